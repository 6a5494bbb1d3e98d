//! A client of the HTTP door that says when each piece of an answer came.
use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// An answer of which nothing comes for so long is given up: only a broken server takes that long.
const PATIENCE: Duration = Duration::from_secs(180);

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// Tokens: their number is known.
    Tokens(Vec<u32>),
    /// Text, which the gateway makes into tokens.
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
    /// Tokens of the answer.
    pub completion_tokens: usize,
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

/// A connection, over which one request goes after another.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // ends with the sender; what goes wrong is seen by who waits for an answer
        tokio::spawn(connection);
        Ok(Self { address, sender })
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<hyper::Response<hyper::body::Incoming>> {
        if self.sender.is_closed() {
            *self = Self::open(self.address).await?;
        }
        self.sender.ready().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        Ok(self.sender.send_request(request).await?)
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
        let sent = Instant::now();
        let response = tokio::time::timeout(PATIENCE, self.send(Method::POST, "/v1/completions", body)).await??;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let text = body.collect().await?.to_bytes();
            bail!("{status}: {}", String::from_utf8_lossy(&text));
        }
        let (mut events, mut reader) = (Vec::with_capacity(max_tokens), Events::default());
        let mut usage = Value::Null;
        while let Some(frame) = tokio::time::timeout(PATIENCE, body.frame()).await? {
            let Ok(data) = frame?.into_data() else { continue };
            let now = Instant::now();
            for event in reader.read(&data) {
                match event {
                    Event::Text => events.push(now),
                    Event::Usage(value) => usage = value,
                    Event::Error(error) => bail!("after {} events: {error}", events.len()),
                    Event::Other => {}
                }
            }
        }
        let count = |value: &Value| value.as_u64().map(|count| count as usize);
        let completion_tokens = count(&usage["completion_tokens"]).context("the answer ended without its usage")?;
        if completion_tokens != max_tokens {
            bail!("the answer has {completion_tokens} tokens; {max_tokens} were asked for");
        }
        Ok(Answer {
            sent,
            events,
            ended: Instant::now(),
            prompt_tokens: count(&usage["prompt_tokens"]).unwrap_or(0),
            cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]).unwrap_or(0),
            completion_tokens,
        })
    }
}

/// What an event of a stream says.
#[derive(Clone, Debug, PartialEq)]
enum Event {
    Text,
    Usage(Value),
    Error(Value),
    Other,
}

/// Puts events together from pieces that end anywhere.
#[derive(Debug, Default)]
struct Events {
    unfinished: Vec<u8>,
}

impl Events {
    fn read(&mut self, piece: &[u8]) -> Vec<Event> {
        self.unfinished.extend_from_slice(piece);
        let Some(end) = self.unfinished.iter().rposition(|byte| *byte == b'\n') else { return Vec::new() };
        let rest = self.unfinished.split_off(end + 1);
        let whole = std::mem::replace(&mut self.unfinished, rest);
        whole.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"data: ")).map(event).collect()
    }
}

/// Reads as JSON only what can be more than text, so that the client does not become what is measured.
fn event(data: &[u8]) -> Event {
    let has = |part: &[u8]| data.windows(part.len()).any(|window| window == part);
    if has(b"\"usage\":{") || has(b"\"error\":{") {
        return match serde_json::from_slice::<Value>(data) {
            Ok(mut value) if value["usage"].is_object() => Event::Usage(value["usage"].take()),
            Ok(mut value) if value["error"].is_object() => Event::Error(value["error"].take()),
            _ => Event::Text,
        };
    }
    if has(b"\"text\":\"") && !has(b"\"text\":\"\"") { Event::Text } else { Event::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"index\":0,\"text\":\" \\\"usage\\\":{ x\"}],\"usage\":null}\n\n",
        ": waiting\n\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"b\"}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"index\":0,\"text\":\"\",\"finish_reason\":\"length\"}],\"usage\":null}\n\n",
        "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        let expected =
            [Event::Text, Event::Text, Event::Other, Event::Usage(json!({"completion_tokens": 2})), Event::Other];
        for size in 1..STREAM.len() {
            let mut reader = Events::default();
            let events: Vec<_> = STREAM.as_bytes().chunks(size).flat_map(|piece| reader.read(piece)).collect();
            assert_eq!(events, expected, "pieces of {size}");
        }
    }

    #[test]
    fn an_error_in_a_stream_is_seen() {
        assert_eq!(event(br#"{"error":{"message":"m"}}"#), Event::Error(json!({"message": "m"})));
    }

    #[test]
    fn times_are_counted_from_the_request() {
        let sent = Instant::now();
        let at = |ms: u64| sent + Duration::from_millis(ms);
        let events = vec![at(200), at(300), at(400)];
        let answer = Answer { sent, events, ended: at(450), prompt_tokens: 1, cached_tokens: 0, completion_tokens: 5 };
        assert!((answer.ttft() - 0.2).abs() < 1e-9 && (answer.total() - 0.45).abs() < 1e-9);
        assert!((answer.time_per_token().unwrap_or(0.0) - 0.05).abs() < 1e-9, "two events had several tokens");
        assert_eq!(Answer { completion_tokens: 1, ..answer }.time_per_token(), None);
    }
}
