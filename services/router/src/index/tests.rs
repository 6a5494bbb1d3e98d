//! What the index knows, and what it forgets.
use super::*;
use crate::policy::Known;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

fn hash(number: u8) -> BlockHash {
    BlockHash([number; 16])
}

fn hashes(numbers: &[u8]) -> Vec<BlockHash> {
    numbers.iter().copied().map(hash).collect()
}

fn stored(numbers: &[u8]) -> KvEvent {
    KvEvent::Stored { blocks: hashes(numbers) }
}

fn evicted(numbers: &[u8]) -> KvEvent {
    KvEvent::Evicted { blocks: hashes(numbers) }
}

fn overlap(index: &PrefixIndex, chain: &[u8]) -> BTreeMap<String, usize> {
    let prefixes = index.prefixes(&hashes(chain));
    let of = |id: &&str| (id.to_string(), prefixes.local(&ReplicaId::new(*id)));
    ["a", "b", "0", "1", "2"].iter().map(of).filter(|(_, depth)| *depth > 0).collect()
}

fn replica(id: &str) -> Owner {
    Owner::Replica(ReplicaId::new(id))
}

fn store(tier: Tier) -> Owner {
    Owner::Store("kv-0".into(), tier)
}

fn expected(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
    pairs.iter().map(|(id, depth)| ((*id).to_owned(), *depth)).collect()
}

#[test]
fn overlap_counts_from_the_start_of_the_chain() {
    let (a, b, life) = (replica("a"), replica("b"), Arc::from("1"));
    let mut index = PrefixIndex::new(100);
    assert_eq!(index.apply(&a, &life, 1, &stored(&[1, 2, 3])), Applied::InOrder);
    assert_eq!(index.apply(&b, &life, 1, &stored(&[1, 3, 9])), Applied::InOrder);
    assert_eq!(overlap(&index, &[1, 2, 3, 4]), expected(&[("a", 3), ("b", 1)]));
    assert_eq!(overlap(&index, &[9, 1, 2]), expected(&[("b", 2)]));
    assert_eq!(overlap(&index, &[4, 1]), expected(&[]));
    assert_eq!(overlap(&index, &[]), expected(&[]));
    index.apply(&a, &life, 2, &evicted(&[2, 77]));
    assert_eq!(overlap(&index, &[1, 2, 3]), expected(&[("a", 1), ("b", 1)]));
    index.apply(&a, &life, 3, &KvEvent::Cleared);
    assert_eq!(overlap(&index, &[1]), expected(&[("b", 1)]));
    index.apply(&a, &life, 4, &stored(&[1]));
    index.forget(&b);
    assert_eq!(overlap(&index, &[1]), expected(&[("a", 1)]));
}

#[test]
fn a_gap_or_a_new_life_clears_the_replica_alone() {
    let (a, b) = (replica("a"), replica("b"));
    let (first, second) = (Arc::from("1"), Arc::from("2"));
    let mut index = PrefixIndex::new(100);
    index.apply(&b, &first, 1, &stored(&[1, 2]));
    assert_eq!(index.apply(&a, &first, 5, &stored(&[1, 2])), Applied::Late, "subscribed late");
    assert_eq!(index.apply(&a, &first, 5, &stored(&[3])), Applied::Stale);
    assert_eq!(overlap(&index, &[3]), expected(&[]));
    assert_eq!(index.apply(&a, &first, 7, &stored(&[3])), Applied::AfterGap);
    assert_eq!(overlap(&index, &[1, 2]), expected(&[("b", 2)]));
    assert_eq!(overlap(&index, &[3]), expected(&[("a", 1)]));
    assert_eq!(index.apply(&a, &first, 8, &stored(&[1])), Applied::InOrder);
    assert_eq!(index.apply(&a, &second, 1, &stored(&[4])), Applied::InOrder);
    assert_eq!(overlap(&index, &[1]), expected(&[("b", 1)]), "the old life's blocks are gone");
    assert_eq!(overlap(&index, &[4]), expected(&[("a", 1)]));
}

#[test]
fn the_oldest_entries_go_first_and_storing_again_makes_new() {
    let (a, life) = (replica("a"), Arc::from("1"));
    let mut index = PrefixIndex::new(3);
    for (sequence, number) in [1, 2, 3, 1, 4].into_iter().enumerate() {
        index.apply(&a, &life, sequence as u64 + 1, &stored(&[number]));
    }
    assert_eq!(index.len(), 3);
    let kept: Vec<u8> = (1..=4).filter(|&number| !overlap(&index, &[number]).is_empty()).collect();
    assert_eq!(kept, [1, 3, 4]);
}

#[test]
fn what_the_stores_have_follows_what_a_replica_has() {
    let (a, life) = (replica("a"), Arc::from("1"));
    let mut index = PrefixIndex::new(100);
    index.apply(&a, &life, 1, &stored(&[1, 2]));
    index.apply(&store(Tier::Ram), &life, 1, &stored(&[2, 3, 4]));
    index.apply(&store(Tier::Disk), &life, 1, &stored(&[4, 5, 7]));
    let prefixes = index.prefixes(&hashes(&[1, 2, 3, 4, 5, 6, 7]));
    assert_eq!(prefixes.known(&ReplicaId::new("a")), Known { local: 2, ram: 2, disk: 1 });
    assert_eq!(prefixes.known(&ReplicaId::new("b")), Known { local: 0, ram: 0, disk: 0 }, "nobody has the first");
    let prefixes = index.prefixes(&hashes(&[4, 5]));
    assert_eq!(prefixes.known(&ReplicaId::new("b")), Known { local: 0, ram: 1, disk: 1 });
    index.forget(&store(Tier::Ram));
    let prefixes = index.prefixes(&hashes(&[4, 5]));
    assert_eq!(prefixes.known(&ReplicaId::new("b")), Known { local: 0, ram: 0, disk: 2 });
}

#[test]
fn what_the_stores_have_pushes_nothing_out_that_replicas_have() {
    let (a, life) = (replica("a"), Arc::from("1"));
    let mut index = PrefixIndex::new(3);
    index.apply(&a, &life, 1, &stored(&[1, 2, 3]));
    index.apply(&store(Tier::Disk), &life, 1, &stored(&[1, 2, 3, 4, 5]));
    assert_eq!(overlap(&index, &[1, 2, 3]), expected(&[("a", 3)]));
    assert_eq!(index.len(), 6);
}

#[test]
fn who_says_everything_anew_after_a_gap_is_known_again() {
    let (a, life) = (replica("a"), Arc::from("1"));
    let mut index = PrefixIndex::new(100);
    index.apply(&a, &life, 1, &stored(&[1, 2]));
    assert_eq!(index.apply(&a, &life, 3, &stored(&[3])), Applied::AfterGap);
    assert_eq!(index.apply(&a, &life, 4, &KvEvent::Cleared), Applied::InOrder);
    assert_eq!(index.apply(&a, &life, 5, &stored(&[1, 2, 3])), Applied::InOrder);
    assert_eq!(overlap(&index, &[1, 2, 3]), expected(&[("a", 3)]));
    assert_eq!(index.apply(&a, &life, 9, &KvEvent::Cleared), Applied::InOrder, "lost, and said anew");
    assert_eq!(overlap(&index, &[1]), expected(&[]));
}

proptest! {
    #[test]
    fn within_its_bound_the_index_is_exact_and_it_never_grows_beyond(
        events in prop::collection::vec(
            (0u8..3, 0u8..10, prop::collection::vec(0u8..12, 0..5), 1u64..3), 0..120),
        chain in prop::collection::vec(0u8..12, 0..6),
        small in 1usize..8,
    ) {
        // 3 replicas x 12 blocks, with room for the dead: 120 events clear at most 120 times 12 entries.
        let (mut roomy, mut tight) = (PrefixIndex::new(10_000), PrefixIndex::new(small));
        let life: Arc<str> = Arc::from("1");
        let mut model: BTreeMap<u8, (u64, BTreeSet<u8>)> = BTreeMap::new();
        for (replica, kind, numbers, step) in events {
            let id = Owner::Replica(ReplicaId::new(replica.to_string()));
            let event = match kind {
                0 => KvEvent::Cleared,
                1..=3 => evicted(&numbers),
                _ => stored(&numbers),
            };
            let (sequence, blocks) = model.entry(replica).or_default();
            let first = *sequence == 0;
            *sequence += step;
            if (step > 1 && !first) || kind == 0 {
                blocks.clear();
            }
            match kind {
                0 => {}
                1..=3 => numbers.iter().for_each(|number| { blocks.remove(number); }),
                _ => blocks.extend(&numbers),
            }
            let gap = match (step, first, kind) {
                (1, ..) | (.., 0) => Applied::InOrder,
                (_, true, _) => Applied::Late,
                _ => Applied::AfterGap,
            };
            prop_assert_eq!(roomy.apply(&id, &life, *sequence, &event), gap);
            tight.apply(&id, &life, *sequence, &event);
            overlap(&tight, &chain);
            prop_assert!(tight.len() <= small && tight.entries.count() <= small + 1);
            prop_assert_eq!(tight.len(), tight.places.count());
        }
        let exact: BTreeMap<String, usize> = model
            .iter()
            .map(|(id, (_, blocks))| (id.to_string(), chain.iter().take_while(|n| blocks.contains(n)).count()))
            .filter(|(_, depth)| *depth > 0)
            .collect();
        prop_assert_eq!(overlap(&roomy, &chain), exact.clone());
        for (id, depth) in overlap(&tight, &chain) {
            prop_assert!(depth <= exact.get(&id).copied().unwrap_or(0), "a bound only forgets");
        }
    }
}

/// The names of a long chain.
fn long(from: usize, to: usize) -> Vec<BlockHash> {
    (from..to)
        .map(|number| BlockHash((number as u128 + 1).wrapping_mul(0x1234_5678_9abc_def1_0fed_cba9).to_le_bytes()))
        .collect()
}

proptest! {
    #[test]
    fn what_is_skipped_in_a_long_chain_is_as_its_ends_say(
        depths in prop::collection::vec(0usize..300, 0..6),
        (ram, disk) in (0usize..300, 0usize..300),
        length in 0usize..300,
    ) {
        let (mut index, life) = (PrefixIndex::new(10_000), Arc::from("1"));
        let id = |number: usize| ReplicaId::new(number.to_string());
        for (number, depth) in depths.iter().enumerate() {
            index.apply(&Owner::Replica(id(number)), &life, 1, &KvEvent::Stored { blocks: long(0, *depth) });
        }
        // dead ones change nothing
        index.apply(&replica("dead"), &life, 1, &KvEvent::Stored { blocks: long(0, 250) });
        index.forget(&replica("dead"));
        for (tier, depth) in [(Tier::Ram, ram), (Tier::Disk, disk)] {
            index.apply(&store(tier), &life, 1, &KvEvent::Stored { blocks: long(0, depth) });
        }
        let prefixes = index.prefixes(&long(0, length));
        for (number, depth) in depths.iter().copied().chain([0]).enumerate() {
            let local = depth.min(length);
            let ram = ram.min(length).saturating_sub(local);
            let disk = disk.min(length).saturating_sub(local + ram);
            prop_assert_eq!(prefixes.known(&id(number)), Known { local, ram, disk }, "replica {}", number);
        }
    }
}

#[test]
fn a_chains_end_goes_before_its_start() {
    let (a, life) = (replica("a"), Arc::from("1"));
    let mut index = PrefixIndex::new(4);
    index.apply(&a, &life, 1, &stored(&[1, 2, 3, 4]));
    index.apply(&a, &life, 2, &stored(&[8, 9]));
    assert_eq!(overlap(&index, &[8, 9]), expected(&[("a", 2)]));
    assert_eq!(overlap(&index, &[1, 2, 3, 4]), expected(&[("a", 2)]));
}

#[test]
fn what_is_looked_up_stays_and_goes_when_nobody_does_any_longer() {
    let (a, life) = (replica("a"), Arc::from("1"));
    let mut index = PrefixIndex::new(4);
    index.apply(&a, &life, 1, &stored(&[1, 2]));
    for (sequence, number) in (2..).zip(10..20) {
        assert_eq!(overlap(&index, &[1, 2]), expected(&[("a", 2)]), "before {number}");
        index.apply(&a, &life, sequence, &stored(&[number]));
    }
    for (sequence, number) in (12..).zip(20..28) {
        index.apply(&a, &life, sequence, &stored(&[number]));
    }
    assert_eq!(overlap(&index, &[1, 2]), expected(&[]));
    // even where all of them are in use there is room for new ones
    assert_eq!(overlap(&index, &[24, 25, 26, 27]), expected(&[("a", 4)]));
    index.apply(&a, &life, 20, &stored(&[30]));
    assert_eq!((overlap(&index, &[30]), index.len()), (expected(&[("a", 1)]), 4));
}

#[test]
fn what_is_looked_up_often_is_marked_now_and_then() {
    let (a, life, chain) = (replica("a"), Arc::from("1"), long(0, 100));
    let mut index = PrefixIndex::new(10_000);
    let to_mark = |index: &PrefixIndex| index.find(&chain).to_mark;
    index.apply(&a, &life, 1, &KvEvent::Stored { blocks: long(0, 70) });
    assert_eq!((to_mark(&index), to_mark(&index)), (Some(70), Some(70)), "until it is");
    index.mark(&chain[..70]);
    assert_eq!(to_mark(&index), None);
    index.apply(&a, &life, 2, &KvEvent::Stored { blocks: long(1000, 1500) });
    assert_eq!(to_mark(&index), None);
    index.apply(&a, &life, 3, &KvEvent::Stored { blocks: long(2000, 4000) });
    assert_eq!(to_mark(&index), Some(70));
    let other = long(500, 600);
    assert_eq!(index.find(&other).to_mark, None, "nobody has it");
}

#[test]
fn dead_entries_go_before_live_ones() {
    let (a, b, life) = (replica("a"), replica("b"), Arc::from("1"));
    let mut index = PrefixIndex::new(4);
    index.apply(&b, &life, 1, &stored(&[3, 4]));
    index.apply(&a, &life, 1, &stored(&[1, 2]));
    for round in 1..10 {
        index.apply(&a, &life, 2 * round, &KvEvent::Cleared);
        index.apply(&a, &life, 2 * round + 1, &stored(&[1, 2]));
        assert_eq!(overlap(&index, &[1, 2]), expected(&[("a", 2)]));
        assert_eq!(overlap(&index, &[3, 4]), expected(&[("b", 2)]));
    }
    assert_eq!(index.len(), 4);
}

#[test]
fn nothing_is_left_of_who_is_forgotten() {
    let mut index = PrefixIndex::new(1000);
    let b = replica("b");
    for number in 0..100u64 {
        let owner = Owner::Replica(ReplicaId::new(format!("r-{number}")));
        index.apply(&owner, &Arc::from("1"), 7, &stored(&[1, 2, 3]));
        index.apply(&owner, &Arc::from("2"), 1, &stored(&[4]));
        index.forget(&owner);
        index.apply(&b, &Arc::from("1"), number + 1, &stored(&[]));
    }
    index.forget(&b);
    index.apply(&b, &Arc::from("2"), 1, &stored(&[9]));
    assert_eq!((index.len(), index.places.count()), (1, 1));
    let (feeds, lives) = index.owners.count();
    assert!(feeds == 1 && lives <= 2, "{feeds} {lives}");
    assert_eq!(index.owners.numbers().end(), 2);
}
