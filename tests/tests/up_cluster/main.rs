//! `moesaic up --cluster`: the services as processes of one host, with Redis and NATS of their own; what is killed comes
//! back, and whatever ends the cluster, nothing of it is left.
#![allow(clippy::unwrap_used, reason = "a test fails there")]
mod shared;
mod up;

use moesaic_testkit::servers::ports;
use moesaic_tests::process::{Server, binary};
use moesaic_tests::{root, until};
use serde_json::Value;
use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use up::{ANY_DOORS, Up, ask, descendants, question, runs, stream};

/// A program with arguments and variables, and what it says of them.
type Case<'a> = (&'a Path, &'a [&'a str], &'a [(&'a str, &'a str)], &'a [&'a str]);

#[test]
fn it_answers_as_one_process_does_and_what_is_killed_comes_back() {
    let exact = ["--weights", "f32", "--kv", "f32", "--threads", "1"];
    let want = ask(Server::start(&exact).unwrap().http, question());
    let (mut up, door) = Up::start(&exact[..4], &[]);
    assert_eq!(ask(door, question()), want);

    let killed = ["scheduler-0", "expert-shard-1-0", "redis", "nats"];
    for process in killed {
        up.signal("-KILL", up.pid(process));
        until("it is missed", || Ok(up.told(process, "ended; it is started again") == 1)).unwrap();
        // a request waits for the shard
        assert_eq!(ask(door, question()), want, "{process} was killed\n{}", up.log());
    }
    for process in killed {
        until("it is back", || Ok(up.told(process, " ready ") >= 2)).unwrap();
    }
    assert_eq!(ask(door, question()), want);

    let all = descendants(up.child.id());
    // redis and nats have a process each that ends them with the cluster
    assert_eq!(all.len(), 10 + 2 * 2, "{}", up.log());
    let mut answer = stream(door, 600);
    up.signal("-TERM", up.child.id());
    let mut usage = Value::Null;
    while let Some(event) = answer.event().unwrap() {
        let event: Value = serde_json::from_str(&event).unwrap_or_default();
        assert!(event.get("error").is_none(), "{event}");
        usage = if event["usage"].is_object() { event["usage"].clone() } else { usage };
    }
    assert_eq!(usage["completion_tokens"], 600, "the answer under way is given to its end");
    assert_eq!(up.ended().code(), Some(0), "{}", up.log());
    assert!(!all.iter().any(runs), "{}", up.log());
    assert!(!up.log().contains("took too long"), "{}", up.log());
    let order = ["ending processes=\"gateway\"", "ending processes=\"router-0 scheduler-0", "\"redis nats\""];
    let order = order.map(|line| up.log().find(line).unwrap_or_else(|| panic!("{line}: {}", up.log())));
    assert!(order.is_sorted(), "{}", up.log());
    up.leaves_nothing();
}

#[test]
fn no_process_outlives_one_that_is_killed() {
    let (mut up, _) = Up::start(&["--replicas", "1", "--expert-groups", "1", "--kv-stores", "1"], &[]);
    let all = descendants(up.child.id());
    assert_eq!(all.len(), 6 + 2 * 2, "{}", up.log());
    up.signal("-KILL", up.child.id());
    up.ended();
    until("all are gone", || Ok(!all.iter().any(runs))).unwrap();
}

#[test]
fn servers_do_not_outlive_their_keepers() {
    let (mut up, _) = Up::start(&["--replicas", "1", "--expert-groups", "0", "--kv-stores", "0"], &[]);
    let all = descendants(up.child.id());
    assert_eq!(all.len(), 3 + 2 * 2, "{}", up.log());
    let killed = [up.child.id(), up.pid("redis"), up.pid("nats")];
    // as `pkill -9 moesaic` does: nobody lives to see another's end
    for signal in ["-STOP", "-KILL"] {
        for pid in killed {
            up.signal(signal, pid);
        }
    }
    up.ended();
    until("all are gone", || Ok(!all.iter().any(runs))).unwrap();
}

#[test]
fn a_second_signal_does_not_wait_for_answers() {
    let few = ["--replicas", "1", "--expert-groups", "0", "--kv-stores", "0", "--set", "gateway.drain_timeout=1h"];
    let logs = tempfile::tempdir().unwrap();
    let kept = logs.path().join("deep/logs");
    let (mut up, door) = Up::start(&[&few[..], &["--logs", kept.to_str().unwrap()]].concat(), &[]);
    let all = descendants(up.child.id());
    // its reader reads no further
    let answer = stream(door, 4000);
    up.signal("-STOP", up.pid("scheduler-0"));
    up.signal("-TERM", up.child.id());
    until("it waits", || Ok(up.log().contains("ending processes=\"gateway\""))).unwrap();
    assert!(all.iter().any(runs));
    up.signal("-INT", up.child.id());
    assert_eq!(up.ended().code(), Some(1), "{}", up.log());
    assert!(!all.iter().any(runs), "{}", up.log());
    up.leaves_nothing();
    for name in ["gateway", "router-0", "scheduler-0", "redis", "nats"] {
        let log = std::fs::read_to_string(kept.join(format!("{name}.log"))).unwrap();
        assert!(!log.is_empty(), "{name}");
    }
    drop(answer);
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    let program = binary().unwrap();
    // the same program where no servers are beside it
    let alone = tempfile::tempdir().unwrap();
    let moved = alone.path().join("moesaic");
    std::fs::hard_link(&program, &moved).or_else(|_| std::fs::copy(&program, &moved).map(|_| ())).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|address| (taken, address.to_string())).unwrap();
    let nobody = format!("redis://127.0.0.1:{}", ports::free());
    let no_variables: &[(&str, &str)] = &[];
    let cases: [Case<'_>; 6] = [
        (&moved, &[], &[("PATH", "")], &["redis-server is not on PATH", "apt-get install", "REDIS_URL"]),
        (&program, &[], &[("REDIS_URL", &nobody)], &["cluster.redis_url does not answer", "leave"]),
        (&program, &["--http", &taken.1], no_variables, &["gateway.http", &taken.1, "use another"]),
        (&program, &["--model", "no-such-folder"], no_variables, &["no-such-folder"]),
        (&program, &["--replicas", "65"], no_variables, &["--replicas", "65", "1..=64"]),
        (&program, &["--set", "scheduler.token_bugdet=1"], no_variables, &["token_budget"]),
    ];
    for (program, arguments, variables, expected) in cases {
        let doors = if arguments.first() == Some(&"--http") { &ANY_DOORS[2..] } else { &ANY_DOORS[..] };
        let mut up = Up::launch(program, &[doors, arguments].concat(), variables);
        assert_eq!(up.ended().code(), Some(2), "{arguments:?}: {}", up.log());
        for text in expected {
            assert!(up.log().contains(text), "{arguments:?}: {}", up.log());
        }
        up.leaves_nothing();
    }
    let alone = Command::new(&program).args(["up", "--replicas", "3"]).output().unwrap();
    assert!(String::from_utf8_lossy(&alone.stderr).contains("--cluster"), "counts are the cluster's");
}

#[test]
fn a_service_that_cannot_start_ends_the_cluster_and_its_log_is_shown_and_kept() {
    let set =
        ["--set", "scheduler.kv_memory_bytes=900TiB", "--replicas", "1", "--expert-groups", "0", "--kv-stores", "0"];
    let mut up = Up::launch(&binary().unwrap(), &[&ANY_DOORS[..], &set].concat(), &[]);
    assert_eq!(up.ended().code(), Some(2), "{}", up.log());
    let log = up.log();
    assert!(log.contains("scheduler-0 could not start") && log.contains("kv_memory_bytes asks for"), "{log}");
    let (_, rest) = log.split_once("the end of its log, ").unwrap();
    let kept = std::fs::read_to_string(rest.split_once(":\n").unwrap().0).unwrap();
    assert!(kept.contains("kv_memory_bytes asks for"), "{kept}");
    let folders: Vec<_> = std::fs::read_dir(up.temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(folders.len(), 1);
    let left: Vec<_> = std::fs::read_dir(&folders[0]).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["logs"]);
}

#[test]
fn a_terminal_that_closes_ends_it_unless_that_is_ignored() {
    let few = "--replicas 1 --expert-groups 0 --kv-stores 0 --http 127.0.0.1:0 --grpc 127.0.0.1:0";
    let (folder, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let log = folder.path().join("log");
    let file = File::create(&log).unwrap();
    // as nohup does
    let script = format!("trap '' HUP; exec \"$0\" up --cluster {few}");
    let mut command = Command::new("sh");
    for given in ["REDIS_URL", "NATS_URL"] {
        command.env_remove(given);
    }
    let child = command
        .args(["-c", &script])
        .arg(binary().unwrap())
        .env("TMPDIR", temporary.path())
        .env("MOESAIC__MODEL__PATH", root().join("deploy/models/demo-moe"))
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    let mut up = Up::of(child, log, temporary, folder);
    // it hears it, if at all, before it is ready
    until("it has begun", || Ok(up.log().contains("started process=\"redis\""))).unwrap();
    up.signal("-HUP", up.child.id());
    until("it goes on", || Ok(up.log().contains("ready: http://")))
        .unwrap_or_else(|error| panic!("{error}\n{}", up.log()));
    up.signal("-TERM", up.child.id());
    assert_eq!(up.ended().code(), Some(0), "{}", up.log());
    up.leaves_nothing();
}
