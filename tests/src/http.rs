//! HTTP/1.1 over a plain socket, one request a connection.
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Longest wait for a byte, for the connection, or for the next event of a stream.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A response whose head is read; the body comes as it is sent.
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header lines.
    pub headers: Vec<String>,
    reader: BufReader<TcpStream>,
    patience: Duration,
}

/// Sends a request; `body` is sent as JSON.
///
/// # Errors
/// When the connection fails or the answer is not HTTP.
pub fn send(address: SocketAddr, method: &str, path: &str, body: Option<&[u8]>) -> Result<Response> {
    send_within(address, method, path, body, TIMEOUT)
}

/// The same with another longest wait.
///
/// # Errors
/// As [`send`].
pub fn send_within(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: Option<&[u8]>,
    patience: Duration,
) -> Result<Response> {
    let mut stream = TcpStream::connect_timeout(&address, patience).context("connect")?;
    stream.set_read_timeout(Some(patience))?;
    let body = body.unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let status =
        line.split(' ').nth(1).and_then(|s| s.parse().ok()).with_context(|| format!("status line {line:?}"))?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            bail!("the head ended early");
        }
        if line == "\r\n" {
            return Ok(Response { status, headers, reader, patience });
        }
        headers.push(line.trim_end().to_owned());
    }
}

/// The JSON answer to a POST, with its status.
///
/// # Errors
/// As [`send`], and when the body is not JSON.
pub fn post(address: SocketAddr, path: &str, body: &Value) -> Result<(u16, Value)> {
    let mut response = send(address, "POST", path, Some(body.to_string().as_bytes()))?;
    let text = response.text()?;
    Ok((response.status, serde_json::from_str(&text).with_context(|| format!("body {text:?}"))?))
}

/// The text of a GET.
///
/// # Errors
/// As [`send`], and when the status is not 200.
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut response = send(address, "GET", path, None)?;
    let text = response.text()?;
    if response.status != 200 {
        bail!("GET {path}: {} {text}", response.status);
    }
    Ok(text)
}

impl Response {
    /// The whole body, chunks put together.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn text(&mut self) -> Result<String> {
        let chunked = self.headers.iter().any(|h| h.eq_ignore_ascii_case("transfer-encoding: chunked"));
        let mut bytes = Vec::new();
        if !chunked {
            self.reader.read_to_end(&mut bytes)?;
            return Ok(String::from_utf8(bytes)?);
        }
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            let len = usize::from_str_radix(line.trim(), 16).with_context(|| format!("chunk length {line:?}"))?;
            let mut chunk = vec![0; len + 2];
            self.reader.read_exact(&mut chunk)?;
            if len == 0 {
                return Ok(String::from_utf8(bytes)?);
            }
            bytes.extend_from_slice(&chunk[..len]);
        }
    }

    /// The next server-sent event's data; `None` at the end. Dropping the response hangs up.
    ///
    /// # Errors
    /// When the connection fails, or no event comes for too long: lines that only keep the connection open are none.
    pub fn event(&mut self) -> Result<Option<String>> {
        let asked = Instant::now();
        let mut line = String::new();
        loop {
            line.clear();
            if self.reader.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Ok(Some(data.trim_end().to_owned()));
            }
            if asked.elapsed() > self.patience {
                bail!("no event for {:?}, though {line:?} came", self.patience);
            }
        }
    }
}
