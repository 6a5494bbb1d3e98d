//! Bloom: layer norms, ALiBi, one matrix of queries, keys and values.
//!
//! llama.cpp's converter sorts that matrix's rows: all queries, all keys, all values. No key stands for
//! `apply_residual_connection_post_layernorm`, which llama.cpp has not: files are read as if it were false.
use super::Reader;
use crate::Result;
use crate::spec::{LayerSpec, Norm, NormKind, bloom};

impl Reader<'_> {
    /// Its layers, and the norm that all parts have.
    pub(super) fn bloom_layers(&self, hidden: usize, count: usize) -> Result<(Vec<LayerSpec>, Norm)> {
        let heads = self.size("attention.head_count", None)?;
        let kv_heads = self.size("attention.head_count_kv", Some(heads))?;
        if !hidden.is_multiple_of(heads) || kv_heads != heads {
            let reason = format!("{heads} query and {kv_heads} key heads are not supported with a width of {hidden}");
            return Err(self.config.error(&self.key("attention.head_count"), reason));
        }
        let eps = self.number("attention.layer_norm_epsilon", Some(1e-5))? as f32;
        let norm = Norm { kind: NormKind::Layer, eps };
        let intermediate = self.size("feed_forward_length", Some(4 * hidden))?;
        let layer = bloom::layer(hidden, heads, intermediate, norm, false);
        Ok((vec![layer; count], norm))
    }
}
