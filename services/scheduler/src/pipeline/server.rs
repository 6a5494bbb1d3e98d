//! A stage's side: one thread that owns its layers, fed by the stream that is open.
use super::fence::{Fence, Life};
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_model::pipeline::{StageInput, StageRunner, StageSequence};
use moesaic_proto::stage::v1 as wire;
use moesaic_proto::stage::v1::run_request::Request as Ask;
use moesaic_proto::stage::v1::run_response::Outcome;
use moesaic_proto::stage::v1::stage_service_server::{StageService as Service, StageServiceServer};
use moesaic_proto::{WireDType, decode_tensor, encode_tensor, into_status};
use moesaic_telemetry::propagation::traced;
use moesaic_transport::channel::MAX_MESSAGE;
use moesaic_transport::pulse::{DEAD_AFTER, Inbox, Outbox, STALLED_AFTER, queue};
use moesaic_types::{Error, ErrorCode, Result};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock, Weak};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Requests that are read ahead of the computation, and answers that wait to be taken.
const AHEAD: usize = 8;

/// Builds a stage's layers.
pub type StageFactory = Box<dyn FnOnce() -> moesaic_model::Result<Box<dyn StageRunner>> + Send>;

/// A stage's thread.
pub struct StageServer {
    jobs: Outbox<Job>,
    fence: Arc<Fence>,
    state: watch::Receiver<Option<Result<()>>>,
}

struct Job {
    life: Life,
    ask: Ask,
    answer: mpsc::OwnedPermit<Answer>,
    /// Gone with the stream.
    caller: Weak<()>,
}

type Answer = Result<wire::RunResponse, Status>;

impl StageServer {
    /// Starts the thread, which first builds the layers `layers` of the replica that has this id.
    ///
    /// # Errors
    /// `Unavailable` when the system gives no thread.
    pub fn start(layers: Range<usize>, replica: &str, factory: StageFactory) -> Result<Arc<Self>> {
        let (jobs, inbox) = queue(AHEAD);
        let (told, state) = watch::channel(None);
        let fence = Arc::new(Fence::new(replica.into(), layers));
        let server = Arc::new(Self { jobs, fence: Arc::clone(&fence), state });
        let work = move || match factory() {
            Ok(runner) => {
                inbox.count_too(runner.advanced());
                told.send_replace(Some(Ok(())));
                // a panic ends the thread: its stage is lost, and so is readiness
                let served = catch_unwind(AssertUnwindSafe(|| serve(runner, inbox, &fence)));
                let reason = if served.is_ok() { "the stage ended" } else { "the stage panicked; restart the process" };
                told.send_replace(Some(Err(Error::unavailable(reason))));
            }
            Err(error) => drop(told.send_replace(Some(Err(Error::unavailable(format!("load the stage: {error}")))))),
        };
        let thread = std::thread::Builder::new().name("stage".into()).spawn(work);
        thread.map_err(|error| Error::unavailable(format!("start the stage's thread: {error}")))?;
        Ok(server)
    }

    /// Whether the layers are loaded and the thread gets on.
    ///
    /// # Errors
    /// `Unavailable` with the reason.
    pub fn ready(&self) -> Result<()> {
        self.running().and_then(|()| self.jobs.check(STALLED_AFTER))
    }

    /// Whether the layers are loaded and the thread runs.
    fn running(&self) -> Result<()> {
        self.state.borrow().clone().unwrap_or_else(|| Err(Error::unavailable("the stage is loading its layers")))
    }

    /// Whether the thread can still answer, or will once it has loaded.
    ///
    /// # Errors
    /// `Unavailable` when it has ended or hangs for good: the process must be restarted.
    pub fn live(&self) -> Result<()> {
        if self.jobs.is_closed() {
            return self.running().and_then(|()| Err(ended()));
        }
        if self.running().is_ok() { self.jobs.check(DEAD_AFTER) } else { Ok(()) }
    }

    /// Waits until the layers are loaded, or could not be.
    ///
    /// # Errors
    /// `Unavailable` with the reason.
    pub async fn loaded(&self) -> Result<()> {
        let mut state = self.state.clone();
        let known = state.wait_for(Option::is_some).await;
        known.map_err(|_| Error::unavailable("the stage's thread has ended"))?;
        self.running()
    }

    /// Answers a stream: a life of the replica's engine.
    fn answer(self: &Arc<Self>, requests: Streaming<wire::RunRequest>) -> BoxStream<'static, Answer> {
        let (sender, answers) = mpsc::channel(AHEAD);
        // goes with the stream of answers: a replica that is gone drops it
        let caller = Arc::new(());
        let (server, called_by) = (Arc::clone(self), Arc::downgrade(&caller));
        tokio::spawn(async move {
            if let Err(error) = server.feed(requests, &sender, called_by).await {
                // the stream's last word; who is gone needs none
                let _ = sender.send(Err(into_status(error))).await;
            }
        });
        let answers = ReceiverStream::new(answers).inspect(move |_| {
            let _held = &caller;
        });
        let pulse = || Ok(wire::RunResponse { outcome: Some(Outcome::Pulse(wire::Pulse {})) });
        self.jobs.with_pulses(answers, pulse).boxed()
    }

    /// Feeds a stream's requests to the thread as long as its life has the stage.
    ///
    /// # Errors
    /// Why no more are taken, where it is not the client that ends.
    async fn feed(
        &self,
        mut requests: Streaming<wire::RunRequest>,
        answers: &mpsc::Sender<Answer>,
        caller: Weak<()>,
    ) -> Result<()> {
        let mut life = None;
        loop {
            // all are cancel-safe
            let message = tokio::select! {
                message = requests.message() => message,
                () = answers.closed() => return Ok(()),
                error = self.fence.lost(life) => return Err(error),
                () = self.jobs.closed() => return Err(ended()),
            };
            let Ok(Some(wire::RunRequest { request })) = message else { return Ok(()) };
            let ask = request.ok_or_else(|| Error::invalid("request", "request is not given"))?;
            let of_life = match (&ask, life) {
                (Ask::Open(open), None) => self.fence.take(open)?,
                (Ask::Open(_), Some(_)) => {
                    return Err(Error::invalid("request", "request: the stream is open already"));
                }
                (_, Some(life)) => life,
                (_, None) => return Err(Error::invalid("request", "request: open the stream first")),
            };
            life = Some(of_life);
            let Ok(answer) = answers.clone().reserve_owned().await else { return Ok(()) };
            let job = Job { life: of_life, ask, answer, caller: Weak::clone(&caller) };
            if self.jobs.send(job).await.is_err() {
                return Err(ended());
            }
        }
    }
}

fn ended() -> Error {
    Error::unavailable("the stage's thread has ended; restart the process")
}

/// Does what is asked, in order; not what nobody waits for, nor what an older life asked for.
fn serve(mut runner: Box<dyn StageRunner>, mut jobs: Inbox<Job>, fence: &Fence) {
    let mut taken = Vec::new();
    while let Some(Job { life, ask, answer, caller }) = jobs.take() {
        if !fence.holds(life) || caller.strong_count() == 0 {
            continue;
        }
        let outcome = carry_out(&mut *runner, ask, &mut taken).unwrap_or_else(|error| Outcome::Error(error.into()));
        drop(answer.send(Ok(wire::RunResponse { outcome: Some(outcome) })));
    }
}

/// `taken` has the first bytes of a block of which more come.
fn carry_out(runner: &mut dyn StageRunner, ask: Ask, taken: &mut Vec<u8>) -> Result<Outcome> {
    match ask {
        Ask::Open(wire::Open { blocks, .. }) => {
            taken.clear();
            runner.allocate_kv(blocks as usize).map_err(failed)?;
            Ok(Outcome::Opened(wire::Opened { block_bytes: runner.block_bytes() as u64 }))
        }
        Ask::Compute(compute) => {
            let rows = compute.x.as_ref().map_or(0, |x| x.rows);
            let _span = traced(&compute.traceparent, || tracing::info_span!("stage", rows = i64::from(rows))).entered();
            let cols = runner.hidden();
            let rows = runner.run(&read(compute, cols)?).map_err(failed)?;
            Ok(Outcome::Rows(encode_tensor(rows.chunks_exact(cols), cols, WireDType::F32)))
        }
        Ask::Export(wire::Export { block, start, length }) => {
            let bytes = bytes::Bytes::from(runner.export_block(block).map_err(failed)?);
            let start = (start as usize).min(bytes.len());
            let end = start.saturating_add(length as usize).min(bytes.len());
            Ok(Outcome::Block(bytes.slice(start..end)))
        }
        Ask::Import(wire::Import { block, bytes, goes_on }) => {
            if !goes_on && taken.is_empty() {
                runner.import_block(block, &bytes).map_err(failed)?;
                return Ok(Outcome::Imported(wire::Imported {}));
            }
            if taken.len() + bytes.len() > runner.block_bytes() {
                taken.clear();
                return Err(Error::invalid("bytes", "bytes: a block is longer than this stage's part of it"));
            }
            taken.extend_from_slice(&bytes);
            if !goes_on {
                let whole = std::mem::take(taken);
                runner.import_block(block, &whole).map_err(failed)?;
            }
            Ok(Outcome::Imported(wire::Imported {}))
        }
    }
}

fn read(compute: wire::Compute, cols: usize) -> Result<StageInput> {
    let x = compute.x.ok_or_else(|| Error::invalid("x", "x is not given; send [rows, hidden]"))?;
    let sequence =
        |of: wire::Sequence| StageSequence { blocks: of.blocks, start: of.start as usize, rows: of.rows as usize };
    let sequences = compute.sequences.into_iter().map(sequence).collect();
    Ok(StageInput { x: decode_tensor("x", &x, cols)?, sequences, wanted: compute.wanted })
}

/// Lost experts come back; anything else is told as it is.
fn failed(error: moesaic_model::Error) -> Error {
    let code = match error {
        moesaic_model::Error::Experts { .. } => ErrorCode::Unavailable,
        _ => ErrorCode::Internal,
    };
    Error::new(code, error.to_string())
}

/// A stage that is there once the model was looked at; a replica's own process never has one.
#[derive(Default)]
pub struct LateStage(OnceLock<Arc<StageServer>>);

impl LateStage {
    /// It is there. A second one is dropped.
    pub fn set(&self, server: Arc<StageServer>) {
        self.0.get_or_init(|| server);
    }

    /// The stage; `None` before it is there.
    pub fn get(&self) -> Option<&Arc<StageServer>> {
        self.0.get()
    }
}

/// The gRPC service of a stage, for the replica that it is part of.
pub fn stage_service(stage: Arc<LateStage>) -> StageServiceServer<LateStage> {
    let service = StageServiceServer::from_arc(stage);
    service.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

#[tonic::async_trait]
impl Service for LateStage {
    type RunStream = BoxStream<'static, Result<wire::RunResponse, Status>>;

    async fn run(&self, request: Request<Streaming<wire::RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let none = || into_status(Error::unavailable("this scheduler is no later stage, or looks at its model yet"));
        let server = self.get().map(Arc::clone).ok_or_else(none)?;
        server.running().map_err(into_status)?;
        Ok(Response::new(server.answer(request.into_inner())))
    }
}
