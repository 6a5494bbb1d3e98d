//! The tokens that may be drawn, with their weights. Each weight is computed once.
use super::best::{best, by_logit, nucleus};
use moesaic_types::{SamplingParams, TokenId};

/// Candidates of one token after another; the memory is kept.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    ids: Vec<TokenId>,
    /// By id; only those of `ids` are of this token.
    weights: Vec<f64>,
}

impl Candidates {
    /// A token at `share`, in [0, 1), of the weights; `likeliest` is the one whose weight is 1.
    pub(super) fn draw(&mut self, logits: &[f32], params: &SamplingParams, likeliest: TokenId, share: f64) -> TokenId {
        let mut left = share * self.select(logits, params, logits[likeliest as usize]);
        for &id in &self.ids {
            let weight = self.weights[id as usize];
            if left < weight {
                return id;
            }
            left -= weight;
        }
        // Rounding can leave a rest after the last candidate.
        self.ids.last().copied().unwrap_or(likeliest)
    }

    /// Takes the tokens left by top-k, top-p and min-p; best first if top-k or top-p cuts, else by id. Their total.
    /// A weight that underflows changes neither sums nor draws: such tokens are left out.
    pub(super) fn select(&mut self, logits: &[f32], params: &SamplingParams, largest: f32) -> f64 {
        let Self { ids, weights } = self;
        ids.clear();
        let allowed = || logits.iter().filter(|logit| **logit > f32::NEG_INFINITY).count();
        match params.top_k.map(|k| k.max(1) as usize) {
            Some(k) if k < allowed() => best(logits, k, ids),
            _ => ids.extend(0..logits.len() as TokenId),
        }
        weights.resize(logits.len(), 0.0);
        let (largest, temperature) = (f64::from(largest), f64::from(params.temperature));
        let mut total = 0.0;
        ids.retain(|&id| {
            let weight = ((f64::from(logits[id as usize]) - largest) / temperature).exp();
            weights[id as usize] = weight;
            total += weight;
            weight > 0.0
        });
        let weight = |id: TokenId| weights[id as usize];
        if params.top_p < 1.0 {
            nucleus(ids, f64::from(params.top_p) * total, weight, |a, b| by_logit(logits, *a, *b));
            total = ids.iter().map(|&id| weight(id)).sum();
        }
        if params.min_p > 0.0 {
            ids.retain(|&id| weight(id) >= f64::from(params.min_p));
            total = ids.iter().map(|&id| weight(id)).sum();
        }
        total
    }

    #[cfg(test)]
    pub(super) fn ids(&self) -> &[TokenId] {
        &self.ids
    }
}
