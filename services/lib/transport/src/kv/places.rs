//! Where a group of blocks belongs: a pure function of its name and of who is there.
use moesaic_types::{BlockHash, GROUP_BLOCKS};
use std::ops::Range;

/// All members, those first where the group belongs (rendezvous hashing): when a member comes or goes, only the groups
/// move that it gets or had.
pub fn ranked<'a>(group: &BlockHash, members: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut ranked: Vec<_> = members.into_iter().map(|member| (weight(group, member), member)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|(_, member)| member).collect()
}

/// FNV-1a over both, mixed so that every bit counts; the same in every build.
fn weight(group: &BlockHash, member: &str) -> u64 {
    let bytes = group.0.iter().chain(member.as_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// The parts of a chain from an index on that belong to one group each, in order.
pub fn parts(len: usize, from: usize) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let mut start = from;
    while start < len {
        let end = (start - start % GROUP_BLOCKS + GROUP_BLOCKS).min(len);
        parts.push(start..end);
        start = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn group(n: u32) -> BlockHash {
        let mut hash = [0; 16];
        hash[..4].copy_from_slice(&n.to_le_bytes());
        BlockHash(hash)
    }

    #[test]
    fn groups_spread_evenly() {
        let members = ["kv-0", "kv-1", "kv-2", "kv-3"];
        let mut counts = [0; 4];
        for n in 0..4000 {
            let first = ranked(&group(n), members)[0];
            counts[members.iter().position(|member| *member == first).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn parts_end_where_groups_do() {
        assert_eq!(parts(40, 0), [0..16, 16..32, 32..40]);
        assert_eq!(parts(40, 17), [17..32, 32..40]);
        assert_eq!(parts(32, 31), std::iter::once(31..32).collect::<Vec<_>>());
        assert!(parts(32, 32).is_empty() && parts(0, 5).is_empty());
    }

    proptest! {
        #[test]
        fn only_what_a_member_had_moves_when_it_goes(n in any::<u32>(), members in 2usize..6, gone in 0usize..6) {
            let all = ["a", "b", "kv-store-3", "d:9040", "e"];
            let before = ranked(&group(n), all.iter().copied().take(members));
            let after = ranked(&group(n), before.iter().copied().filter(|member| *member != all[gone % members]));
            let expected: Vec<_> = before.into_iter().filter(|member| *member != all[gone % members]).collect();
            prop_assert_eq!(after, expected);
        }
    }
}
