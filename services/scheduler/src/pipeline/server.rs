//! A stage's side: one thread that owns its layers, fed by the stream that is open.
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
use moesaic_types::{Error, ErrorCode, Result};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Requests that are read ahead of the computation, and answers that wait to be taken.
const AHEAD: usize = 8;

/// Builds a stage's layers.
pub type StageFactory = Box<dyn FnOnce() -> moesaic_model::Result<Box<dyn StageRunner>> + Send>;

/// A stage's thread.
pub struct StageServer {
    jobs: mpsc::Sender<Job>,
    /// The stream that has the stage.
    life: AtomicU64,
    state: watch::Receiver<Option<Result<()>>>,
}

struct Job {
    life: u64,
    ask: Ask,
    answer: mpsc::OwnedPermit<wire::RunResponse>,
}

impl StageServer {
    /// Starts the thread, which first builds the layers `layers`.
    ///
    /// # Errors
    /// `Unavailable` when the system gives no thread.
    pub fn start(layers: Range<usize>, factory: StageFactory) -> Result<Arc<Self>> {
        let (jobs, queue) = mpsc::channel(AHEAD);
        let (told, state) = watch::channel(None);
        let server = Arc::new(Self { jobs, life: AtomicU64::new(0), state });
        let work = move || match factory() {
            Ok(runner) => {
                told.send_replace(Some(Ok(())));
                // a panic ends the thread: its stage is lost, and so is readiness
                let served = catch_unwind(AssertUnwindSafe(|| serve(runner, queue, &layers)));
                let reason = if served.is_ok() { "the stage ended" } else { "the stage panicked; restart the process" };
                told.send_replace(Some(Err(Error::unavailable(reason))));
            }
            Err(error) => drop(told.send_replace(Some(Err(Error::unavailable(format!("load the stage: {error}")))))),
        };
        let thread = std::thread::Builder::new().name("stage".into()).spawn(work);
        thread.map_err(|error| Error::unavailable(format!("start the stage's thread: {error}")))?;
        Ok(server)
    }

    /// Whether the layers are loaded and the thread runs.
    ///
    /// # Errors
    /// `Unavailable` with the reason.
    pub fn ready(&self) -> Result<()> {
        self.state.borrow().clone().unwrap_or_else(|| Err(Error::unavailable("the stage is loading its layers")))
    }

    /// Whether the thread can still answer, or will once it has loaded.
    ///
    /// # Errors
    /// `Unavailable` when it has ended: the process must be restarted.
    pub fn live(&self) -> Result<()> {
        if self.jobs.is_closed() { self.ready() } else { Ok(()) }
    }

    /// Waits until the layers are loaded, or could not be.
    ///
    /// # Errors
    /// `Unavailable` with the reason.
    pub async fn loaded(&self) -> Result<()> {
        let mut state = self.state.clone();
        let known = state.wait_for(Option::is_some).await;
        known.map_err(|_| Error::unavailable("the stage's thread has ended"))?;
        self.ready()
    }

    /// Feeds a stream's requests to the thread as long as it is the newest.
    async fn feed(
        &self,
        life: u64,
        mut requests: Streaming<wire::RunRequest>,
        answers: mpsc::Sender<wire::RunResponse>,
    ) {
        let mut is_open = false;
        loop {
            let message = tokio::select! {
                message = requests.message() => message,
                () = answers.closed() => return,
                // the thread ended: so does the stream, and its replica hears it
                () = self.jobs.closed() => return,
            };
            let Ok(Some(message)) = message else { return };
            let Ok(place) = answers.clone().reserve_owned().await else { return };
            let refused = |error: Error| wire::RunResponse { outcome: Some(Outcome::Error(error.into())) };
            let ask = match message.request {
                Some(ask) if is_open || matches!(ask, Ask::Open(_)) => ask,
                Some(_) => {
                    return drop(place.send(refused(Error::invalid("request", "request: open the stream first"))));
                }
                None => return drop(place.send(refused(Error::invalid("request", "request is not given")))),
            };
            is_open = true;
            if self.life.load(Ordering::Acquire) != life {
                return drop(place.send(refused(Error::unavailable("another stream has taken this stage over"))));
            }
            if self.jobs.send(Job { life, ask, answer: place }).await.is_err() {
                return;
            }
        }
    }
}

/// Does what is asked, in order. Requests of a life that is over are refused.
fn serve(mut runner: Box<dyn StageRunner>, mut queue: mpsc::Receiver<Job>, layers: &Range<usize>) {
    let mut newest = 0;
    while let Some(Job { life, ask, answer }) = queue.blocking_recv() {
        if life < newest {
            let error = Error::unavailable("another stream has taken this stage over");
            drop(answer.send(wire::RunResponse { outcome: Some(Outcome::Error(error.into())) }));
            continue;
        }
        newest = life;
        let outcome = carry_out(&mut *runner, ask, layers).unwrap_or_else(|error| Outcome::Error(error.into()));
        drop(answer.send(wire::RunResponse { outcome: Some(outcome) }));
    }
}

fn carry_out(runner: &mut dyn StageRunner, ask: Ask, layers: &Range<usize>) -> Result<Outcome> {
    match ask {
        Ask::Open(wire::Open { blocks, first_layer, end_layer }) => {
            let wanted = first_layer as usize..end_layer as usize;
            if wanted != *layers {
                let message = format!("first_layer: layers {wanted:?} are expected here; this stage has {layers:?}");
                return Err(Error::invalid("first_layer", message));
            }
            runner.allocate_kv(blocks as usize).map_err(failed)?;
            Ok(Outcome::Opened(wire::Opened { block_bytes: runner.block_bytes() as u64 }))
        }
        Ask::Compute(compute) => {
            let rows = compute.x.as_ref().map_or(0, |x| x.rows);
            let _span = traced(&compute.traceparent, || tracing::info_span!("stage", rows)).entered();
            let cols = runner.hidden();
            let rows = runner.run(&read(compute, cols)?).map_err(failed)?;
            Ok(Outcome::Rows(encode_tensor(rows.chunks_exact(cols), cols, WireDType::F32)))
        }
        Ask::Export(wire::Export { block }) => {
            runner.export_block(block).map(|b| Outcome::Block(b.into())).map_err(failed)
        }
        Ask::Import(wire::Import { block, bytes }) => {
            runner.import_block(block, &bytes).map_err(failed)?;
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
        server.ready().map_err(into_status)?;
        let life = server.life.fetch_add(1, Ordering::AcqRel) + 1;
        let (sender, answers) = mpsc::channel(AHEAD);
        tokio::spawn(async move { server.feed(life, request.into_inner(), sender).await });
        Ok(Response::new(ReceiverStream::new(answers).map(Ok).boxed()))
    }
}
