//! What every placement keeps, whatever the load.
use super::*;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

fn limits() -> Limits {
    Limits { redundant_experts: 0, min_copies: 1, max_experts: 0, min_gain: 0.05, min_load: 0 }
}

fn first(n: usize) -> BTreeSet<usize> {
    (0..n).collect()
}

/// Loads of a few hot experts among many cold ones.
fn counts(experts: usize) -> impl Strategy<Value = Vec<u64>> {
    vec(prop_oneof![4 => 0..100u64, 1 => 0..10_000u64], experts)
}

/// Two loads of a model of one shape.
fn loads() -> impl Strategy<Value = (Load, Load)> {
    let shape = vec(1..24usize, 1..4);
    shape.prop_flat_map(|shape| {
        let load = || shape.iter().map(|experts| counts(*experts)).collect::<Vec<_>>();
        let indexed = |layers: Vec<Vec<u64>>| layers.into_iter().enumerate().map(|(i, l)| (2 * i + 1, l)).collect();
        (load(), load()).prop_map(move |(one, two)| (indexed(one), indexed(two)))
    })
}

fn some_limits() -> impl Strategy<Value = Limits> {
    let bound = prop_oneof![Just(0), 1..30usize];
    (0..8usize, 1..4usize, bound, 0.01..0.5f64).prop_map(|(redundant_experts, min_copies, max_experts, min_gain)| {
        Limits { redundant_experts, min_copies, max_experts, min_gain, ..limits() }
    })
}

fn held(layers: &Layers, layer: usize, group: usize) -> usize {
    layers[&layer].iter().filter(|groups| groups.contains(&group)).count()
}

/// What must hold of any placement.
fn check(load: &Load, groups: &BTreeSet<usize>, limits: &Limits, layers: &Layers) {
    assert!(layers.keys().eq(load.keys()));
    let spread = |counts: Vec<usize>| counts.iter().max().unwrap() - counts.iter().min().unwrap();
    for (&index, experts) in layers {
        assert_eq!(experts.len(), load[&index].len());
        let room = if limits.max_experts == 0 { usize::MAX } else { limits.max_experts * groups.len() };
        let least = if room == usize::MAX { limits.min_copies.min(groups.len()) } else { 1 };
        for holders in experts {
            assert!(holders.len() >= least, "{holders:?}");
            assert!(holders.windows(2).all(|pair| pair[0] < pair[1]) && holders.iter().all(|g| groups.contains(g)));
        }
        let counts: Vec<usize> = groups.iter().map(|group| held(layers, index, *group)).collect();
        let wanted = experts.len() * limits.min_copies.min(groups.len()) + limits.redundant_experts;
        let total = wanted.min(experts.len() * groups.len()).min(room.max(experts.len()));
        assert_eq!(counts.iter().sum::<usize>(), total);
        assert!(spread(counts) <= 1);
    }
    let all = groups.iter().map(|group| layers.keys().map(|index| held(layers, *index, *group)).sum());
    assert!(spread(all.collect()) <= 1);
}

proptest! {
    #[test]
    fn a_placement_is_complete_and_even_in_count_and_changes_only_for_a_reason(
        (before, after) in loads(),
        groups in btree_set(0..8usize, 1..6),
        later in btree_set(0..8usize, 1..6),
        limits in some_limits(),
    ) {
        let first = plan(&before, &groups, &limits, None).expect("there is none");
        check(&before, &groups, &limits, &first.layers);
        prop_assert_eq!(Some(first.clone()), plan(&before, &groups, &limits, None));
        prop_assert_eq!(plan(&before, &groups, &limits, Some(&first.layers)), None);
        let mut present = first.layers;
        for groups in [&groups, &later] {
            let Some(next) = plan(&after, groups, &limits, Some(&present)) else {
                check(&after, groups, &limits, &present);
                continue;
            };
            check(&after, groups, &limits, &next.layers);
            prop_assert_eq!(next.moves, moves(Some(&present), &next.layers));
            let imbalance = imbalance(&after, &next.layers, groups.len(), 0);
            prop_assert!((next.imbalance - imbalance).abs() < 1e-6);
            prop_assert_eq!(plan(&after, groups, &limits, Some(&next.layers)), None);
            present = next.layers;
        }
    }

    #[test]
    fn the_busiest_group_bears_one_copy_more_than_the_idlest_at_most(
        (load, _) in loads(),
        groups in btree_set(0..8usize, 1..6),
        limits in some_limits(),
    ) {
        let placed = plan(&load, &groups, &limits, None).expect("there is none").layers;
        for (index, experts) in &placed {
            let weights = weights(&load[index], 0);
            let copy = |expert: usize| weights[expert] / experts[expert].len() as f64;
            let bears = |group: &usize| {
                (0..experts.len()).filter(|expert| experts[*expert].contains(group)).map(copy).sum::<f64>()
            };
            let bears: Vec<f64> = groups.iter().map(bears).collect();
            let (most, least) = (bears.iter().copied().fold(0.0, f64::max), bears.iter().copied().fold(1.0, f64::min));
            let heaviest = (0..experts.len()).map(copy).fold(0.0, f64::max);
            let even = (1.0 + limits.min_gain / 2.0) / groups.len() as f64;
            prop_assert!(most <= even.max(least + heaviest) + 1e-6, "{bears:?} {heaviest}");
        }
    }

    #[test]
    fn only_what_must_moves_when_a_group_goes_or_comes(experts in 1..40usize, n in 2..7usize, gone in 0..7usize) {
        let load = Load::from([(0, vec![0; experts])]);
        let all = first(n);
        let present = plan(&load, &all, &limits(), None).expect("there is none").layers;
        let mut rest = all.clone();
        rest.remove(&(gone % n));
        let orphans = held(&present, 0, gone % n);
        match plan(&load, &rest, &limits(), Some(&present)) {
            Some(without) => {
                // one more where the groups with one more than the others are other ones now
                prop_assert!(without.moves <= orphans + n, "{} for {orphans}", without.moves);
                prop_assert!(without.moves >= orphans);
                let back = plan(&load, &all, &limits(), Some(&without.layers)).expect("a group is empty");
                prop_assert!(back.moves <= orphans + n);
            }
            None => prop_assert_eq!(orphans, 0),
        }
    }
}

#[test]
fn the_first_placement_is_an_even_split_in_order() {
    let load = Load::from([(1, vec![0; 6]), (2, vec![0; 5])]);
    let plan = plan(&load, &first(2), &limits(), None).unwrap();
    assert_eq!(plan.layers[&1], [[0], [0], [0], [1], [1], [1]]);
    assert_eq!(plan.layers[&2], [[0], [0], [0], [1], [1]]);
    assert_eq!((plan.moves, covers(&Shares::from([(1, vec![0, 2])]), &Shares::from([(1, vec![2])]))), (11, true));
    assert!(!covers(&Shares::from([(1, vec![0])]), &Shares::from([(1, vec![2])])));
    assert!(!covers(&Shares::new(), &Shares::from([(1, vec![2])])));
}

#[test]
fn hot_experts_get_the_copies_and_are_kept_apart() {
    let even = Load::from([(0, vec![10; 8])]);
    let limits = Limits { redundant_experts: 2, ..limits() };
    let before = plan(&even, &first(2), &limits, None).unwrap().layers;
    let hot = Load::from([(0, vec![10, 10, 10, 10, 10, 10, 500, 400])]);
    let after = plan(&hot, &first(2), &limits, Some(&before)).unwrap();
    assert_eq!((&*after.layers[&0][6], &*after.layers[&0][7]), (&[0, 1][..], &[0, 1][..]));
    assert_eq!(after.moves, 2, "nothing but the two copies");
    assert!(after.imbalance < 1.03, "{}", after.imbalance);

    let without = Limits { redundant_experts: 0, ..limits };
    let before = plan(&even, &first(2), &without, None).unwrap().layers;
    assert_eq!((&*before[&0][6], &*before[&0][7]), (&[1][..], &[1][..]));
    let after = plan(&hot, &first(2), &without, Some(&before)).unwrap();
    assert_eq!(after.moves, 2, "one swap");
    assert_ne!(after.layers[&0][6], after.layers[&0][7]);
}

#[test]
fn a_small_gain_moves_nothing_and_little_load_says_nothing() {
    let present = Layers::from([(0, vec![vec![0], vec![0], vec![1], vec![1]])]);
    let load = Load::from([(0, vec![52, 51, 50, 49])]);
    assert_eq!(plan(&load, &first(2), &limits(), Some(&present)), None);
    assert!(plan(&load, &first(2), &Limits { min_gain: 0.0, ..limits() }, Some(&present)).is_some());
    let load = Load::from([(0, vec![9, 9, 0, 0])]);
    assert!(plan(&load, &first(2), &limits(), Some(&present)).is_some());
    assert_eq!(plan(&load, &first(2), &Limits { min_load: 19, ..limits() }, Some(&present)), None);
    let copies = Layers::from([(0, vec![vec![0, 1], vec![0, 1], vec![0], vec![0], vec![1]])]);
    let (idle, two) = (Load::from([(0, vec![0; 5])]), Limits { redundant_experts: 2, ..limits() });
    assert_eq!(plan(&idle, &first(2), &two, Some(&copies)), None, "the copies stay where the last load wanted them");
}

#[test]
fn copies_give_way_to_the_room_and_completeness_does_not() {
    let load = Load::from([(0, vec![1, 1, 1, 90, 1, 1])]);
    let two = Limits { min_copies: 2, redundant_experts: 3, max_experts: 4, ..limits() };
    let placed = plan(&load, &first(2), &two, None).unwrap().layers;
    assert_eq!((held(&placed, 0, 0), held(&placed, 0, 1)), (4, 4));
    assert_eq!(placed[&0][3], [0, 1], "the hottest first");
    let alone = plan(&load, &first(1), &two, Some(&placed)).unwrap().layers;
    assert_eq!(held(&alone, 0, 0), 6);
    assert_eq!(plan(&load, &BTreeSet::new(), &two, None), None);
    assert_eq!(plan(&Load::new(), &first(1), &two, None), None);
}
