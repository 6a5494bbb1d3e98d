//! Placement of requests.
use crate::router::v1 as wire;
use bytes::Bytes;
use moesaic_types::boundary::{PlaceRequest, Placed};
use moesaic_types::{BlockHash, Digest, Error, ReplicaId, RequestId};

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
    fn from(request: PlaceRequest) -> Self {
        Self {
            id: request.id.to_string(),
            blocks: hashes_to_wire(&request.blocks),
            prompt_tokens: request.prompt_tokens.try_into().unwrap_or(u32::MAX),
            max_tokens: request.max_tokens.try_into().unwrap_or(u32::MAX),
            exclude: request.exclude.iter().map(ToString::to_string).collect(),
            latest_was_full: request.latest_was_full,
            model: request.model.map(|model| Bytes::copy_from_slice(&model.0)).unwrap_or_default(),
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
            latest_was_full: request.latest_was_full,
            model: model_from_wire(&request.model)?,
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

impl From<Placed> for wire::PlaceResponse {
    fn from(placed: Placed) -> Self {
        Self {
            replica: placed.replica.to_string(),
            overlap_blocks: placed.overlap_blocks.try_into().unwrap_or(u32::MAX),
        }
    }
}

impl From<wire::PlaceResponse> for Placed {
    fn from(placed: wire::PlaceResponse) -> Self {
        Self { replica: ReplicaId::new(placed.replica), overlap_blocks: placed.overlap_blocks as usize }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_request_survives_the_wire() {
        let request = PlaceRequest {
            id: RequestId::new("r"),
            blocks: vec![BlockHash([1; 16]), BlockHash([2; 16])],
            prompt_tokens: 130,
            max_tokens: 7,
            exclude: vec![ReplicaId::new("b")],
            latest_was_full: true,
            model: Some(Digest::of(b"model")),
        };
        for request in [PlaceRequest { model: None, ..request.clone() }, request] {
            assert_eq!(PlaceRequest::try_from(wire::PlaceRequest::from(request.clone())), Ok(request));
        }
        let broken = wire::PlaceRequest { model: Bytes::from_static(b"short"), ..Default::default() };
        assert_eq!(PlaceRequest::try_from(broken).unwrap_err().field.as_deref(), Some("model"));
        let broken = wire::PlaceRequest { blocks: Bytes::from_static(b"17 bytes are here"), ..Default::default() };
        assert_eq!(PlaceRequest::try_from(broken).unwrap_err().field.as_deref(), Some("blocks"));
    }
}
