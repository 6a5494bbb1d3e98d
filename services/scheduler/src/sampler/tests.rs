use super::best::{by_logit, nucleus};
use super::*;
use proptest::prelude::*;

/// With memory of its own.
fn sample(
    logits: &mut [f32],
    params: &SamplingParams,
    seen: Option<&Seen>,
    allowed: Allowed<'_>,
    position: usize,
) -> Result<TokenId> {
    super::sample(logits, params, seen, allowed, position, &mut Scratch::default())
}

fn draws(logits: &[f32], params: &SamplingParams) -> BTreeMap<TokenId, usize> {
    let mut counts = BTreeMap::new();
    for position in 0..4000 {
        *counts
            .entry(sample(&mut logits.to_vec(), params, None, Allowed::default(), position).unwrap())
            .or_default() += 1;
    }
    counts
}

fn masked(mask: &[u32]) -> Allowed<'_> {
    Allowed { mask: Some(mask), ..Allowed::default() }
}

#[test]
fn greedy_takes_the_largest_and_ties_go_to_the_lowest_id() {
    let greedy = SamplingParams::greedy();
    assert_eq!(sample(&mut [0.0, 3.0, 3.0, 1.0], &greedy, None, Allowed::default(), 0), Ok(1));
    assert_eq!(sample(&mut [-0.5, f32::NEG_INFINITY], &greedy, None, Allowed::default(), 0), Ok(0));
}

#[test]
fn draws_follow_the_probabilities_and_the_temperature() {
    let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
    let counts = draws(&logits, &SamplingParams { seed: 7, ..Default::default() });
    for (id, share) in [(0, 0.5), (1, 0.3), (2, 0.2)] {
        assert!((counts[&id] as f64 / 4000.0 - share).abs() < 0.03, "{counts:?}");
    }
    let cold = draws(&logits, &SamplingParams { temperature: 0.1, ..Default::default() });
    assert!(cold[&0] > 3900);
}

#[test]
fn cuts_keep_the_documented_sets() {
    let logits = [0.1f32.ln(), 0.4f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
    let ids = |params: SamplingParams| draws(&logits, &params).into_keys().collect::<Vec<_>>();
    assert_eq!(ids(SamplingParams { top_k: Some(2), ..Default::default() }), [1, 2]);
    assert_eq!(ids(SamplingParams { top_p: 0.65, ..Default::default() }), [1, 2]);
    assert_eq!(ids(SamplingParams { top_p: 0.75, ..Default::default() }), [1, 2, 3]);
    assert_eq!(ids(SamplingParams { min_p: 0.45, ..Default::default() }), [1, 2, 3]);
    assert_eq!(ids(SamplingParams { top_p: 0.01, ..Default::default() }), [1]);
}

#[test]
fn penalties_bias_and_mask_change_the_choice() {
    let mut params = SamplingParams::greedy();
    let seen = Seen::new(&[2, 0], 1);
    params.repetition_penalty = 2.0;
    assert_eq!(sample(&mut [1.0, 0.7, 1.2], &params, Some(&seen), Allowed::default(), 0), Ok(1));
    assert_eq!(sample(&mut [-1.0, -1.5, -1.1], &params, Some(&seen), Allowed::default(), 0), Ok(1));
    params.repetition_penalty = 1.0;
    params.presence_penalty = 0.5;
    assert_eq!(sample(&mut [1.0, 0.7, 0.0], &params, Some(&seen), Allowed::default(), 0), Ok(1), "0 is output");
    assert_eq!(sample(&mut [0.0, 0.7, 1.0], &params, Some(&seen), Allowed::default(), 0), Ok(2), "2 is prompt only");
    params.presence_penalty = 0.0;
    params.frequency_penalty = 0.2;
    let mut often = seen.clone();
    assert_eq!(sample(&mut [1.0, 0.7, 0.0], &params, Some(&often), Allowed::default(), 0), Ok(0));
    often.push(0);
    assert_eq!(sample(&mut [1.0, 0.7, 0.0], &params, Some(&often), Allowed::default(), 0), Ok(1));
    let mut biased = SamplingParams::greedy();
    biased.logit_bias.insert(2, 5.0);
    assert_eq!(sample(&mut [1.0, 0.7, 0.0], &biased, None, Allowed::default(), 0), Ok(2));
    assert_eq!(sample(&mut [1.0, 0.7, 0.0], &biased, None, masked(&[0b010]), 0), Ok(1));
    assert!(sample(&mut [1.0, 0.7, 0.0], &biased, None, masked(&[0]), 0).is_err());
}

#[test]
fn tokens_that_are_held_back_come_only_where_nothing_else_can() {
    let greedy = SamplingParams::greedy();
    let choose = |allowed| sample(&mut [3.0, 2.0, 1.0], &greedy, None, allowed, 0);
    assert_eq!(choose(Allowed { mask: None, held_back: &[0, 9] }), Ok(1));
    assert_eq!(choose(Allowed { mask: Some(&[0b101]), held_back: &[0] }), Ok(2));
    assert_eq!(choose(Allowed { mask: Some(&[0b001]), held_back: &[0, 0] }), Ok(0), "the grammar's end");
    assert!(choose(Allowed { mask: Some(&[0]), held_back: &[0] }).is_err());
    let held_back = Allowed { mask: None, held_back: &[1] };
    for position in 0..200 {
        let drawn = sample(&mut [0.0, 5.0, 0.0], &SamplingParams::default(), None, held_back, position).unwrap();
        assert_ne!(drawn, 1);
    }
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|p| p.ln() + 3.0).collect();
    let token = log_probabilities(&logits, 1, 2);
    assert!((token.logprob.unwrap() - 0.25f32.ln()).abs() < 1e-6);
    assert_eq!(token.top_logprobs.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
    assert!(check(&[0.0, f32::NAN]).is_err() && check(&[f32::NEG_INFINITY]).is_err() && check(&logits).is_ok());
}

#[test]
fn a_wide_nucleus_is_found_beyond_the_guess() {
    let logits = vec![0.0f32; 5000];
    let params = SamplingParams { top_p: 0.9, ..Default::default() };
    let mut candidates = Candidates::default();
    assert_eq!(candidates.select(&logits, &params, 0.0), 4500.0);
    assert_eq!(candidates.ids().len(), 4500);
    assert_eq!(candidates.ids().last(), Some(&4499));
}

/// The definition of a draw, one step after another; each weight is computed whenever it is asked for.
fn defined(logits: &[f32], params: &SamplingParams, position: usize) -> TokenId {
    let order = |a: &TokenId, b: &TokenId| by_logit(logits, *a, *b);
    let all = 0..logits.len() as TokenId;
    let greedy = all.clone().min_by(order).unwrap();
    let largest = f64::from(logits[greedy as usize]);
    let weight = |id: TokenId| ((f64::from(logits[id as usize]) - largest) / f64::from(params.temperature)).exp();
    let mut ids: Vec<TokenId> = all.filter(|&id| logits[id as usize] > f32::NEG_INFINITY).collect();
    let top_k = params.top_k.map_or(ids.len(), |k| k as usize).max(1);
    if top_k < ids.len() {
        ids.sort_by(order);
        ids.truncate(top_k);
    }
    if params.top_p < 1.0 {
        let mass = f64::from(params.top_p) * ids.iter().map(|&id| weight(id)).sum::<f64>();
        nucleus(&mut ids, mass, weight, order);
    }
    if params.min_p > 0.0 {
        ids.retain(|&id| weight(id) >= f64::from(params.min_p));
    }
    let mut left = rng::uniform(params.seed, position as u64) * ids.iter().map(|&id| weight(id)).sum::<f64>();
    for &id in &ids {
        if weight(id) > 0.0 && left < weight(id) {
            return id;
        }
        left -= weight(id);
    }
    ids.iter().rev().copied().find(|&id| weight(id) > 0.0).unwrap_or(greedy)
}

proptest! {
    #[test]
    fn draws_are_those_of_the_definition_whatever_the_memory_held(
        // Ties, weights that underflow, forbidden tokens, both zeros.
        logits in prop::collection::vec(
            prop_oneof![
                8 => -30f32..30.0,
                4 => (-3i32..4).prop_map(|n| n as f32),
                1 => Just(-0.0),
                1 => Just(f32::NEG_INFINITY),
            ],
            1..1500,
        ),
        temperature in prop_oneof![Just(1.0f32), Just(1e-30), 0.001f32..0.1, 0.1f32..2.0],
        top_k in prop::option::of(prop_oneof![0u32..8, 0u32..1600]),
        top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..0.5],
        seed in any::<u64>(),
    ) {
        prop_assume!(check(&logits).is_ok());
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..Default::default() };
        let mut scratch = Scratch::default();
        for part in [&logits[..], &logits[..logits.len().div_ceil(2)], &logits[..]] {
            if check(part).is_err() {
                continue;
            }
            for position in 0..8 {
                let drawn = super::sample(&mut part.to_vec(), &params, None, Allowed::default(), position, &mut scratch);
                prop_assert_eq!(drawn, Ok(defined(part, &params, position)));
            }
        }
    }

    #[test]
    fn a_row_is_refused_for_any_number_that_is_none(
        mut row in prop::collection::vec(prop_oneof![-9f32..9.0, Just(f32::NEG_INFINITY)], 1..40),
        at in any::<prop::sample::Index>(),
        wrong in prop_oneof![Just(f32::NAN), Just(-f32::NAN), Just(f32::INFINITY)],
    ) {
        let finite = row.iter().any(|logit| logit.is_finite());
        prop_assert_eq!(check(&row).is_ok(), finite);
        *at.get_mut(&mut row) = wrong;
        prop_assert_eq!(check(&row), Err("NaN or infinity"));
    }

    #[test]
    fn a_mask_allows_just_its_bits(
        mask in prop::collection::vec(prop_oneof![any::<u32>(), Just(0), Just(u32::MAX)], 0..4),
        vocab in 1usize..130,
    ) {
        let is_allowed = |id: usize| mask.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
        let mut logits = vec![1.0; vocab];
        let chosen = sample(&mut logits, &SamplingParams::greedy(), None, masked(&mask), 0);
        prop_assert_eq!(chosen.ok(), (0..vocab).find(|&id| is_allowed(id)).map(|id| id as TokenId));
        prop_assert!(logits.iter().enumerate().all(|(id, logit)| (*logit == 1.0) == is_allowed(id)));
    }
}
