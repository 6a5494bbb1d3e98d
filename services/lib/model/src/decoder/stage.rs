//! A later pipeline stage: consecutive layers of a model.
use super::micro_batch::{MicroBatch, cut_rows};
use super::stack::{Stack, load_layers};
use super::weights::Weights;
use super::{LoadOptions, Part, append};
use crate::backend::{AttentionSequence, Backend};
use crate::expert_pool::ExpertPool;
use crate::pipeline::{StageInput, StageRunner, StageSequence};
use crate::runner::{Advanced, BlockIndex};
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
    AttentionSequence { blocks: &of.blocks, start: of.start, queries: of.rows }
}

impl<B: Backend> StageRunner for Stage<B> {
    fn block_bytes(&self) -> usize {
        self.stack.block_bytes()
    }

    fn hidden(&self) -> usize {
        self.hidden
    }

    fn advanced(&self) -> Advanced {
        self.stack.advanced()
    }

    fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        self.stack.allocate_kv(blocks)
    }

    fn run(&mut self, input: &StageInput) -> Result<Vec<f32>> {
        self.check(input)?;
        self.stack.laps.begin();
        let sequences: Vec<_> = input.sequences.iter().map(attention).collect();
        sequences.iter().try_for_each(|sequence| self.stack.check(sequence))?;
        let backend = Arc::clone(&self.stack.backend);
        // experts of one half compute while the other is at its attention
        let parts = cut_rows(&sequences, self.stack.pool.micro_batches(input.x.len() / self.hidden));
        let (mut micro_batches, mut first) = (Vec::with_capacity(parts.len()), 0);
        for part in parts {
            let rows: usize = part.iter().map(|sequence| sequence.queries).sum();
            let x = input.x[first * self.hidden..][..rows * self.hidden].to_vec();
            let inside = |row: &&u32| (first..first + rows).contains(&(**row as usize));
            let mut micro_batch: MicroBatch<'_, B> = self.stack.empty();
            micro_batch.sequences.extend(part);
            micro_batch.wanted.extend(input.wanted.iter().filter(inside).map(|row| row - first as u32));
            self.stack.enter(&mut micro_batch, backend.to_device(x, self.hidden)?)?;
            micro_batches.push(micro_batch);
            first += rows;
        }
        self.stack.run(&mut micro_batches, None)?;
        let mut output = Vec::new();
        for mut micro_batch in micro_batches {
            let x = micro_batch.end(&backend, None, &mut self.stack.laps)?;
            match micro_batch.wanted.len() {
                count if !self.is_last || count == micro_batch.rows => append(&mut output, backend.to_host(&x)?),
                0 => {}
                _ => append(&mut output, backend.to_host(&backend.rows(&x, &micro_batch.wanted)?)?),
            }
            self.stack.keep(micro_batch);
        }
        Ok(output)
    }

    fn export_block(&self, block: BlockIndex) -> Result<Vec<u8>> {
        self.stack.export_block(block)
    }

    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()> {
        self.stack.import_block(block, bytes)
    }
}
