//! A checksum with each block that leaves this replica: whatever it passes through (links, other nodes' memory, disks), it
//! comes back as it was, or is not used.
//!
//! The block's bytes, then blake3 of its name and these.
use bytes::Bytes;
use moesaic_types::BlockHash;

const CHECKSUM: usize = 32;

fn checksum(name: &BlockHash, block: &[u8]) -> [u8; CHECKSUM] {
    *blake3::Hasher::new().update(&name.0).update(block).finalize().as_bytes()
}

/// A block as it leaves.
pub fn seal(name: &BlockHash, block: Bytes) -> Bytes {
    let checksum = checksum(name, &block);
    let mut sealed = Vec::from(block);
    sealed.extend_from_slice(&checksum);
    sealed.into()
}

/// A block that came back; `None` when it is not this block, to the last bit.
pub fn open(name: &BlockHash, sealed: &Bytes) -> Option<Bytes> {
    let (block, found) = sealed.split_last_chunk::<CHECKSUM>()?;
    (*found == checksum(name, block)).then(|| sealed.slice(..block.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_block_comes_back_as_it_was_or_not_at_all(
            block in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let (name, block) = (BlockHash([7; 16]), Bytes::from(block));
            let sealed = seal(&name, block.clone());
            prop_assert_eq!(open(&name, &sealed), Some(block));
            prop_assert_eq!(open(&BlockHash([8; 16]), &sealed), None, "another's");
            let at = at.index(sealed.len());
            prop_assert_eq!(open(&name, &sealed.slice(..at)), None);
            let mut changed = sealed.to_vec();
            changed[at] ^= 1 << bit;
            prop_assert_eq!(open(&name, &changed.into()), None);
        }
    }
}
