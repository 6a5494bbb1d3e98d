//! The real demo model over experts that are lost again and again: a step that is run anew gives the same bits.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Answer, generate, prompt, request, until_idle, vocabulary};
use moesaic_model::backend::Backend;
use moesaic_model::backend::native::NativeBackend;
use moesaic_model::decoder::{ExpertStore, load_decoder, load_experts};
use moesaic_model::expert_pool::{ExpertPool, Ticket};
use moesaic_model::{Error, LoadOptions, source, spec};
use moesaic_scheduler::{Config, RunnerFactory, Scheduler};
use moesaic_types::{BlockHasher, Digest, KvFormat, Routing, WeightFormat};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

type Tensor = <NativeBackend as Backend>::Tensor;

/// Experts of which every so many calls fail, dispatches and combinations in turn; 0: none.
struct Flaky {
    inner: ExpertStore<NativeBackend>,
    every: usize,
    calls: Arc<Calls>,
}

/// Dispatches and combinations so far.
#[derive(Default)]
struct Calls {
    made: AtomicUsize,
    failed: AtomicUsize,
}

impl Calls {
    fn make(&self, every: usize, layer: usize) -> moesaic_model::Result<()> {
        let call = self.made.fetch_add(1, Ordering::SeqCst) + 1;
        if every == 0 || !call.is_multiple_of(every) {
            return Ok(());
        }
        self.failed.fetch_add(1, Ordering::SeqCst);
        Err(Error::Experts { layer, reason: "the shard is away".into() })
    }
}

impl ExpertPool<NativeBackend> for Flaky {
    fn dispatch(&self, layer: usize, x: &Tensor, routing: &Routing) -> moesaic_model::Result<Ticket<NativeBackend>> {
        self.calls.make(self.every, layer)?;
        let (ticket, every, calls) = (self.inner.dispatch(layer, x, routing)?, self.every, Arc::clone(&self.calls));
        Ok(Ticket::Pending(Box::new(move || {
            calls.make(every, layer)?;
            ticket.combine()
        })))
    }

    fn micro_batches(&self, tokens: usize) -> usize {
        if tokens > 1 { 2 } else { 1 }
    }
}

async fn answers(every: usize) -> (Vec<Answer>, usize) {
    let calls = Arc::new(Calls::default());
    let made = Arc::clone(&calls);
    let factory: RunnerFactory = Arc::new(move || {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/models/demo-moe");
        let source = source::open(&folder)?;
        let spec = spec::read(&folder, &*source)?;
        let backend = Arc::new(NativeBackend::new(2, moesaic_model::Activations::Int8));
        let options = LoadOptions { threads: 2, ..LoadOptions::default() };
        let inner = load_experts(&*source, &spec, backend.clone(), &options)?;
        let pool = Flaky { inner, every, calls: Arc::clone(&made) };
        Ok(Box::new(load_decoder(&*source, spec, backend, &options, Arc::new(pool))?))
    });
    let hasher = BlockHasher::new(&Digest::of(b"demo"), WeightFormat::default(), KvFormat::default(), None);
    let config = Config { kv_blocks: Some(64), max_chunk: 40, ..Config::default() };
    let scheduler = Scheduler::start(config, factory, vocabulary(), hasher, None, None).await.unwrap();
    let requests = (0..5u64).map(|n| {
        let mut request = request(prompt(n % 3, 30 + 25 * n as usize), 8);
        request.top_logprobs = Some(2);
        request.prompt_logprobs = n == 2;
        request
    });
    let answers = futures::future::try_join_all(requests.map(|request| generate(&scheduler, request))).await.unwrap();
    until_idle(&scheduler).await;
    (answers, calls.failed.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_equal_to_the_bit_when_experts_are_lost_on_the_way() {
    let (expected, none) = answers(0).await;
    // Calls a step: two for each MoE layer and micro-batch, so that some steps fail more than once.
    let (found, failures) = answers(31).await;
    assert_eq!(none, 0);
    assert!(failures > 3, "only {failures} failures");
    for (n, (expected, found)) in expected.iter().zip(&found).enumerate() {
        assert_eq!(expected.tokens, found.tokens, "request {n}");
        assert_eq!(expected.prompt_logprobs, found.prompt_logprobs, "prompt of request {n}");
    }
}
