//! A replica that does what a request's id says.
use crate::{Open, soon};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt};
use moesaic_types::boundary::{DeltaStream, Replica, ReplicaLoad};
use moesaic_types::{Delta, Error, FinishReason, GenerateRequest, Result, SampledToken, Usage};
use std::sync::{Arc, Mutex};
use tokio::sync::{Semaphore, watch};

/// Answers by script: `answer`, `step`, `refuse`, `fail`, `break-off`, `hang`, `endless`, `silent`, `until-deadline`.
#[derive(Debug)]
pub(super) struct Player {
    seen: Mutex<Option<GenerateRequest>>,
    error: Mutex<Error>,
    load: Mutex<Result<ReplicaLoad>>,
    /// Steps that may be made.
    steps: Arc<Semaphore>,
    /// Requests and streams that nobody has dropped yet.
    open: watch::Sender<usize>,
}

impl Player {
    pub fn new() -> Self {
        Self {
            seen: Mutex::default(),
            error: Mutex::new(Error::internal("no error was set")),
            load: Mutex::new(Ok(ReplicaLoad::default())),
            steps: Arc::new(Semaphore::new(0)),
            open: watch::Sender::new(0),
        }
    }

    /// The request that came last.
    pub fn seen(&self) -> GenerateRequest {
        self.seen.lock().expect("no test panics here").clone().expect("a request came")
    }

    /// The error of `refuse` and `fail`.
    pub fn fail_with(&self, error: Error) {
        *self.error.lock().expect("no test panics here") = error;
    }

    pub fn set_load(&self, load: Result<ReplicaLoad>) {
        *self.load.lock().expect("no test panics here") = load;
    }

    /// Lets `step` make one more token.
    pub fn allow_step(&self) {
        self.steps.add_permits(1);
    }

    /// Waits until so many requests are open.
    pub async fn until_open(&self, count: usize) {
        let mut open = self.open.subscribe();
        let reached = open.wait_for(|open| *open == count);
        soon(&format!("{count} requests are open"), reached).await.expect("the player is there");
    }

    fn error(&self) -> Error {
        self.error.lock().expect("no test panics here").clone()
    }

    fn play(&self, request: &GenerateRequest) -> DeltaStream {
        let steps = Arc::clone(&self.steps);
        let limit = request.stop.max_tokens;
        let asked = request.clone();
        let token = move |i: usize| Ok(token(&asked, i));
        match &*request.id.0 {
            "answer" => stream::iter(0..limit).map(token).boxed(),
            "step" => stream::iter(0..limit)
                .then(move |i| {
                    let steps = Arc::clone(&steps);
                    async move {
                        steps.acquire().await.expect("it is never closed").forget();
                        Ok(Delta { tokens: vec![sampled(i)], ..Delta::default() })
                    }
                })
                .boxed(),
            "fail" => stream::iter(0..2).map(token).chain(stream::iter([Err(self.error())])).boxed(),
            "break-off" => stream::iter(0..2).map(token).boxed(),
            "hang" => stream::iter(0..1).map(token).chain(stream::pending()).boxed(),
            "endless" => stream::iter(0..)
                .then(move |i| {
                    let token = token(i % 2);
                    async {
                        tokio::task::yield_now().await;
                        token
                    }
                })
                .boxed(),
            "until-deadline" => {
                let deadline = request.deadline.expect("the request has one").into();
                let over = async move {
                    tokio::time::sleep_until(deadline).await;
                    Err(Error::new(moesaic_types::ErrorCode::DeadlineExceeded, "the deadline passed"))
                };
                stream::iter(0..1).map(token).chain(stream::once(over)).boxed()
            }
            other => panic!("{other} is no script"),
        }
    }
}

fn sampled(i: usize) -> SampledToken {
    SampledToken { id: i as u32, logprob: None, top_logprobs: Vec::new() }
}

/// The token at a position, with all that the request asks for; the last one at `max_tokens`.
fn token(request: &GenerateRequest, i: usize) -> Delta {
    let logprob = |rank: usize| -0.25 - rank as f32;
    let top = usize::from(request.top_logprobs.unwrap_or(0));
    let with_logprobs = |i: usize| SampledToken {
        logprob: request.top_logprobs.map(|_| logprob(0)),
        top_logprobs: (0..top).map(|rank| ((i + rank) as u32, logprob(rank))).collect(),
        ..sampled(i)
    };
    let usage = Usage { prompt_tokens: request.prompt.len(), cached_tokens: 1, completion_tokens: i + 1 };
    let prompt = || (0..request.prompt.len().min(100)).map(with_logprobs).collect();
    Delta {
        tokens: vec![with_logprobs(i)],
        prompt_logprobs: (request.prompt_logprobs && i == 0).then(prompt),
        cached_tokens: (i == 0).then_some(1),
        finish: (i + 1 == request.stop.max_tokens).then_some((FinishReason::Length, usage)),
    }
}

impl Replica for Player {
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<DeltaStream>> {
        async move {
            let open = Open::new(&self.open);
            *self.seen.lock().expect("no test panics here") = Some(request.clone());
            match &*request.id.0 {
                "refuse" => return Err(self.error()),
                "silent" => std::future::pending::<()>().await,
                _ => {}
            }
            let deltas = self.play(&request);
            Ok(deltas.map(move |delta| (delta, &open).0).boxed())
        }
        .boxed()
    }

    fn load(&self) -> BoxFuture<'_, Result<ReplicaLoad>> {
        let load = self.load.lock().expect("no test panics here").clone();
        async move { load }.boxed()
    }
}
