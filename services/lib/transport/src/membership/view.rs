//! What is known of a service's members, and how it changes with what is read: without a clock or a server.
use super::record::{Change, MembershipEvent, Record};
use moesaic_types::Error;
use moesaic_types::cluster::MemberState;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The members of a service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// By id.
    pub members: BTreeMap<Arc<str>, Record>,
    /// The metadata could not be read, or not yet: this is the last that was known.
    pub is_stale: bool,
}

impl View {
    /// A member.
    pub fn get(&self, id: &str) -> Option<&Record> {
        self.members.get(id)
    }

    /// An error that members are missing, with the reason where it may lie in what we know.
    pub fn explain(&self, error: Error) -> Error {
        if !self.is_stale {
            return error;
        }
        let message =
            format!("{}; redis (cluster.redis_url) was not read just now, so others may be there", error.message);
        Error { message, ..error }
    }

    /// Members that take work, by id.
    pub fn ready(&self) -> impl Iterator<Item = &Record> {
        self.members.values().filter(|record| record.member.state == MemberState::Ready)
    }
}

/// Keeps the view.
#[derive(Debug)]
pub(super) struct Known {
    members: BTreeMap<Arc<str>, Entry>,
    is_stale: bool,
    grace: Duration,
}

#[derive(Debug)]
struct Entry {
    record: Record,
    /// It was not found, and is kept until then.
    doubted_until: Option<Instant>,
    /// It told of itself, and is there until then, whatever is found: it may not reach the metadata.
    heard_until: Option<Instant>,
}

/// A member that cannot renew its lease speaks after each attempt, and each may take a second.
const ATTEMPT: Duration = Duration::from_secs(1);

impl Known {
    /// Nothing is known. A member that is not found any longer and did not say that it left is kept for `grace`: the
    /// metadata may have come back without it, and it be about to register again.
    pub fn new(grace: Duration) -> Self {
        Self { members: BTreeMap::new(), is_stale: true, grace }
    }

    pub fn view(&self) -> View {
        let members = self.members.iter().map(|(id, entry)| (Arc::clone(id), entry.record.clone())).collect();
        View { members, is_stale: self.is_stale }
    }

    /// The metadata could not be read.
    pub fn unreadable(&mut self) {
        self.is_stale = true;
    }

    /// All records were read.
    pub fn read(&mut self, now: Instant, found: BTreeMap<Arc<str>, Record>) {
        let grace = self.grace;
        self.members.retain(|id, entry| {
            let doubted_until = *entry.doubted_until.get_or_insert(now + grace);
            found.contains_key(id) || now < entry.heard_until.map_or(doubted_until, |heard| heard.max(doubted_until))
        });
        for (_, record) in found {
            self.set(record);
        }
        self.is_stale = false;
    }

    /// Whether the metadata could not be read when that was last tried.
    pub fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// One record was read.
    pub fn set(&mut self, record: Record) {
        let heard_until = self.members.get(&record.member.id).and_then(|entry| entry.heard_until);
        self.members.insert(Arc::clone(&record.member.id), Entry { record, doubted_until: None, heard_until });
    }

    /// A member told of itself. Earlier lives are not listened to.
    pub fn told(&mut self, now: Instant, event: MembershipEvent) {
        let id = &event.record.member.id;
        let known = self.members.get(id).map_or(0, |entry| entry.record.member.generation);
        if event.record.member.generation < known {
            return;
        }
        match event.change {
            Change::Joined | Change::Changed => {
                let heard_until = Some(now + self.grace + ATTEMPT);
                let entry = Entry { record: event.record, doubted_until: None, heard_until };
                self.members.insert(Arc::clone(&entry.record.member.id), entry);
            }
            Change::Left => {
                self.members.remove(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_types::cluster::{Member, Role, Service};

    const GRACE: Duration = Duration::from_secs(3);

    fn record(id: &str, generation: u64) -> Record {
        let member = Member {
            service: Service::KvStore,
            id: id.into(),
            generation,
            address: format!("http://{id}:9040"),
            socket: None,
            state: MemberState::Ready,
            role: Role::Plain,
        };
        Record { member, load: None }
    }

    fn found(ids: &[&str]) -> BTreeMap<Arc<str>, Record> {
        ids.iter().map(|id| (Arc::from(*id), record(id, 1))).collect()
    }

    fn ids(known: &Known) -> Vec<Arc<str>> {
        known.view().members.into_keys().collect()
    }

    fn names(names: &[&str]) -> Vec<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn one_that_vanishes_among_others_is_doubted_and_then_gone() {
        let now = Instant::now();
        let mut known = Known::new(GRACE);
        assert!(known.view().is_stale, "nothing was read yet");
        known.read(now, found(&["a", "b"]));
        assert!(!known.view().is_stale);
        // a registry that lost its data is as this one when b was faster than a to register again
        known.read(now, found(&["b"]));
        assert_eq!(ids(&known), names(&["a", "b"]));
        known.read(now + GRACE, found(&["b"]));
        assert_eq!(ids(&known), names(&["b"]));
    }

    #[test]
    fn an_unreadable_registry_changes_nothing_and_those_it_forgot_have_time_to_come_back() {
        let now = Instant::now();
        let mut known = Known::new(GRACE);
        known.read(now, found(&["a", "b", "c"]));
        known.unreadable();
        assert!(known.view().is_stale);
        assert_eq!(ids(&known), names(&["a", "b", "c"]));
        let second = Duration::from_secs(1);
        known.read(now + second, found(&["a"]));
        assert!(!known.view().is_stale);
        assert_eq!(ids(&known), names(&["a", "b", "c"]));
        known.read(now + 2 * second, found(&["a", "b"]));
        assert_eq!(ids(&known), names(&["a", "b", "c"]));
        known.read(now + 4 * second, found(&["a", "b"]));
        assert_eq!(ids(&known), names(&["a", "b"]), "c had its time");
        known.read(now + 4 * second, found(&["a"]));
        assert_eq!(ids(&known), names(&["a", "b"]), "b's doubt began anew");
    }

    #[test]
    fn a_registry_that_came_back_empty_is_doubted_as_well() {
        let now = Instant::now();
        let mut known = Known::new(GRACE);
        known.read(now, found(&["a", "b"]));
        known.read(now, found(&[]));
        assert_eq!(ids(&known), names(&["a", "b"]));
        known.read(now + GRACE, found(&[]));
        assert_eq!(ids(&known), names(&[]));
    }

    #[test]
    fn a_member_s_word_counts_unless_a_later_life_spoke() {
        let (now, mut known) = (Instant::now(), Known::new(GRACE));
        let event = |change, generation| MembershipEvent { change, record: record("a", generation) };
        known.told(now, event(Change::Joined, 5));
        known.told(now, event(Change::Left, 4));
        assert_eq!(ids(&known), names(&["a"]), "an earlier life's end is not this one's");
        known.told(now, event(Change::Changed, 4));
        assert_eq!(known.view().get("a").map(|a| a.member.generation), Some(5));
        known.told(now, event(Change::Left, 5));
        assert_eq!(ids(&known), names(&[]));
    }

    #[test]
    fn one_that_does_not_reach_the_metadata_is_there_as_long_as_it_is_heard() {
        let (now, mut known) = (Instant::now(), Known::new(GRACE));
        known.read(now, found(&["a", "b"]));
        let word = || MembershipEvent { change: Change::Changed, record: record("a", 1) };
        known.told(now, word());
        known.read(now + GRACE, found(&["b"]));
        assert_eq!(ids(&known), names(&["a", "b"]));
        known.told(now + GRACE, word());
        known.read(now + 2 * GRACE, found(&["b"]));
        assert_eq!(ids(&known), names(&["a", "b"]));
        known.read(now + 3 * GRACE, found(&["b"]));
        assert_eq!(ids(&known), names(&["b"]), "it has fallen silent");
    }

    #[test]
    fn a_stale_view_explains_who_is_missing() {
        let missing = Error::unavailable("no replica is ready");
        assert!(View { is_stale: true, ..View::default() }.explain(missing.clone()).message.contains("redis"));
        assert_eq!(View::default().explain(missing.clone()), missing);
    }

    #[test]
    fn only_the_ready_take_work() {
        let mut known = Known::new(GRACE);
        let mut draining = record("b", 1);
        draining.member.state = MemberState::Draining;
        known.set(record("a", 1));
        known.set(draining);
        let view = known.view();
        assert_eq!(view.ready().map(|record| &*record.member.id).collect::<Vec<_>>(), ["a"]);
    }
}
