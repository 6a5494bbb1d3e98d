//! Consecutive layers of a model, and their part of the KV pool.
use super::laps::Laps;
use super::layer::{Layer, Step};
use super::micro_batch::{MicroBatch, Recorder, Stream};
use super::weights::Weights;
use crate::Result;
use crate::backend::{AttentionSequence, Backend, KvLayout, Loader};
use crate::expert_pool::ExpertPool;
use crate::runner::{Advanced, BlockIndex};
use crate::spec::{LayerSpec, ModelSpec, Rope};
use moesaic_types::{BLOCK_TOKENS, KvFormat};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Layers on a backend; their experts are behind an [`ExpertPool`].
pub(super) struct Stack<B: Backend> {
    pub(super) backend: Arc<B>,
    pub(super) pool: Arc<dyn ExpertPool<B>>,
    /// The first layer's index in the model.
    first: usize,
    specs: Vec<LayerSpec>,
    layers: Vec<Layer<B>>,
    /// The layers' distinct rotations with their frequencies.
    ropes: Vec<(Rope, Vec<f32>)>,
    kv_format: KvFormat,
    kv: Option<(B::Kv, usize)>,
    pub(super) laps: Laps,
    /// Layers that micro-batches went through.
    advanced: Arc<AtomicU64>,
    spare: Spare<B>,
}

/// Memory of steps that ended, for later ones.
struct Spare<B: Backend> {
    micro_batches: Vec<MicroBatch<'static, B>>,
    positions: Vec<u32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Layers `range` and their distinct rotations; `progress(layers done, layers in all)`.
pub(super) fn load_layers<L: Loader>(
    weights: &Weights<'_>,
    loader: &L,
    range: Range<usize>,
    progress: &dyn Fn(usize, usize),
) -> Result<(Vec<Layer<L>>, Vec<Rope>)> {
    let (mut ropes, total) = (Vec::new(), range.len());
    let mut layers = Vec::with_capacity(total);
    for (done, index) in range.enumerate() {
        progress(done, total);
        layers.push(Layer::load(weights, loader, index, &mut ropes)?);
    }
    progress(total, total);
    Ok((layers, ropes))
}

/// What of a KV block some layers fill.
pub(super) fn kv_layouts(layers: &[LayerSpec]) -> Vec<KvLayout> {
    let layout = |layer: &LayerSpec| {
        let (heads, k_dim, v_dim, v_in_k) = layer.attention.cached();
        KvLayout { heads, k_dim, v_dim, v_in_k }
    };
    layers.iter().map(layout).collect()
}

impl<B: Backend> Stack<B> {
    /// Loaded layers `range` of a model.
    pub(super) fn new(
        spec: &ModelSpec,
        range: Range<usize>,
        (layers, ropes): (Vec<Layer<B>>, Vec<Rope>),
        backend: Arc<B>,
        pool: Arc<dyn ExpertPool<B>>,
        kv_format: KvFormat,
    ) -> Self {
        let specs = spec.layers[range.clone()].to_vec();
        let (laps, advanced) = (Laps::new(), Arc::default());
        let with_frequencies = |rope: Rope| {
            let frequencies = rope.frequencies();
            (rope, frequencies)
        };
        let ropes = ropes.into_iter().map(with_frequencies).collect();
        let spare = Spare { micro_batches: Vec::new(), positions: Vec::new(), cos: Vec::new(), sin: Vec::new() };
        Self { backend, pool, first: range.start, specs, layers, ropes, kv_format, kv: None, laps, advanced, spare }
    }

    /// How far micro-batches are, by layers, kernels and waits for experts.
    pub(super) fn advanced(&self) -> Advanced {
        let (backend, pool) = (Arc::clone(&self.backend), Arc::clone(&self.pool));
        let layers = Arc::clone(&self.advanced);
        Box::new(move || layers.load(Ordering::Relaxed).wrapping_add(backend.advanced()).wrapping_add(pool.advanced()))
    }

    pub(super) fn kv_format(&self) -> KvFormat {
        self.kv_format
    }

    /// Bytes of these layers' part of a KV block.
    pub(super) fn block_bytes(&self) -> usize {
        self.backend.kv_block_bytes(&kv_layouts(&self.specs), self.kv_format)
    }

    pub(super) fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        // an earlier pool makes room first
        self.kv = None;
        self.kv = Some((self.backend.allocate_kv(&kv_layouts(&self.specs), self.kv_format, blocks)?, blocks));
        Ok(())
    }

    /// Checks that a sequence's blocks hold its positions and are in the pool.
    pub(super) fn check(&self, sequence: &AttentionSequence<'_>) -> Result<()> {
        let (end, blocks) = (sequence.start + sequence.queries, self.kv.as_ref().map_or(0, |(_, blocks)| *blocks));
        let reason = if sequence.queries == 0 {
            "a chunk has no tokens".to_owned()
        } else if sequence.blocks.len() * BLOCK_TOKENS < end {
            format!("{} blocks do not hold {end} positions", sequence.blocks.len())
        } else if let Some(block) = sequence.blocks.iter().find(|&&block| block as usize >= blocks) {
            format!("block {block} is outside the pool of {blocks}")
        } else {
            return Ok(());
        };
        Err(self.backend.error(reason))
    }

    /// A micro-batch without rows.
    pub(super) fn empty(&mut self) -> MicroBatch<'static, B> {
        self.spare.micro_batches.pop().unwrap_or_else(MicroBatch::empty)
    }

    /// Keeps the memory of a micro-batch that ended.
    pub(super) fn keep(&mut self, micro_batch: MicroBatch<'_, B>) {
        self.spare.micro_batches.push(micro_batch.emptied());
    }

    /// Rows `x` of a micro-batch, whose sequences it has already, on their way into the first layer.
    pub(super) fn enter(&mut self, micro_batch: &mut MicroBatch<'_, B>, x: B::Tensor) -> Result<()> {
        let Spare { positions, cos, sin, .. } = &mut self.spare;
        positions.clear();
        for AttentionSequence { start, queries, .. } in &micro_batch.sequences {
            positions.extend((*start..start + queries).map(|position| position as u32));
        }
        for (rope, frequencies) in &self.ropes {
            rope.table(frequencies, positions, cos, sin);
            micro_batch.rotations.push(self.backend.rotation(cos, sin, rope.dims / 2, rope.interleaved)?);
        }
        micro_batch.rows = positions.len();
        micro_batch.stream = Stream::Between(x);
        Ok(())
    }

    /// Runs the layers on some micro-batches, the last of which each still awaits its experts: see [`MicroBatch::end`].
    /// One micro-batch's experts compute while another is at the next layer's attention.
    pub(super) fn run(
        &mut self,
        micro_batches: &mut [MicroBatch<'_, B>],
        mut record: Option<&mut Recorder>,
    ) -> Result<()> {
        let (backend, pool, first, laps) = (&*self.backend, &*self.pool, self.first, &mut self.laps);
        let (kv, _) = self.kv.as_mut().expect("the sequences' blocks are inside the pool, so there is one");
        for (at, (layer, spec)) in self.layers.iter().zip(&self.specs).enumerate() {
            for micro_batch in &mut *micro_batches {
                let x = micro_batch.end(backend, record.as_deref_mut(), laps)?;
                let MicroBatch { sequences, rotations, routing, .. } = micro_batch;
                let (kv, laps) = (&mut *kv, &mut *laps);
                let mut step = Step { backend, pool, sequences, rotations, kv, first, laps, routing };
                micro_batch.stream = Stream::Begun(first + at, layer.begin(&mut step, first + at, spec, x)?);
                self.advanced.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(next) = self.layers.get(at + 1) {
                next.expect(backend);
            }
        }
        Ok(())
    }

    pub(super) fn export_block(&self, block: BlockIndex) -> Result<Vec<u8>> {
        match &self.kv {
            Some((kv, blocks)) if (block as usize) < *blocks => self.backend.export_block(kv, block as usize),
            _ => Err(self.outside(block)),
        }
    }

    /// Fills a block with bytes of the right length.
    pub(super) fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()> {
        let expected = self.block_bytes();
        if bytes.len() != expected {
            let reason = format!("a KV block has {expected} bytes, not {}", bytes.len());
            return Err(self.backend.error(reason));
        }
        match &mut self.kv {
            Some((kv, blocks)) if (block as usize) < *blocks => self.backend.import_block(kv, block as usize, bytes),
            _ => Err(self.outside(block)),
        }
    }

    fn outside(&self, block: BlockIndex) -> crate::Error {
        self.backend.error(format!("block {block} is outside the pool"))
    }
}
