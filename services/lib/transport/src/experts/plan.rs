//! Which tokens of a layer go to which group of shards: without a connection or a clock.
use moesaic_types::Routing;
use std::collections::BTreeMap;

/// What one group computes of a layer.
#[derive(Debug, PartialEq)]
pub(super) struct Part {
    /// The group.
    pub group: usize,
    /// The tokens that it gets, ascending.
    pub tokens: Vec<u32>,
    /// Their experts in this group.
    pub routing: Routing,
}

/// Cuts a layer's routing by groups, ascending. `holders` are the groups that hold each expert of the layer, and
/// `lives` says which of them can be asked, the same at each call.
///
/// Where an expert is in several groups, the choice depends on nothing but its token's own experts (and on who lives),
/// so that a token's sum is the same in every batch: among the groups that the token needs anyway, or else among all, its
/// experts decide, so that the tokens of a hot expert are spread.
///
/// # Errors
/// The first expert that no living group holds.
pub(super) fn cut(routing: &Routing, holders: &[Vec<usize>], lives: impl Fn(usize) -> bool) -> Result<Vec<Part>, u32> {
    let mut parts: BTreeMap<usize, Part> = BTreeMap::new();
    let mut chosen: Vec<(usize, u32, f32)> = Vec::new();
    for token in 0..routing.tokens() {
        choose(routing.token(token), holders, &lives, &mut chosen)?;
        // by group; in one, in the gate's order
        chosen.sort_by_key(|(group, ..)| *group);
        for of_group in chosen.chunk_by(|(a, ..), (b, ..)| a == b) {
            let group = of_group[0].0;
            let part =
                parts.entry(group).or_insert_with(|| Part { group, tokens: Vec::new(), routing: Routing::new() });
            part.tokens.push(token as u32);
            part.routing.push(of_group.iter().map(|(_, expert, weight)| (*expert, *weight)));
        }
    }
    Ok(parts.into_values().collect())
}

/// Cuts a part where it is above the limit of a message: `room` are the bytes for its tokens, of which each takes
/// `token` and `choice` for each of its experts. A token that is above it alone is alone.
pub(super) fn fit(part: Part, room: usize, token: usize, choice: usize) -> Vec<Part> {
    let size = |experts: usize| token + choice * experts;
    if part.tokens.len() * token + part.routing.experts.len() * choice <= room {
        return vec![part];
    }
    let (mut pieces, mut left): (Vec<Part>, usize) = (Vec::new(), 0);
    for (at, number) in part.tokens.iter().enumerate() {
        let own = part.routing.token(at);
        let needed = size(own.clone().count());
        if needed > left || pieces.is_empty() {
            pieces.push(Part { group: part.group, tokens: Vec::new(), routing: Routing::new() });
            left = room;
        }
        let piece = pieces.last_mut().expect("one was pushed");
        piece.tokens.push(*number);
        piece.routing.push(own);
        left = left.saturating_sub(needed);
    }
    pieces
}

/// The group of each of a token's experts.
fn choose(
    experts: impl Iterator<Item = (u32, f32)> + Clone,
    holders: &[Vec<usize>],
    lives: &impl Fn(usize) -> bool,
    chosen: &mut Vec<(usize, u32, f32)>,
) -> Result<(), u32> {
    chosen.clear();
    let living =
        |expert: u32| holders.get(expert as usize).into_iter().flatten().copied().filter(|&group| lives(group));
    let mut needed: Vec<usize> = Vec::new();
    for (expert, _) in experts.clone() {
        let mut living = living(expert);
        match (living.next(), living.next()) {
            (None, _) => return Err(expert),
            (Some(only), None) => needed.push(only),
            _ => {}
        }
    }
    let turn = experts.clone().fold(0, |hash: u64, (expert, _)| {
        // Fibonacci hashing; the high half is the mixed one
        let mixed = (hash ^ u64::from(expert + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ (mixed >> 32)
    });
    let by_turn = |count: usize| (turn % count as u64) as usize;
    for (expert, weight) in experts {
        let known = || living(expert).filter(|group| needed.contains(group));
        let count = known().count();
        let found =
            if count > 0 { known().nth(by_turn(count)) } else { living(expert).nth(by_turn(living(expert).count())) };
        let group = found.expect("who lives does not change meanwhile");
        if count == 0 {
            needed.push(group);
        }
        chosen.push((group, expert, weight));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXPERTS: usize = 6;
    const GROUPS: usize = 4;

    fn routing(tokens: &[Vec<u32>]) -> Routing {
        let mut routing = Routing::new();
        for experts in tokens {
            routing.push(experts.iter().map(|expert| (*expert, 1.0 + *expert as f32)));
        }
        routing
    }

    fn tokens() -> impl Strategy<Value = Vec<Vec<u32>>> {
        let experts: Vec<u32> = (0..EXPERTS as u32).collect();
        let token = prop::sample::subsequence(experts, 0..=4).prop_shuffle();
        prop::collection::vec(token, 0..12)
    }

    fn holders() -> impl Strategy<Value = Vec<Vec<usize>>> {
        let groups = prop::sample::subsequence((0..GROUPS).collect::<Vec<_>>(), 1..=GROUPS);
        prop::collection::vec(groups, EXPERTS)
    }

    proptest! {
        #[test]
        fn every_expert_of_every_token_goes_to_one_living_holder(
            tokens in tokens(), holders in holders(), dead in prop::option::of(0..GROUPS),
        ) {
            let routing = routing(&tokens);
            let lives = |group| Some(group) != dead;
            let is_lost = |expert: &u32| !holders[*expert as usize].iter().any(|group| lives(*group));
            match cut(&routing, &holders, lives) {
                Err(expert) => prop_assert_eq!(tokens.iter().flatten().find(|expert| is_lost(expert)), Some(&expert)),
                Ok(parts) => {
                    prop_assert!(parts.is_sorted_by_key(|part| part.group));
                    let mut found = vec![Vec::new(); tokens.len()];
                    for part in &parts {
                        prop_assert!(lives(part.group) && part.tokens.is_sorted_by(|a, b| a < b));
                        prop_assert_eq!(part.routing.check(part.tokens.len(), EXPERTS), Ok(()));
                        for (at, token) in part.tokens.iter().enumerate() {
                            let experts: Vec<u32> = part.routing.token(at).map(|(expert, _)| expert).collect();
                            prop_assert!(!experts.is_empty());
                            prop_assert!(part.routing.token(at).all(|(expert, weight)| weight == 1.0 + expert as f32));
                            prop_assert!(experts.iter().all(|e| holders[*e as usize].contains(&part.group)));
                            let order: Vec<_> = tokens[*token as usize].iter().filter(|e| experts.contains(e)).collect();
                            prop_assert_eq!(experts.iter().collect::<Vec<_>>(), order, "the gate's order");
                            found[*token as usize].extend(experts);
                        }
                    }
                    for (mut found, mut sent) in found.into_iter().zip(tokens.clone()) {
                        found.sort_unstable();
                        sent.sort_unstable();
                        prop_assert_eq!(found, sent);
                    }
                }
            }
        }

        #[test]
        fn a_token_s_groups_do_not_depend_on_the_batch(tokens in tokens(), holders in holders()) {
            let together = cut(&routing(&tokens), &holders, |_| true).expect("all live");
            for (at, token) in tokens.iter().enumerate() {
                let alone = cut(&routing(std::slice::from_ref(token)), &holders, |_| true).expect("all live");
                let of_token = |part: &Part| {
                    let at = part.tokens.binary_search(&(at as u32)).ok()?;
                    Some((part.group, part.routing.token(at).collect::<Vec<_>>()))
                };
                let expected: Vec<_> = alone.iter().map(|part| (part.group, part.routing.token(0).collect())).collect();
                prop_assert_eq!(together.iter().filter_map(of_token).collect::<Vec<_>>(), expected);
            }
        }
    }

    #[test]
    fn a_part_above_the_limit_is_cut_between_tokens() {
        let part =
            || Part { group: 3, tokens: vec![1, 4, 5, 9], routing: routing(&[vec![0], vec![1, 2], vec![3], vec![]]) };
        let tokens = |room: usize| -> Vec<Vec<u32>> {
            let pieces = fit(part(), room, 10, 1);
            let whole: Vec<_> = (0..4).map(|at| part().routing.token(at).collect::<Vec<_>>()).collect();
            let cut = pieces
                .iter()
                .flat_map(|piece| (0..piece.tokens.len()).map(|at| piece.routing.token(at).collect::<Vec<_>>()));
            assert_eq!(cut.collect::<Vec<_>>(), whole);
            assert!(pieces.iter().all(|piece| piece.group == 3));
            pieces.into_iter().map(|piece| piece.tokens).collect()
        };
        assert_eq!(tokens(44), [vec![1, 4, 5, 9]], "it fits");
        assert_eq!(tokens(43), [vec![1, 4, 5], vec![9]]);
        assert_eq!(tokens(23), [vec![1, 4], vec![5, 9]]);
        assert_eq!(tokens(1), [[1], [4], [5], [9]]);
    }

    #[test]
    fn a_replica_is_taken_where_the_token_goes_anyway_and_else_tokens_are_spread() {
        let holders = [vec![0, 1], vec![1], vec![0, 1], vec![0, 1]];
        let parts = cut(&routing(&[vec![0, 1]]), &holders, |_| true).expect("all live");
        assert_eq!(parts.len(), 1, "expert 0 goes where expert 1 is: {parts:?}");
        let everywhere: Vec<Vec<usize>> = vec![vec![0, 1]; 64];
        let tokens: Vec<Vec<u32>> = (1..64).map(|other| vec![0, other]).collect();
        let parts = cut(&routing(&tokens), &everywhere, |_| true).expect("all live");
        let counts: Vec<usize> = parts.iter().map(|part| part.tokens.len()).collect();
        assert!(counts.len() == 2 && counts.iter().all(|count| *count > 16), "{counts:?}");
    }

    #[test]
    fn copies_of_hot_experts_share_their_tokens_though_a_token_needs_most_groups_anyway() {
        const MODEL: u32 = 128;
        const TOP: usize = 8;
        let mut state = 7_u64;
        let mut below = |count: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % u64::from(count)) as u32
        };
        for (groups, copied) in [(2, 1), (2, 16), (4, 1), (4, 16)] {
            // the first experts are everywhere, and each token has one of them at least
            let holders: Vec<Vec<usize>> = (0..MODEL)
                .map(|expert| if expert < copied { (0..groups).collect() } else { vec![expert as usize % groups] })
                .collect();
            let mut routing = Routing::new();
            for _ in 0..20_000 {
                let mut experts = vec![below(copied)];
                while experts.len() < TOP {
                    let expert = below(MODEL);
                    if !experts.contains(&expert) {
                        experts.push(expert);
                    }
                }
                routing.push(experts.into_iter().map(|expert| (expert, 0.125)));
            }
            let parts = cut(&routing, &holders, |_| true).expect("all live");
            let of_group = |part: &Part| part.routing.experts.iter().filter(|expert| **expert < copied).count();
            let shares: Vec<usize> = parts.iter().map(of_group).collect();
            let even = shares.iter().sum::<usize>() / groups;
            assert_eq!(shares.len(), groups);
            assert!(shares.iter().all(|share| share.abs_diff(even) * 10 <= even), "{copied} on {groups}: {shares:?}");
        }
    }
}
