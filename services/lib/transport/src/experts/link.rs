//! One stream to one shard, opened again whenever it breaks or its shard hangs.
use super::ExpertsOptions;
use crate::grpc::explain;
use crate::pulse::heard;
use moesaic_proto::expert::v1::compute_response::Outcome;
use moesaic_proto::expert::v1::expert_service_client::ExpertServiceClient;
use moesaic_proto::expert::v1::{ComputeRequest, ComputeResponse};
use moesaic_types::{Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Pauses between attempts to open the stream.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// How long a shard may take to open it.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// Requests that wait to be written.
const OUTGOING: usize = 256;

/// Takes an answer, or why there is none.
pub(super) type Waiter = Box<dyn FnOnce(Result<ComputeResponse>) + Send>;

/// A stream to a shard. Ends when it is dropped; who waits then gets an error.
#[derive(Debug)]
pub(super) struct Link {
    peer: Arc<str>,
    shared: Arc<Shared>,
    task: AbortHandle,
}

struct Shared {
    state: Mutex<State>,
    /// Counts the times that the stream opened or broke.
    changes: watch::Sender<u64>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("is_up", &self.state().outgoing.is_some()).finish_non_exhaustive()
    }
}

struct State {
    /// Where requests are written; `None` while the stream is not open.
    outgoing: Option<mpsc::Sender<ComputeRequest>>,
    /// Why it is not open.
    reason: Error,
    waiting: HashMap<u64, Waiter>,
    next_tag: u64,
    /// It did not follow this placement yet when it was last asked.
    behind: Option<(u64, Instant)>,
}

/// A shard that does not follow the placement yet is asked again after so long.
const PROBE: Duration = Duration::from_millis(500);

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.close(Error::unavailable(format!("{} left the cluster", self.peer)));
    }
}

impl Link {
    /// Begins to open a stream behind a channel; `peer` names the shard in errors. It is given up when nothing came of
    /// the shard for a while, and is open again with the shard's first pulse.
    pub(super) fn open(
        peer: Arc<str>,
        channel: Channel,
        options: &ExpertsOptions,
        changes: watch::Sender<u64>,
    ) -> Self {
        let reason = Error::unavailable(format!("{peer} is not connected yet"));
        let state = State { outgoing: None, reason, waiting: HashMap::new(), next_tag: 0, behind: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changes });
        let client = ExpertServiceClient::new(channel);
        let client = client.max_decoding_message_size(options.max_message);
        let client = client.max_encoding_message_size(options.max_message);
        let task = tokio::spawn(keep(Arc::clone(&peer), client, options.silence, Arc::clone(&shared))).abort_handle();
        Self { peer, shared, task }
    }

    /// A stream that is open, or never opens, and is not read.
    #[cfg(test)]
    pub(super) fn unread(peer: &str, is_open: bool) -> Self {
        let outgoing = is_open.then(|| mpsc::channel(OUTGOING).0);
        let reason = Error::unavailable(format!("{peer} is not connected yet"));
        let state = State { outgoing, reason, waiting: HashMap::new(), next_tag: 0, behind: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), changes: watch::Sender::new(0) });
        Self { peer: peer.into(), shared, task: tokio::spawn(async {}).abort_handle() }
    }

    /// Whether the shard can be asked under a placement.
    ///
    /// # Errors
    /// Why not: the stream is not open, or it refused a moment ago because it has not loaded its experts.
    pub(super) fn is_up(&self, epoch: u64) -> Result<()> {
        let state = self.shared.state();
        if state.outgoing.is_none() {
            return Err(state.reason.clone());
        }
        match state.behind {
            Some((behind, since)) if behind == epoch && since.elapsed() < PROBE => {
                Err(Error::unavailable(format!("{} loads the experts of placement {epoch}", self.peer)))
            }
            _ => Ok(()),
        }
    }

    /// The shard does not follow this placement yet: its copies are asked, and it is asked again later.
    pub(super) fn set_behind(&self, epoch: u64) {
        self.shared.state().behind = Some((epoch, Instant::now()));
    }

    /// Sends a request, whose tag is set here; `waiter` is called once, whatever comes.
    pub(super) fn send(&self, mut request: ComputeRequest, waiter: Waiter) {
        let mut state = self.shared.state();
        let refused = match &state.outgoing {
            None => Some(state.reason.clone()),
            Some(outgoing) => {
                request.tag = state.next_tag;
                let full = |_| Error::unavailable(format!("{} takes no more requests", self.peer));
                outgoing.try_send(request).map_err(full).err()
            }
        };
        if let Some(error) = refused {
            drop(state);
            return waiter(Err(error));
        }
        let tag = state.next_tag;
        state.next_tag += 1;
        state.waiting.insert(tag, waiter);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_open(&self, outgoing: mpsc::Sender<ComputeRequest>) {
        self.state().outgoing = Some(outgoing);
        self.changes.send_modify(|count| *count += 1);
    }

    /// Everyone who waits gets the reason.
    fn close(&self, reason: Error) {
        let mut state = self.state();
        state.reason = reason.clone();
        let was_open = state.outgoing.take().is_some();
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        if was_open {
            self.changes.send_modify(|count| *count += 1);
        }
        waiting.into_values().for_each(|waiter| waiter(Err(reason.clone())));
    }

    fn answer(&self, response: ComputeResponse) {
        let waiter = self.state().waiting.remove(&response.tag);
        if let Some(waiter) = waiter {
            waiter(Ok(response));
        }
    }
}

/// Opens the stream and reads it, again and again.
async fn keep(peer: Arc<str>, client: ExpertServiceClient<Channel>, silence: Duration, shared: Arc<Shared>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let (sender, outgoing) = mpsc::channel(OUTGOING);
        let mut opening = client.clone();
        let opened = timeout(OPEN_TIMEOUT, opening.compute(ReceiverStream::new(outgoing))).await;
        let reason = match opened {
            Err(_) => Error::unavailable(format!("{peer} did not answer within {OPEN_TIMEOUT:?}")),
            Ok(Err(status)) => explain(&peer, &status),
            Ok(Ok(answers)) => {
                let mut stream = Stream { peer: &peer, answers: answers.into_inner(), silence, outgoing: Some(sender) };
                let reason = stream.read(&shared).await;
                if stream.outgoing.is_none() {
                    pause = FIRST_PAUSE;
                    tracing::warn!(%peer, %reason, "the connection broke");
                }
                reason
            }
        };
        shared.close(reason);
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// A stream that is being read.
struct Stream<'a> {
    peer: &'a str,
    answers: Streaming<ComputeResponse>,
    silence: Duration,
    /// Where requests go, until the shard's first message shows that its thread takes them.
    outgoing: Option<mpsc::Sender<ComputeRequest>>,
}

impl Stream<'_> {
    /// Hands answers to who waits for them; why no more come.
    async fn read(&mut self, shared: &Shared) -> Error {
        loop {
            let why = |status: &Status| explain(self.peer, status);
            let response = match heard(&mut self.answers, self.peer, self.silence, why).await {
                Ok(Some(response)) => response,
                Ok(None) => return Error::unavailable(format!("{} ended the stream", self.peer)),
                Err(error) => return error,
            };
            if let Some(outgoing) = self.outgoing.take() {
                tracing::info!(peer = self.peer, "connected");
                shared.set_open(outgoing);
            }
            if !matches!(response.outcome, Some(Outcome::Pulse(_))) {
                shared.answer(response);
            }
        }
    }
}
