//! One block as a file: a header that says where it stands, its bytes, and a checksum over both.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | `MSKVBLK1` |
//! | 16 | the block's name |
//! | 16 | its parent's name; zeros for a chain's first |
//! | 16 | its group's name |
//! | 4 | its position, little-endian |
//! | 8 | length of its bytes, little-endian |
//! | 32 | blake3 of all the above and the bytes |
//! | ... | the bytes |
use moesaic_types::{BlockHash, Link};

const MAGIC: &[u8; 8] = b"MSKVBLK1";

/// What stands before the checksum.
const FIELDS: usize = 8 + 3 * 16 + 4 + 8;

/// Bytes before the block's own.
pub const HEADER: usize = FIELDS + 32;

/// A file's first bytes.
pub fn header(link: &Link, block: &[u8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let parent = link.parent.unwrap_or(BlockHash([0; 16]));
    let fields = [
        &MAGIC[..],
        &link.hash.0,
        &parent.0,
        &link.group.0,
        &link.position.to_le_bytes(),
        &(block.len() as u64).to_le_bytes(),
    ]
    .concat();
    header[..FIELDS].copy_from_slice(&fields);
    header[FIELDS..].copy_from_slice(&checksum(&fields, block));
    header
}

fn checksum(fields: &[u8], block: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(fields).update(block).finalize().as_bytes()
}

/// What a header says; it is not checked against the block. `None` where it is none, or the file has another length.
pub fn read_header(header: &[u8; HEADER], file_len: u64) -> Option<(Link, u64)> {
    let name = |at: usize| {
        let mut name = [0; 16];
        name.copy_from_slice(&header[at..at + 16]);
        BlockHash(name)
    };
    let mut len = [0; 8];
    len.copy_from_slice(&header[60..68]);
    let len = u64::from_le_bytes(len);
    let position = u32::from_le_bytes([header[56], header[57], header[58], header[59]]);
    let is_whole = &header[..8] == MAGIC && len.checked_add(HEADER as u64) == Some(file_len);
    let parent = Some(name(24)).filter(|_| position > 0);
    is_whole.then(|| (Link { hash: name(8), parent, position, group: name(40) }, len))
}

/// Whether these bytes are the file of this block, to the last bit.
pub fn is_intact(file: &[u8], hash: &BlockHash) -> bool {
    let Some((header, block)) = file.split_first_chunk::<HEADER>() else { return false };
    let named = read_header(header, file.len() as u64).is_some_and(|(link, _)| link.hash == *hash);
    named && header[FIELDS..] == checksum(&header[..FIELDS], block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(position: usize, block: &[u8]) -> (Link, Vec<u8>) {
        let chain: Vec<_> = (0..=position as u8).map(|n| BlockHash([n + 1; 16])).collect();
        let link = Link::of(&chain, position);
        (link, [&header(&link, block)[..], block].concat())
    }

    #[test]
    fn a_header_says_where_the_block_stands() {
        for position in [0, 1, 20] {
            let (link, file) = file(position, b"block");
            let header = file.first_chunk().unwrap();
            assert_eq!(read_header(header, file.len() as u64), Some((link, 5)));
            assert_eq!(read_header(header, file.len() as u64 - 1), None, "truncated");
        }
    }

    proptest! {
        #[test]
        fn any_cut_and_any_changed_bit_is_found(
            block in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let (link, file) = file(3, &block);
            prop_assert!(is_intact(&file, &link.hash));
            prop_assert!(!is_intact(&file, &BlockHash([77; 16])), "another's file");
            prop_assert!(!is_intact(&file[..at.index(file.len())], &link.hash));
            let mut changed = file.clone();
            changed[at.index(file.len())] ^= 1 << bit;
            prop_assert!(!is_intact(&changed, &link.hash));
        }
    }
}
