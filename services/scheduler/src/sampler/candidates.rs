//! The tokens that may be drawn, with their weights. Each weight is computed once, many at a time.
use super::best::{best, by_logit, nucleus};
use moesaic_kernels::Isa;
use moesaic_kernels::likelihood::{RUN, weigh};
use moesaic_types::{SamplingParams, TokenId};

/// Candidates of one token after another; the memory is kept.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    ids: Vec<TokenId>,
    /// By id; where only a few tokens are left, only those of `ids` are of this token.
    weights: Vec<f64>,
    /// Sums of runs of them.
    sums: Vec<f64>,
}

impl Candidates {
    /// A token at `share`, in [0, 1), of the weights; `likeliest` is the one whose weight is 1.
    pub(super) fn draw(&mut self, logits: &[f32], params: &SamplingParams, likeliest: TokenId, share: f64) -> TokenId {
        let largest = logits[likeliest as usize];
        if params.top_k.is_none() && params.top_p >= 1.0 && params.min_p <= 0.0 {
            let total = self.weigh_all(logits, params, largest);
            return self.find(share * total).unwrap_or(likeliest);
        }
        let mut left = share * self.select(logits, params, largest);
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

    /// All tokens' weights and their total.
    fn weigh_all(&mut self, logits: &[f32], params: &SamplingParams, largest: f32) -> f64 {
        self.weights.resize(logits.len(), 0.0);
        self.sums.resize(logits.len().div_ceil(RUN), 0.0);
        let temperature = f64::from(params.temperature);
        weigh(Isa::best(), logits, f64::from(largest), temperature, &mut self.weights, &mut self.sums)
    }

    /// The token at `left` of all weights, by runs first.
    fn find(&self, mut left: f64) -> Option<TokenId> {
        // Rounding can leave a rest after the last run, and after a run's last token.
        let last = self.sums.iter().rposition(|sum| *sum > 0.0)?;
        let mut run = 0;
        while run < last && left >= self.sums[run] {
            left -= self.sums[run];
            run += 1;
        }
        let first = run * RUN;
        let weights = &self.weights[first..(first + RUN).min(self.weights.len())];
        let reached = |weight: &f64| {
            let reached = left < *weight;
            left -= weight;
            reached
        };
        let at = weights.iter().position(reached).or_else(|| weights.iter().rposition(|weight| *weight > 0.0))?;
        Some((first + at) as TokenId)
    }

    /// Takes the tokens left by top-k, top-p and min-p; best first if top-k or top-p cuts, else by id. Their total.
    /// A weight that underflows changes neither sums nor draws: such tokens are left out.
    pub(super) fn select(&mut self, logits: &[f32], params: &SamplingParams, largest: f32) -> f64 {
        let allowed = || logits.iter().filter(|logit| **logit > f32::NEG_INFINITY).count();
        let few = params.top_k.map(|k| k.max(1) as usize).filter(|k| *k < allowed());
        self.ids.clear();
        let mut total = match few {
            Some(k) => {
                best(logits, k, &mut self.ids);
                self.weights.resize(logits.len(), 0.0);
                let (largest, temperature) = (f64::from(largest), f64::from(params.temperature));
                let weight = |id: TokenId| ((f64::from(logits[id as usize]) - largest) / temperature).exp();
                self.ids.iter().for_each(|&id| self.weights[id as usize] = weight(id));
                self.ids.iter().map(|&id| self.weights[id as usize]).sum()
            }
            None => {
                self.ids.extend(0..logits.len() as TokenId);
                self.weigh_all(logits, params, largest)
            }
        };
        let Self { ids, weights, .. } = self;
        ids.retain(|&id| weights[id as usize] > 0.0);
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
