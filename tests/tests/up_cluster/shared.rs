//! Servers that others use as well, and a folder that outlives the cluster.
use super::up::{Up, ask, descendants, question};
use moesaic_testkit::servers;
use moesaic_tests::process::Server;
use moesaic_tests::{http, until};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;

const FEW: [&str; 6] = ["--replicas", "1", "--expert-groups", "0", "--kv-stores", "1"];

/// What Redis answers to a command of one line: the strings and numbers of the answer.
fn redis(server: &servers::Server, command: &str) -> Vec<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    write!(stream, "{command}\r\nQUIT\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let lines = answer.trim_end().trim_end_matches("+OK").lines();
    lines.filter(|line| !line.starts_with(['$', '*'])).map(|line| line.trim_start_matches(':').to_owned()).collect()
}

#[test]
fn servers_that_are_named_are_used_and_stay() {
    let (redis, nats) = (servers::redis(), servers::nats());
    let (redis_url, nats_url) = (redis.url(), nats.url());
    let variables = [("REDIS_URL", &*redis_url), ("NATS_URL", &*nats_url), ("MOESAIC__TELEMETRY__LOG_FORMAT", "json")];
    let counts = ["--replicas", "1", "--stages", "2", "--expert-groups", "0", "--kv-stores", "1"];
    let logs = tempfile::tempdir().unwrap();
    let arguments = [&counts[..], &["--logs", logs.path().to_str().unwrap()]].concat();
    let (mut up, door) = Up::start(&arguments, &variables);
    let mut body = question();
    body["messages"][0]["content"] = json!("What is the capital of France?");
    let want = ask(Server::start(&["--threads", "1"]).unwrap().http, body.clone());
    assert_eq!(ask(door, body), want);
    // gateway, router, the replica's two stages, the store
    assert_eq!(descendants(up.child.id()).len(), 5, "{}", up.log());
    up.signal("-HUP", up.child.id());
    assert_eq!(up.ended().code(), Some(0), "{}", up.log());
    up.leaves_nothing();
    assert!(std::net::TcpStream::connect(("127.0.0.1", redis.port())).is_ok(), "it is not ours to end");
    assert!(std::net::TcpStream::connect(("127.0.0.1", nats.port())).is_ok(), "it is not ours to end");
    let mut names: Vec<_> = std::fs::read_dir(logs.path()).unwrap().map(|log| log.unwrap().file_name()).collect();
    names.sort();
    let services = ["gateway", "kv-store-0", "router-0", "scheduler-0-stage-1", "scheduler-0"];
    assert_eq!(names, services.map(|name| OsString::from(format!("{name}.log"))));
    let log = std::fs::read_to_string(logs.path().join("gateway.log")).unwrap();
    let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert!(line["level"].is_string(), "logs are as the settings have them: {line}");
}

#[test]
fn two_clusters_share_a_redis_and_a_nats() {
    let (store, nats) = (servers::redis(), servers::nats());
    let (redis_url, nats_url) = (store.url(), nats.url());
    let variables = [("REDIS_URL", &*redis_url), ("NATS_URL", &*nats_url)];
    let mut ups = [Up::start(&FEW, &variables), Up::start(&FEW, &variables)];
    let counters = redis(&store, "KEYS *:version");
    assert_eq!(counters.len(), 2, "each has keys of its own: {counters:?}");
    // leases are renewed: by then, one that another process took the name of would have found that out
    for _ in 0..6 {
        let last: Vec<_> = counters.iter().map(|key| redis(&store, &format!("GET {key}"))).collect();
        until("both go on", || {
            Ok(counters.iter().zip(&last).all(|(key, last)| redis(&store, &format!("GET {key}")) != *last))
        })
        .unwrap();
    }
    let answers = ups.each_ref().map(|(up, door)| (ask(*door, question()), up.log().matches("started again").count()));
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0].1, 0, "{}\n{}", ups[0].0.log(), ups[1].0.log());
    for (up, _) in &mut ups {
        up.signal("-TERM", up.child.id());
        assert_eq!(up.ended().code(), Some(0), "{}", up.log());
        up.leaves_nothing();
    }
    assert_eq!(redis(&store, "KEYS *"), [""; 0], "nothing of them is left");
}

#[test]
fn a_prefix_that_is_set_stays() {
    let store = servers::redis();
    let redis_url = store.url();
    let set = ["--set", "cluster.key_prefix=mine"];
    let (mut up, _) = Up::start(&[&FEW[..4], &["--kv-stores", "0"], &set].concat(), &[("REDIS_URL", &*redis_url)]);
    assert_eq!(redis(&store, "KEYS *:version"), ["mine:version"]);
    up.signal("-TERM", up.child.id());
    assert_eq!(up.ended().code(), Some(0), "{}", up.log());
    assert_eq!(redis(&store, "KEYS *:version"), ["mine:version"], "another process may use it as well");
}

/// How many tokens of a long prompt were found in a cache.
fn cached_tokens(door: SocketAddr) -> u64 {
    let prompt = "Once upon a time there was a fox. ".repeat(40);
    let body = json!({"prompt": prompt, "max_tokens": 1, "temperature": 0});
    let (status, answer) = http::post(door, "/v1/completions", &body).unwrap();
    assert_eq!(status, 200, "{answer}");
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[test]
fn blocks_on_disk_are_found_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let disk = format!("kv_store.disk_folder={}", folder.path().display());
    let settings =
        [&*disk, "kv_store.capacity=0B", "scheduler.prefix_store_offer=full", "scheduler.prefix_store_fetch=always"];
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    let arguments: Vec<&str> = FEW.into_iter().chain(settings).collect();
    let blocks = || std::fs::read_dir(folder.path().join("kv-store-0")).map_or(0, Iterator::count);
    let (mut up, door) = Up::start(&arguments, &[]);
    let files = blocks();
    assert_eq!(cached_tokens(door), 0);
    until("blocks are on disk", || Ok(blocks() >= files + 2)).unwrap();
    let secret = folder.path().join("salt-secret");
    let (text, mode) = (std::fs::read(&secret).unwrap(), secret.metadata().unwrap().mode());
    assert_eq!(mode & 0o777, 0o600);
    up.signal("-TERM", up.child.id());
    assert_eq!(up.ended().code(), Some(0), "{}", up.log());

    let (_up, door) = Up::start(&arguments, &[]);
    assert!(cached_tokens(door) > 0);
    assert_eq!(std::fs::read(&secret).unwrap(), text);
}
