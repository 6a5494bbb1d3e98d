//! The servers for tests start, freeze, die and come back as asked, and leave nothing.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::servers::{self, Server, ports};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::Duration;

/// One line that the server answers to a command.
fn ask(server: &Server, command: &str) -> std::io::Result<String> {
    let stream = TcpStream::connect(("127.0.0.1", server.port()))?;
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    (&stream).write_all(command.as_bytes())?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

#[test]
fn redis_keeps_its_data_over_a_kill_and_loses_it_when_restarted_empty() {
    let mut redis = servers::redis();
    let port = redis.port();
    assert_eq!(redis.url(), format!("redis://127.0.0.1:{port}"));
    assert_eq!(ask(&redis, "SET k v\r\n").unwrap(), "+OK");
    redis.kill();
    assert!(ask(&redis, "PING\r\n").is_err(), "it is gone when kill returns");
    redis.restart();
    assert_eq!(redis.port(), port);
    assert_eq!(ask(&redis, "EXISTS k\r\n").unwrap(), ":1");
    redis.restart_empty();
    assert_eq!(ask(&redis, "EXISTS k\r\n").unwrap(), ":0");
}

#[test]
fn a_stopped_server_takes_connections_and_does_not_answer() {
    let redis = servers::redis();
    redis.stop();
    let timed_out = ask(&redis, "PING\r\n").unwrap_err();
    assert_eq!(timed_out.kind(), std::io::ErrorKind::WouldBlock);
    redis.cont();
    assert_eq!(ask(&redis, "PING\r\n").unwrap(), "+PONG");
}

#[test]
fn nats_comes_with_jetstream_and_comes_back() {
    let mut nats = servers::nats();
    assert!(ask(&nats, "").unwrap().contains("\"jetstream\":true"));
    nats.restart();
    assert!(ask(&nats, "").unwrap().starts_with("INFO "));
    assert!(nats.url().starts_with("nats://127.0.0.1:"));
}

#[test]
fn a_dropped_server_leaves_no_process_and_no_folder() {
    let redis = servers::redis();
    let folder = ask_folder(&redis);
    assert!(std::fs::exists(&folder).unwrap());
    let port = redis.port();
    drop(redis);
    assert!(!std::fs::exists(&folder).unwrap());
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

fn ask_folder(redis: &Server) -> String {
    let stream = TcpStream::connect(("127.0.0.1", redis.port())).unwrap();
    (&stream).write_all(b"CONFIG GET dir\r\n").unwrap();
    let lines = BufReader::new(&stream).lines();
    lines.map(Result::unwrap).find(|line| line.starts_with('/')).unwrap()
}

/// Set in the process that a test starts from this same binary.
const INNER: &str = "MOESAIC_TESTKIT_INNER";

/// A test of this binary in a process of its own.
fn inner(test: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INNER, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

/// What follows `port=` in the lines of a process.
fn told(test: &mut Child) -> impl Iterator<Item = u16> + use<> {
    let lines = BufReader::new(test.stdout.take().unwrap()).lines();
    lines.map(Result::unwrap).filter_map(|line| line.split_once("port=")?.1.parse().ok())
}

#[test]
fn no_port_is_handed_out_twice_be_it_by_another_process() {
    let some = || -> Vec<u16> {
        let clusters = (0..100).flat_map(|_| {
            let port = ports::free_with(&[1000]);
            [port, port + 1000]
        });
        clusters.chain((0..200).map(|_| ports::free())).collect()
    };
    let own = some();
    if std::env::var_os(INNER).is_some() {
        // the harness begins the first line
        println!();
        own.iter().for_each(|port| println!("port={port}"));
        return;
    }
    let mut test = inner("no_port_is_handed_out_twice_be_it_by_another_process");
    let others: Vec<u16> = told(&mut test).collect();
    assert!(test.wait().unwrap().success());
    assert_eq!((own.len(), others.len()), (400, 400));
    let all: BTreeSet<u16> = own.into_iter().chain(others).collect();
    assert_eq!(all.len(), 800);
}

#[test]
fn a_killed_test_leaves_no_server() {
    if std::env::var_os(INNER).is_some() {
        let redis = servers::redis();
        println!("port={}", redis.port());
        loop {
            std::thread::park();
        }
    }
    let mut test = inner("a_killed_test_leaves_no_server");
    let port = told(&mut test).next().unwrap();
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    test.kill().unwrap();
    test.wait().unwrap();
    let deadline = std::time::Instant::now() + moesaic_testkit::DEADLINE;
    while TcpStream::connect(("127.0.0.1", port)).is_ok() {
        assert!(std::time::Instant::now() < deadline, "the server outlives its test");
        std::thread::sleep(Duration::from_millis(1)); // between two looks at the condition
    }
}
