use super::*;

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
    let ids = candidates(&logits, &params, |_| 1.0);
    assert_eq!(ids.len(), 4500);
    assert_eq!(ids.last(), Some(&4499));
}
