//! A model in pipeline stages gives the bits of the whole one.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{Decoder, LoadOptions, Stage, load_decoder, load_experts, load_first_stage, load_stage};
use moesaic_model::pipeline::{LaterStages, StageInput, StageRunner, split_layers};
use moesaic_model::runner::{Advanced, Waker};
use moesaic_model::source::WeightSource;
use moesaic_model::spec::ModelSpec;
use moesaic_model::{Error, LogitsWanted, Result, Runner, SequenceChunk, source, spec};
use moesaic_types::KvFormat;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

/// Later stages in this process, each computed when a micro-batch is sent.
struct Local {
    stages: Vec<Stage<NativeBackend>>,
    ready: VecDeque<Vec<f32>>,
}

impl LaterStages for Local {
    fn stages(&self) -> usize {
        self.stages.len()
    }

    fn wake_with(&mut self, _: Waker) {}

    fn advanced(&self) -> Advanced {
        Box::new(|| 0)
    }

    fn check(&mut self) -> Result<()> {
        Ok(())
    }

    fn allocate_kv(&mut self, blocks: usize) -> Result<()> {
        self.stages.iter_mut().try_for_each(|stage| stage.allocate_kv(blocks))
    }

    fn send(&mut self, mut input: StageInput) -> Result<()> {
        for stage in &mut self.stages {
            input.x = stage.run(&input)?;
        }
        self.ready.push_back(input.x);
        Ok(())
    }

    fn receive(&mut self) -> Result<Vec<f32>> {
        Ok(self.ready.pop_front().unwrap())
    }

    fn forget(&mut self) {
        self.ready.clear();
    }

    fn export_block(&mut self, block: u32) -> Result<Vec<u8>> {
        Ok(self.stages.iter().map(|stage| stage.export_block(block)).collect::<Result<Vec<_>>>()?.concat())
    }

    fn import_block(&mut self, block: u32, mut bytes: &[u8]) -> Result<()> {
        for stage in &mut self.stages {
            let own;
            (own, bytes) = bytes.split_at(stage.block_bytes());
            stage.import_block(block, own)?;
        }
        Ok(())
    }
}

struct Model {
    source: Box<dyn WeightSource>,
    spec: ModelSpec,
    backend: Arc<NativeBackend>,
}

const OPTIONS: LoadOptions<'static> = LoadOptions {
    weights: None,
    kv: KvFormat::F32,
    threads: 1,
    activations: moesaic_model::Activations::F32,
    progress: None,
};

impl Model {
    fn open(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens").join(name);
        let source = source::open(&path).unwrap();
        let spec = spec::read(&path, &*source).unwrap();
        Self { source, spec, backend: Arc::new(NativeBackend::new(1, moesaic_model::Activations::F32)) }
    }

    fn experts(&self) -> Arc<moesaic_model::decoder::ExpertStore<NativeBackend>> {
        Arc::new(load_experts(&*self.source, &self.spec, self.backend.clone(), &OPTIONS).unwrap())
    }

    fn whole(&self) -> Decoder<NativeBackend> {
        load_decoder(&*self.source, self.spec.clone(), self.backend.clone(), &OPTIONS, self.experts()).unwrap()
    }

    fn stage(&self, range: std::ops::Range<usize>) -> Result<Stage<NativeBackend>> {
        load_stage(&*self.source, &self.spec, self.backend.clone(), &OPTIONS, self.experts(), range)
    }

    fn split(&self, stages: usize) -> Decoder<NativeBackend> {
        let mut ranges = split_layers(self.spec.layers.len(), stages).into_iter();
        let first = ranges.next().unwrap().end;
        let stages = ranges.map(|range| self.stage(range).unwrap()).collect();
        let later = Box::new(Local { stages, ready: VecDeque::new() });
        let (spec, backend) = (self.spec.clone(), self.backend.clone());
        load_first_stage(&*self.source, spec, backend, &OPTIONS, self.experts(), first, later).unwrap()
    }
}

/// Two sequences in steps of several chunks; all logits that are wanted.
fn run(model: &mut Decoder<NativeBackend>, vocab: u32) -> Vec<f32> {
    let tokens: Vec<u32> = (0..150).map(|i| (i * 7 + 3) % vocab).collect();
    let (a, b) = ([4, 0, 2], [1, 3, 5]);
    let mut logits = Vec::new();
    let chunk = |tokens, start, blocks, logits| SequenceChunk { tokens, start, blocks, logits };
    let steps = [
        vec![chunk(&tokens[..70], 0, &a[..], LogitsWanted::None), chunk(&tokens[5..9], 0, &b, LogitsWanted::All)],
        vec![chunk(&tokens[70..71], 70, &a, LogitsWanted::Last), chunk(&tokens[9..90], 4, &b, LogitsWanted::Last)],
        vec![chunk(&tokens[71..72], 71, &a, LogitsWanted::Last)],
        vec![chunk(&tokens[72..150], 72, &a, LogitsWanted::None)],
    ];
    for step in &steps {
        model.forward(step, &mut logits).unwrap();
    }
    logits
}

#[test]
fn stages_give_the_whole_model_s_bits() {
    for name in ["qwen3_moe", "deepseek_v3", "gpt_oss", "bloom_alibi", "granite_moe", "llama_rope_yarn"] {
        let model = Model::open(name);
        let vocab = model.spec.vocab as u32;
        let mut whole = model.whole();
        whole.allocate_kv(6).unwrap();
        let expected = run(&mut whole, vocab);
        assert_eq!(expected.len(), (4 + 3) * vocab as usize);
        for stages in 2..=model.spec.layers.len().min(3) {
            let mut split = model.split(stages);
            split.allocate_kv(6).unwrap();
            assert!(run(&mut split, vocab) == expected, "{name} in {stages} stages");
            for block in 0..6 {
                assert_eq!(split.export_block(block).unwrap().len(), split.kv_block_bytes());
            }
            // blocks travel between replicas that are split in different ways
            let mut other = model.whole();
            other.allocate_kv(6).unwrap();
            for block in 0..6 {
                other.import_block(block, &split.export_block(block).unwrap()).unwrap();
            }
            let next = |model: &mut Decoder<NativeBackend>| {
                let chunk = SequenceChunk { tokens: &[1], start: 90, blocks: &[1, 3], logits: LogitsWanted::Last };
                let mut logits = Vec::new();
                model.forward(&[chunk], &mut logits).unwrap();
                logits
            };
            assert_eq!(next(&mut other), next(&mut split), "{name} from {stages} stages");
        }
    }
}

#[test]
fn a_stage_refuses_what_does_not_fit() {
    let model = Model::open("qwen3_moe");
    let layers = model.spec.layers.len();
    for range in [layers..layers, 0..layers + 1] {
        assert!(matches!(model.stage(range), Err(Error::Stage { .. })));
    }
    let mut stage = model.stage(1..layers).unwrap();
    stage.allocate_kv(2).unwrap();
    let sequence = moesaic_model::pipeline::StageSequence { blocks: vec![1], start: 0, rows: 2 };
    let good = StageInput { x: vec![0.1; 2 * model.spec.hidden], sequences: vec![sequence.clone()], wanted: vec![1] };
    assert_eq!(stage.run(&good).unwrap().len(), model.spec.hidden);
    assert!(stage.run(&StageInput { wanted: vec![], ..good.clone() }).unwrap().is_empty());
    let with = |sequence| StageInput { sequences: vec![sequence], ..good.clone() };
    let wrong = [
        StageInput { x: vec![0.1; model.spec.hidden], ..good.clone() },
        StageInput { sequences: vec![], ..good.clone() },
        StageInput { wanted: vec![2], ..good.clone() },
        StageInput { wanted: vec![1, 0], ..good.clone() },
        with(moesaic_model::pipeline::StageSequence { blocks: vec![2], ..sequence.clone() }),
        with(moesaic_model::pipeline::StageSequence { start: 63, ..sequence.clone() }),
    ];
    for input in wrong {
        assert!(matches!(stage.run(&input), Err(Error::Backend { .. })), "{:?}", input.sequences);
    }
    assert!(stage.import_block(0, &[0; 3]).is_err() && stage.export_block(2).is_err());
}
