//! Clients that open a connection, or begin a request, and then send nothing more.
use crate::client;
use crate::scripted::Act;
use crate::server::{Doors, config, model};
use moesaic_config::{ByteSize, HumanDuration};
use moesaic_gateway::Config;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What is answered before the connection is closed.
async fn answer_to(doors: &Doors, begun: &[u8]) -> String {
    let mut stream = TcpStream::connect(doors.http).await.unwrap();
    stream.write_all(begun).await.unwrap();
    let mut answer = Vec::new();
    // closed or reset: either way the server has let go
    let _reset = moesaic_testkit::soon("the connection is closed", stream.read_to_end(&mut answer)).await;
    String::from_utf8(answer).unwrap()
}

async fn impatient() -> Doors {
    let config = Config { read_timeout: HumanDuration::from_millis(200), ..config() };
    Doors::with(config, model(), [vec![Act::Answer]]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_on_which_no_whole_request_head_comes_is_closed() {
    let doors = impatient().await;
    for begun in ["", "P", "GET /live HTTP/1.1\r\nhost: x\r\nx-slow: "] {
        let answer = answer_to(&doors, begun.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{begun:?}: {answer}");
    }
    assert_eq!(doors.get("/live").await.status, 200, "it serves on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_coming_is_told_and_gives_its_place_back() {
    let doors = impatient().await;
    let begun =
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 90\r\n\r\n{\"prompt\": ";
    let answer = answer_to(&doors, begun).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("gateway.read_timeout") && answer.contains("request_timeout"), "{answer}");
    assert!(answer.contains("invalid_request_error"), "{answer}");
    assert_eq!(doors.core.admission.in_flight(), 0);
    doors.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_take_no_more_memory_than_they_may_and_give_it_back() {
    let memory = Config { body_limit: ByteSize::kib(4), body_memory: ByteSize::kib(4), ..config() };
    let doors = Doors::with(memory, model(), [vec![Act::Answer]]).await;
    let body = json!({"prompt": "Count:", "max_tokens": 1, "user": "u".repeat(3000)}).to_string();
    let (begin, end) = body.split_at(2500);
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    let begin = format!("{head}content-length: {}\r\n\r\n{begin}", body.len());
    let open = || async {
        let mut slow = TcpStream::connect(doors.http).await.unwrap();
        slow.write_all(begin.as_bytes()).await.unwrap();
        slow
    };
    let post = || client::send(doors.http, "POST", "/v1/completions", &[], body.as_bytes());
    let mut slow = open().await;
    let held = async {
        while post().await.status != 429 {
            // it was refused itself where a post came first
            if slow.try_read(&mut [0; 1]).is_ok() {
                slow = open().await;
            }
        }
    };
    moesaic_testkit::soon("the slow client's body is held", held).await;
    let refused = post().await;
    assert!(refused.text().contains("gateway.body_memory") && refused.text().contains("4096"), "{refused:?}");
    assert_eq!(refused.header("retry-after"), Some("1"));
    slow.write_all(end.as_bytes()).await.unwrap();
    let mut answer = String::new();
    moesaic_testkit::soon("the slow client's answer", slow.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(post().await.status, 200, "its memory is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_do_not_hold_up_the_end() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let mut idle = TcpStream::connect(doors.http).await.unwrap();
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    idle.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let _silent = TcpStream::connect(doors.http).await.unwrap();
    doors.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_without_tls_is_spoken_too() {
    let doors = Doors::open([vec![Act::Answer]]).await;
    let mut stream = TcpStream::connect(doors.http).await.unwrap();
    // the preface, then an empty SETTINGS frame; the server answers with its own SETTINGS (type 4)
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "{head:?}");
}
