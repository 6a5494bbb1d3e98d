//! A client of the HTTP door that says when each piece of an answer came.
use crate::events::{Events, Usage};
use crate::origin::Origin;
use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::json;
use std::time::{Duration, Instant};

/// An answer of which nothing comes for so long is given up: only a broken server takes that long.
const PATIENCE: Duration = Duration::from_secs(180);

/// Bytes of a refusal's text that are kept.
const LONGEST_REASON: usize = 400;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Tokens: their number is known.
    Tokens(Vec<u32>),
    /// Text, which the server makes into tokens.
    Text(String),
}

/// A greedy completion of exactly `max_tokens` tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// What is asked.
    pub prompt: Prompt,
    /// Tokens of the answer.
    pub max_tokens: usize,
}

impl Completion {
    /// The body of the request.
    pub fn body(&self) -> Bytes {
        let prompt = match &self.prompt {
            Prompt::Tokens(tokens) => json!(tokens),
            Prompt::Text(text) => json!(text),
        };
        let body = json!({
            "prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true},
        });
        Bytes::from(body.to_string())
    }
}

/// When what came of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// When the request was sent.
    pub sent: Instant,
    /// When each event with text came. Events may have several tokens where the client is slow.
    pub events: Vec<Instant>,
    /// When the answer ended.
    pub ended: Instant,
    /// Tokens of the prompt, as the server counts them.
    pub prompt_tokens: usize,
    /// Those that came from a prefix cache.
    pub cached_tokens: usize,
    /// Tokens of the answer: as the server counts them, or else the number of events.
    pub completion_tokens: usize,
    /// Whether the server told the numbers of tokens.
    pub told_usage: bool,
}

impl Answer {
    /// When the first token came.
    pub fn first(&self) -> Instant {
        self.events.first().copied().unwrap_or(self.ended)
    }

    /// Time to the first token, in seconds.
    pub fn ttft(&self) -> f64 {
        (self.first() - self.sent).as_secs_f64()
    }

    /// Time to the end, in seconds.
    pub fn total(&self) -> f64 {
        (self.ended - self.sent).as_secs_f64()
    }

    /// Time for each token after the first, in seconds; `None` of one token.
    pub fn time_per_token(&self) -> Option<f64> {
        let last = self.events.last().copied().unwrap_or(self.ended);
        let rest = self.completion_tokens.checked_sub(1).filter(|rest| *rest > 0)?;
        Some((last - self.first()).as_secs_f64() / rest as f64)
    }
}

/// Why a request has no answer, or not all of one.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// Nobody took the connection, or it broke before the request was heard.
    #[error("no connection: {0}")]
    Connect(String),
    /// Nothing came for too long.
    #[error("nothing came for {:.1} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// A status that is no success.
    #[error("{status}: {text}")]
    Refused {
        /// HTTP's.
        status: u16,
        /// The answer's body.
        text: String,
    },
    /// The answer ended with an error, in the stream or by its end.
    #[error("after {events} events: {reason}")]
    Broken {
        /// Events with text until then.
        events: usize,
        /// What was said.
        reason: String,
    },
    /// A success without a token.
    #[error("the answer has no text")]
    Empty,
}

impl Failure {
    /// A short name, to count by.
    pub fn kind(&self) -> String {
        match self {
            Self::Connect(_) => "no connection".into(),
            Self::Timeout(_) => "timeout".into(),
            Self::Refused { status, .. } => format!("http {status}"),
            Self::Broken { .. } => "broken stream".into(),
            Self::Empty => "empty answer".into(),
        }
    }
}

/// A connection, over which one request goes after another.
#[derive(Debug)]
pub struct Connection {
    origin: Origin,
    sender: SendRequest<Full<Bytes>>,
    /// A request went over it.
    used: bool,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn open(origin: impl Into<Origin>) -> Result<Self> {
        let origin = origin.into();
        let sender = Self::dial(&origin).await?;
        Ok(Self { origin, sender, used: false })
    }

    /// The same, given up after `patience`.
    ///
    /// # Errors
    /// When nobody listens there, or nobody says so for that long.
    pub async fn open_within(origin: impl Into<Origin>, patience: Duration) -> Result<Self, Failure> {
        let opened = tokio::time::timeout(patience, Self::open(origin)).await;
        opened.map_err(|_| Failure::Timeout(patience))?.map_err(|error| Failure::Connect(format!("{error:#}")))
    }

    async fn dial(origin: &Origin) -> Result<SendRequest<Full<Bytes>>> {
        let (sender, connection) = handshake(TokioIo::new(origin.connect().await?)).await?;
        // ends with the sender; what goes wrong is seen by who waits for an answer
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<hyper::Response<hyper::body::Incoming>> {
        // servers end connections that were idle, or had a request or many
        let was_used = std::mem::replace(&mut self.used, true);
        if !self.sender.is_closed() && self.sender.ready().await.is_ok() {
            let request = self.request(&method, path, &body)?;
            match self.sender.send_request(request).await {
                // it was ended before the request came there
                Err(error) if was_used && (error.is_canceled() || error.is_incomplete_message()) => {}
                answered => return Ok(answered?),
            }
        }
        self.sender = Self::dial(&self.origin).await?;
        self.sender.ready().await?;
        let request = self.request(&method, path, &body)?;
        Ok(self.sender.send_request(request).await?)
    }

    fn request(&self, method: &Method, path: &str, body: &Bytes) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.origin.authority())
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = self.origin.authorization() {
            request = request.header(header::AUTHORIZATION, key);
        }
        Ok(request.body(Full::new(body.clone()))?)
    }

    /// The text of a GET.
    ///
    /// # Errors
    /// When the connection fails or the status is not 200.
    pub async fn get(&mut self, path: &str) -> Result<String> {
        let response = self.send(Method::GET, path, Bytes::new()).await?;
        let status = response.status();
        let text = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
        if !status.is_success() {
            bail!("GET {path}: {status} {text}");
        }
        Ok(text)
    }

    /// A completion's answer.
    ///
    /// # Errors
    /// When it is refused or ends with an error, or has another length than was asked for.
    pub async fn complete(&mut self, completion: &Completion) -> Result<Answer> {
        self.complete_body(completion.body(), completion.max_tokens).await
    }

    /// The same, of a body that was made before.
    ///
    /// # Errors
    /// As [`Self::complete`].
    pub async fn complete_body(&mut self, body: Bytes, max_tokens: usize) -> Result<Answer> {
        let path = self.origin.path("completions");
        let answer = self.ask(&path, body, PATIENCE).await?;
        ensure!(answer.told_usage, "the answer ended without its usage");
        let tokens = answer.completion_tokens;
        ensure!(tokens == max_tokens, "the answer has {tokens} tokens; {max_tokens} were asked for");
        Ok(answer)
    }

    /// The stream that comes after a POST of `body`. When nothing comes for as long as `patience` it is given up; the
    /// connection can be used again after any failure.
    ///
    /// # Errors
    /// Says why there is no answer, or not all of one.
    pub async fn ask(&mut self, path: &str, body: Bytes, patience: Duration) -> Result<Answer, Failure> {
        let sent = Instant::now();
        let asked = tokio::time::timeout(patience, self.send(Method::POST, path, body)).await;
        let response =
            asked.map_err(|_| Failure::Timeout(patience))?.map_err(|error| Failure::Connect(format!("{error:#}")))?;
        let (status, mut body) = (response.status(), response.into_body());
        if status != StatusCode::OK {
            let text = tokio::time::timeout(patience, body.collect()).await;
            let bytes = text.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST_REASON)]).trim().to_owned();
            return Err(Failure::Refused { status: status.as_u16(), text });
        }
        let (mut events, mut reader, mut usage, mut done) = (Vec::new(), Events::default(), None::<Usage>, false);
        while let Some(frame) =
            tokio::time::timeout(patience, body.frame()).await.map_err(|_| Failure::Timeout(patience))?
        {
            let broken = |reason: String| Failure::Broken { events: events.len(), reason };
            let Ok(data) = frame.map_err(|error| broken(error.to_string()))?.into_data() else { continue };
            let now = Instant::now();
            for event in reader.read(&data) {
                if let Some(reason) = event.error {
                    return Err(Failure::Broken { events: events.len(), reason });
                }
                if event.text {
                    events.push(now);
                }
                usage = event.usage.or(usage);
                done |= event.done;
            }
        }
        let told = usage.unwrap_or(Usage { completion: events.len(), ..Usage::default() });
        if !done && usage.is_none() {
            return Err(Failure::Broken { events: events.len(), reason: "the stream ended without its end".into() });
        }
        if told.completion == 0 {
            return Err(Failure::Empty);
        }
        Ok(Answer {
            sent,
            events,
            ended: Instant::now(),
            prompt_tokens: told.prompt,
            cached_tokens: told.cached,
            completion_tokens: told.completion,
            told_usage: usage.is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_counted_from_the_request() {
        let sent = Instant::now();
        let at = |ms: u64| sent + Duration::from_millis(ms);
        let events = vec![at(200), at(300), at(400)];
        let answer = Answer {
            sent,
            events,
            ended: at(450),
            prompt_tokens: 1,
            cached_tokens: 0,
            completion_tokens: 5,
            told_usage: true,
        };
        assert!((answer.ttft() - 0.2).abs() < 1e-9 && (answer.total() - 0.45).abs() < 1e-9);
        assert!((answer.time_per_token().unwrap_or(0.0) - 0.05).abs() < 1e-9, "two events had several tokens");
        assert_eq!(Answer { completion_tokens: 1, ..answer }.time_per_token(), None);
    }

    #[test]
    fn failures_are_counted_by_what_they_are() {
        let kinds = [
            Failure::Connect("x".into()),
            Failure::Timeout(PATIENCE),
            Failure::Refused { status: 429, text: "slow down".into() },
            Failure::Broken { events: 2, reason: "y".into() },
            Failure::Empty,
        ]
        .map(|failure| failure.kind());
        assert_eq!(kinds, ["no connection", "timeout", "http 429", "broken stream", "empty answer"]);
    }
}
