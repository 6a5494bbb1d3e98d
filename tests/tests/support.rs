//! What the scenarios stand on: metrics that are read whole, and streams that stall.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_tests::http;
use moesaic_tests::process::metric;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

/// A server that gives its connections to `answer`, so many of them.
fn server(connections: usize, answer: fn(TcpStream)) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = move || {
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            answer(stream);
        }
    };
    (address, std::thread::spawn(serve))
}

#[test]
fn a_metric_is_the_sum_over_its_labels_and_no_other_s() {
    let (address, server) = server(4, |mut stream| {
        let text = "# TYPE tokens_total counter\ntokens_total{layer=\"1 {\"} 3\ntokens_total{layer=\"0\"} 4\n\
                    tokens_total_bytes 50\ntokens 600\nidle 0\n";
        stream.write_all(text.as_bytes()).unwrap();
    });
    for (name, value) in [("tokens_total", Some(7.0)), ("tokens", Some(600.0)), ("idle", Some(0.0)), ("tok", None)] {
        assert_eq!(metric(address, name).unwrap(), value, "{name}");
    }
    server.join().unwrap();
}

#[test]
fn a_stream_that_is_only_kept_open_is_an_error() {
    let (address, server) = server(1, |mut stream| {
        stream.write_all(b"data: one\n\n").unwrap();
        while stream.write_all(b": waiting\n\n").is_ok() {
            std::thread::sleep(Duration::from_millis(10)); // as a server does, again and again
        }
    });
    let mut answer = http::send_within(address, "GET", "/", None, Duration::from_secs(1)).unwrap();
    assert_eq!(answer.event().unwrap().unwrap(), "one");
    let error = answer.event().unwrap_err().to_string();
    assert!(error.contains("no event for"), "{error}");
    drop(answer);
    server.join().unwrap();
}
