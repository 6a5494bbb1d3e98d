//! The decoder: one forward pass over a batch, for every architecture that a [`ModelSpec`] can describe.
mod body;
mod experts;
mod layer;
mod micro_batch;
mod weights;

pub use body::visit;
pub use experts::{ExpertStore, load_experts};

use crate::Result;
use crate::backend::candle::CandleBackend;
use crate::backend::native::NativeBackend;
use crate::backend::{AttentionSequence, Backend, BackendKind, KvLayout};
use crate::expert_pool::ExpertPool;
use crate::runner::{BlockIndex, LogitsWanted, Runner, SequenceChunk};
use crate::source::{self, WeightSource};
use crate::spec::{self, ModelSpec, Rope};
use body::Body;
use bytes::Bytes;
use layer::{Layer, Step};
use micro_batch::{MicroBatch, Recorder, Stream};
use moesaic_types::{BLOCK_TOKENS, KvFormat, WeightFormat};
use std::path::Path;
use std::sync::Arc;
use weights::Weights;

/// What is being loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Attention, gates, embeddings.
    Decoder,
    /// Experts.
    Experts,
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being loaded.
    pub part: Part,
    /// Layers of it that are loaded.
    pub layers_done: usize,
    /// Layers of it in all.
    pub layers_total: usize,
}

/// How to load a model.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// How weights are held; `None`: as they are stored (K-quants as q8).
    pub weights: Option<WeightFormat>,
    /// How keys and values are cached.
    pub kv: KvFormat,
    /// Threads that load and run.
    pub threads: usize,
    /// Told of each layer.
    pub progress: Option<&'a dyn Fn(Progress)>,
}

impl LoadOptions<'_> {
    fn report(&self, part: Part, layers_done: usize, layers_total: usize) {
        if let Some(progress) = self.progress {
            progress(Progress { part, layers_done, layers_total });
        }
    }
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { weights: None, kv: KvFormat::default(), threads, progress: None }
    }
}

/// A model on a backend: everything but the experts, which are behind an [`ExpertPool`].
pub struct Decoder<B: Backend> {
    spec: ModelSpec,
    backend: Arc<B>,
    pool: Arc<dyn ExpertPool<B>>,
    embedding: B::Embedding,
    embedding_norm: Option<B::Norm>,
    layers: Vec<Layer<B>>,
    ropes: Vec<Rope>,
    final_norm: B::Norm,
    output: B::Linear,
    kv_format: KvFormat,
    kv: Option<(B::Kv, usize)>,
    record_routing: bool,
    routing: Recorder,
}

/// Opens a model and loads all of it, experts included.
pub fn load(path: &Path, kind: BackendKind, options: &LoadOptions<'_>) -> Result<Box<dyn Runner>> {
    fn with<B: Backend>(
        source: &dyn WeightSource,
        spec: ModelSpec,
        backend: B,
        options: &LoadOptions<'_>,
    ) -> Result<Box<dyn Runner>> {
        let backend = Arc::new(backend);
        let pool = Arc::new(load_experts(source, &spec, backend.clone(), options)?);
        Ok(Box::new(load_decoder(source, spec, backend, options, pool)?))
    }
    let source = source::open(path)?;
    let spec = spec::read(path, &*source)?;
    match kind {
        BackendKind::Native => with(&*source, spec, NativeBackend::new(options.threads), options),
        BackendKind::Candle => with(&*source, spec, CandleBackend::new(options.threads)?, options),
    }
}

/// Loads everything but the experts.
pub fn load_decoder<B: Backend>(
    source: &dyn WeightSource,
    spec: ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
    pool: Arc<dyn ExpertPool<B>>,
) -> Result<Decoder<B>> {
    let weights = Weights::new(source, &spec, options.weights);
    let Body { embedding, embedding_norm, layers, ropes, final_norm, output } =
        Body::load(&weights, &*backend, &|done, total| options.report(Part::Decoder, done, total))?;
    Ok(Decoder {
        backend,
        pool,
        embedding,
        embedding_norm,
        layers,
        ropes,
        final_norm,
        output,
        kv_format: options.kv,
        kv: None,
        record_routing: false,
        routing: Recorder::default(),
        spec,
    })
}

impl<B: Backend> Decoder<B> {
    fn kv_layouts(&self) -> Vec<KvLayout> {
        let layout = |layer: &spec::LayerSpec| {
            let (heads, k_dim, v_dim, v_in_k) = layer.attention.cached();
            KvLayout { heads, k_dim, v_dim, v_in_k }
        };
        self.spec.layers.iter().map(layout).collect()
    }

    fn check(&self, batch: &[SequenceChunk<'_>], blocks: usize) -> Result<()> {
        for chunk in batch {
            let end = chunk.start + chunk.tokens.len();
            let reason = if chunk.tokens.is_empty() {
                "a chunk has no tokens".to_owned()
            } else if let Some(token) = chunk.tokens.iter().find(|&&token| token as usize >= self.spec.vocab) {
                format!("token {token} is outside the vocabulary of {}", self.spec.vocab)
            } else if chunk.blocks.len() * BLOCK_TOKENS < end {
                format!("{} blocks do not hold {end} positions", chunk.blocks.len())
            } else if let Some(block) = chunk.blocks.iter().find(|&&block| block as usize >= blocks) {
                format!("block {block} is outside the pool of {blocks}")
            } else {
                continue;
            };
            return Err(self.backend.error(reason));
        }
        Ok(())
    }

    /// A micro-batch before the first layer.
    fn embed<'a>(&self, part: &'a [SequenceChunk<'a>]) -> Result<MicroBatch<'a, B>> {
        let backend = &*self.backend;
        let (mut tokens, mut positions, mut wanted, mut sequences) = (vec![], vec![], vec![], vec![]);
        for chunk in part {
            let first = tokens.len() as u32;
            let rows = chunk.tokens.len();
            tokens.extend_from_slice(chunk.tokens);
            positions.extend((0..rows).map(|row| (chunk.start + row) as u32));
            sequences.push(AttentionSequence { blocks: chunk.blocks, start: chunk.start, rows });
            match chunk.logits {
                LogitsWanted::None => {}
                LogitsWanted::Last => wanted.push(first + rows as u32 - 1),
                LogitsWanted::All => wanted.extend(first..first + rows as u32),
            }
        }
        let rotation = |rope: &Rope| {
            let (cos, sin) = rope.table(&positions);
            backend.rotation(cos, sin, rope.dims / 2, rope.interleaved)
        };
        let rotations = self.ropes.iter().map(rotation).collect::<Result<Vec<_>>>()?;
        let mut x = backend.embed(&self.embedding, &tokens)?;
        if self.spec.embedding_scale != 1.0 {
            x = backend.scale(x, self.spec.embedding_scale)?;
        }
        if let Some(norm) = &self.embedding_norm {
            x = backend.norm(norm, &x)?;
        }
        Ok(MicroBatch { rows: tokens.len(), sequences, rotations, wanted, stream: Stream::Between(x) })
    }

    /// Appends the wanted rows' logits.
    fn project(&self, x: &B::Tensor, rows: usize, wanted: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        let backend = &*self.backend;
        let chosen = if wanted.len() < rows { Some(backend.rows(x, wanted)?) } else { None };
        let x = backend.norm(&self.final_norm, chosen.as_ref().unwrap_or(x))?;
        let rows = backend.to_host(&backend.linear(&self.output, &x)?)?;
        let scale = self.spec.logits_scale;
        logits.extend(rows.into_iter().map(|logit| if scale == 1.0 { logit } else { logit * scale }));
        Ok(())
    }

    fn block(&self, block: BlockIndex) -> Result<(&B::Kv, usize)> {
        match &self.kv {
            Some((kv, blocks)) if (block as usize) < *blocks => Ok((kv, block as usize)),
            _ => Err(self.backend.error(format!("block {block} is outside the pool"))),
        }
    }
}

impl<B: Backend> Runner for Decoder<B> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_block_bytes(&self) -> usize {
        self.backend.kv_block_bytes(&self.kv_layouts(), self.kv_format)
    }

    fn kv_format(&self) -> KvFormat {
        self.kv_format
    }

    fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        let kv = self.backend.allocate_kv(&self.kv_layouts(), self.kv_format, blocks)?;
        self.kv = Some((kv, blocks));
        Ok(())
    }

    fn forward(&mut self, batch: &[SequenceChunk<'_>], logits: &mut Vec<f32>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let blocks = self.kv.as_ref().map_or(0, |(_, blocks)| *blocks);
        self.check(batch, blocks)?;
        let rows = batch.iter().map(|chunk| chunk.tokens.len()).sum();
        let parts = micro_batch::cut(batch, self.pool.micro_batches(rows));
        let mut recorder = std::mem::take(&mut self.routing);
        recorder.clear();
        let mut micro_batches = parts.iter().map(|part| self.embed(part)).collect::<Result<Vec<_>>>()?;
        let layers = self.layers.iter().zip(&self.spec.layers).enumerate();
        let (backend, pool) = (&*self.backend, &*self.pool);
        let (kv, _) = self.kv.as_mut().expect("a chunk's blocks are inside the pool, so there is one");
        let mut record = self.record_routing.then_some(&mut recorder);
        for (index, (layer, spec)) in layers {
            // One micro-batch's experts compute while another is at the next layer's attention.
            for micro_batch in &mut micro_batches {
                let x = micro_batch.end(backend, record.as_deref_mut())?;
                let (sequences, rotations) = (&micro_batch.sequences, &micro_batch.rotations);
                let mut step = Step { backend, pool, sequences, rotations, kv: &mut *kv };
                micro_batch.stream = Stream::Begun(index, layer.begin(&mut step, index, spec, x)?);
            }
        }
        for micro_batch in &mut micro_batches {
            let x = micro_batch.end(backend, record.as_deref_mut())?;
            self.project(&x, micro_batch.rows, &micro_batch.wanted, logits)?;
        }
        self.routing = recorder;
        Ok(())
    }

    fn routing(&self) -> &[Vec<Vec<u32>>] {
        &self.routing.chosen
    }

    fn record_routing(&mut self, on: bool) {
        self.record_routing = on;
    }

    fn export_block(&self, block: BlockIndex) -> Result<Bytes> {
        let (kv, block) = self.block(block)?;
        self.backend.export_block(kv, block).map(Bytes::from)
    }

    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()> {
        self.block(block)?;
        let expected = self.kv_block_bytes();
        if bytes.len() != expected {
            let reason = format!("a KV block has {expected} bytes, not {}", bytes.len());
            return Err(self.backend.error(reason));
        }
        let backend = self.backend.clone();
        let (kv, _) = self.kv.as_mut().expect("the block is inside the pool, so there is one");
        backend.import_block(kv, block as usize, bytes)
    }
}
