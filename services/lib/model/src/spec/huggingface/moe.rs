//! The experts of a family and the policy of its gate.
use super::{MAX_EXPERTS, Reader};
use crate::Result;
use crate::spec::{Dense, GatePolicy, Groups, Moe, Shared};

impl Reader<'_> {
    pub(super) fn moe(&self) -> Result<Moe> {
        let config = &self.config;
        let experts_key = config.first_of(&["num_experts", "num_local_experts", "n_routed_experts"]);
        let experts = config.size(experts_key, None)?;
        let top_k = config.size("num_experts_per_tok", None)?;
        if experts > MAX_EXPERTS {
            return Err(config.error(experts_key, format!("{experts} is above {MAX_EXPERTS}")));
        }
        if top_k > experts {
            return Err(config.error("num_experts_per_tok", format!("{top_k} is above {experts} experts")));
        }
        let intermediate_key = match self.family {
            "olmoe" | "mixtral" | "granitemoe" | "gpt_oss" => "intermediate_size",
            _ => "moe_intermediate_size",
        };
        let intermediate = config.size(intermediate_key, None)?;
        let shared = match self.family {
            "qwen2_moe" => {
                let form = self.network(config.size("shared_expert_intermediate_size", None)?);
                Some(Shared { form, gated: true })
            }
            "deepseek_v2" | "deepseek_v3" | "glm4_moe" => match config.count("n_shared_experts", Some(0))? {
                0 => None,
                count => Some(Shared { form: self.biased(self.network(intermediate * count))?, gated: false }),
            },
            _ => None,
        };
        Ok(Moe {
            experts,
            expert: Dense { bias: self.family == "gpt_oss", ..self.network(intermediate) },
            gate: self.gate(experts, top_k)?,
            gate_bias: self.family == "gpt_oss",
            choice_bias: matches!(self.family, "deepseek_v3" | "glm4_moe"),
            shared,
        })
    }

    fn gate(&self, experts: usize, top_k: usize) -> Result<GatePolicy> {
        let config = &self.config;
        match config.text("moe_gate")? {
            None => {}
            Some("dynamic_top_p") => {
                let p = config.positive("moe_top_p", None)? as f32;
                if p > 1.0 {
                    return Err(config.error("moe_top_p", format!("{p} is above 1")));
                }
                let max_active = config.size("moe_max_active", Some(top_k))?.min(experts);
                return Ok(GatePolicy::DynamicTopP { p, max_active });
            }
            Some(other) => {
                let reason = format!("'{other}' is not supported; leave it out or use 'dynamic_top_p'");
                return Err(config.error("moe_gate", reason));
            }
        }
        let scale = config.number("routed_scaling_factor", Some(1.0))? as f32;
        let normalize = || config.flag("norm_topk_prob", false);
        Ok(match self.family {
            "mixtral" => GatePolicy::SoftmaxTopK { top_k, normalize: true, groups: None, scale: 1.0 },
            "gpt_oss" | "granitemoe" => GatePolicy::TopKSoftmax { top_k },
            "deepseek_v3" | "glm4_moe" => {
                self.only("scoring_func", "sigmoid")?;
                self.only("topk_method", "noaux_tc")?;
                GatePolicy::Sigmoid { top_k, normalize: normalize()?, groups: self.groups(experts, top_k)?, scale }
            }
            "deepseek_v2" => {
                self.only("scoring_func", "softmax")?;
                let groups = match config.text("topk_method")?.unwrap_or("greedy") {
                    "greedy" => None,
                    "group_limited_greedy" => self.groups(experts, top_k)?,
                    other => {
                        let reason = format!("'{other}' is not 'greedy' or 'group_limited_greedy'");
                        return Err(config.error("topk_method", reason));
                    }
                };
                // The weights are never normalized, whatever `norm_topk_prob` says.
                GatePolicy::SoftmaxTopK { top_k, normalize: false, groups, scale }
            }
            _ => GatePolicy::SoftmaxTopK { top_k, normalize: normalize()?, groups: None, scale: 1.0 },
        })
    }

    /// Refuses any value of a text but one.
    fn only(&self, key: &str, supported: &str) -> Result<()> {
        match self.config.text(key)? {
            Some(other) if other != supported => {
                let reason = format!("'{other}' is not supported with {}, only '{supported}'", self.family);
                Err(self.config.error(key, reason))
            }
            _ => Ok(()),
        }
    }

    fn groups(&self, experts: usize, top_k: usize) -> Result<Option<Groups>> {
        let config = &self.config;
        let count = config.size("n_group", Some(1))?;
        let keep = config.size("topk_group", Some(count))?;
        if !experts.is_multiple_of(count) {
            return Err(config.error("n_group", format!("{count} does not divide {experts} experts")));
        }
        if keep > count || experts / count * keep < top_k {
            return Err(config.error("topk_group", format!("{keep} of {count} groups cannot give {top_k} experts")));
        }
        Ok((keep < count).then_some(Groups { count, keep }))
    }
}
