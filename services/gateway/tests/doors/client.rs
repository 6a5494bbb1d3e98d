//! HTTP/1.1 over a plain socket, so that a test can stop reading and hang up.
use serde_json::Value;
use std::net::SocketAddr;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(self.text()).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The data of a stream's events, which must end with `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{}", self.text());
        let data: Vec<_> = self.text().split("\n\n").filter(|event| !event.is_empty()).collect();
        let data: Vec<_> = data.iter().map(|event| event.strip_prefix("data: ").unwrap()).collect();
        let (last, events) = data.split_last().unwrap();
        assert_eq!(*last, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// An answer whose body comes as it is sent; dropping it hangs up.
pub struct Live {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
}

impl Live {
    /// The next event's data; `None` at the end of a body that is complete.
    pub async fn event(&mut self) -> std::io::Result<Option<String>> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.reader.read_line(&mut line).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            match line.trim_end() {
                "0" => return Ok(None),
                text => {
                    if let Some(data) = text.strip_prefix("data: ") {
                        return Ok(Some(data.to_owned()));
                    }
                }
            }
        }
    }
}

/// Sends a request and reads the answer's head.
pub async fn open(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Live {
    let socket = TcpSocket::new_v4().unwrap();
    // small, so that a client that stops reading is soon felt
    socket.set_recv_buffer_size(8 << 10).unwrap();
    let mut stream = socket.connect(address).await.unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("content-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    // a server may refuse a body before it has read all of it
    let _refused_early = stream.write_all(body).await;
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).await.unwrap() > 0, "the head ended early: {lines:?}");
        match line.trim_end() {
            "" => break,
            text => lines.push(text.to_owned()),
        }
    }
    let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    let header = |line: &String| line.split_once(": ").map(|(name, value)| (name.to_owned(), value.to_owned()));
    let headers = lines[1..].iter().filter_map(header).collect();
    Live { status, headers, reader }
}

/// Sends a request and reads the whole answer.
pub async fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let whole = async {
        let mut live = open(address, method, path, headers, body).await;
        let mut bytes = Vec::new();
        let mut answer = Answer { status: live.status, headers: live.headers, body: Vec::new() };
        if answer.header("transfer-encoding") == Some("chunked") {
            loop {
                let mut line = String::new();
                live.reader.read_line(&mut line).await.unwrap();
                let len = usize::from_str_radix(line.trim(), 16).unwrap_or_else(|_| panic!("chunk length {line:?}"));
                let mut chunk = vec![0; len + 2];
                live.reader.read_exact(&mut chunk).await.unwrap();
                if len == 0 {
                    break;
                }
                bytes.extend_from_slice(&chunk[..len]);
            }
        } else if let Some(length) = answer.header("content-length").filter(|_| method != "HEAD") {
            bytes.resize(length.parse().unwrap(), 0);
            live.reader.read_exact(&mut bytes).await.unwrap();
        }
        answer.body = bytes;
        answer
    };
    moesaic_testkit::soon("the answer", whole).await
}

/// Posts bytes and reads the whole answer.
pub async fn send_owned(address: SocketAddr, path: &str, body: Vec<u8>) -> Answer {
    send(address, "POST", path, &[], &body).await
}
