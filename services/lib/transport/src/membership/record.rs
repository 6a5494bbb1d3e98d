//! What stands in the metadata and travels in events, and who may write it.
use bytes::Bytes;
use moesaic_types::boundary::ReplicaLoad;
use moesaic_types::cluster::{Member, Service};
use serde::{Deserialize, Serialize};

/// A member as it stands in the metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The process.
    pub member: Member,
    /// How busy it was when it last renewed its lease; `None` where it does not say.
    pub load: Option<ReplicaLoad>,
}

/// What happened to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It took its lease, for the first time or again.
    Joined,
    /// Its record changed.
    Changed,
    /// It went by itself. One that died says nothing: its lease runs out.
    Left,
}

/// The payload of membership events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MembershipEvent {
    /// What happened.
    pub change: Change,
    /// The member, after it happened.
    pub record: Record,
}

/// Where the records of a service's members stand.
pub(super) fn folder(service: Service) -> String {
    format!("members/{service}/")
}

/// Where a member's record stands.
pub(super) fn key(service: Service, id: &str) -> String {
    format!("members/{service}/{id}")
}

/// Where lives of a member take their generations.
pub(super) fn claims(service: Service, id: &str) -> String {
    format!("generations/{service}/{id}")
}

impl Record {
    pub(super) fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("a record is plain data").into()
    }

    /// `None` where it is not a record that this build understands.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

impl MembershipEvent {
    pub(super) fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("an event is plain data").into()
    }

    /// Reads an event's payload; `None` where it is not one that this build understands.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// A record that was found where ours should stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub generation: u64,
    pub version: u64,
}

/// What to do to hold a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Take {
    /// Write it, over this version, as this generation.
    Write { expected: Option<u64>, generation: u64 },
    /// A later life of the same name has it.
    Fenced { by: u64 },
}

/// Who has the record: the later life. One that starts is the latest, whatever its number says; one that held the record
/// before gives way to a higher generation. Its own generation is its own write, of which it did not hear.
pub(super) fn take(ours: u64, held_before: bool, found: Option<Found>) -> Take {
    match found {
        None => Take::Write { expected: None, generation: ours },
        Some(found) if found.generation <= ours => Take::Write { expected: Some(found.version), generation: ours },
        Some(found) if held_before => Take::Fenced { by: found.generation },
        Some(found) => Take::Write { expected: Some(found.version), generation: found.generation + 1 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_life_has_the_record() {
        let found = |generation| Some(Found { generation, version: 7 });
        for held_before in [false, true] {
            assert_eq!(take(5, held_before, None), Take::Write { expected: None, generation: 5 });
            assert_eq!(take(5, held_before, found(4)), Take::Write { expected: Some(7), generation: 5 });
            assert_eq!(take(5, held_before, found(5)), Take::Write { expected: Some(7), generation: 5 });
        }
        assert_eq!(take(5, true, found(6)), Take::Fenced { by: 6 });
        assert_eq!(
            take(5, false, found(6)),
            Take::Write { expected: Some(7), generation: 7 },
            "numbers that went back do not keep a new life out"
        );
    }

    #[test]
    fn what_is_no_record_is_none() {
        assert_eq!(Record::read(b"{}"), None);
        assert_eq!(MembershipEvent::read(b"\xff"), None);
    }
}
