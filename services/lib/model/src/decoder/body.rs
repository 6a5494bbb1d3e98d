//! A model's weights in the order of loading.
use super::layer::{Layer, load_norm};
use super::stack::load_layers;
use super::weights::{Role, Weights};
use crate::Result;
use crate::backend::Loader;
use crate::source::WeightSource;
use crate::spec::{ModelSpec, Rope};
use moesaic_types::WeightFormat;
use std::ops::Range;

/// Everything but the experts.
pub(super) struct Body<L: Loader> {
    pub(super) embedding: L::Embedding,
    pub(super) embedding_norm: Option<L::Norm>,
    pub(super) layers: Vec<Layer<L>>,
    /// The layers' distinct rotations.
    pub(super) ropes: Vec<Rope>,
    pub(super) final_norm: L::Norm,
    pub(super) output: L::Linear,
}

impl<L: Loader> Body<L> {
    /// Loads it with the layers `range`; `progress(layers done, layers in all)`.
    pub(super) fn load(
        weights: &Weights<'_>,
        loader: &L,
        range: Range<usize>,
        progress: &dyn Fn(usize, usize),
    ) -> Result<Self> {
        let spec = weights.spec();
        let names = &spec.names;
        let embedding =
            loader.load_embedding(weights.matrix(names.embedding, spec.vocab, spec.hidden, Role::Precise)?)?;
        let embedding_norm = match spec.embedding_norm {
            Some(norm) => Some(load_norm(weights, loader, norm, names.embedding_norm, spec.hidden)?),
            None => None,
        };
        let final_norm = load_norm(weights, loader, spec.final_norm, names.final_norm, spec.hidden)?;
        let output = if spec.tied {
            loader.tie(&embedding)?
        } else {
            loader.load_linear(weights.matrix(names.output, spec.vocab, spec.hidden, Role::Output)?, None)?
        };
        let (layers, ropes) = load_layers(weights, loader, range, progress)?;
        Ok(Self { embedding, embedding_norm, layers, ropes, final_norm, output })
    }
}

/// Hands every weight of a model to `loader`, experts last and one after another, each matrix in the format that
/// loading with `format` (`None`: as it is stored) would hold it in.
///
/// # Errors
/// What the source and the loader say.
pub fn visit<L: Loader>(
    source: &dyn WeightSource,
    spec: &ModelSpec,
    format: Option<WeightFormat>,
    loader: &L,
) -> Result<()> {
    let weights = Weights::new(source, spec, format);
    Body::load(&weights, loader, 0..spec.layers.len(), &|_, _| {})?;
    for layer in spec.moe_layers() {
        let Some(moe) = spec.moe(layer) else { continue };
        for expert in 0..moe.experts {
            loader.load_ffn(weights.expert(layer, expert, moe.experts, moe.expert)?)?;
        }
    }
    Ok(())
}
