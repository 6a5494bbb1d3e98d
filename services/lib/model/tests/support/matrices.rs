//! Every matrix of a model, as a device would get it.
use moesaic_model::backend::{FfnMatrices, Loader, Matrix, TensorSlice};
use moesaic_model::decoder::visit;
use moesaic_model::spec::{self, Norm};
use moesaic_model::{Result, source};
use moesaic_types::WeightFormat;
use std::path::Path;

struct ForEach<'a> {
    slice: TensorSlice,
    take: &'a dyn Fn(Matrix<'_>) -> Result<()>,
}

impl Loader for ForEach<'_> {
    type Linear = ();
    type Embedding = ();
    type Norm = ();
    type Ffn = ();

    fn load_linear(&self, matrix: Matrix<'_>, _bias: Option<Vec<f32>>) -> Result<()> {
        (self.take)(matrix)
    }

    fn load_embedding(&self, matrix: Matrix<'_>) -> Result<()> {
        (self.take)(matrix)
    }

    fn tie(&self, _embedding: &()) -> Result<()> {
        Ok(())
    }

    fn load_norm(&self, _norm: Norm, _weight: Vec<f32>, _bias: Option<Vec<f32>>) -> Result<()> {
        Ok(())
    }

    fn load_ffn(&self, matrices: FfnMatrices<'_>) -> Result<()> {
        let FfnMatrices { gate, up, down, .. } = matrices.slice(self.slice)?;
        gate.into_iter().chain([up, down]).try_for_each(self.take)
    }
}

/// Hands out each matrix of the model at `path`, a slice of each feed-forward network.
pub fn each(
    path: &Path,
    format: Option<WeightFormat>,
    slice: TensorSlice,
    take: &dyn Fn(Matrix<'_>) -> Result<()>,
) -> Result<()> {
    let source = source::open(path)?;
    let spec = spec::read(path, &*source)?;
    visit(&*source, &spec, format, &ForEach { slice, take })
}
