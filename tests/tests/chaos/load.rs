//! A steady load: clients that stream one answer after another and compare each with that of an undisturbed run.
use anyhow::{Context, Result, bail};
use moesaic_tests::{http, until};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Clients at the same time.
pub const CLIENTS: usize = 6;

/// What a client that was refused waits before it asks again.
const RETRY: Duration = Duration::from_millis(100);

/// Longest wait for an event of an answer: a stream that stalls for so long is an error.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was asked, and what an undisturbed run answered.
pub struct Question {
    body: Value,
    answer: Answer,
}

/// What came of a stream that ended well.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    pub text: String,
    pub tokens: u64,
    pub finish: String,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// As in the undisturbed run.
    Equal,
    /// With other text, or another number of tokens.
    Differs { got: Answer, want: Answer },
    /// It was not accepted: nobody took the connection, or the status says so.
    Refused { status: Option<u16>, why: String },
    /// The connection broke off, or nothing came for [`PATIENCE`].
    Cut { why: String },
    /// An error came in the stream, which ended properly then.
    Failed { error: Value },
}

/// A request that ended.
#[derive(Clone, Debug)]
pub struct Ended {
    pub client: usize,
    pub door: SocketAddr,
    pub begun: Instant,
    pub took: Duration,
    pub outcome: Outcome,
}

/// Clients at work. They end when it is dropped.
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

struct Shared {
    doors: Vec<SocketAddr>,
    questions: Vec<Question>,
    is_over: AtomicBool,
    seen: Mutex<Seen>,
}

struct Seen {
    ended: Vec<Ended>,
    /// The latest token of all clients, and of each one.
    latest: Instant,
    latest_of: Vec<Instant>,
    /// The longest time without one.
    gap: Duration,
    gap_of_one: Duration,
}

impl Seen {
    fn token(&mut self, client: usize) {
        let now = Instant::now();
        self.gap = self.gap.max(now - self.latest);
        self.gap_of_one = self.gap_of_one.max(now - self.latest_of[client]);
        (self.latest, self.latest_of[client]) = (now, now);
    }
}

/// What happened since the last look.
pub struct Window {
    pub ended: Vec<Ended>,
    /// The longest time in which no client got a token.
    pub gap: Duration,
    /// The longest time in which one of them got none.
    pub gap_of_one: Duration,
}

/// A text that several prompts begin with, of about a dozen KV blocks.
fn prefix(name: &str) -> String {
    let note = |number: usize| format!("{name} {number}: the town has {} wells. ", number * 7 % 13);
    (0..40).map(note).collect()
}

/// What the clients ask: greedy, sampled with a seed, under a grammar, and behind long prefixes that several share and
/// that a scheduler has no room for all at once.
fn questions() -> Vec<Value> {
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["name", "tags", "size"],
        "properties": {"name": {"type": "string", "maxLength": 20}, "size": {"type": "integer"},
            "tags": {"type": "array", "minItems": 3, "maxItems": 5, "items": {"type": "string", "maxLength": 8}}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}});
    let greedy = |prompt: String, max_tokens: usize| json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
    vec![
        greedy("Once upon a time".into(), 120),
        greedy(prefix("Note") + "The first town", 40),
        json!({"prompt": "The capital of", "max_tokens": 100, "temperature": 0.8, "seed": 7, "ignore_eos": true}),
        greedy(prefix("Page") + "The second town", 40),
        json!({"prompt": "A thing as JSON:", "max_tokens": 120, "temperature": 0, "response_format": format}),
        greedy(prefix("Note") + "The last well", 40),
        greedy(prefix("Verse") + "A third town", 40),
        json!({"prompt": prefix("Line") + "A town", "max_tokens": 40, "temperature": 0.7, "seed": 5,
            "ignore_eos": true}),
        json!({"prompt": "Two things as JSON:", "max_tokens": 120, "temperature": 0.9, "seed": 11,
            "response_format": format}),
        greedy(prefix("Entry") + "A fourth town", 40),
        json!({"prompt": prefix("Word") + "No town", "max_tokens": 40, "temperature": 0, "ignore_eos": true,
            "repetition_penalty": 1.1}),
    ]
}

impl Load {
    /// Asks everything once, undisturbed, then starts the clients, which begin at a door each.
    ///
    /// # Errors
    /// When an undisturbed answer does not come, or two of them differ.
    pub fn start(doors: Vec<SocketAddr>) -> Result<Self> {
        let mut known = Vec::new();
        for mut body in questions() {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            let ask = |door: SocketAddr| match stream(door, &body, || {}) {
                Ok(answer) => Ok(answer),
                Err(outcome) => bail!("undisturbed: {body}: {outcome:?}"),
            };
            let answer = ask(doors[0])?;
            if answer.tokens == 0 || answer.finish.is_empty() {
                bail!("undisturbed: {body}: {answer:?}");
            }
            for door in &doors {
                let again = ask(*door)?;
                if again != answer {
                    bail!("two undisturbed answers to {body}: {answer:?}, {again:?}");
                }
            }
            known.push(Question { body, answer });
        }
        let now = Instant::now();
        let seen = Seen {
            ended: Vec::new(),
            latest: now,
            latest_of: vec![now; CLIENTS],
            gap: Duration::ZERO,
            gap_of_one: Duration::ZERO,
        };
        let shared =
            Arc::new(Shared { doors, questions: known, is_over: AtomicBool::new(false), seen: Mutex::new(seen) });
        let clients = (0..CLIENTS).map(|client| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.ask_on_and_on(client))
        });
        Ok(Self { clients: clients.collect(), shared })
    }

    /// Begins a window: what was seen before is forgotten.
    pub fn begin(&self) {
        self.take();
    }

    /// What happened since the last look.
    pub fn take(&self) -> Window {
        let now = Instant::now();
        let mut seen = self.shared.seen();
        let waits = seen.latest_of.iter().map(|latest| now - *latest).max().unwrap_or_default();
        let window = Window {
            ended: std::mem::take(&mut seen.ended),
            gap: seen.gap.max(now - seen.latest),
            gap_of_one: seen.gap_of_one.max(waits),
        };
        (seen.gap, seen.gap_of_one) = (Duration::ZERO, Duration::ZERO);
        seen.latest = now;
        seen.latest_of.fill(now);
        window
    }

    /// Waits until each client got a whole answer to a question that it asked after `since`.
    ///
    /// # Errors
    /// When one does not, in time.
    pub fn all_answered(&self, since: Instant) -> Result<()> {
        self.answered(since, |_| true)
    }

    /// The same of the clients whose own door this is.
    ///
    /// # Errors
    /// When one gets none, in time.
    pub fn answered_at(&self, door: SocketAddr, since: Instant) -> Result<()> {
        let doors = &self.shared.doors;
        self.answered(since, |client| doors[client % doors.len()] == door)
    }

    fn answered(&self, since: Instant, is_meant: impl Fn(usize) -> bool) -> Result<()> {
        let answered = |client: usize| {
            let seen = self.shared.seen();
            let is_answered =
                |ended: &Ended| ended.client == client && ended.begun >= since && ended.outcome == Outcome::Equal;
            seen.ended.iter().any(is_answered)
        };
        let waits = || (0..CLIENTS).filter(|client| is_meant(*client) && !answered(*client)).collect::<Vec<_>>();
        until("each client gets a whole answer", || Ok(waits().is_empty())).with_context(|| {
            format!(
                "clients {:?} got none; the latest ends: {:?}",
                waits(),
                self.shared.seen().ended.iter().rev().take(6).collect::<Vec<_>>()
            )
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        for client in self.clients.drain(..) {
            // a client that panicked was seen by who looked at its answers
            let _ = client.join();
        }
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client: it asks at its own door, and at the others when that fails.
    fn ask_on_and_on(&self, client: usize) {
        let mut door = client;
        let mut number = client;
        while !self.is_over.load(Ordering::Acquire) {
            let (question, at) = (&self.questions[number % self.questions.len()], self.doors[door % self.doors.len()]);
            let begun = Instant::now();
            let outcome = match stream(at, &question.body, || self.seen().token(client)) {
                Ok(got) if got == question.answer => Outcome::Equal,
                Ok(got) => Outcome::Differs { got, want: question.answer.clone() },
                Err(outcome) => outcome,
            };
            let is_answered = matches!(outcome, Outcome::Equal | Outcome::Differs { .. });
            self.seen().ended.push(Ended { client, door: at, begun, took: begun.elapsed(), outcome });
            if is_answered {
                (door, number) = (client, number + 1);
            } else {
                door += 1;
                std::thread::sleep(RETRY); // as a client does that was told to come back
            }
        }
    }
}

/// Asks for a stream and reads it to its end; `token` is called at each event.
fn stream(door: SocketAddr, body: &Value, mut token: impl FnMut()) -> Result<Answer, Outcome> {
    let sent = http::send_within(door, "POST", "/v1/completions", Some(body.to_string().as_bytes()), PATIENCE);
    let mut response = sent.map_err(|error| Outcome::Refused { status: None, why: format!("{error:#}") })?;
    if response.status != 200 {
        let why = response.text().unwrap_or_else(|error| format!("{error:#}"));
        return Err(Outcome::Refused { status: Some(response.status), why });
    }
    let cut = |why: String| Outcome::Cut { why };
    let mut answer = Answer::default();
    loop {
        let event = response.event().map_err(|error| cut(format!("{error:#}")))?;
        let event = event.ok_or_else(|| cut("the stream ended without [DONE]".into()))?;
        if event == "[DONE]" {
            return Ok(answer);
        }
        let event: Value = serde_json::from_str(&event).map_err(|error| cut(format!("{error}: {event}")))?;
        if let Some(error) = event.get("error") {
            return Err(Outcome::Failed { error: error.clone() });
        }
        token();
        let choice = &event["choices"][0];
        answer.text += choice["text"].as_str().unwrap_or_default();
        if let Some(reason) = choice["finish_reason"].as_str() {
            reason.clone_into(&mut answer.finish);
        }
        answer.tokens = event["usage"]["completion_tokens"].as_u64().unwrap_or(answer.tokens);
    }
}
