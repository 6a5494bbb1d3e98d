//! What is kept for each member, such as a client: made with a life of it, dropped with that.
use super::record::Record;
use moesaic_types::Result;
use moesaic_types::cluster::{Member, Socket};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Values of members, by id.
#[derive(Debug)]
pub struct Peers<T> {
    kept: BTreeMap<Arc<str>, Kept<T>>,
}

#[derive(Debug)]
struct Kept<T> {
    life: Life,
    value: T,
}

/// What a value was made for.
#[derive(Debug, PartialEq)]
struct Life {
    generation: u64,
    address: String,
    socket: Option<Socket>,
}

/// What [`Peers::follow`] did.
#[derive(Debug, PartialEq)]
pub struct Followed<T> {
    /// Made: of members that are new, or started anew.
    pub came: Vec<(Arc<str>, T)>,
    /// Dropped, and not replaced.
    pub went: Vec<Arc<str>>,
}

impl<T> Default for Peers<T> {
    fn default() -> Self {
        Self { kept: BTreeMap::new() }
    }
}

impl<T: Clone> Peers<T> {
    /// Makes what is missing and drops what is over. A member for which nothing can be made is left out, and tried again
    /// the next time.
    pub fn follow<'a>(
        &mut self,
        members: impl IntoIterator<Item = &'a Record>,
        make: impl Fn(&Member) -> Result<T>,
    ) -> Followed<T> {
        let (mut came, mut kept) = (Vec::new(), BTreeMap::new());
        for Record { member, .. } in members {
            let life =
                Life { generation: member.generation, address: member.address.clone(), socket: member.socket.clone() };
            let before = self.kept.remove(&member.id).filter(|before| before.life == life);
            let value = match before {
                Some(before) => before.value,
                None => match make(member) {
                    Ok(value) => {
                        came.push((Arc::clone(&member.id), value.clone()));
                        value
                    }
                    Err(error) => {
                        tracing::warn!(%error, service = member.service.name(), id = &*member.id, "reach a member");
                        continue;
                    }
                },
            };
            kept.insert(Arc::clone(&member.id), Kept { life, value });
        }
        let before = std::mem::replace(&mut self.kept, kept);
        let went = before.into_keys().filter(|id| !self.kept.contains_key(id)).collect();
        Followed { came, went }
    }

    /// A member's value.
    pub fn get(&self, id: &str) -> Option<&T> {
        self.kept.get(id).map(|kept| &kept.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::Error;
    use moesaic_types::cluster::{MemberState, Role, Service};

    fn record(id: &str, generation: u64) -> Record {
        let member = Member {
            service: Service::Scheduler,
            id: id.into(),
            generation,
            address: format!("http://{id}:9020"),
            socket: None,
            state: MemberState::Ready,
            role: Role::Plain,
        };
        Record { member, load: None }
    }

    fn make(member: &Member) -> Result<u64> {
        if &*member.id == "odd" { Err(Error::internal("it has no address")) } else { Ok(member.generation) }
    }

    #[test]
    fn a_value_lives_as_long_as_its_member() {
        let mut peers = Peers::default();
        let first = peers.follow(&[record("a", 1), record("b", 2), record("odd", 3)], make);
        assert_eq!(first, Followed { came: vec![("a".into(), 1), ("b".into(), 2)], went: vec![] });
        assert_eq!((peers.get("a"), peers.get("odd")), (Some(&1), None));

        let mut busy = record("a", 1);
        busy.member.state = MemberState::Draining;
        let same = peers.follow(&[busy, record("b", 2)], |_| panic!("nothing is new"));
        assert_eq!(same, Followed { came: vec![], went: vec![] });

        let restarted = peers.follow(&[record("a", 7)], make);
        assert_eq!(restarted, Followed { came: vec![("a".into(), 7)], went: vec!["b".into()] });
        assert_eq!((peers.get("a"), peers.get("b")), (Some(&7), None));

        let mut moved = record("a", 7);
        moved.member.address = "http://elsewhere:9020".into();
        assert_eq!(peers.follow(&[moved], make).came.len(), 1);
    }
}
