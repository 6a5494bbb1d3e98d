//! The decoder: one forward pass over a batch, for every architecture that a [`ModelSpec`] can describe.
mod body;
mod experts;
mod laps;
mod layer;
mod micro_batch;
mod stack;
mod stage;
mod weights;

pub use body::visit;
pub use experts::{ExpertStore, load_experts, load_experts_of};
pub use stage::{Stage, load_stage};

use crate::Result;
use crate::backend::candle::CandleBackend;
use crate::backend::native::NativeBackend;
use crate::backend::{Activations, AttentionSequence, Backend, BackendKind};
use crate::expert_pool::ExpertPool;
use crate::pipeline::{LaterStages, StageInput, StageSequence};
use crate::runner::{Advanced, BlockIndex, LogitsWanted, Profile, Runner, SequenceChunk, StepPart, Waker};
use crate::source::{self, WeightSource};
use crate::spec::{self, ModelSpec};
use body::Body;
use bytes::Bytes;
use micro_batch::{MicroBatch, Recorder};
use moesaic_types::{KvFormat, WeightFormat};
use stack::{Stack, kv_layouts};
use stage::check_range;
use std::ops::Range;
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
    /// What products with bf16, q8 and q4 weights take, where a native backend is made for the model.
    pub activations: Activations,
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
        Self { weights: None, kv: KvFormat::default(), threads, activations: Activations::default(), progress: None }
    }
}

/// A model on a backend: everything but the experts, which are behind an [`ExpertPool`], and but the layers of later
/// pipeline stages, if it has them.
pub struct Decoder<B: Backend> {
    spec: ModelSpec,
    embedding: B::Embedding,
    embedding_norm: Option<B::Norm>,
    stack: Stack<B>,
    later: Option<Box<dyn LaterStages>>,
    final_norm: B::Norm,
    output: B::Linear,
    record_routing: bool,
    routing: Recorder,
    /// Memory for a micro-batch's tokens.
    tokens: Vec<u32>,
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
        BackendKind::Native => with(&*source, spec, NativeBackend::new(options.threads, options.activations), options),
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
    let all = 0..spec.layers.len();
    load_range(source, spec, backend, options, pool, all)
}

/// Loads the first `layers` layers, and all that is before the first and after the last; `later` have the others.
///
/// # Errors
/// `Stage` when the model has no more layers; what loading says.
pub fn load_first_stage<B: Backend>(
    source: &dyn WeightSource,
    spec: ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
    pool: Arc<dyn ExpertPool<B>>,
    layers: usize,
    later: Box<dyn LaterStages>,
) -> Result<Decoder<B>> {
    check_range(&spec, &(layers..spec.layers.len()))?;
    let decoder = load_range(source, spec, backend, options, pool, 0..layers)?;
    Ok(Decoder { later: Some(later), ..decoder })
}

fn load_range<B: Backend>(
    source: &dyn WeightSource,
    spec: ModelSpec,
    backend: Arc<B>,
    options: &LoadOptions<'_>,
    pool: Arc<dyn ExpertPool<B>>,
    range: Range<usize>,
) -> Result<Decoder<B>> {
    check_range(&spec, &range)?;
    let weights = Weights::new(source, &spec, options.weights);
    let report = |done, total| options.report(Part::Decoder, done, total);
    let Body { embedding, embedding_norm, layers, ropes, final_norm, output } =
        Body::load(&weights, &*backend, range.clone(), &report)?;
    let stack = Stack::new(&spec, range, (layers, ropes), backend, pool, options.kv);
    let (record_routing, routing, later, tokens) = (false, Recorder::default(), None, Vec::new());
    Ok(Decoder { spec, embedding, embedding_norm, stack, later, final_norm, output, record_routing, routing, tokens })
}

impl<B: Backend> Decoder<B> {
    fn backend(&self) -> &B {
        &self.stack.backend
    }

    fn check(&self, batch: &[SequenceChunk<'_>]) -> Result<()> {
        for chunk in batch {
            if let Some(token) = chunk.tokens.iter().find(|&&token| token as usize >= self.spec.vocab) {
                let vocab = self.spec.vocab;
                return Err(self.backend().error(format!("token {token} is outside the vocabulary of {vocab}")));
            }
            self.stack.check(&sequence(chunk))?;
        }
        Ok(())
    }

    /// A micro-batch before the first layer.
    fn embed<'a>(&mut self, part: &[SequenceChunk<'a>]) -> Result<MicroBatch<'a, B>> {
        let mut micro_batch: MicroBatch<'a, B> = self.stack.empty();
        self.tokens.clear();
        for chunk in part {
            let first = self.tokens.len() as u32;
            self.tokens.extend_from_slice(chunk.tokens);
            let end = self.tokens.len() as u32;
            match chunk.logits {
                LogitsWanted::None => {}
                LogitsWanted::Last => micro_batch.wanted.push(end - 1),
                LogitsWanted::All => micro_batch.wanted.extend(first..end),
            }
        }
        micro_batch.sequences.extend(part.iter().map(sequence));
        let backend = &*self.stack.backend;
        let mut x = backend.embed(&self.embedding, &self.tokens)?;
        if self.spec.embedding_scale != 1.0 {
            x = backend.scale(x, self.spec.embedding_scale)?;
        }
        if let Some(norm) = &self.embedding_norm {
            x = backend.norm(norm, &x)?;
        }
        self.stack.enter(&mut micro_batch, x)?;
        Ok(micro_batch)
    }

    /// Appends the logits of rows that left the last layer.
    fn project(&self, x: &B::Tensor, logits: &mut Vec<f32>) -> Result<()> {
        let backend = self.backend();
        let x = backend.norm(&self.final_norm, x)?;
        let rows = backend.linear(&self.output, &x)?;
        let rows = backend.on_host(&rows)?;
        match self.spec.logits_scale {
            1.0 => logits.extend_from_slice(&rows),
            scale => logits.extend(rows.iter().map(|logit| logit * scale)),
        }
        Ok(())
    }

    /// All layers are here: micro-batches are at the same layer, so that their experts and attention overlap.
    fn run_layers<'a, M>(&mut self, mut micro_batches: M, logits: &mut Vec<f32>) -> Result<()>
    where
        M: AsMut<[MicroBatch<'a, B>]> + IntoIterator<Item = MicroBatch<'a, B>>,
        B: 'a,
    {
        self.stack.laps.end(StepPart::Embed);
        let all = micro_batches.as_mut();
        self.stack.run(all, self.record_routing.then_some(&mut self.routing))?;
        if all.iter().any(|micro_batch| !micro_batch.wanted.is_empty()) {
            self.stack.backend.expect(&self.output);
        }
        for mut micro_batch in micro_batches {
            let Stack { backend, laps, .. } = &mut self.stack;
            let record = self.record_routing.then_some(&mut self.routing);
            let x = micro_batch.end(backend, record, laps)?;
            match micro_batch.wanted.len() {
                0 => {}
                count if count == micro_batch.rows => self.project(&x, logits)?,
                _ => self.project(&self.backend().rows(&x, &micro_batch.wanted)?, logits)?,
            }
            self.stack.laps.end(StepPart::Head);
            self.stack.keep(micro_batch);
        }
        Ok(())
    }

    /// Micro-batches go through the first layers one after another, while those before are in later stages. Each is cut
    /// again, so that its experts and attention overlap as well.
    fn run_stages(&mut self, parts: &[Vec<SequenceChunk<'_>>], logits: &mut Vec<f32>) -> Result<()> {
        for part in parts {
            let rows = part.iter().map(|chunk| chunk.tokens.len()).sum();
            let halves = micro_batch::cut(part, self.stack.pool.micro_batches(rows));
            let mut micro_batches = halves.iter().map(|half| self.embed(half)).collect::<Result<Vec<_>>>()?;
            self.stack.laps.end(StepPart::Embed);
            let mut record = self.record_routing.then_some(&mut self.routing);
            self.stack.run(&mut micro_batches, record.as_deref_mut())?;
            let (mut x, mut wanted, mut first) = (Vec::new(), Vec::new(), 0);
            for mut micro_batch in micro_batches {
                let Stack { backend, laps, .. } = &mut self.stack;
                let ended = micro_batch.end(backend, record.as_deref_mut(), laps)?;
                append(&mut x, self.stack.backend.to_host(&ended)?);
                wanted.extend(micro_batch.wanted.iter().map(|row| first + row));
                first += micro_batch.rows as u32;
                self.stack.keep(micro_batch);
            }
            let sequences = part.iter().map(sequence);
            let sequences = sequences.map(|AttentionSequence { blocks, start, queries }| StageSequence {
                blocks: blocks.to_vec(),
                start,
                rows: queries,
            });
            let input = StageInput { x, sequences: sequences.collect(), wanted };
            self.later().send(input)?;
        }
        for _ in parts {
            let rows = self.later().receive()?;
            self.stack.laps.begin();
            if !rows.is_empty() {
                let rows = self.backend().to_device(rows, self.spec.hidden)?;
                self.project(&rows, logits)?;
                self.stack.laps.end(StepPart::Head);
            }
        }
        Ok(())
    }

    fn later(&mut self) -> &mut dyn LaterStages {
        self.later.as_deref_mut().expect("only a first stage asks for later ones")
    }
}

/// Adds rows, without a copy where they are the first.
fn append(rows: &mut Vec<f32>, mut more: Vec<f32>) {
    if rows.is_empty() { *rows = more } else { rows.append(&mut more) }
}

/// A chunk's rows.
fn sequence<'a>(chunk: &SequenceChunk<'a>) -> AttentionSequence<'a> {
    AttentionSequence { blocks: chunk.blocks, start: chunk.start, queries: chunk.tokens.len() }
}

impl<B: Backend> Runner for Decoder<B> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_block_bytes(&self) -> usize {
        self.backend().kv_block_bytes(&kv_layouts(&self.spec.layers), self.kv_format())
    }

    fn kv_format(&self) -> KvFormat {
        self.stack.kv_format()
    }

    fn wake_with(&mut self, waker: Waker) {
        if let Some(later) = &mut self.later {
            later.wake_with(waker);
        }
    }

    fn advanced(&self) -> Option<Advanced> {
        let (own, later) = (self.stack.advanced(), self.later.as_ref().map(|later| later.advanced()));
        Some(Box::new(move || own().wrapping_add(later.as_ref().map_or(0, |later| later()))))
    }

    fn profile(&self) -> Option<Profile> {
        Some(self.stack.laps.profile())
    }

    fn check_parts(&mut self) -> Result<()> {
        self.later.as_deref_mut().map_or(Ok(()), |later| later.check())
    }

    fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        self.stack.allocate_kv(blocks)?;
        self.later.as_deref_mut().map_or(Ok(()), |later| later.allocate_kv(blocks))
    }

    fn forward(&mut self, batch: &[SequenceChunk<'_>], logits: &mut Vec<f32>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        self.check(batch)?;
        self.routing.clear();
        self.stack.laps.begin();
        let rows: usize = batch.iter().map(|chunk| chunk.tokens.len()).sum();
        match &self.later {
            None => match self.stack.pool.micro_batches(rows) {
                0 | 1 => {
                    let whole = [self.embed(batch)?];
                    self.run_layers(whole, logits)
                }
                count => {
                    let parts = micro_batch::cut(batch, count);
                    let parts = parts.iter().map(|part| self.embed(part)).collect::<Result<Vec<_>>>()?;
                    self.run_layers(parts, logits)
                }
            },
            Some(later) => {
                let count = (later.stages() + 1).max(rows.div_ceil(later.max_rows()));
                let parts = micro_batch::cut(batch, count);
                self.run_stages(&parts, logits).inspect_err(|_| self.later().forget())
            }
        }
    }

    fn routing(&self) -> &[Vec<Vec<u32>>] {
        &self.routing.chosen
    }

    fn record_routing(&mut self, on: bool) {
        self.record_routing = on;
    }

    fn export_block(&mut self, block: BlockIndex) -> Result<Bytes> {
        let mut bytes = self.stack.export_block(block)?;
        if let Some(later) = &mut self.later {
            bytes.extend(later.export_block(block)?);
        }
        Ok(Bytes::from(bytes))
    }

    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()> {
        let (expected, own) = (self.kv_block_bytes(), self.stack.block_bytes());
        if bytes.len() != expected {
            let reason = format!("a KV block has {expected} bytes, not {}", bytes.len());
            return Err(self.backend().error(reason));
        }
        self.stack.import_block(block, &bytes[..own])?;
        self.later.as_deref_mut().map_or(Ok(()), |later| later.import_block(block, &bytes[own..]))
    }
}
