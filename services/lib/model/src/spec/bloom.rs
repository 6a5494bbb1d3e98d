//! What Bloom's layers are, whichever file describes them.
use super::{Activation, Attention, Dense, Ffn, Gqa, LayerSpec, Norm, Position, QkNorm};

/// A layer of `heads` query, key and value heads over `hidden` columns.
pub(super) fn layer(
    hidden: usize,
    heads: usize,
    intermediate: usize,
    norm: Norm,
    residual_after_norm: bool,
) -> LayerSpec {
    let head_dim = hidden / heads;
    LayerSpec {
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
        ffn: Ffn::Dense(Dense { intermediate, activation: Activation::GeluTanh, gated: false, bias: true }),
        residual_scale: 1.0,
        residual_after_norm,
    }
}
