//! What the router that leads does with shards and metadata. Each of these is a plain task that ends with the term.
use super::config::Config;
use super::lease::{Term, current};
use super::plan::{self, Plan};
use super::seen::Seen;
use super::shard::Shard;
use super::state::{Change, Failure, Found, Mend};
use crate::metrics;
use futures::future::{join_all, try_join_all};
use moesaic_transport::membership::{Clients, Record};
use moesaic_transport::placement;
use moesaic_types::boundary::{EventBus, Metadata};
use moesaic_types::cluster::{MemberState, Placement, Role, ShardInfo};
use moesaic_types::{Digest, Error, Result};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// The counter of epochs, of all models: no two placements have the same.
const EPOCHS: &str = "placement/epochs";

/// A counter below this one, in seconds since 1970, is a new one.
const YEAR_2020: u64 = 1_577_836_800;

/// What the placement stands on, whatever becomes of its actor.
pub(crate) struct Ground {
    pub config: Config,
    pub metadata: Arc<dyn Metadata>,
    pub events: Arc<dyn EventBus>,
    pub shards: Clients<Shard>,
    pub term: watch::Receiver<Option<Term>>,
    /// Names this router in this life of it.
    pub source: String,
}

/// What was found, by model.
pub(crate) type Looked = HashMap<Digest, Found>;

impl Ground {
    /// What a future gives, unless the term ends before.
    pub async fn leading<T, E: From<Error>>(
        &self,
        number: u64,
        future: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut term = self.term.clone();
        let ended = term.wait_for(|term| term.is_none_or(|term| term.number != number));
        tokio::select! {
            biased;
            _ = ended => Err(deposed().into()),
            output = future => output,
        }
    }

    /// Asks all shards, then reads the records of their models.
    pub async fn look(&self, end_window: bool) -> Result<Looked> {
        let view = self.shards.directory().view();
        let members = view.members.values().filter_map(shard_of);
        let answers = join_all(members.map(|(record, info)| self.ask(record, info, end_window))).await;
        let mut looked = Looked::new();
        for seen in answers {
            looked.entry(seen.info.model).or_default().shards.push(seen);
        }
        for (model, found) in &mut looked {
            found.standing = placement::read(&*self.metadata, model).await?;
        }
        Ok(looked)
    }

    async fn ask(&self, Record { member, .. }: &Record, info: &ShardInfo, end_window: bool) -> Seen {
        let report = match self.shards.get(&member.id) {
            Some(shard) => shard.describe(end_window, self.config.call_timeout.get()).await,
            None => Err(gone(&member.id)),
        };
        if let Err(error) = &report {
            tracing::debug!(shard = &*member.id, %error, "ask a shard");
        }
        let leaves = member.state == MemberState::Draining;
        Seen { id: Arc::clone(&member.id), generation: member.generation, info: info.clone(), leaves, report }
    }

    fn shard(&self, id: &str) -> Result<Shard> {
        self.shards.get(id).ok_or_else(|| gone(id))
    }

    /// Makes a placement: every shard loads what it needs, the record is written, every shard switches. `None` when
    /// nothing is better than what stands. An error leaves that standing, unless it came with the writing. What stands
    /// gets another epoch also where a shard fails, which then is mended as one that restarted.
    pub async fn change(&self, model: Digest, change: Change) -> Result<Option<Placement>, Failure> {
        let Change { groups, load, present, is_planned, is_renumbered, floor, version, shards } = change;
        let (limits, members) = (self.config.limits(), groups.clone());
        let (planned, present) = if is_planned {
            let planning = move || (plan::plan(&load, &members, &limits, present.as_ref()), present);
            let planned = tokio::task::spawn_blocking(planning).await;
            planned.map_err(|error| Error::internal(format!("plan the placement: {error}")))?
        } else {
            (None, present)
        };
        let (layers, moves, is_new) = match (planned, present) {
            (Some(Plan { layers, moves, .. }), _) => (layers, moves, true),
            (None, Some(present)) if is_renumbered => (present, 0, false),
            (None, _) => return Ok(None),
        };
        let epoch = self.epoch(floor).await?;
        let last = layers.values().flatten().flatten().chain(&groups).max().copied();
        let placement = Placement { epoch, model, groups: last.map_or(0, |last| last + 1), layers };
        tracing::info!(epoch, moves, groups = groups.len(), "prepare a placement of experts");
        let prepare = async |id: &str, group: usize| {
            let patience = self.config.prepare_timeout.get();
            let prepared = match self.shard(id) {
                Ok(shard) => shard.prepare(epoch, &placement.shares(group), patience).await,
                Err(error) => Err(error),
            };
            match prepared {
                Err(error) if is_new => Err(Failure { group: Some(group), error }),
                Err(error) => {
                    tracing::warn!(shard = id, epoch, %error, "give a shard another epoch");
                    Ok(())
                }
                Ok(()) => Ok(()),
            }
        };
        try_join_all(shards.iter().map(|(id, group)| prepare(id, *group))).await?;
        if current(&self.term).is_none() {
            return Err(deposed().into());
        }
        let written = placement::publish(&*self.metadata, &*self.events, &self.source, &placement, version).await?;
        if written.is_none() {
            return Err(Error::unavailable("another router wrote the placement meanwhile").into());
        }
        tracing::info!(epoch, moves, "experts are placed");
        metrics::expert_moves(moves);
        let commit = async |id: &Arc<str>| {
            let committed = match self.shard(id) {
                Ok(shard) => shard.commit(epoch, self.config.call_timeout.get()).await,
                Err(error) => Err(error),
            };
            // it switches when it is first asked, or is seen to be behind
            if let Err(error) = committed {
                tracing::debug!(shard = &**id, epoch, %error, "commit a placement");
            }
        };
        join_all(shards.iter().map(|(id, _)| commit(id))).await;
        Ok(Some(placement))
    }

    /// Takes a shard to the placement that stands.
    pub async fn mend(&self, mend: &Mend) -> Result<()> {
        let shard = self.shard(&mend.id)?;
        shard.prepare(mend.epoch, &mend.shares, self.config.prepare_timeout.get()).await?;
        shard.commit(mend.epoch, self.config.call_timeout.get()).await
    }

    /// An epoch that no placement had: above `floor`, and, should all who knew them be gone with the counter, above the
    /// epochs of old, for it begins with the seconds since 1970 and placements are further apart than that.
    async fn epoch(&self, floor: u64) -> Result<u64> {
        let count = async |amount: u64| -> Result<u64> {
            let amount = i64::try_from(amount).map_err(|_| Error::internal(format!("epochs end at {floor}")))?;
            let counted = self.metadata.add(EPOCHS, amount, None).await?;
            u64::try_from(counted).map_err(|_| Error::internal(format!("{EPOCHS} is {counted}")))
        };
        let next = count(1).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let floor = if next < YEAR_2020 { floor.max(now) } else { floor };
        if next > floor { Ok(next) } else { count(floor - next + 1).await }
    }
}

fn deposed() -> Error {
    Error::unavailable("this router does not lead the placement any longer")
}

fn gone(id: &str) -> Error {
    Error::unavailable(format!("shard {id} is gone"))
}

/// Slices of a group at most: a record with more is none of a shard of ours.
const MOST_RANKS: usize = 1024;

/// A member that is a shard.
fn shard_of(record: &Record) -> Option<(&Record, &ShardInfo)> {
    let Role::Shard(info) = &record.member.role else { return None };
    (info.rank < info.ranks && info.ranks <= MOST_RANKS).then_some((record, info))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_transport::{Directory, MemoryBus, MemoryMetadata};
    use moesaic_types::ErrorCode;
    use moesaic_types::cluster::{Member, Service};
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Duration;
    use tokio::time::Instant;

    fn ground(term: Option<Term>) -> (Ground, watch::Sender<Option<Term>>) {
        let (metadata, events) = (Arc::new(MemoryMetadata::new()), Arc::new(MemoryBus::new()));
        let lease = Duration::from_secs(3);
        let shards = Directory::start(metadata.clone(), events.clone(), Service::ExpertShard, lease);
        let (told, term) = watch::channel(term);
        let shards = Clients::new(shards, Shard::of);
        (Ground { config: Config::default(), metadata, events, shards, term, source: "r0".into() }, told)
    }

    fn term(number: u64) -> Option<Term> {
        Some(Term { number, until: Instant::now() + Duration::from_secs(60) })
    }

    fn first(floor: u64, version: Option<u64>) -> Change {
        Change {
            groups: BTreeSet::from([0, 2]),
            load: BTreeMap::from([(0, vec![1; 4])]),
            present: None,
            is_planned: true,
            is_renumbered: false,
            floor,
            version,
            shards: vec![],
        }
    }

    #[tokio::test]
    async fn who_was_deposed_writes_nothing() {
        let (ground, told) = ground(term(1));
        let model = Digest::default();
        let placed = ground.change(model, first(0, None)).await.unwrap().unwrap();
        assert_eq!((placed.groups, &placed.layers[&0]), (3, &vec![vec![0], vec![0], vec![2], vec![2]]));
        let standing = placement::read(&*ground.metadata, &model).await.unwrap();
        let refused = ground.change(model, first(0, None)).await.unwrap_err().error;
        assert!(refused.message.contains("another router wrote"), "{refused}");
        told.send_replace(Some(Term { number: 1, until: Instant::now() }));
        let version = standing.as_ref().map(|standing| standing.version);
        let late = ground.change(model, first(0, version)).await.unwrap_err().error;
        assert!(late.message.contains("does not lead"), "{late}");
        assert_eq!(placement::read(&*ground.metadata, &model).await.unwrap(), standing);
    }

    #[tokio::test]
    async fn what_is_under_way_ends_with_the_term() {
        let (ground, told) = ground(term(1));
        let five = async || -> Result<i32> { Ok(5) };
        assert_eq!(ground.leading(1, five()).await, Ok(5));
        assert_eq!(ground.leading(2, five()).await.unwrap_err().code, ErrorCode::Unavailable);
        let pending = ground.leading(1, std::future::pending::<Result<()>>());
        let (ended, _) = tokio::join!(pending, async { told.send_replace(term(2)) });
        assert_eq!(ended.unwrap_err().code, ErrorCode::Unavailable);
    }

    #[tokio::test]
    async fn no_two_placements_have_one_epoch() {
        let (ground, _told) = ground(term(1));
        let first = ground.epoch(3).await.unwrap();
        assert!(first > YEAR_2020, "above all that was before");
        assert_eq!(ground.epoch(3).await, Ok(first + 1));
        assert_eq!(ground.epoch(first + 10).await, Ok(first + 11));
        assert_eq!(ground.epoch(first + 10).await, Ok(first + 12));
        assert_eq!(ground.epoch(u64::MAX - 1).await.unwrap_err().code, ErrorCode::Internal);
    }

    #[test]
    fn what_is_no_shard_is_not_asked() {
        let record = |state, role| {
            let member = Member {
                service: Service::ExpertShard,
                id: "s".into(),
                generation: 1,
                address: "http://s:9030".into(),
                socket: None,
                state,
                role,
            };
            Record { member, load: None }
        };
        let shard = |rank, ranks| Role::Shard(ShardInfo { model: Digest::default(), group: 0, rank, ranks });
        assert!(shard_of(&record(MemberState::Starting, shard(1, 2))).is_some());
        assert!(shard_of(&record(MemberState::Ready, shard(0, 1))).is_some());
        assert!(shard_of(&record(MemberState::Draining, shard(0, 1))).is_some());
        for (state, role) in [
            (MemberState::Ready, shard(2, 2)),
            (MemberState::Ready, shard(0, usize::MAX)),
            (MemberState::Ready, Role::Plain),
        ] {
            assert!(shard_of(&record(state, role)).is_none());
        }
    }
}
