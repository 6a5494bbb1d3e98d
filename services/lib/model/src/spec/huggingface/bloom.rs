//! Bloom: layer norms, ALiBi, a fused query, key and value.
use super::layer_count;
use crate::Result;
use crate::spec::config::Config;
use crate::spec::{
    Activation, Attention, Dense, Ffn, Gqa, LayerSpec, ModelSpec, Norm, NormKind, Position, QkNorm, names,
};

/// The architecture that a Bloom's `config.json` describes.
pub(super) fn read(config: &Config<'_>) -> Result<ModelSpec> {
    let hidden_key = config.first_of(&["n_embed", "hidden_size"]);
    let hidden = config.size(hidden_key, None)?;
    let heads_key = config.first_of(&["n_head", "num_attention_heads"]);
    let heads = config.size(heads_key, None)?;
    if !hidden.is_multiple_of(heads) {
        return Err(config.error(heads_key, format!("{heads} does not divide {hidden}")));
    }
    let norm = Norm { kind: NormKind::Layer, eps: config.positive("layer_norm_epsilon", None)? as f32 };
    let head_dim = hidden / heads;
    let layer = LayerSpec {
        attention_norm: norm,
        attention: Attention::Gqa(Gqa {
            heads,
            kv_heads: heads,
            head_dim,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            position: Position::Alibi,
            window: None,
            sinks: false,
            qkv_bias: true,
            output_bias: true,
            qk_norm: QkNorm::None,
            clip: None,
        }),
        ffn_norm: norm,
        ffn: Ffn::Dense(Dense { intermediate: 4 * hidden, activation: Activation::GeluTanh, gated: false, bias: true }),
        residual_scale: 1.0,
        residual_after_norm: config.flag("apply_residual_connection_post_layernorm", false)?,
    };
    let layers = layer_count(config, config.first_of(&["n_layer", "num_hidden_layers"]))?;
    Ok(ModelSpec {
        architecture: "bloom".into(),
        vocab: config.size("vocab_size", None)?,
        hidden,
        max_context: config.size("seq_length", Some(2048))?,
        embedding_scale: 1.0,
        embedding_norm: Some(norm),
        layers: vec![layer; layers],
        final_norm: norm,
        logits_scale: 1.0,
        tied: config.flag("tie_word_embeddings", false)?,
        names: names::BLOOM,
    })
}
