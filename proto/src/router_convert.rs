//! Placement of requests.
use crate::router::v1 as wire;
use bytes::Bytes;
use moesaic_types::boundary::{PlaceRequest, Placed};
use moesaic_types::{BlockHash, Digest, Error, Priority, ReplicaId, RequestId, TenantId};
use std::time::{Duration, Instant};

/// Names of blocks, one after another.
pub fn hashes_to_wire(hashes: &[BlockHash]) -> Bytes {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

/// Names of blocks, one after another.
///
/// # Errors
/// `InvalidArgument` naming `field` when the length is no multiple of 16.
pub fn hashes_from_wire(field: &str, bytes: &[u8]) -> Result<Vec<BlockHash>, Error> {
    let (hashes, rest) = bytes.as_chunks::<16>();
    if !rest.is_empty() {
        let message = format!("{field} has {} bytes; names of blocks have 16 bytes each", bytes.len());
        return Err(Error::invalid(field, message));
    }
    Ok(hashes.iter().copied().map(BlockHash).collect())
}

impl From<PlaceRequest> for wire::PlaceRequest {
    /// A deadline becomes the time that is left.
    fn from(request: PlaceRequest) -> Self {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now()).as_millis();
        Self {
            id: request.id.to_string(),
            blocks: hashes_to_wire(&request.blocks),
            prompt_tokens: request.prompt_tokens.try_into().unwrap_or(u32::MAX),
            max_tokens: request.max_tokens.try_into().unwrap_or(u32::MAX),
            exclude: request.exclude.iter().map(ToString::to_string).collect(),
            model: request.model.map(|model| Bytes::copy_from_slice(&model.0)).unwrap_or_default(),
            full: request.full.iter().map(ToString::to_string).collect(),
            tenant: Bytes::copy_from_slice(&request.tenant.0),
            priority: request.priority.0,
            deadline_ms: request.deadline.map(|deadline| left(deadline).try_into().unwrap_or(u64::MAX)),
        }
    }
}

impl TryFrom<wire::PlaceRequest> for PlaceRequest {
    type Error = Error;
    fn try_from(request: wire::PlaceRequest) -> Result<Self, Error> {
        Ok(Self {
            id: RequestId::new(request.id),
            blocks: hashes_from_wire("blocks", &request.blocks)?,
            prompt_tokens: request.prompt_tokens as usize,
            max_tokens: request.max_tokens as usize,
            exclude: request.exclude.into_iter().map(ReplicaId::new).collect(),
            full: request.full.into_iter().map(ReplicaId::new).collect(),
            model: model_from_wire(&request.model)?,
            tenant: tenant_from_wire(&request.tenant)?,
            priority: Priority(request.priority),
            // a deadline too far away to be told is none
            deadline: request.deadline_ms.and_then(|left| Instant::now().checked_add(Duration::from_millis(left))),
        })
    }
}

fn model_from_wire(bytes: &[u8]) -> Result<Option<Digest>, Error> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let wrong = |_| Error::invalid("model", format!("model has {} bytes; use 32, or none", bytes.len()));
    Ok(Some(Digest(bytes.try_into().map_err(wrong)?)))
}

fn tenant_from_wire(bytes: &[u8]) -> Result<TenantId, Error> {
    if bytes.is_empty() {
        return Ok(TenantId::default());
    }
    let wrong = |_| Error::invalid("tenant", format!("tenant has {} bytes; use 16, or none", bytes.len()));
    Ok(TenantId(bytes.try_into().map_err(wrong)?))
}

impl From<Placed> for wire::PlaceResponse {
    fn from(placed: Placed) -> Self {
        let placement = wire::Placement {
            replica: placed.replica.to_string(),
            overlap_blocks: placed.overlap_blocks.try_into().unwrap_or(u32::MAX),
        };
        Self { word: Some(wire::place_response::Word::Placement(placement)) }
    }
}

impl wire::PlaceResponse {
    /// The request waits.
    pub fn waiting() -> Self {
        Self { word: Some(wire::place_response::Word::Waiting(wire::Waiting {})) }
    }

    /// Where the request goes; `None` while it waits. A word that is not known says that the router is well.
    pub fn placed(self) -> Option<Placed> {
        match self.word {
            Some(wire::place_response::Word::Placement(placement)) => Some(Placed {
                replica: ReplicaId::new(placement.replica),
                overlap_blocks: placement.overlap_blocks as usize,
            }),
            Some(wire::place_response::Word::Waiting(_)) | None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_placement_is_the_last_word() {
        let placed = Placed { replica: ReplicaId::new("a"), overlap_blocks: 7 };
        assert_eq!(wire::PlaceResponse::from(placed.clone()).placed(), Some(placed));
        assert_eq!(wire::PlaceResponse::waiting().placed(), None);
        assert_eq!(wire::PlaceResponse { word: None }.placed(), None, "a word of a later version");
    }

    #[test]
    fn a_placement_request_survives_the_wire() {
        let request = PlaceRequest {
            id: RequestId::new("r"),
            blocks: vec![BlockHash([1; 16]), BlockHash([2; 16])],
            prompt_tokens: 130,
            max_tokens: 7,
            exclude: vec![ReplicaId::new("b")],
            full: vec![ReplicaId::new("b")],
            model: Some(Digest::of(b"model")),
            tenant: TenantId::derive(b"secret", "key"),
            priority: Priority(-7),
            deadline: None,
        };
        for request in [PlaceRequest { model: None, ..request.clone() }, request.clone()] {
            assert_eq!(PlaceRequest::try_from(wire::PlaceRequest::from(request.clone())), Ok(request));
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        let dated = wire::PlaceRequest::from(PlaceRequest { deadline: Some(deadline), ..request });
        let got = PlaceRequest::try_from(dated).expect("it is whole").deadline.expect("it has one");
        assert!(got.max(deadline) - got.min(deadline) < Duration::from_secs(30));
        let broken = wire::PlaceRequest { tenant: Bytes::from_static(b"short"), ..Default::default() };
        assert_eq!(PlaceRequest::try_from(broken).unwrap_err().field.as_deref(), Some("tenant"));
        let broken = wire::PlaceRequest { model: Bytes::from_static(b"short"), ..Default::default() };
        assert_eq!(PlaceRequest::try_from(broken).unwrap_err().field.as_deref(), Some("model"));
        let broken = wire::PlaceRequest { blocks: Bytes::from_static(b"17 bytes are here"), ..Default::default() };
        assert_eq!(PlaceRequest::try_from(broken).unwrap_err().field.as_deref(), Some("blocks"));
    }
}
