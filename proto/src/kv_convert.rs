//! KV blocks.
use crate::hashes_from_wire;
use crate::kv::v1 as wire;
use bytes::Bytes;
use moesaic_types::{BlockHash, Error, GROUP_BLOCKS, Link};

/// Bytes of a block at most.
pub const MAX_BLOCK: usize = 67_000_000;

/// Blocks of a chain at most: 4 million tokens.
pub const MAX_CHAIN: usize = 65_536;

/// Names of a chain's blocks.
///
/// # Errors
/// `InvalidArgument` naming `chain` when it is no list of names, or longer than [`MAX_CHAIN`].
pub fn chain_from_wire(bytes: &[u8]) -> Result<Vec<BlockHash>, Error> {
    let blocks = bytes.len() / 16;
    if blocks > MAX_CHAIN {
        return Err(Error::invalid("chain", format!("chain has {blocks} blocks; the limit is {MAX_CHAIN}")));
    }
    hashes_from_wire("chain", bytes)
}

fn hash(field: &str, bytes: &[u8]) -> Result<BlockHash, Error> {
    let hash = bytes.try_into().map(BlockHash);
    hash.map_err(|_| Error::invalid(field, format!("{field} has {} bytes; a block's name has 16", bytes.len())))
}

/// A block that a peer offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Where it stands.
    pub link: Link,
    /// Its bytes.
    pub block: Bytes,
    /// It is to be copied to other nodes.
    pub replicate: bool,
}

impl TryFrom<wire::OfferRequest> for Offered {
    type Error = Error;
    fn try_from(request: wire::OfferRequest) -> Result<Self, Error> {
        let wire::OfferRequest { hash: name, block, replicate, parent, position, group } = request;
        if !(1..=MAX_BLOCK).contains(&block.len()) {
            return Err(Error::invalid("block", format!("block has {} bytes; use 1 to {MAX_BLOCK}", block.len())));
        }
        let parent = if parent.is_empty() { None } else { Some(hash("parent", &parent)?) };
        let link = Link { hash: hash("hash", &name)?, parent, position, group: hash("group", &group)? };
        if parent.is_none() != (position == 0) {
            let message = format!("position is {position}; it is 0 exactly when the block has no parent");
            return Err(Error::invalid("position", message));
        }
        let leads = position.is_multiple_of(GROUP_BLOCKS as u32);
        if leads != (link.group == link.hash) {
            let message = format!("group: every {GROUP_BLOCKS}th block of a chain leads its group, and no other does");
            return Err(Error::invalid("group", message));
        }
        Ok(Self { link, block, replicate })
    }
}

/// A block to offer.
pub fn offer_to_wire(link: &Link, block: Bytes, replicate: bool) -> wire::OfferRequest {
    let name = |hash: &BlockHash| Bytes::copy_from_slice(&hash.0);
    wire::OfferRequest {
        hash: name(&link.hash),
        block,
        replicate,
        parent: link.parent.as_ref().map(name).unwrap_or_default(),
        position: link.position,
        group: name(&link.group),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> Vec<BlockHash> {
        (0..40).map(|n| BlockHash([n; 16])).collect()
    }

    #[test]
    fn an_offer_survives_the_wire() {
        for position in [0, 1, 16, 39] {
            let link = Link::of(&chain(), position);
            let offered = Offered { link, block: Bytes::from_static(b"x"), replicate: position > 1 };
            let wire = offer_to_wire(&link, offered.block.clone(), offered.replicate);
            assert_eq!(Offered::try_from(wire), Ok(offered));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = offer_to_wire(&Link::of(&chain(), 17), Bytes::from_static(b"x"), true);
        let of = |change: fn(&mut wire::OfferRequest)| {
            let mut wrong = good.clone();
            change(&mut wrong);
            Offered::try_from(wrong).unwrap_err().field
        };
        assert_eq!(of(|offer| offer.block.clear()).as_deref(), Some("block"));
        assert_eq!(of(|offer| offer.block = vec![0; MAX_BLOCK + 1].into()).as_deref(), Some("block"));
        assert_eq!(of(|offer| offer.hash.truncate(15)).as_deref(), Some("hash"));
        assert_eq!(of(|offer| offer.parent.truncate(15)).as_deref(), Some("parent"));
        assert_eq!(of(|offer| offer.parent.clear()).as_deref(), Some("position"));
        assert_eq!(of(|offer| offer.position = 0).as_deref(), Some("position"));
        assert_eq!(of(|offer| offer.group.clear()).as_deref(), Some("group"));
        assert_eq!(of(|offer| offer.group = offer.hash.clone()).as_deref(), Some("group"));
        assert_eq!(of(|offer| offer.position = 16).as_deref(), Some("group"));
    }

    #[test]
    fn a_chain_has_a_limit() {
        assert_eq!(chain_from_wire(&[7; 32]), Ok(vec![BlockHash([7; 16]); 2]));
        for wrong in [17, (MAX_CHAIN + 1) * 16] {
            assert_eq!(chain_from_wire(&vec![0; wrong]).unwrap_err().field.as_deref(), Some("chain"));
        }
    }
}
