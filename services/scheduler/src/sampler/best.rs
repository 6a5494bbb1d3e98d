//! Selections that look at the whole vocabulary once and order no more of it than is asked for.
use moesaic_types::TokenId;
use std::cmp::Ordering;

/// Tokens that are ordered first when looking for the nucleus; further ones by this factor.
const FIRST_GUESS: usize = 256;
const NEXT_GUESS: usize = 8;

/// Logits whose largest is sought at once.
const RUN: usize = 1024;

/// The best of so few tokens are kept in order while looking.
const FEW: usize = 256;

/// The likelier first; ties go to the lowest id.
pub fn by_logit(logits: &[f32], a: TokenId, b: TokenId) -> Ordering {
    logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b))
}

/// The bits of a number as an integer of `total_cmp`'s order, and back: processors compare many integers at once.
fn ordered(bits: u32) -> i32 {
    let bits = bits as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// The least and the largest number in `total_cmp`'s order, in which NaN is outside the infinities.
pub fn extremes(logits: &[f32]) -> (f32, f32) {
    let numbers = logits.iter().map(|logit| ordered(logit.to_bits()));
    let (least, most) = numbers.fold((i32::MAX, i32::MIN), |(least, most), n| (least.min(n), most.max(n)));
    let number = |n: i32| f32::from_bits(ordered(n as u32) as u32);
    (number(least), number(most))
}

/// The likeliest token.
pub fn likeliest(logits: &[f32]) -> Option<TokenId> {
    let runs = logits.chunks(RUN).map(|run| extremes(run).1).enumerate();
    let (run, largest) = runs.min_by(|a, b| b.1.total_cmp(&a.1))?;
    let at = logits[run * RUN..].iter().position(|logit| logit.to_bits() == largest.to_bits())?;
    Some((run * RUN + at) as TokenId)
}

/// Appends the `count` likeliest tokens to `best`, which is empty, best first.
pub fn best(logits: &[f32], count: usize, best: &mut Vec<TokenId>) {
    if count > FEW {
        best.extend(0..logits.len() as TokenId);
        if count < logits.len() {
            best.select_nth_unstable_by(count - 1, |a, b| by_logit(logits, *a, *b));
            best.truncate(count);
        }
        best.sort_unstable_by(|a, b| by_logit(logits, *a, *b));
        return;
    }
    // Only a token that is among the best so far is compared with more than the last of them; with NaN, above which
    // nothing is, where none is wanted.
    let mut last = f32::NAN;
    for (id, logit) in logits.iter().enumerate() {
        // Ids ascend, so an equal logit does not displace an earlier one.
        if best.len() == count && logit.total_cmp(&last).is_le() {
            continue;
        }
        let id = id as TokenId;
        let at = best.partition_point(|&other| by_logit(logits, other, id).is_lt());
        best.insert(at, id);
        best.truncate(count);
        last = logits[best[best.len() - 1] as usize];
    }
}

/// Cuts `ids` to the likeliest ones whose weights reach `mass`, best first. Orders them piece by piece, until enough.
pub fn nucleus(
    ids: &mut Vec<TokenId>,
    mass: f64,
    weight: impl Fn(TokenId) -> f64,
    mut order: impl FnMut(&TokenId, &TokenId) -> Ordering,
) {
    let (mut ordered, mut guess, mut reached) = (0, FIRST_GUESS, 0.0);
    while ordered < ids.len() {
        let end = guess.min(ids.len());
        let piece = &mut ids[ordered..];
        if end - ordered < piece.len() {
            piece.select_nth_unstable_by(end - ordered - 1, &mut order);
        }
        piece[..end - ordered].sort_unstable_by(&mut order);
        for at in ordered..end {
            reached += weight(ids[at]);
            if reached >= mass {
                ids.truncate(at + 1);
                return;
            }
        }
        ordered = end;
        guess = guess.saturating_mul(NEXT_GUESS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_peaked_nucleus_orders_a_small_part_of_a_large_vocabulary() {
        let vocab = 150_000u32;
        // A permutation of the ranks; the likeliest 100 have nearly all of the mass.
        let rank = |id: TokenId| u64::from(id) * 77_777 % u64::from(vocab);
        let logits: Vec<f32> = (0..vocab).map(|id| -(rank(id) as f32)).collect();
        let weight = |id: TokenId| (f64::from(logits[id as usize]) / 10.0).exp();
        let mut ids: Vec<TokenId> = (0..vocab).collect();
        let mass = 0.95 * ids.iter().map(|&id| weight(id)).sum::<f64>();
        let mut comparisons = 0usize;
        nucleus(&mut ids, mass, weight, |a, b| {
            comparisons += 1;
            by_logit(&logits, *a, *b)
        });
        assert_eq!(ids.iter().map(|&id| rank(id)).collect::<Vec<_>>(), (0..ids.len() as u64).collect::<Vec<_>>());
        assert!((20..60).contains(&ids.len()), "{}", ids.len());
        // Sorting would take 17 comparisons a token.
        assert!(comparisons < 6 * vocab as usize, "{comparisons} comparisons");
    }

    proptest! {
        #[test]
        fn selections_equal_those_of_a_full_sort(
            // Few values, so that ties are common.
            logits in prop::collection::vec((-4i32..4).prop_map(|n| n as f32 / 2.0), 1..3000),
            count in prop_oneof![0usize..25, 0..3 * FEW],
            share in 0.01f64..1.0,
        ) {
            let mut sorted: Vec<TokenId> = (0..logits.len() as TokenId).collect();
            sorted.sort_by(|a, b| by_logit(&logits, *a, *b));
            let mut found = Vec::new();
            best(&logits, count, &mut found);
            prop_assert_eq!(&found[..], &sorted[..count.min(sorted.len())]);
            prop_assert_eq!(likeliest(&logits), Some(sorted[0]));
            let weight = |id: TokenId| f64::from(logits[id as usize]).exp();
            let mass = share * sorted.iter().map(|&id| weight(id)).sum::<f64>();
            let mut reached = 0.0;
            let keep = sorted.iter().position(|&id| { reached += weight(id); reached >= mass });
            let mut ids: Vec<TokenId> = (0..logits.len() as TokenId).rev().collect();
            nucleus(&mut ids, mass, weight, |a, b| by_logit(&logits, *a, *b));
            prop_assert_eq!(&ids[..], &sorted[..keep.map_or(sorted.len(), |last| last + 1)]);
        }
    }
}
