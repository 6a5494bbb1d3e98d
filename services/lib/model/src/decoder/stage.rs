//! A later pipeline stage: consecutive layers of a model.
use super::stack::{Stack, load_layers};
use super::weights::Weights;
use super::{LoadOptions, Part};
use crate::backend::{AttentionSequence, Backend};
use crate::expert_pool::ExpertPool;
use crate::pipeline::{StageInput, StageRunner, StageSequence};
use crate::runner::BlockIndex;
use crate::source::WeightSource;
use crate::spec::ModelSpec;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Layers on a backend.
pub struct Stage<B: Backend> {
    stack: Stack<B>,
    hidden: usize,
    is_last: bool,
}

/// Loads layers `range` of a model, without their experts.
///
/// # Errors
/// `Stage` when the model has no such layers; what loading says.
pub fn load_stage<B: Backend>(
    source: &dyn WeightSource,
    spec: &ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
    pool: Arc<dyn ExpertPool<B>>,
    range: Range<usize>,
) -> Result<Stage<B>> {
    check_range(spec, &range)?;
    let weights = Weights::new(source, spec, options.weights);
    let report = |done, total| options.report(Part::Decoder, done, total);
    let layers = load_layers(&weights, &*backend, range.clone(), &report)?;
    let is_last = range.end == spec.layers.len();
    Ok(Stage { stack: Stack::new(spec, range, layers, backend, pool, options.kv), hidden: spec.hidden, is_last })
}

/// Checks that a stage has layers, and that the model has them.
pub(super) fn check_range(spec: &ModelSpec, range: &Range<usize>) -> Result<()> {
    if range.start < range.end && range.end <= spec.layers.len() {
        return Ok(());
    }
    let reason =
        format!("layers {}..{} of {} make no stage; use fewer stages", range.start, range.end, spec.layers.len());
    Err(Error::Stage { reason })
}

impl<B: Backend> Stage<B> {
    fn check(&self, input: &StageInput) -> Result<()> {
        let rows: usize = input.sequences.iter().map(|sequence| sequence.rows).sum();
        let is_ascending = input.wanted.is_sorted_by(|a, b| a < b);
        let reason = if input.sequences.is_empty() {
            "a micro-batch has no sequence".to_owned()
        } else if input.x.len() != rows * self.hidden {
            format!("a micro-batch of {rows} rows of {} has {} values", self.hidden, input.x.len())
        } else if !is_ascending || input.wanted.last().is_some_and(|&row| row as usize >= rows) {
            format!("rows are wanted that a micro-batch of {rows} does not have, or not in order")
        } else {
            return Ok(());
        };
        Err(self.stack.backend.error(reason))
    }
}

fn attention(of: &StageSequence) -> AttentionSequence<'_> {
    AttentionSequence { blocks: &of.blocks, start: of.start, rows: of.rows }
}

impl<B: Backend> StageRunner for Stage<B> {
    fn block_bytes(&self) -> usize {
        self.stack.block_bytes()
    }

    fn hidden(&self) -> usize {
        self.hidden
    }

    fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        self.stack.allocate_kv(blocks)
    }

    fn run(&mut self, input: &StageInput) -> Result<Vec<f32>> {
        self.check(input)?;
        let sequences: Vec<_> = input.sequences.iter().map(attention).collect();
        sequences.iter().try_for_each(|sequence| self.stack.check(sequence))?;
        let backend = Arc::clone(&self.stack.backend);
        let x = backend.to_device(input.x.clone(), self.hidden)?;
        let mut micro_batches = [self.stack.enter(sequences, x, input.wanted.clone())?];
        self.stack.run(&mut micro_batches, None)?;
        let [mut micro_batch] = micro_batches;
        let x = micro_batch.end(&backend, None)?;
        if self.is_last && micro_batch.wanted.len() < micro_batch.rows {
            if micro_batch.wanted.is_empty() {
                return Ok(Vec::new());
            }
            return backend.to_host(&backend.rows(&x, &micro_batch.wanted)?);
        }
        backend.to_host(&x)
    }

    fn export_block(&self, block: BlockIndex) -> Result<Vec<u8>> {
        self.stack.export_block(block)
    }

    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()> {
        self.stack.import_block(block, bytes)
    }
}
