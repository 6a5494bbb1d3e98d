//! A model whose logits depend on the tokens that it finds in its own KV blocks, so that a wrong block table, a
//! wrong chunk or a stale block shows as a wrong token.
#![allow(dead_code)]

use bytes::Bytes;
use futures::StreamExt;
use moesaic_model::runner::{Advanced, BlockIndex};
use moesaic_model::spec::{ModelSpec, Norm, NormKind, names};
use moesaic_model::{LogitsWanted, Runner, SequenceChunk};
use moesaic_scheduler::{Config, RunnerFactory, Scheduler, Snapshot, Vocabulary};
use moesaic_types::boundary::{DeltaStream, Replica};
use moesaic_types::{
    BLOCK_TOKENS, BlockHasher, Delta, Digest, Error, FinishReason, GenerateRequest, KvFormat, Priority, RequestId,
    SampledToken, SamplingParams, StopConditions, TenantSalt, TokenId, Usage, WeightFormat,
};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

pub const VOCAB: usize = 260;
pub const EOS: TokenId = 256;
pub const CONTEXT: usize = 2048;
const POISON: u32 = 0x7fc0_0000;

/// How long a test waits for a condition.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What tests do to a model from outside.
#[derive(Default)]
pub struct Levers {
    /// Steps to fail.
    pub fail: AtomicUsize,
    /// Steps to return NaN in the first row of.
    pub nan: AtomicUsize,
    /// Every how many steps two fail for lack of experts; 0: none, 1: all.
    pub lose_experts_every: AtomicUsize,
    /// Steps that failed so.
    pub lost: AtomicUsize,
    /// Steps that were run.
    pub steps: AtomicUsize,
    /// Steps that spoil the keys and values of their first sequence's tokens; every later row over these is NaN.
    pub poison: AtomicUsize,
    /// Blocks leave it spoiled, so that every row over these is NaN.
    pub spoil_exports: AtomicBool,
    /// How many models were built.
    pub built: AtomicUsize,
    /// How many tokens were computed.
    pub computed: AtomicUsize,
    /// Largest number of sequences in one step.
    pub widest: AtomicUsize,
    /// First token of every sequence, in the order in which they were computed.
    pub starts: Mutex<Vec<TokenId>>,
    /// Grows as the model says that it gets on.
    pub advanced: AtomicU64,
    /// Holds steps.
    step: Gate,
    /// Holds the loading of a model.
    pub load: Gate,
}

/// Holds whoever passes, from outside.
#[derive(Default)]
pub struct Gate {
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Default)]
struct Held {
    hold: bool,
    stuck: bool,
}

impl Gate {
    /// Holds who passes next, until `release`.
    pub fn hold(&self) {
        self.held.lock().unwrap().hold = true;
    }

    /// Waits, on a blocking thread, until somebody is held.
    pub fn wait(&self) {
        let held = self.held.lock().unwrap();
        let (held, timeout) = self.changed.wait_timeout_while(held, PATIENCE, |held| !held.stuck).unwrap();
        assert!(held.stuck && !timeout.timed_out(), "nobody was held");
    }

    pub fn release(&self) {
        self.held.lock().unwrap().hold = false;
        self.changed.notify_all();
    }

    /// Held here, if it is to be.
    pub fn pass(&self) {
        let mut held = self.held.lock().unwrap();
        if held.hold {
            held.stuck = true;
            self.changed.notify_all();
            let (mut after, timeout) = self.changed.wait_timeout_while(held, PATIENCE, |held| held.hold).unwrap();
            assert!(!timeout.timed_out(), "a held thread was never released");
            after.stuck = false;
        }
    }
}

impl Levers {
    /// Holds the next step until `release`; `held` awaits that a step is held.
    pub fn hold(&self) {
        self.step.hold();
    }

    pub async fn held(self: &Arc<Self>) {
        let levers = Arc::clone(self);
        tokio::task::spawn_blocking(move || levers.step.wait()).await.unwrap();
    }

    pub fn release(&self) {
        self.step.release();
    }

    /// Awaits that the loading of a model is held.
    pub async fn load_held(self: &Arc<Self>) {
        let levers = Arc::clone(self);
        tokio::task::spawn_blocking(move || levers.load.wait()).await.unwrap();
    }

    fn lose(&self) -> bool {
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        let lost = match self.lose_experts_every.load(Ordering::SeqCst) {
            0 => false,
            1 => true,
            every => step % (every + 1) >= every - 1,
        };
        self.lost.fetch_add(usize::from(lost), Ordering::SeqCst);
        lost
    }

    fn take(lever: &AtomicUsize) -> bool {
        lever.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
    }
}

pub struct Fake {
    spec: ModelSpec,
    kv: Vec<[u32; BLOCK_TOKENS]>,
    levers: Arc<Levers>,
}

impl Fake {
    fn new(levers: Arc<Levers>) -> Self {
        let spec = ModelSpec {
            architecture: "fake".into(),
            vocab: VOCAB,
            hidden: 1,
            max_context: CONTEXT,
            embedding_scale: 1.0,
            embedding_norm: None,
            layers: Vec::new(),
            final_norm: Norm { kind: NormKind::Rms, eps: 1e-6 },
            logits_scale: 1.0,
            tied: true,
            names: names::LLAMA,
        };
        Self { spec, kv: Vec::new(), levers }
    }
}

fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Logits that depend on the whole prefix; the end of sequence is unlikely.
pub fn logits_of(state: u64) -> impl Iterator<Item = f32> {
    (0..VOCAB as u64).map(move |id| {
        let noise = (mix(state, id) >> 40) as f32 / (1u64 << 24) as f32;
        if id >= EOS as u64 { noise - 4.0 } else { noise * 6.0 }
    })
}

impl Runner for Fake {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn kv_block_bytes(&self) -> usize {
        BLOCK_TOKENS * 4
    }

    fn kv_format(&self) -> KvFormat {
        KvFormat::F32
    }

    fn advanced(&self) -> Option<Advanced> {
        let levers = Arc::clone(&self.levers);
        Some(Box::new(move || levers.advanced.load(Ordering::SeqCst)))
    }

    fn allocate_kv(&mut self, blocks: usize) -> moesaic_model::Result<()> {
        self.kv = vec![[0xdead_beef; BLOCK_TOKENS]; blocks];
        Ok(())
    }

    fn forward(&mut self, batch: &[SequenceChunk<'_>], logits: &mut Vec<f32>) -> moesaic_model::Result<()> {
        self.levers.step.pass();
        self.levers.widest.fetch_max(batch.len(), Ordering::SeqCst);
        let lost = self.levers.lose();
        let fail = lost || Levers::take(&self.levers.fail);
        let poison = Levers::take(&self.levers.poison);
        let mut written = std::collections::HashSet::new();
        for (n, chunk) in batch.iter().enumerate() {
            assert!(!chunk.tokens.is_empty() && chunk.blocks.len() * BLOCK_TOKENS >= chunk.start + chunk.tokens.len());
            for (position, &token) in (chunk.start..).zip(chunk.tokens) {
                let block = chunk.blocks[position / BLOCK_TOKENS];
                written.insert((block, chunk.start));
                self.kv[block as usize][position % BLOCK_TOKENS] = match () {
                    () if fail => 0xbad,
                    () if poison && n == 0 => POISON,
                    () => token,
                };
            }
            if chunk.start == 0 {
                self.levers.starts.lock().unwrap().push(chunk.tokens[0]);
            }
            self.levers.computed.fetch_add(chunk.tokens.len(), Ordering::SeqCst);
        }
        let blocks: std::collections::HashSet<_> = written.iter().map(|(block, _)| block).collect();
        let chunks: usize =
            batch.iter().map(|c| (c.start + c.tokens.len()).div_ceil(BLOCK_TOKENS) - c.start / BLOCK_TOKENS).sum();
        assert_eq!(blocks.len(), chunks, "two sequences wrote to one block");
        if lost {
            return Err(moesaic_model::Error::Experts { layer: 3, reason: "the shard is away".into() });
        }
        if fail {
            return Err(moesaic_model::Error::Backend { backend: "fake", reason: "told to fail".into() });
        }
        for chunk in batch {
            let mut state = 0;
            let mut spoiled = false;
            let end = chunk.start + chunk.tokens.len();
            for position in 0..end {
                let token = self.kv[chunk.blocks[position / BLOCK_TOKENS] as usize][position % BLOCK_TOKENS];
                spoiled |= token == POISON;
                state = mix(state, u64::from(token) + 1);
                let wanted = match chunk.logits {
                    LogitsWanted::None => false,
                    LogitsWanted::Last => position + 1 == end,
                    LogitsWanted::All => position >= chunk.start,
                };
                if wanted {
                    logits.extend(logits_of(state).map(|logit| if spoiled { f32::NAN } else { logit }));
                }
            }
        }
        if !logits.is_empty() && Levers::take(&self.levers.nan) {
            logits[7] = f32::NAN;
        }
        Ok(())
    }

    fn routing(&self) -> &[Vec<Vec<u32>>] {
        &[]
    }

    fn record_routing(&mut self, _on: bool) {}

    fn export_block(&mut self, block: BlockIndex) -> moesaic_model::Result<Bytes> {
        if self.levers.spoil_exports.load(Ordering::SeqCst) {
            return Ok(POISON.to_le_bytes().repeat(BLOCK_TOKENS).into());
        }
        Ok(self.kv[block as usize].iter().flat_map(|token| token.to_le_bytes()).collect::<Vec<u8>>().into())
    }

    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> moesaic_model::Result<()> {
        if bytes.len() != self.kv_block_bytes() {
            return Err(moesaic_model::Error::Backend { backend: "fake", reason: "wrong length".into() });
        }
        for (slot, bytes) in self.kv[block as usize].iter_mut().zip(bytes.chunks_exact(4)) {
            *slot = u32::from_le_bytes(bytes.try_into().unwrap());
        }
        Ok(())
    }
}

pub fn factory(levers: &Arc<Levers>) -> RunnerFactory {
    let levers = Arc::clone(levers);
    Arc::new(move || {
        levers.load.pass();
        levers.built.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Fake::new(Arc::clone(&levers))))
    })
}

/// A token per byte, then control tokens.
pub fn vocabulary() -> Vocabulary {
    let mut token_bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    token_bytes.extend((256..VOCAB).map(|id| format!("<{id}>").into_bytes()));
    let special = (0..VOCAB).map(|id| id >= 256).collect();
    Vocabulary { token_bytes, special, eos: vec![EOS] }
}

pub fn hasher() -> BlockHasher {
    BlockHasher::new(&Digest::of(b"fake"), WeightFormat::F32, KvFormat::F32, None)
}

pub fn config() -> Config {
    Config { kv_blocks: Some(256), restart_backoff_ms: 1, step_silence_ms: 600_000, ..Config::default() }
}

pub async fn start(config: Config, levers: &Arc<Levers>) -> Arc<Scheduler> {
    Scheduler::start(config, factory(levers), vocabulary(), hasher(), None, None).await.unwrap()
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

pub fn request(prompt: impl IntoIterator<Item = TokenId>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        id: RequestId::new(format!("r{}", NEXT.fetch_add(1, Ordering::SeqCst))),
        prompt: prompt.into_iter().collect(),
        resumed_tokens: 0,
        sampling: SamplingParams::default(),
        stop: StopConditions { max_tokens, ignore_eos: true, ..Default::default() },
        top_logprobs: None,
        prompt_logprobs: false,
        grammar: None,
        priority: Priority(0),
        deadline: None,
        salt: TenantSalt::default(),
        traceparent: None,
    }
}

/// A prompt that differs from other seeds' from its first token on.
pub fn prompt(seed: u64, length: usize) -> Vec<TokenId> {
    (0..length as u64).map(|n| (mix(seed, n) % 256) as TokenId).collect()
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub tokens: Vec<SampledToken>,
    pub prompt_logprobs: Option<Vec<SampledToken>>,
    pub cached_tokens: Option<usize>,
    pub finish: Option<(FinishReason, Usage)>,
}

impl Answer {
    pub fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    pub fn usage(&self) -> Usage {
        self.finish.unwrap().1
    }
}

pub async fn read(mut stream: DeltaStream) -> Result<Answer, Error> {
    let mut answer = Answer::default();
    while let Some(delta) = tokio::time::timeout(PATIENCE, stream.next()).await.expect("an answer in time") {
        let Delta { tokens, prompt_logprobs, cached_tokens, finish } = delta?;
        assert!(answer.finish.is_none(), "a delta after the last");
        let first = answer.tokens.is_empty() && !tokens.is_empty();
        assert_eq!(cached_tokens.is_some(), first, "told once, with the first token");
        answer.cached_tokens = answer.cached_tokens.or(cached_tokens);
        if prompt_logprobs.is_some() {
            assert!(answer.tokens.is_empty() && answer.prompt_logprobs.is_none());
            answer.prompt_logprobs = prompt_logprobs;
        }
        answer.tokens.extend(tokens);
        answer.finish = finish;
    }
    assert!(answer.finish.is_some(), "the stream ended without a finish");
    if let Some(cached) = answer.cached_tokens {
        assert_eq!(cached, answer.usage().cached_tokens);
    }
    Ok(answer)
}

pub async fn generate(scheduler: &Scheduler, request: GenerateRequest) -> Result<Answer, Error> {
    read(scheduler.generate(request).await?).await
}

/// Waits until the scheduler's state is as described.
pub async fn until(scheduler: &Scheduler, wanted: impl FnMut(&Snapshot) -> bool) -> Snapshot {
    let mut watch = scheduler.watch();
    let found = tokio::time::timeout(PATIENCE, watch.wait_for(wanted)).await;
    found.unwrap_or_else(|_| panic!("still {:?}", scheduler.snapshot())).unwrap().clone()
}

/// All blocks are back and nothing runs.
pub async fn until_idle(scheduler: &Scheduler) {
    until(scheduler, |s| s.running == 0 && s.waiting == 0 && s.kv_blocks_used == 0).await;
}
