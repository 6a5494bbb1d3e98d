//! How families call their tensors. `{l}` stands for the layer, `{e}` for the expert. Matrices are named without
//! `.weight` and `.bias`.

/// Tensor names of one family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Names {
    /// Token embedding.
    pub embedding: &'static str,
    /// Norm of the embedding.
    pub embedding_norm: &'static str,
    /// Norm before the logits.
    pub final_norm: &'static str,
    /// Output matrix.
    pub output: &'static str,
    /// Norm before attention.
    pub attention_norm: &'static str,
    /// Norm before the feed-forward part.
    pub ffn_norm: &'static str,
    /// Query, key and value, separate or fused.
    pub qkv: QkvNames,
    /// Output of attention.
    pub o: &'static str,
    /// Norm of queries.
    pub q_norm: &'static str,
    /// Norm of keys.
    pub k_norm: &'static str,
    /// Attention sinks (whole name).
    pub sinks: &'static str,
    /// MLA: query down, norm, up.
    pub q_latent: [&'static str; 3],
    /// MLA: latent down (with the rotary key), norm, up.
    pub kv_latent: [&'static str; 3],
    /// MLA: the keys' and the values' part of the latent's up as stacks `[heads, rank, nope]` and `[heads, v, rank]`, in
    /// families whose files may have them in its place.
    pub kv_by_head: Option<[&'static str; 2]>,
    /// The dense network: gate, up, down.
    pub dense: [&'static str; 3],
    /// The shared expert: gate, up, down.
    pub shared: [&'static str; 3],
    /// The shared expert's own gate.
    pub shared_gate: &'static str,
    /// The gate.
    pub gate: &'static str,
    /// The bias that enters the choice alone (whole name).
    pub choice_bias: &'static str,
    /// The experts.
    pub experts: ExpertNames,
}

impl Names {
    /// The names in a checkpoint that was saved without its output matrix: they lack the first part (`model.`,
    /// `transformer.`).
    pub fn without_prefix(self) -> Self {
        let cut = |name: &'static str| {
            ["model.", "transformer."].iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
        };
        let experts = match self.experts {
            ExpertNames::Separate(names) => ExpertNames::Separate(names.map(cut)),
            ExpertNames::Stacked(names) => ExpertNames::Stacked(names.map(cut)),
            ExpertNames::Fused(names) => ExpertNames::Fused(names.map(cut)),
            ExpertNames::Interleaved(names) => ExpertNames::Interleaved(names.map(cut)),
        };
        let qkv = match self.qkv {
            QkvNames::Separate(names) => QkvNames::Separate(names.map(cut)),
            QkvNames::FusedByHead(name) => QkvNames::FusedByHead(cut(name)),
            QkvNames::FusedByPart(name) => QkvNames::FusedByPart(cut(name)),
        };
        Self {
            embedding: cut(self.embedding),
            embedding_norm: cut(self.embedding_norm),
            final_norm: cut(self.final_norm),
            output: self.output,
            attention_norm: cut(self.attention_norm),
            ffn_norm: cut(self.ffn_norm),
            qkv,
            o: cut(self.o),
            q_norm: cut(self.q_norm),
            k_norm: cut(self.k_norm),
            sinks: cut(self.sinks),
            q_latent: self.q_latent.map(cut),
            kv_latent: self.kv_latent.map(cut),
            kv_by_head: self.kv_by_head.map(|names| names.map(cut)),
            dense: self.dense.map(cut),
            shared: self.shared.map(cut),
            shared_gate: cut(self.shared_gate),
            gate: cut(self.gate),
            choice_bias: cut(self.choice_bias),
            experts,
        }
    }
}

/// Query, key and value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkvNames {
    /// Three matrices.
    Separate([&'static str; 3]),
    /// One matrix; of each head first the query's rows, then the key's, then the value's.
    FusedByHead(&'static str),
    /// One matrix; the queries' rows, then the keys', then the values'.
    FusedByPart(&'static str),
}

/// How the experts' matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertNames {
    /// A matrix each: gate, up, down.
    Separate([&'static str; 3]),
    /// Three tensors `[experts, rows, cols]`: gate, up, down.
    Stacked([&'static str; 3]),
    /// `[experts, 2 inner, hidden]`, the gate's rows first, and `[experts, hidden, inner]` (whole names are these
    /// plus `.weight`).
    Fused([&'static str; 2]),
    /// `[experts, hidden, 2 inner]`, gate and up in turns, and `[experts, inner, hidden]`; whole names, biases with
    /// `_bias`.
    Interleaved([&'static str; 2]),
}

/// Llama's names, from which the other families differ.
pub const LLAMA: Names = Names {
    embedding: "model.embed_tokens",
    embedding_norm: "",
    final_norm: "model.norm",
    output: "lm_head",
    attention_norm: "model.layers.{l}.input_layernorm",
    ffn_norm: "model.layers.{l}.post_attention_layernorm",
    qkv: QkvNames::Separate([
        "model.layers.{l}.self_attn.q_proj",
        "model.layers.{l}.self_attn.k_proj",
        "model.layers.{l}.self_attn.v_proj",
    ]),
    o: "model.layers.{l}.self_attn.o_proj",
    q_norm: "model.layers.{l}.self_attn.q_norm",
    k_norm: "model.layers.{l}.self_attn.k_norm",
    sinks: "model.layers.{l}.self_attn.sinks",
    q_latent: [
        "model.layers.{l}.self_attn.q_a_proj",
        "model.layers.{l}.self_attn.q_a_layernorm",
        "model.layers.{l}.self_attn.q_b_proj",
    ],
    kv_latent: [
        "model.layers.{l}.self_attn.kv_a_proj_with_mqa",
        "model.layers.{l}.self_attn.kv_a_layernorm",
        "model.layers.{l}.self_attn.kv_b_proj",
    ],
    kv_by_head: None,
    dense: ["model.layers.{l}.mlp.gate_proj", "model.layers.{l}.mlp.up_proj", "model.layers.{l}.mlp.down_proj"],
    shared: [
        "model.layers.{l}.mlp.shared_experts.gate_proj",
        "model.layers.{l}.mlp.shared_experts.up_proj",
        "model.layers.{l}.mlp.shared_experts.down_proj",
    ],
    shared_gate: "model.layers.{l}.mlp.shared_expert_gate",
    gate: "model.layers.{l}.mlp.gate",
    choice_bias: "model.layers.{l}.mlp.gate.e_score_correction_bias",
    experts: ExpertNames::Separate([
        "model.layers.{l}.mlp.experts.{e}.gate_proj",
        "model.layers.{l}.mlp.experts.{e}.up_proj",
        "model.layers.{l}.mlp.experts.{e}.down_proj",
    ]),
};

/// Qwen2-MoE.
pub const QWEN2_MOE: Names = Names {
    shared: [
        "model.layers.{l}.mlp.shared_expert.gate_proj",
        "model.layers.{l}.mlp.shared_expert.up_proj",
        "model.layers.{l}.mlp.shared_expert.down_proj",
    ],
    ..LLAMA
};

/// Mixtral.
pub const MIXTRAL: Names = Names {
    gate: "model.layers.{l}.block_sparse_moe.gate",
    experts: ExpertNames::Separate([
        "model.layers.{l}.block_sparse_moe.experts.{e}.w1",
        "model.layers.{l}.block_sparse_moe.experts.{e}.w3",
        "model.layers.{l}.block_sparse_moe.experts.{e}.w2",
    ]),
    ..LLAMA
};

/// Granite-MoE.
pub const GRANITE_MOE: Names = Names {
    gate: "model.layers.{l}.block_sparse_moe.router.layer",
    experts: ExpertNames::Fused([
        "model.layers.{l}.block_sparse_moe.input_linear",
        "model.layers.{l}.block_sparse_moe.output_linear",
    ]),
    ..LLAMA
};

/// GPT-OSS.
pub const GPT_OSS: Names = Names {
    gate: "model.layers.{l}.mlp.router",
    experts: ExpertNames::Interleaved([
        "model.layers.{l}.mlp.experts.gate_up_proj",
        "model.layers.{l}.mlp.experts.down_proj",
    ]),
    ..LLAMA
};

/// Bloom.
pub const BLOOM: Names = Names {
    embedding: "transformer.word_embeddings",
    embedding_norm: "transformer.word_embeddings_layernorm",
    final_norm: "transformer.ln_f",
    attention_norm: "transformer.h.{l}.input_layernorm",
    ffn_norm: "transformer.h.{l}.post_attention_layernorm",
    qkv: QkvNames::FusedByHead("transformer.h.{l}.self_attention.query_key_value"),
    o: "transformer.h.{l}.self_attention.dense",
    dense: ["", "transformer.h.{l}.mlp.dense_h_to_4h", "transformer.h.{l}.mlp.dense_4h_to_h"],
    ..LLAMA
};

/// GGUF files.
pub const GGUF: Names = Names {
    embedding: "token_embd",
    embedding_norm: "token_embd_norm",
    final_norm: "output_norm",
    output: "output",
    attention_norm: "blk.{l}.attn_norm",
    ffn_norm: "blk.{l}.ffn_norm",
    qkv: QkvNames::Separate(["blk.{l}.attn_q", "blk.{l}.attn_k", "blk.{l}.attn_v"]),
    o: "blk.{l}.attn_output",
    q_norm: "blk.{l}.attn_q_norm",
    k_norm: "blk.{l}.attn_k_norm",
    sinks: "blk.{l}.attn_sinks.weight",
    q_latent: ["blk.{l}.attn_q_a", "blk.{l}.attn_q_a_norm", "blk.{l}.attn_q_b"],
    kv_latent: ["blk.{l}.attn_kv_a_mqa", "blk.{l}.attn_kv_a_norm", "blk.{l}.attn_kv_b"],
    choice_bias: "blk.{l}.exp_probs_b.bias",
    dense: ["blk.{l}.ffn_gate", "blk.{l}.ffn_up", "blk.{l}.ffn_down"],
    shared: ["blk.{l}.ffn_gate_shexp", "blk.{l}.ffn_up_shexp", "blk.{l}.ffn_down_shexp"],
    shared_gate: "blk.{l}.ffn_gate_inp_shexp",
    gate: "blk.{l}.ffn_gate_inp",
    experts: ExpertNames::Stacked(["blk.{l}.ffn_gate_exps", "blk.{l}.ffn_up_exps", "blk.{l}.ffn_down_exps"]),
    ..LLAMA
};

/// GGUF files of GPT-OSS.
pub const GGUF_GPT_OSS: Names = Names { ffn_norm: "blk.{l}.post_attention_norm", ..GGUF };

/// GGUF files of DeepSeek-V2 and V3 whose keys and values have a matrix for each head.
pub const GGUF_MLA_BY_HEAD: Names = Names { kv_by_head: Some(["blk.{l}.attn_k_b", "blk.{l}.attn_v_b"]), ..GGUF };

/// GGUF files of Bloom.
pub const GGUF_BLOOM: Names = Names { qkv: QkvNames::FusedByPart("blk.{l}.attn_qkv"), ..GGUF };

/// Fills a name's layer in.
pub fn at_layer(name: &str, layer: usize) -> String {
    name.replace("{l}", &layer.to_string())
}

/// Fills a name's layer and expert in.
pub fn at_expert(name: &str, layer: usize, expert: usize) -> String {
    at_layer(name, layer).replace("{e}", &expert.to_string())
}
