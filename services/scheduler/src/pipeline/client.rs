//! The replica's side: its later stages over gRPC.
use moesaic_model::pipeline::{LaterStages, StageInput};
use moesaic_proto::stage::v1 as wire;
use moesaic_proto::stage::v1::run_request::Request as Ask;
use moesaic_proto::stage::v1::run_response::Outcome;
use moesaic_proto::stage::v1::stage_service_client::StageServiceClient;
use moesaic_proto::tensor::v1::Tensor;
use moesaic_proto::{WireDType, decode_tensor, encode_tensor, from_status};
use moesaic_telemetry::propagation::current_traceparent;
use moesaic_transport::channel::MAX_MESSAGE;
use moesaic_types::{Error, ErrorCode, Result};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::mpsc as blocking;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Longest wait for a stage to make its KV pool.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for a stage's answer to anything else; a lost one is noticed sooner, by its connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// Where a stage is, and which layers it has.
#[derive(Clone, Debug)]
pub struct StagePeer {
    /// Its name, for errors.
    pub name: String,
    /// How to reach it.
    pub channel: Channel,
    /// Its layers.
    pub layers: Range<usize>,
}

/// All later stages of a replica. Use it on a thread that is not the runtime's.
pub struct RemoteStages {
    peers: Vec<StagePeer>,
    hidden: usize,
    runtime: Handle,
    life: Option<Life>,
}

/// One life of the engine: a stream to each stage.
struct Life {
    outputs: blocking::Receiver<Output>,
    /// By stage, at least one.
    items: Vec<mpsc::UnboundedSender<Item>>,
    /// By stage: bytes of its part of a block.
    block_bytes: Vec<usize>,
    /// Micro-batches that were sent.
    sent: u64,
    /// Micro-batches of which it is known what came.
    answered: u64,
    /// Those before are of steps that failed.
    valid_from: u64,
    _tasks: JoinSet<()>,
}

/// What came of a micro-batch, by its number; [`LOST`]: of all.
type Output = (u64, Result<Vec<f32>>);

/// A stage is lost.
const LOST: u64 = u64::MAX;

/// What a stage's task sends.
enum Item {
    Compute(u64, Box<wire::Compute>),
    Export(u32, blocking::Sender<Result<Vec<u8>>>),
    Import(u32, bytes::Bytes, blocking::Sender<Result<Vec<u8>>>),
}

/// What a stage's next answer is for.
enum Waiting {
    Rows { number: u64, sequences: Vec<wire::Sequence>, wanted: Vec<u32>, traceparent: String },
    Bytes(blocking::Sender<Result<Vec<u8>>>),
}

impl RemoteStages {
    /// Stages in the order of their layers, of a model with rows of `hidden` columns; their streams run in `runtime`.
    pub fn new(peers: Vec<StagePeer>, hidden: usize, runtime: Handle) -> Self {
        Self { peers, hidden, runtime, life: None }
    }

    fn life(&mut self) -> moesaic_model::Result<&mut Life> {
        self.life.as_mut().ok_or_else(|| lost(Error::unavailable("the stages' KV pools were not made")))
    }

    async fn open(&self, blocks: usize) -> Result<Life> {
        if self.peers.is_empty() {
            return Err(Error::internal("a pipeline has a later stage"));
        }
        let (outputs_in, outputs) = blocking::channel();
        let mut opened = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            let late = |_| Err(Error::unavailable(format!("{} did not answer within {OPEN_TIMEOUT:?}", peer.name)));
            opened.push(timeout(OPEN_TIMEOUT, open(peer, blocks)).await.unwrap_or_else(late)?);
        }
        let (mut tasks, mut items, mut block_bytes) = (JoinSet::new(), VecDeque::new(), VecDeque::new());
        let mut next = None;
        for (stream, peer) in opened.into_iter().zip(&self.peers).rev() {
            let (sender, queue) = mpsc::unbounded_channel();
            block_bytes.push_front(stream.block_bytes);
            let (name, outputs) = (peer.name.clone(), outputs_in.clone());
            tasks.spawn(Stage { name, hidden: self.hidden, stream, queue, next, outputs }.run());
            next = Some(sender.clone());
            items.push_front(sender);
        }
        let (items, block_bytes) = (items.into(), block_bytes.into());
        Ok(Life { outputs, items, block_bytes, sent: 0, answered: 0, valid_from: 0, _tasks: tasks })
    }
}

/// A stream that is open.
struct Stream {
    requests: mpsc::Sender<wire::RunRequest>,
    answers: Streaming<wire::RunResponse>,
    block_bytes: usize,
}

/// Micro-batches and blocks that wait to be written to one stage.
const OUTGOING: usize = 16;

async fn open(peer: &StagePeer, blocks: usize) -> Result<Stream> {
    let explain = |status: &tonic::Status| {
        let error = from_status(status);
        Error { message: format!("{}: {}", peer.name, error.message), ..error }
    };
    let client = StageServiceClient::new(peer.channel.clone());
    let mut client = client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
    let (requests, outgoing) = mpsc::channel(OUTGOING);
    let wire_open =
        wire::Open { blocks: blocks as u32, first_layer: peer.layers.start as u32, end_layer: peer.layers.end as u32 };
    let ask = wire::RunRequest { request: Some(Ask::Open(wire_open)) };
    requests.send(ask).await.map_err(|_| Error::internal("a new channel has room"))?;
    let answers = client.run(ReceiverStream::new(outgoing)).await;
    let mut answers = answers.map_err(|status| explain(&status))?.into_inner();
    match answers.message().await.map_err(|status| explain(&status))?.and_then(|answer| answer.outcome) {
        Some(Outcome::Opened(wire::Opened { block_bytes })) => {
            Ok(Stream { requests, answers, block_bytes: block_bytes as usize })
        }
        Some(Outcome::Error(error)) => {
            let error = Error::from(error);
            Err(Error { message: format!("{}: {}", peer.name, error.message), ..error })
        }
        _ => Err(Error::unavailable(format!("{} ended the stream", peer.name))),
    }
}

/// One stage's task.
struct Stage {
    name: String,
    hidden: usize,
    stream: Stream,
    queue: mpsc::UnboundedReceiver<Item>,
    /// Where its rows go; `None`: it is the last.
    next: Option<mpsc::UnboundedSender<Item>>,
    outputs: blocking::Sender<Output>,
}

impl Stage {
    /// Writes what comes and hands answers on; a stage that is lost fails the step, and every later one of this life.
    async fn run(mut self) {
        if let Err(error) = self.relay().await {
            self.put_out(LOST, Err(Error::unavailable(format!("{} is lost: {error}", self.name))));
        }
    }

    fn put_out(&self, number: u64, output: Result<Vec<f32>>) {
        // nobody waits: the life is over
        let _ = self.outputs.send((number, output));
    }

    async fn relay(&mut self) -> Result<()> {
        let ended = || Error::unavailable("it ended the stream");
        let mut waiting = VecDeque::new();
        loop {
            tokio::select! {
                item = self.queue.recv() => {
                    let Some(item) = item else { return Ok(()) };
                    let (ask, wait) = match item {
                        Item::Compute(number, compute) => {
                            let (sequences, wanted) = (compute.sequences.clone(), compute.wanted.clone());
                            let traceparent = compute.traceparent.clone();
                            (Ask::Compute(*compute), Waiting::Rows { number, sequences, wanted, traceparent })
                        }
                        Item::Export(block, reply) => (Ask::Export(wire::Export { block }), Waiting::Bytes(reply)),
                        Item::Import(block, bytes, reply) => {
                            (Ask::Import(wire::Import { block, bytes }), Waiting::Bytes(reply))
                        }
                    };
                    waiting.push_back(wait);
                    self.stream.requests.send(wire::RunRequest { request: Some(ask) }).await.map_err(|_| ended())?;
                }
                answer = self.stream.answers.message() => {
                    let answer = answer.map_err(|status| from_status(&status))?.ok_or_else(ended)?;
                    let wait = waiting.pop_front().ok_or_else(|| Error::internal("it answers what was not asked"))?;
                    self.take(answer, wait)?;
                }
            }
        }
    }

    fn take(&self, answer: wire::RunResponse, wait: Waiting) -> Result<()> {
        let unexpected = || Error::internal("it answers something else than was asked");
        match (wait, answer.outcome) {
            (Waiting::Rows { number, sequences, wanted, traceparent }, Some(Outcome::Rows(x))) => match &self.next {
                Some(next) => {
                    let compute = wire::Compute { x: Some(x), sequences, wanted, traceparent };
                    // a next stage that is gone has told why
                    let _ = next.send(Item::Compute(number, Box::new(compute)));
                }
                None => self.put_out(number, Ok(self.rows(&x, wanted.len())?)),
            },
            // the experts of its layers are lost for now: only this step fails
            (Waiting::Rows { number, .. }, Some(Outcome::Error(error))) => {
                let error = Error::from(error);
                if error.code != ErrorCode::Unavailable {
                    return Err(error);
                }
                self.put_out(number, Err(Error { message: format!("{}: {}", self.name, error.message), ..error }));
            }
            (Waiting::Bytes(reply), Some(Outcome::Block(bytes))) => drop(reply.send(Ok(bytes.to_vec()))),
            (Waiting::Bytes(reply), Some(Outcome::Imported(_))) => drop(reply.send(Ok(Vec::new()))),
            (Waiting::Bytes(reply), Some(Outcome::Error(error))) => drop(reply.send(Err(error.into()))),
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    fn rows(&self, x: &Tensor, wanted: usize) -> Result<Vec<f32>> {
        let rows = decode_tensor("rows", x, self.hidden)?;
        if rows.len() == wanted * self.hidden {
            return Ok(rows);
        }
        Err(Error::internal(format!("{} gives {} values for {wanted} rows", self.name, rows.len())))
    }
}

fn lost(error: Error) -> moesaic_model::Error {
    moesaic_model::Error::Stage { reason: error.message }
}

impl Life {
    /// What came of the next micro-batch, by its number.
    fn next(&mut self) -> moesaic_model::Result<Output> {
        let output = self.outputs.recv_timeout(ANSWER_TIMEOUT);
        let (number, output) = output.map_err(|_| lost(Error::unavailable("a stage does not answer")))?;
        if number == LOST {
            return output.map(|rows| (number, Ok(rows))).map_err(lost);
        }
        self.answered += 1;
        Ok((number, output))
    }

    /// Waits until no micro-batch of a step that failed is under way: it would write into blocks that have others'
    /// tokens by now.
    fn drain(&mut self) -> moesaic_model::Result<()> {
        while self.answered < self.sent {
            // its step failed: nobody wants what came of it
            drop(self.next()?);
        }
        Ok(())
    }
}

impl LaterStages for RemoteStages {
    fn stages(&self) -> usize {
        self.peers.len()
    }

    fn allocate_kv(&mut self, blocks: usize) -> moesaic_model::Result<()> {
        self.life = None;
        self.life = Some(self.runtime.block_on(self.open(blocks)).map_err(lost)?);
        Ok(())
    }

    fn send(&mut self, input: StageInput) -> moesaic_model::Result<()> {
        let hidden = self.hidden;
        let sequence = |of: moesaic_model::pipeline::StageSequence| wire::Sequence {
            blocks: of.blocks,
            start: of.start as u32,
            rows: of.rows as u32,
        };
        let compute = wire::Compute {
            x: Some(encode_tensor(input.x.chunks_exact(hidden), hidden, WireDType::F32)),
            sequences: input.sequences.into_iter().map(sequence).collect(),
            wanted: input.wanted,
            traceparent: current_traceparent().unwrap_or_default(),
        };
        let life = self.life()?;
        let number = life.sent;
        life.sent += 1;
        // if that stage is lost, its task has told why
        let _ = life.items[0].send(Item::Compute(number, Box::new(compute)));
        Ok(())
    }

    fn receive(&mut self) -> moesaic_model::Result<Vec<f32>> {
        let life = self.life()?;
        loop {
            let (number, output) = life.next()?;
            if number >= life.valid_from {
                return output.map_err(|error| moesaic_model::Error::Experts { layer: 0, reason: error.message });
            }
        }
    }

    fn forget(&mut self) {
        if let Some(life) = &mut self.life {
            life.valid_from = life.sent;
        }
    }

    fn export_block(&mut self, block: u32) -> moesaic_model::Result<Vec<u8>> {
        let life = self.life()?;
        life.drain()?;
        let ask = |items: &mpsc::UnboundedSender<Item>| {
            let (reply, answer) = blocking::channel();
            items.send(Item::Export(block, reply)).ok().map(|()| answer)
        };
        let answers: Vec<_> = life.items.iter().map(ask).collect();
        let parts = answers.into_iter().map(await_bytes);
        Ok(parts.collect::<moesaic_model::Result<Vec<_>>>()?.concat())
    }

    fn import_block(&mut self, block: u32, bytes: &[u8]) -> moesaic_model::Result<()> {
        let life = self.life()?;
        life.drain()?;
        let (mut rest, mut answers) = (bytes, Vec::new());
        for (items, size) in life.items.iter().zip(&life.block_bytes) {
            let Some((own, later)) = rest.split_at_checked(*size) else {
                return Err(lost(Error::internal("a block is shorter than the stages' parts of it")));
            };
            rest = later;
            let (reply, answer) = blocking::channel();
            let sent = items.send(Item::Import(block, bytes::Bytes::copy_from_slice(own), reply));
            answers.push(sent.ok().map(|()| answer));
        }
        answers.into_iter().try_for_each(|answer| await_bytes(answer).map(drop))
    }
}

fn await_bytes(answer: Option<blocking::Receiver<Result<Vec<u8>>>>) -> moesaic_model::Result<Vec<u8>> {
    let gone = || lost(Error::unavailable("a stage is lost"));
    answer.ok_or_else(gone)?.recv_timeout(ANSWER_TIMEOUT).map_err(|_| gone())?.map_err(lost)
}
