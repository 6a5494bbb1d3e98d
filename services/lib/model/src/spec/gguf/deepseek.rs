//! DeepSeek-V2 and V3 (`deepseek2`): latent attention and the gates of both.
//!
//! Files up to April 2025 have the latent's up projection as Hugging Face does (`attn_kv_b`); later ones have it for
//! each head, the keys' part turned (`attn_k_b`, `attn_v_b`). Files without groups of experts run without, as in
//! llama.cpp.
use super::{DEEPSEEK, Reader};
use crate::Result;
use crate::spec::rope::{Rope, yarn_mscale};
use crate::spec::{GatePolicy, Groups, Mla, Norm, NormKind, RopeScaling};

/// Values of `expert_gating_func`.
const UNSAID: usize = 0;
const SOFTMAX: usize = 1;
const SIGMOID: usize = 2;

impl Reader<'_> {
    pub(super) fn mla(&self, max_context: usize) -> Result<Mla> {
        let heads = self.size("attention.head_count", None)?;
        let temperature = self.key("attention.temperature_scale");
        if self.config.number(&temperature, Some(0.0))? != 0.0 {
            return Err(self.config.error(&temperature, "is not supported".into()));
        }
        // The later files' plain lengths are those of the cached latent.
        let length = |of_heads: &str, plain: &str| match self.nonzero_size(of_heads)? {
            Some(length) => Ok(length),
            None => self.size(plain, None),
        };
        let key_dim = length("attention.key_length_mla", "attention.key_length")?;
        let v_dim = length("attention.value_length_mla", "attention.value_length")?;
        let rope_dim = self.size("rope.dimension_count", None)?;
        if !rope_dim.is_multiple_of(2) || rope_dim >= key_dim {
            let reason = format!("{rope_dim} is odd or not below the key's {key_dim}");
            return Err(self.config.error(&self.key("rope.dimension_count"), reason));
        }
        let scaling = self.scaling(max_context)?;
        let temperature = match (scaling, self.yarn_multiplier()?) {
            (RopeScaling::Yarn { factor, .. }, Some(multiplier)) => yarn_mscale(factor, multiplier).powi(2),
            _ => 1.0,
        };
        Ok(Mla {
            heads,
            q_rank: self.nonzero_size("attention.q_lora_rank")?,
            kv_rank: self.size("attention.kv_lora_rank", None)?,
            nope_dim: key_dim - rope_dim,
            rope_dim,
            v_dim,
            scale: (temperature / (key_dim as f64).sqrt()) as f32,
            rope: Rope { dims: rope_dim, theta: self.theta()?, interleaved: true, scaling, divisors: None },
            // The latents' norms keep their default, whatever the model's is (llama.cpp gives them the model's).
            norm: Norm { kind: NormKind::Rms, eps: 1e-6 },
            bias: false,
        })
    }

    /// `mscale_all_dim`, a tenth of which is in the file; `None` where the file or the family has none.
    fn yarn_multiplier(&self) -> Result<Option<f64>> {
        if self.architecture != DEEPSEEK {
            return Ok(None);
        }
        Ok(self.nonzero("rope.scaling.yarn_log_multiplier")?.map(|tenth| tenth * 10.0))
    }

    /// What YaRN multiplies cosines and sines by. DeepSeek's `mscale` equals its `mscale_all_dim`: one cancels the other.
    pub(super) fn yarn_temperature(&self, factor: f64) -> Result<f64> {
        Ok(if self.yarn_multiplier()?.is_some() { 1.0 } else { yarn_mscale(factor, 1.0) })
    }

    pub(super) fn deepseek_gate(&self, experts: usize, top_k: usize, normalize: bool) -> Result<GatePolicy> {
        let scale = self.nonzero("expert_weights_scale")?.unwrap_or(1.0) as f32;
        let count = self.nonzero_size("expert_group_count")?.unwrap_or(1);
        let keep = self.nonzero_size("expert_group_used_count")?.unwrap_or(count);
        if !experts.is_multiple_of(count) {
            let key = self.key("expert_group_count");
            return Err(self.config.error(&key, format!("{count} does not divide {experts} experts")));
        }
        if keep > count || experts / count * keep < top_k {
            let reason = format!("{keep} of {count} groups cannot give {top_k} experts");
            return Err(self.config.error(&self.key("expert_group_used_count"), reason));
        }
        let groups = (keep < count).then_some(Groups { count, keep });
        let key = self.key("expert_gating_func");
        match self.config.count(&key, Some(UNSAID))? {
            // Files of DeepSeek-V2 do not say it.
            UNSAID | SOFTMAX => Ok(GatePolicy::SoftmaxTopK { top_k, normalize, groups, scale }),
            SIGMOID => Ok(GatePolicy::Sigmoid { top_k, normalize, groups, scale }),
            other => Err(self.config.error(&key, format!("{other} is not {SOFTMAX} (softmax) or {SIGMOID} (sigmoid)"))),
        }
    }
}
