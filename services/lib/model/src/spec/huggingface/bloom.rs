//! Bloom: layer norms, ALiBi, a fused query, key and value.
use super::layer_count;
use crate::Result;
use crate::spec::config::Config;
use crate::spec::{ModelSpec, Norm, NormKind, bloom, names};

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
    let residual_after_norm = config.flag("apply_residual_connection_post_layernorm", false)?;
    let layer = bloom::layer(hidden, heads, 4 * hidden, norm, residual_after_norm);
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
