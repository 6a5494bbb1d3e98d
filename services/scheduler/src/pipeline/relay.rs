//! One stage of a replica: its stream, and the task that hands micro-batches on to the next one.
use super::client::{StageOptions, StagePeer};
use moesaic_model::runner::Waker;
use moesaic_proto::stage::v1 as wire;
use moesaic_proto::stage::v1::run_request::Request as Ask;
use moesaic_proto::stage::v1::run_response::Outcome;
use moesaic_proto::stage::v1::stage_service_client::StageServiceClient;
use moesaic_proto::tensor::v1::Tensor;
use moesaic_proto::{decode_tensor, from_status};
use moesaic_transport::pulse::heard;
use moesaic_types::{Error, Result};
use std::sync::mpsc as blocking;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// What came of a micro-batch, by its number; [`LOST`]: of all.
pub(super) type Output = (u64, Result<Vec<f32>>);

/// A stage is lost.
pub(super) const LOST: u64 = u64::MAX;

/// Takes what came of a block, or of a piece of it.
pub(super) type BlockReply = blocking::Sender<Result<bytes::Bytes>>;

/// What a stage's task sends.
pub(super) enum Item {
    Compute(u64, Box<wire::Compute>),
    Export(wire::Export, BlockReply),
    Import(wire::Import, BlockReply),
}

/// What a stage's next answer is for.
enum Waiting {
    Rows { number: u64, sequences: Vec<wire::Sequence>, wanted: Vec<u32>, traceparent: String },
    Bytes(BlockReply),
}

/// A stream that is open.
pub(super) struct Stream {
    requests: mpsc::Sender<wire::RunRequest>,
    answers: Streaming<wire::RunResponse>,
    /// Of the stage's part of a block.
    pub(super) block_bytes: usize,
}

/// Micro-batches and blocks that wait to be written to one stage.
const OUTGOING: usize = 16;

fn explain(peer: &StagePeer, status: &Status) -> Error {
    let error = from_status(status);
    Error { message: format!("{}: {}", peer.name, error.message), ..error }
}

fn client(peer: &StagePeer, options: &StageOptions) -> StageServiceClient<Channel> {
    let client = StageServiceClient::new(peer.channel.clone());
    client.max_decoding_message_size(options.max_message).max_encoding_message_size(options.max_message)
}

/// Whether a stage would take a stream; takes nothing from whoever has it.
pub(super) async fn knock(peer: &StagePeer, options: &StageOptions) -> Result<()> {
    let nothing = futures::stream::empty::<wire::RunRequest>();
    client(peer, options).run(nothing).await.map(drop).map_err(|status| explain(peer, &status))
}

/// Opens a stream; returns when the stage has made its KV pool.
pub(super) async fn open(peer: &StagePeer, options: &StageOptions, open: wire::Open) -> Result<Stream> {
    let (requests, outgoing) = mpsc::channel(OUTGOING);
    let ask = wire::RunRequest { request: Some(Ask::Open(open)) };
    requests.send(ask).await.map_err(|_| Error::internal("a new channel has room"))?;
    let answers = client(peer, options).run(ReceiverStream::new(outgoing)).await;
    let mut answers = answers.map_err(|status| explain(peer, &status))?.into_inner();
    loop {
        let answer = answers.message().await.map_err(|status| explain(peer, &status))?;
        match answer.and_then(|answer| answer.outcome) {
            Some(Outcome::Pulse(_)) => {}
            Some(Outcome::Opened(wire::Opened { block_bytes })) => {
                return Ok(Stream { requests, answers, block_bytes: block_bytes as usize });
            }
            Some(Outcome::Error(error)) => {
                let error = Error::from(error);
                return Err(Error { message: format!("{}: {}", peer.name, error.message), ..error });
            }
            _ => return Err(Error::unavailable(format!("{} ended the stream", peer.name))),
        }
    }
}

/// One stage's task.
pub(super) struct Relay {
    pub(super) name: String,
    pub(super) hidden: usize,
    pub(super) silence: Duration,
    pub(super) queue: mpsc::UnboundedReceiver<Item>,
    pub(super) onward: Onward,
}

/// Where a stage's rows go.
pub(super) struct Onward {
    /// The next stage; `None`: it is the last.
    pub(super) next: Option<mpsc::UnboundedSender<Item>>,
    pub(super) outputs: blocking::Sender<Output>,
    /// Wakes who waits for neither.
    pub(super) waker: Waker,
}

impl Onward {
    fn put_out(&self, number: u64, output: Result<Vec<f32>>) {
        // nobody waits: the life is over
        let _ = self.outputs.send((number, output));
        if number == LOST {
            (self.waker)();
        }
    }
}

impl Drop for Onward {
    /// However the task ends, nobody waits for it in vain.
    fn drop(&mut self) {
        self.put_out(LOST, Err(Error::unavailable("a stage's stream has ended")));
    }
}

impl Relay {
    /// Writes what comes and hands answers on; a stage that is lost fails the step, and every later one of this life.
    pub(super) async fn run(self, stream: Stream) {
        let Self { name, hidden, silence, queue, onward } = self;
        let Stream { requests, answers, .. } = stream;
        let (expect, expected) = mpsc::unbounded_channel();
        let reading = read(&name, hidden, silence, answers, expected, &onward);
        // neither waits for the other: a stage that takes no requests until its answers are read gets both
        let lost = tokio::select! {
            error = reading => error,
            () = write(queue, requests, expect) => return,
        };
        onward.put_out(LOST, Err(Error::unavailable(format!("{name} is lost: {lost}"))));
    }
}

/// Writes what comes, until no more can.
async fn write(
    mut queue: mpsc::UnboundedReceiver<Item>,
    requests: mpsc::Sender<wire::RunRequest>,
    expect: mpsc::UnboundedSender<Waiting>,
) {
    while let Some(item) = queue.recv().await {
        let (ask, waiting) = match item {
            Item::Compute(number, compute) => {
                let (sequences, wanted) = (compute.sequences.clone(), compute.wanted.clone());
                let traceparent = compute.traceparent.clone();
                (Ask::Compute(*compute), Waiting::Rows { number, sequences, wanted, traceparent })
            }
            Item::Export(export, reply) => (Ask::Export(export), Waiting::Bytes(reply)),
            Item::Import(import, reply) => (Ask::Import(import), Waiting::Bytes(reply)),
        };
        let is_over = expect.send(waiting).is_err();
        if is_over || requests.send(wire::RunRequest { request: Some(ask) }).await.is_err() {
            // who reads hears why
            return std::future::pending().await;
        }
    }
}

/// Hands answers on; why no more come.
async fn read(
    name: &str,
    hidden: usize,
    silence: Duration,
    mut answers: Streaming<wire::RunResponse>,
    mut expected: mpsc::UnboundedReceiver<Waiting>,
    onward: &Onward,
) -> Error {
    loop {
        let outcome = match heard(&mut answers, "it", silence, from_status).await {
            Ok(Some(answer)) => answer.outcome,
            Ok(None) => return Error::unavailable("it ended the stream"),
            Err(error) => return error,
        };
        if matches!(outcome, Some(Outcome::Pulse(_))) {
            continue;
        }
        let Ok(waiting) = expected.try_recv() else { return Error::internal("it answers what was not asked") };
        if let Err(error) = take(name, hidden, waiting, outcome, onward) {
            return error;
        }
    }
}

fn take(name: &str, hidden: usize, waiting: Waiting, outcome: Option<Outcome>, onward: &Onward) -> Result<()> {
    match (waiting, outcome) {
        (Waiting::Rows { number, sequences, wanted, traceparent }, Some(Outcome::Rows(x))) => match &onward.next {
            Some(next) => {
                let compute = wire::Compute { x: Some(x), sequences, wanted, traceparent };
                // a next stage that is gone has told why
                let _ = next.send(Item::Compute(number, Box::new(compute)));
            }
            None => onward.put_out(number, Ok(rows(name, hidden, &x, wanted.len())?)),
        },
        // only this step fails: the stage is there
        (Waiting::Rows { number, .. }, Some(Outcome::Error(error))) => {
            let error = Error::from(error);
            onward.put_out(number, Err(Error { message: format!("{name}: {}", error.message), ..error }));
        }
        (Waiting::Bytes(reply), Some(Outcome::Block(bytes))) => drop(reply.send(Ok(bytes))),
        (Waiting::Bytes(reply), Some(Outcome::Imported(_))) => drop(reply.send(Ok(bytes::Bytes::new()))),
        (Waiting::Bytes(reply), Some(Outcome::Error(error))) => drop(reply.send(Err(error.into()))),
        _ => return Err(Error::internal("it answers something else than was asked")),
    }
    Ok(())
}

fn rows(name: &str, hidden: usize, x: &Tensor, wanted: usize) -> Result<Vec<f32>> {
    let rows = decode_tensor("rows", x, hidden)?;
    if rows.len() == wanted * hidden {
        return Ok(rows);
    }
    Err(Error::internal(format!("{name} gives {} values for {wanted} rows", rows.len())))
}
