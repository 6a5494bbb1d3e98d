//! The replicas of a cluster that this gateway's requests may go to: those that give tokens the same meaning, and among
//! them those that serve the model in one and the same way, so that an answer can go on at another.
use moesaic_transport::Directory;
use moesaic_transport::GrpcReplica;
use moesaic_transport::channel::channel;
use moesaic_transport::membership::{Clients, View};
use moesaic_types::boundary::Replica;
use moesaic_types::cluster::{Member, MemberState, ReplicaInfo, Role, ServedAs};
use moesaic_types::{Digest, ReplicaId, Result};
use std::sync::Arc;

/// What is served, as the replicas say.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Served {
    /// The model and its formats.
    pub(crate) model: ServedAs,
    /// The longest context that one of them takes, in tokens.
    pub(crate) max_context: usize,
}

fn info<'a>(view: &'a View, text: &Digest) -> impl Iterator<Item = (&'a ReplicaInfo, MemberState)> {
    let text = *text;
    view.members.values().filter_map(move |record| match &record.member.role {
        Role::Replica(info) if info.text == text => Some((info, record.member.state)),
        _ => None,
    })
}

/// What to serve: what is served now, as long as a replica that takes work has it; else what the first one has. `None`
/// when nobody takes work.
pub(crate) fn choose(view: &View, text: &Digest, now: Option<&ServedAs>) -> Option<Served> {
    let ready = || info(view, text).filter(|(_, state)| *state == MemberState::Ready).map(|(info, _)| info);
    let first = ready().next()?;
    let model = now.filter(|now| ready().any(|info| info.model == **now)).unwrap_or(&first.model).clone();
    let max_context = ready().filter(|info| info.model == model).map(|info| info.max_context).max()?;
    Some(Served { model, max_context })
}

/// Why nothing is served.
pub(crate) fn explain(view: &View, text: &Digest) -> String {
    let known = view.members.len();
    let ours = info(view, text).count();
    let others = view.members.values().filter(|record| matches!(record.member.role, Role::Replica(_))).count() - ours;
    let mut reason = format!("no scheduler is ready ({known} known");
    if others > 0 {
        reason += &format!(", {others} with another model or tokenizer than this gateway's [model]");
    }
    reason.push(')');
    reason
}

/// Connections to replicas.
pub(crate) struct Replicas(Clients<Arc<dyn Replica>>);

impl Replicas {
    pub(crate) fn new(directory: Directory) -> Self {
        let reach = |member: &Member| -> Result<Arc<dyn Replica>> {
            Ok(Arc::new(GrpcReplica::new(&format!("replica {}", member.id), channel(member)?)))
        };
        Self(Clients::new(directory, reach))
    }

    pub(crate) fn directory(&self) -> &Directory {
        self.0.directory()
    }

    /// A replica, where it serves this.
    pub(crate) fn get(&self, id: &ReplicaId, served: &ServedAs) -> Option<Arc<dyn Replica>> {
        let view = self.0.directory().view();
        let is_ours = matches!(&view.get(&id.0)?.member.role, Role::Replica(info) if info.model == *served);
        is_ours.then(|| self.0.get(&id.0)).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_transport::membership::Record;
    use moesaic_types::KvFormat;
    use moesaic_types::cluster::Service;

    fn served_as(weights: &str) -> ServedAs {
        ServedAs { digest: Digest::of(weights.as_bytes()), weights: None, kv: KvFormat::default() }
    }

    fn view(replicas: &[(&str, &str, &str, usize, MemberState)]) -> View {
        let record = |(id, text, weights, max_context, state): &(&str, &str, &str, usize, MemberState)| {
            let text = Digest::of(text.as_bytes());
            let info = ReplicaInfo { model: served_as(weights), text, max_context: *max_context };
            let member = Member {
                service: Service::Scheduler,
                id: (*id).into(),
                generation: 1,
                address: "http://h:9020".into(),
                socket: None,
                state: *state,
                role: Role::Replica(info),
            };
            (Arc::from(*id), Record { member, load: None })
        };
        View { members: replicas.iter().map(record).collect(), is_stale: false }
    }

    #[test]
    fn what_is_served_stays_while_a_replica_has_it() {
        let (ready, draining) = (MemberState::Ready, MemberState::Draining);
        let ours = Digest::of(b"ours");
        let all = view(&[
            ("a", "other", "w", 900, ready),
            ("b", "ours", "new", 100, ready),
            ("c", "ours", "old", 200, ready),
            ("d", "ours", "old", 300, ready),
            ("e", "ours", "old", 400, draining),
        ]);
        let (new, old) = (served_as("new"), served_as("old"));
        let chosen = |now: Option<&ServedAs>| choose(&all, &ours, now).unwrap();
        assert_eq!(chosen(None), Served { model: new.clone(), max_context: 100 }, "the first by name");
        assert_eq!(chosen(Some(&old)), Served { model: old.clone(), max_context: 300 });
        assert_eq!(chosen(Some(&served_as("gone"))).model, new);
        let left = view(&[("b", "ours", "new", 100, ready), ("e", "ours", "old", 400, draining)]);
        assert_eq!(choose(&left, &ours, Some(&old)).unwrap().model, new, "one that drains takes nothing new");
    }

    #[test]
    fn why_nothing_is_served_is_said() {
        let ours = Digest::of(b"ours");
        let none = view(&[("a", "other", "w", 9, MemberState::Ready), ("b", "ours", "w", 9, MemberState::Draining)]);
        assert_eq!(choose(&none, &ours, None), None);
        let reason = explain(&none, &ours);
        assert!(reason.contains("2 known, 1 with another model"), "{reason}");
        assert_eq!(explain(&View::default(), &ours), "no scheduler is ready (0 known)");
    }
}
