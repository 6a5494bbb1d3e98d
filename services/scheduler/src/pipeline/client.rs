//! The replica's side: its later stages over gRPC.
use super::relay::{self, Item, LOST, Onward, Output, Relay};
use bytes::Bytes;
use moesaic_model::pipeline::{LaterStages, StageInput, StageSequence};
use moesaic_model::runner::{Advanced, Waker};
use moesaic_proto::stage::v1 as wire;
use moesaic_proto::{WireDType, encode_tensor};
use moesaic_telemetry::propagation::current_traceparent;
use moesaic_transport::channel::{MAX_MESSAGE, payload};
use moesaic_transport::pulse::PULSE_EVERY;
use moesaic_types::{Error, ErrorCode, Result};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as blocking;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::Channel;

/// Longest wait for a stage to make its KV pool.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for a stage to say that it would take a stream.
const KNOCK_TIMEOUT: Duration = Duration::from_secs(2);

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

/// Whose stages they are: each life of the engine is later than those before it, in this process and in earlier ones.
#[derive(Clone, Debug, Default)]
pub struct StageOwner {
    /// The `cluster.id` of the replica's process.
    pub replica: Arc<str>,
    /// The generation of its registration.
    pub generation: u64,
    /// Lives of the engine in this process so far.
    pub lives: Arc<AtomicU64>,
}

/// How stages are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOptions {
    /// A stage of which nothing came for so long hangs or is cut off, and is lost. Some times
    /// [`PULSE_EVERY`](moesaic_transport::pulse::PULSE_EVERY).
    pub silence: Duration,
    /// The largest message, in bytes: what is longer than it, or than
    /// [`MAX_PIECE`](moesaic_transport::channel::MAX_PIECE), travels in pieces.
    pub max_message: usize,
}

impl Default for StageOptions {
    fn default() -> Self {
        Self { silence: Duration::from_secs(3), max_message: MAX_MESSAGE }
    }
}

impl StageOptions {
    /// Bytes of tensors or of a block in one message.
    fn payload(&self) -> usize {
        payload(self.max_message)
    }
}

/// All later stages of a replica. Use it on a thread that is not the runtime's.
pub struct RemoteStages {
    peers: Vec<StagePeer>,
    hidden: usize,
    owner: StageOwner,
    options: StageOptions,
    runtime: Handle,
    waker: Waker,
    waits: Waits,
    life: Option<Life>,
}

/// Grows while stages are waited for: who waits does not hang, since a stage of which nothing comes is lost.
#[derive(Clone, Default)]
struct Waits(Arc<AtomicU64>);

impl Waits {
    /// What comes next; `None` when nobody can send any longer.
    fn wait<T>(&self, answers: &blocking::Receiver<T>) -> Option<T> {
        loop {
            self.0.fetch_add(1, Ordering::Relaxed);
            match answers.recv_timeout(PULSE_EVERY) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }
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
    waits: Waits,
    _tasks: JoinSet<()>,
}

impl RemoteStages {
    /// Stages in the order of their layers, of a model with rows of `hidden` columns; their streams run in `runtime`.
    pub fn new(
        peers: Vec<StagePeer>,
        hidden: usize,
        owner: StageOwner,
        options: StageOptions,
        runtime: Handle,
    ) -> Self {
        Self { peers, hidden, owner, options, runtime, waker: Arc::new(|| ()), waits: Waits::default(), life: None }
    }

    /// Whether all stages would take a stream now.
    ///
    /// # Errors
    /// `Unavailable` naming the first that would not.
    pub fn knock(&self) -> Result<()> {
        let knock = |peer: &StagePeer| {
            let knocking = async { timeout(KNOCK_TIMEOUT, relay::knock(peer, &self.options)).await };
            let late = |_| Err(Error::unavailable(format!("{} did not answer within {KNOCK_TIMEOUT:?}", peer.name)));
            self.runtime.block_on(knocking).unwrap_or_else(late)
        };
        self.peers.iter().try_for_each(knock)
    }

    fn life(&mut self) -> moesaic_model::Result<&mut Life> {
        self.life.as_mut().ok_or_else(|| lost(Error::unavailable("the stages' KV pools were not made")))
    }

    async fn open(&self, blocks: usize) -> Result<Life> {
        if self.peers.is_empty() {
            return Err(Error::internal("a pipeline has a later stage"));
        }
        let life = self.owner.lives.fetch_add(1, Ordering::Relaxed) + 1;
        let (outputs_in, outputs) = blocking::channel();
        let mut opened = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            let open = wire::Open {
                blocks: blocks as u32,
                first_layer: peer.layers.start as u32,
                end_layer: peer.layers.end as u32,
                replica: self.owner.replica.to_string(),
                generation: self.owner.generation,
                life,
            };
            let late = |_| Err(Error::unavailable(format!("{} did not answer within {OPEN_TIMEOUT:?}", peer.name)));
            let opening = timeout(OPEN_TIMEOUT, relay::open(peer, &self.options, open));
            opened.push(opening.await.unwrap_or_else(late)?);
        }
        let (mut tasks, mut items, mut block_bytes) = (JoinSet::new(), VecDeque::new(), VecDeque::new());
        let mut next = None;
        for (stream, peer) in opened.into_iter().zip(&self.peers).rev() {
            let (sender, queue) = mpsc::unbounded_channel();
            block_bytes.push_front(stream.block_bytes);
            let onward = Onward { next, outputs: outputs_in.clone(), waker: Arc::clone(&self.waker) };
            let (name, silence) = (peer.name.clone(), self.options.silence);
            tasks.spawn(Relay { name, hidden: self.hidden, silence, queue, onward }.run(stream));
            next = Some(sender.clone());
            items.push_front(sender);
        }
        let (items, block_bytes) = (items.into(), block_bytes.into());
        Ok(Life {
            outputs,
            items,
            block_bytes,
            sent: 0,
            answered: 0,
            valid_from: 0,
            waits: self.waits.clone(),
            _tasks: tasks,
        })
    }
}

fn lost(error: Error) -> moesaic_model::Error {
    moesaic_model::Error::Stage { reason: error.message }
}

fn ended() -> moesaic_model::Error {
    lost(Error::unavailable("the stages' streams have ended"))
}

/// What a step fails with: experts come back, anything else would come again.
fn failed(error: Error) -> moesaic_model::Error {
    match error.code {
        ErrorCode::Unavailable => moesaic_model::Error::Experts { layer: 0, reason: error.message },
        _ => moesaic_model::Error::Backend { backend: "stage", reason: error.message },
    }
}

impl Life {
    /// What came of the next micro-batch, by its number. Ends, for a stage of which nothing comes is lost.
    fn next(&mut self) -> moesaic_model::Result<Output> {
        let output = self.waits.wait(&self.outputs).ok_or_else(ended)?;
        self.take(output)
    }

    fn take(&mut self, (number, output): Output) -> moesaic_model::Result<Output> {
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

    fn max_rows(&self) -> usize {
        (self.options.payload() / (self.hidden * size_of::<f32>()).max(1)).max(1)
    }

    fn wake_with(&mut self, waker: Waker) {
        self.waker = waker;
    }

    fn advanced(&self) -> Advanced {
        let waits = self.waits.clone();
        Box::new(move || waits.0.load(Ordering::Relaxed))
    }

    fn check(&mut self) -> moesaic_model::Result<()> {
        let Some(life) = &mut self.life else { return Ok(()) };
        loop {
            match life.outputs.try_recv() {
                // of a step that failed: nobody wants what came of it
                Ok(output) => drop(life.take(output)?),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err(ended()),
            }
        }
    }

    fn allocate_kv(&mut self, blocks: usize) -> moesaic_model::Result<()> {
        self.life = None;
        self.life = Some(self.runtime.block_on(self.open(blocks)).map_err(lost)?);
        Ok(())
    }

    fn send(&mut self, input: StageInput) -> moesaic_model::Result<()> {
        let hidden = self.hidden;
        let sequence =
            |of: StageSequence| wire::Sequence { blocks: of.blocks, start: of.start as u32, rows: of.rows as u32 };
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
                return output.map_err(failed);
            }
        }
    }

    fn forget(&mut self) {
        if let Some(life) = &mut self.life {
            life.valid_from = life.sent;
        }
    }

    fn export_block(&mut self, block: u32) -> moesaic_model::Result<Vec<u8>> {
        let payload = self.options.payload();
        let life = self.life()?;
        life.drain()?;
        let mut answers = Vec::new();
        for (items, size) in life.items.iter().zip(&life.block_bytes) {
            for start in (0..*size).step_by(payload) {
                let export = wire::Export { block, start: start as u64, length: payload as u64 };
                answers.push(ask(items, |reply| Item::Export(export, reply)));
            }
        }
        let mut bytes = Vec::with_capacity(life.block_bytes.iter().sum());
        for answer in answers {
            bytes.extend_from_slice(&await_bytes(&life.waits, answer)?);
        }
        Ok(bytes)
    }

    fn import_block(&mut self, block: u32, bytes: &[u8]) -> moesaic_model::Result<()> {
        let payload = self.options.payload();
        let life = self.life()?;
        life.drain()?;
        let (mut rest, mut answers) = (bytes, Vec::new());
        for (items, size) in life.items.iter().zip(&life.block_bytes) {
            let Some((mut own, later)) = rest.split_at_checked(*size) else {
                return Err(lost(Error::internal("a block is shorter than the stages' parts of it")));
            };
            rest = later;
            while !own.is_empty() {
                let (piece, more) = own.split_at(own.len().min(payload));
                own = more;
                let import = wire::Import { block, bytes: Bytes::copy_from_slice(piece), goes_on: !own.is_empty() };
                answers.push(ask(items, |reply| Item::Import(import, reply)));
            }
        }
        answers.into_iter().try_for_each(|answer| await_bytes(&life.waits, answer).map(drop))
    }
}

type BlockAnswer = blocking::Receiver<Result<Bytes>>;

/// Sends something of a block; `None`: the stage is lost.
fn ask(items: &mpsc::UnboundedSender<Item>, item: impl FnOnce(relay::BlockReply) -> Item) -> Option<BlockAnswer> {
    let (reply, answer) = blocking::channel();
    items.send(item(reply)).ok().map(|()| answer)
}

/// Ends, for the task that has the other end drops it when its stage is lost.
fn await_bytes(waits: &Waits, answer: Option<BlockAnswer>) -> moesaic_model::Result<Bytes> {
    let gone = || lost(Error::unavailable("a stage is lost"));
    waits.wait(&answer.ok_or_else(gone)?).ok_or_else(gone)?.map_err(lost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_transport::channel::MAX_PIECE;

    #[test]
    fn what_a_stage_sends_at_once_is_a_piece_at_most() {
        let payload = StageOptions::default().payload();
        assert!(payload <= MAX_PIECE && payload > MAX_PIECE / 2, "{payload}");
        let small = StageOptions { max_message: 1600, ..StageOptions::default() };
        assert_eq!(small.payload(), 1500, "a lower limit holds as well");
    }
}
