//! Replicas that play a script, and a router that takes them in order.
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use moesaic_model::tokenizer::Tokenizer;
use moesaic_testkit::Open;
use moesaic_types::boundary::{DeltaStream, PlaceRequest, Placed, Placer, Replica, ReplicaLoad};
use moesaic_types::{
    Delta, Error, FinishReason, GenerateRequest, ReplicaId, RequestId, Result, SampledToken, TokenId, Usage,
};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// What a replica does with a request.
#[derive(Clone, Debug)]
pub enum Act {
    /// Answers until the request's `max_tokens`.
    Answer,
    /// Sends so many tokens, then fails.
    Fail(usize, Error),
    /// Sends so many tokens, then its stream ends without a last piece.
    BreakOff(usize),
    /// Sends so many tokens, then nothing more.
    Hang(usize),
    /// Sends these tokens and stops; the last of them ends the sequence.
    Say(Vec<TokenId>),
    /// Refuses at once.
    Refuse(Error),
    /// Neither accepts nor refuses.
    Silent,
    /// Sends tokens without end.
    Endless,
}

/// Text that the scripted tokens make, word by word.
const WORDS: &str = " one two three four five six seven eight nine ten eleven twelve";

/// A replica whose token at a position depends on the seed and the position alone, as the real one's does.
pub struct Scripted {
    pub id: ReplicaId,
    /// The requests that came.
    pub seen: Mutex<Vec<GenerateRequest>>,
    /// Streams that nobody has dropped yet.
    pub open: watch::Sender<usize>,
    /// Requests of which the gateway said that it has enough.
    pub enough: Mutex<Vec<RequestId>>,
    /// What `load` says; `None`: not ready.
    pub ready: Mutex<bool>,
    acts: Mutex<VecDeque<Act>>,
    words: Vec<TokenId>,
    cached: usize,
}

impl Scripted {
    /// Plays the acts in turn, and the last one again and again.
    pub fn new(id: &str, tokenizer: &Tokenizer, acts: impl Into<VecDeque<Act>>) -> Arc<Self> {
        Arc::new(Self {
            id: ReplicaId::new(id),
            seen: Mutex::default(),
            open: watch::Sender::new(0),
            enough: Mutex::default(),
            ready: Mutex::new(true),
            acts: Mutex::new(acts.into()),
            words: tokenizer.encode(WORDS, false).unwrap(),
            cached: 2,
        })
    }

    /// The requests that came, as they came.
    pub fn requests(&self) -> Vec<GenerateRequest> {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until no stream is open.
    pub async fn until_closed(&self) {
        let mut open = self.open.subscribe();
        moesaic_testkit::soon("the replica's stream was dropped", open.wait_for(|open| *open == 0)).await.unwrap();
    }

    /// Waits until so many streams are open.
    pub async fn until_open(&self, count: usize) {
        let mut open = self.open.subscribe();
        moesaic_testkit::soon("the request reached the replica", open.wait_for(|open| *open == count)).await.unwrap();
    }

    fn act(&self) -> Act {
        let mut acts = self.acts.lock().unwrap();
        if acts.len() > 1 { acts.pop_front().unwrap() } else { acts.front().cloned().unwrap() }
    }

    fn token(&self, request: &GenerateRequest, position: usize) -> SampledToken {
        let words = &self.words;
        let id = |shift: usize| words[(position + request.sampling.seed as usize + shift) % words.len()];
        let top = usize::from(request.top_logprobs.unwrap_or(0));
        SampledToken {
            id: id(0),
            logprob: request.top_logprobs.map(|_| -0.25),
            top_logprobs: (0..top).map(|rank| (id(rank), -0.25 - rank as f32)).collect(),
        }
    }

    fn play(&self, request: &GenerateRequest, act: Act) -> DeltaStream {
        let Act::Say(said) = act else { return self.count(request, act) };
        let said: Vec<_> = said.into_iter().map(|id| SampledToken { id, ..self.token(request, 0) }).collect();
        let usage = self.usage(request, said.len());
        let delta = Delta { tokens: said, finish: Some((FinishReason::Stop, usage)), ..Delta::default() };
        stream::iter([Ok(delta)]).boxed()
    }

    fn usage(&self, request: &GenerateRequest, completion_tokens: usize) -> Usage {
        Usage { prompt_tokens: request.prompt.len(), cached_tokens: self.cached, completion_tokens }
    }

    /// One delta a token.
    fn count(&self, request: &GenerateRequest, act: Act) -> DeltaStream {
        let (limit, end) = match &act {
            Act::Fail(after, error) => (*after, Some(Err(error.clone()))),
            Act::Endless => (usize::MAX, None),
            Act::BreakOff(after) | Act::Hang(after) => (*after, None),
            _ => (request.stop.max_tokens, None),
        };
        let last = matches!(act, Act::Answer).then_some(limit);
        let start = request.prompt.len();
        let prompt = request.prompt_logprobs.then(|| self.prompt_logprobs(request));
        let deltas: Vec<SampledToken> = (0..self.words.len()).map(|i| self.token(request, start + i)).collect();
        let (cached, usage) = (self.cached, self.usage(request, limit));
        let tokens = (0..limit).map(move |i| {
            Ok(Delta {
                tokens: vec![deltas[i % deltas.len()].clone()],
                prompt_logprobs: prompt.clone().filter(|_| i == 0),
                cached_tokens: (i == 0).then_some(cached),
                finish: (Some(i + 1) == last).then_some((FinishReason::Length, usage)),
            })
        });
        let tokens = stream::iter(tokens.chain(end));
        if matches!(act, Act::Hang(_)) { tokens.chain(stream::pending()).boxed() } else { tokens.boxed() }
    }

    fn prompt_logprobs(&self, request: &GenerateRequest) -> Vec<SampledToken> {
        let known = request.prompt.iter().skip(1);
        known.map(|id| SampledToken { id: *id, logprob: Some(-1.5), top_logprobs: vec![(*id, -1.5)] }).collect()
    }
}

impl Replica for Scripted {
    fn enough(&self, id: &RequestId) {
        self.enough.lock().unwrap().push(id.clone());
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        Box::pin(async move {
            let act = self.act();
            self.seen.lock().unwrap().push(request.clone());
            let open = Open::new(&self.open);
            match act {
                Act::Refuse(error) => return Err(error),
                Act::Silent => std::future::pending::<()>().await,
                _ => {}
            }
            let deltas = self.play(&request, act);
            // lets other tasks run, as a replica on a thread of its own does
            let paced = deltas.then(|delta| async move {
                tokio::task::yield_now().await;
                delta
            });
            Ok(paced.map(move |delta| (delta, &open).0).boxed())
        })
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        Box::pin(async move {
            match *self.ready.lock().unwrap() {
                true => Ok(ReplicaLoad::default()),
                false => Err(Error::unavailable("the replica is starting")),
            }
        })
    }
}

/// Places at the first replica that did not fail.
pub struct InOrder(pub Vec<ReplicaId>);

impl Placer for InOrder {
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        let free = self.0.iter().find(|id| !request.exclude.contains(id)).cloned();
        let placed = free.map(|replica| Placed { replica, overlap_blocks: 0 });
        Box::pin(async move { placed.ok_or_else(|| Error::unavailable("no replica is ready")) })
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        Box::pin(async { Ok(self.0.clone()) })
    }
}
