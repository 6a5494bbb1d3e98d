//! `moesaic.expert.v1`: schedulers send tokens, the leading router placements.
use crate::app::ExpertShard;
use crate::executor::{Executor, Job, Outcome};
use crate::library::Library;
use crate::shelf::{Held, check_is_coming};
use futures::stream::{BoxStream, StreamExt};
use moesaic_model::backend::Backend;
use moesaic_proto::expert::v1 as wire;
use moesaic_proto::expert::v1::expert_service_server::{ExpertService, ExpertServiceServer};
use moesaic_proto::{ComputeInput, WireDType, encode_tensor, from_status, into_status, shares_from_wire};
use moesaic_telemetry::count;
use moesaic_telemetry::propagation::traced;
use moesaic_transport::channel::MAX_MESSAGE;
use moesaic_types::cluster::Shares;
use moesaic_types::{Error, Result};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::timeout_at;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Requests of one stream that are computed or wait to be taken; then no more are read from it.
const IN_FLIGHT: usize = 32;

/// What a process does with its shard, whatever backend that is on.
#[tonic::async_trait]
pub trait ShardServer: ExpertService<ComputeStream = ComputeStream> {
    /// The placement that it follows; 0 before the first.
    fn epoch(&self) -> u64;
    /// Whether it can compute.
    ///
    /// # Errors
    /// `Unavailable` when its thread has ended or hangs for good: the process must be restarted.
    fn live(&self) -> Result<()>;
    /// Whether it computes what is asked.
    ///
    /// # Errors
    /// `Unavailable` when its thread hangs or has ended.
    fn ready(&self) -> Result<()>;
    /// Waits until nobody waits for an answer; whether that was by the deadline.
    async fn idle_by(&self, deadline: Instant) -> bool;
}

/// Answers of one stream.
pub type ComputeStream = BoxStream<'static, Result<wire::ComputeResponse, Status>>;

/// A shard that is there once the model's files are opened.
#[derive(Default)]
pub struct Shard(OnceLock<Arc<dyn ShardServer>>);

impl Shard {
    /// It is there. A second one is dropped.
    pub fn set(&self, server: Arc<dyn ShardServer>) {
        self.0.get_or_init(|| server);
    }

    /// The shard.
    ///
    /// # Errors
    /// `Unavailable` while the files are being opened.
    pub fn get(&self) -> Result<&Arc<dyn ShardServer>> {
        self.0.get().ok_or_else(|| Error::unavailable("the model's files are being opened"))
    }
}

/// The gRPC service of a shard.
pub fn expert_service(shard: Arc<Shard>) -> ExpertServiceServer<Shard> {
    let service = ExpertServiceServer::from_arc(shard);
    service.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

/// Serves a shard whose experts come from `library`.
pub fn server<B: Backend>(shard: Arc<ExpertShard<B>>, executor: Executor<B>, library: Library) -> Arc<dyn ShardServer> {
    let server = Server { shard, executor, library, preparing: Arc::default(), in_flight: watch::Sender::new(0) };
    Arc::new(Served(Arc::new(server)))
}

/// A shard on one backend.
struct Served<B: Backend>(Arc<Server<B>>);

struct Server<B: Backend> {
    shard: Arc<ExpertShard<B>>,
    executor: Executor<B>,
    library: Library,
    /// Held while a placement is prepared.
    preparing: Arc<Mutex<()>>,
    /// Requests that were not answered yet.
    in_flight: watch::Sender<usize>,
}

/// A request that is not answered yet.
struct InFlight<B: Backend>(Arc<Server<B>>);

impl<B: Backend> InFlight<B> {
    fn new(server: &Arc<Server<B>>) -> Self {
        server.in_flight.send_modify(|count| *count += 1);
        Self(Arc::clone(server))
    }
}

impl<B: Backend> Drop for InFlight<B> {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}

/// How an answer travels.
struct Pending {
    tag: u64,
    reply: WireDType,
    hidden: usize,
    epoch: u64,
}

impl Pending {
    fn answer(&self, outcome: Outcome) -> wire::ComputeResponse {
        use wire::compute_response::Outcome::{Error, Output};
        let outcome_on_wire = match outcome.output {
            Ok(output) => Output(encode_tensor(output.chunks_exact(self.hidden), self.hidden, self.reply)),
            Err(error) => Error(error.into()),
        };
        wire::ComputeResponse {
            tag: self.tag,
            outcome: Some(outcome_on_wire),
            queued_us: micros(outcome.queued),
            computed_us: micros(outcome.computed),
            epoch: self.epoch,
        }
    }
}

fn micros(time: Duration) -> u32 {
    time.as_micros().try_into().unwrap_or(u32::MAX)
}

impl<B: Backend> Server<B> {
    /// Reads requests and submits them until the client ends, breaks off or stops to take answers.
    async fn take(
        self: Arc<Self>,
        mut requests: Streaming<wire::ComputeRequest>,
        answers: mpsc::Sender<Answer>,
        caller: Weak<()>,
    ) {
        loop {
            let Ok(place) = answers.clone().reserve_owned().await else { return };
            let message = tokio::select! {
                message = requests.message() => message,
                // the thread ended: so does the stream, and its scheduler hears it
                () = self.executor.ended() => return,
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(status) => {
                    tracing::debug!(error = %from_status(&status), "a scheduler's stream ended");
                    return;
                }
            };
            let tag = message.tag;
            let submitted = Instant::now();
            let refused = |error: Error| {
                let pending =
                    Pending { tag, reply: WireDType::F32, hidden: 0, epoch: self.shard.shelf().current().epoch };
                let outcome = Outcome { output: Err(error), queued: Duration::ZERO, computed: Duration::ZERO };
                (pending, outcome)
            };
            match self.accept(message) {
                Err(error) => drop(place.send(refused(error))),
                Ok((input, held)) => {
                    let (reply, hidden, epoch) = (input.reply, self.shard.hidden(), held.epoch);
                    let pending = Pending { tag, reply, hidden, epoch };
                    let (layer, tokens) = (count(input.layer), count(input.routing.tokens()));
                    let span = traced(&input.traceparent, || tracing::info_span!("experts", layer, tokens));
                    let in_flight = InFlight::new(&self);
                    let reply = Box::new(move |outcome| {
                        drop(place.send((pending, outcome)));
                        drop(in_flight);
                    });
                    let ComputeInput { layer, x, routing, is_again, .. } = input;
                    let caller = Weak::clone(&caller);
                    let job = Job { held, layer, x, routing, is_again, caller, span, submitted, reply };
                    if self.executor.submit(job).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn accept(&self, message: wire::ComputeRequest) -> Result<(ComputeInput, Held<B>)> {
        let input = ComputeInput::read(message, self.shard.hidden(), |layer| self.library.experts(layer))?;
        let held = self.shard.shelf().at(input.epoch)?;
        Ok((input, held))
    }

    /// Loads what a placement wants; how many experts that were.
    async fn prepare(self: Arc<Self>, epoch: u64, shares: Shares) -> Result<u32> {
        let server = Arc::clone(&self);
        // goes along with the loading, which outlives a call that is given up
        let preparing = Arc::clone(&self.preparing).lock_owned().await;
        let current = self.shard.shelf().current();
        check_is_coming(epoch, current.epoch)?;
        if self.shard.shelf().has_prepared(epoch, &shares) {
            return Ok(0);
        }
        let load = move || {
            let _preparing = preparing;
            let begun = Instant::now();
            let before = held_of(&current.experts.shares(), &shares);
            let experts: usize = shares.values().map(Vec::len).sum();
            tracing::info!(epoch, experts, loads = experts - before, "prepare a placement");
            let progress = |progress: moesaic_model::decoder::Progress| {
                tracing::debug!(epoch, layers = progress.layers_done, of = progress.layers_total, "load experts");
            };
            // one that came to nothing is in memory as well
            let prepared = server.shard.shelf().prepared();
            let also = prepared.as_ref().map(|held| &*held.experts);
            let store = server.library.load(&current.experts, also, &shares, &progress)?;
            drop(prepared);
            tracing::info!(epoch, seconds = begun.elapsed().as_secs_f64(), "prepared a placement");
            server.shard.shelf().prepare(Held { epoch, experts: Arc::new(store) })?;
            Ok((experts - before) as u32)
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        loaded.map_err(|_| Error::internal("loading experts panicked"))?
    }
}

/// How many of `wanted` are among `held`.
fn held_of(held: &Shares, wanted: &Shares) -> usize {
    let of_layer = |(layer, experts): (&usize, &Vec<u32>)| {
        let held = held.get(layer);
        experts.iter().filter(|expert| held.is_some_and(|held| held.binary_search(expert).is_ok())).count()
    };
    wanted.iter().map(of_layer).sum()
}

type Answer = (Pending, Outcome);

#[tonic::async_trait]
impl ExpertService for Shard {
    type ComputeStream = ComputeStream;

    async fn compute(
        &self,
        request: Request<Streaming<wire::ComputeRequest>>,
    ) -> Result<Response<ComputeStream>, Status> {
        self.get().map_err(into_status)?.compute(request).await
    }

    async fn describe(
        &self,
        request: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeResponse>, Status> {
        self.get().map_err(into_status)?.describe(request).await
    }

    async fn prepare(&self, request: Request<wire::PrepareRequest>) -> Result<Response<wire::PrepareResponse>, Status> {
        self.get().map_err(into_status)?.prepare(request).await
    }

    async fn commit(&self, request: Request<wire::CommitRequest>) -> Result<Response<wire::CommitResponse>, Status> {
        self.get().map_err(into_status)?.commit(request).await
    }
}

#[tonic::async_trait]
impl<B: Backend> ShardServer for Served<B> {
    fn epoch(&self) -> u64 {
        self.0.shard.shelf().current().epoch
    }

    fn live(&self) -> Result<()> {
        self.0.executor.live()
    }

    fn ready(&self) -> Result<()> {
        self.0.executor.ready()
    }

    async fn idle_by(&self, deadline: Instant) -> bool {
        let mut in_flight = self.0.in_flight.subscribe();
        let idle = in_flight.wait_for(|count| *count == 0);
        timeout_at(deadline.into(), idle).await.is_ok()
    }
}

#[tonic::async_trait]
impl<B: Backend> ExpertService for Served<B> {
    type ComputeStream = ComputeStream;

    async fn compute(
        &self,
        request: Request<Streaming<wire::ComputeRequest>>,
    ) -> Result<Response<Self::ComputeStream>, Status> {
        let (sender, answers) = mpsc::channel::<Answer>(IN_FLIGHT);
        // goes with the stream of answers: a client that is gone drops it
        let caller = Arc::new(());
        tokio::spawn(Arc::clone(&self.0).take(request.into_inner(), sender, Arc::downgrade(&caller)));
        let answers = ReceiverStream::new(answers).map(move |(pending, outcome)| {
            let _held = &caller;
            Ok(pending.answer(outcome))
        });
        let pulse = || {
            let outcome = Some(wire::compute_response::Outcome::Pulse(wire::Pulse {}));
            Ok(wire::ComputeResponse { outcome, ..wire::ComputeResponse::default() })
        };
        Ok(Response::new(self.0.executor.with_pulses(answers, pulse).boxed()))
    }

    async fn describe(
        &self,
        request: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::DescribeResponse>, Status> {
        let shard = &self.0.shard;
        let load = if request.into_inner().end_window { shard.end_window().await } else { shard.load().await };
        let mut load = load.map_err(into_status)?;
        let Held { epoch, experts } = shard.shelf().current();
        let mut held = experts.shares();
        let spec = &self.0.library.spec;
        let layers = spec.moe_layers().map(|layer| wire::Layer {
            layer: layer as u32,
            experts: held.remove(&layer).unwrap_or_default(),
            load: load.remove(&layer).unwrap_or_else(|| vec![0; spec.moe(layer).map_or(0, |moe| moe.experts)]),
        });
        Ok(Response::new(wire::DescribeResponse { epoch, layers: layers.collect() }))
    }

    async fn prepare(&self, request: Request<wire::PrepareRequest>) -> Result<Response<wire::PrepareResponse>, Status> {
        let wire::PrepareRequest { epoch, shares } = request.into_inner();
        let shares = shares_from_wire(shares).map_err(into_status)?;
        let loaded = Server::prepare(Arc::clone(&self.0), epoch, shares).await.map_err(into_status)?;
        Ok(Response::new(wire::PrepareResponse { loaded }))
    }

    async fn commit(&self, request: Request<wire::CommitRequest>) -> Result<Response<wire::CommitResponse>, Status> {
        let epoch = request.into_inner().epoch;
        self.0.shard.shelf().commit(epoch).map_err(into_status)?;
        Ok(Response::new(wire::CommitResponse { epoch }))
    }
}
