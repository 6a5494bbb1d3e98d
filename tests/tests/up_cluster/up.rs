//! A cluster that is started by `moesaic up --cluster`, and what is asked of it.
use moesaic_testkit::servers::process::Watchdog;
use moesaic_tests::process::binary;
use moesaic_tests::{http, root, until};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use tempfile::TempDir;

pub const ANY_DOORS: [&str; 4] = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];

/// A process by its number and the time it was started: numbers are given again.
pub type Life = (u32, u64);

/// What of `/proc/N/stat` stands after the program's name: state, parent, and so on.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(text.rsplit_once(") ")?.1.split(' ').map(str::to_owned).collect())
}

/// Whether it runs; one that ended and that nobody waited for does not.
pub fn runs(&(pid, start): &Life) -> bool {
    stat(pid).is_some_and(|stat| stat[0] != "Z" && stat[19] == start.to_string())
}

/// All that a process started, and what those did.
pub fn descendants(pid: u32) -> Vec<Life> {
    let mut children: BTreeMap<u32, Vec<Life>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(stat) = stat(child) else { continue };
        children.entry(stat[1].parse().unwrap()).or_default().push((child, stat[19].parse().unwrap()));
    }
    let (mut found, mut at) = (children.remove(&pid).unwrap_or_default(), 0);
    while let Some(&(pid, _)) = found.get(at) {
        found.extend(children.remove(&pid).unwrap_or_default());
        at += 1;
    }
    found
}

/// A cluster under way, killed where it is dropped.
pub struct Up {
    pub child: Child,
    /// Ends it where this process is killed; `None` once it is waited for.
    watchdog: Option<Watchdog>,
    log: PathBuf,
    /// Where it may make temporary files; empty when it leaves nothing behind.
    pub temporary: TempDir,
    _folder: TempDir,
}

impl Up {
    pub fn launch(program: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let (folder, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let log = folder.path().join("log");
        let file = File::create(&log).unwrap();
        let mut command = Command::new(program);
        for given in ["REDIS_URL", "NATS_URL", "OTEL_EXPORTER_OTLP_ENDPOINT"] {
            command.env_remove(given);
        }
        let child = command
            .args(["up", "--cluster"])
            .args(arguments)
            .env("TMPDIR", temporary.path())
            .env("MOESAIC__MODEL__PATH", root().join("deploy/models/demo-moe"))
            .envs(variables.iter().copied())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self::of(child, log, temporary, folder)
    }

    pub fn of(child: Child, log: PathBuf, temporary: TempDir, folder: TempDir) -> Self {
        let watchdog = Some(Watchdog::over(&child).unwrap());
        Self { child, watchdog, log, temporary, _folder: folder }
    }

    pub fn start(arguments: &[&str], variables: &[(&str, &str)]) -> (Self, SocketAddr) {
        let mut up = Self::launch(&binary().unwrap(), &[&ANY_DOORS[..], arguments].concat(), variables);
        let mut door = None;
        until("the cluster is ready", || {
            assert!(up.child.try_wait()?.is_none(), "{}", up.log());
            let log = up.log();
            door = log.split_once("ready: http://").and_then(|(_, rest)| rest.split('/').next()?.parse().ok());
            Ok(door.is_some())
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", up.log()));
        (up, door.unwrap())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// How often a process's line of the log says this.
    pub fn told(&self, process: &str, what: &str) -> usize {
        let named = format!("process=\"{process}\"");
        self.log().lines().filter(|line| line.contains(&named) && line.contains(what)).count()
    }

    /// The process id of the last life of a process.
    pub fn pid(&self, process: &str) -> u32 {
        let started = format!("started process=\"{process}\" pid=");
        let log = self.log();
        log.rsplit_once(&started).unwrap().1.split(' ').next().unwrap().parse().unwrap()
    }

    pub fn signal(&self, signal: &str, pid: u32) {
        assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
    }

    pub fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        let ended = until("the end", || {
            status = self.child.try_wait()?;
            Ok(status.is_some())
        });
        self.watchdog = None;
        ended.unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
        status.unwrap()
    }

    pub fn leaves_nothing(&self) {
        let left: Vec<_> =
            std::fs::read_dir(self.temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}\n{}", self.log());
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.watchdog = None;
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn ask(address: SocketAddr, body: Value) -> Value {
    let (status, answer) = http::post(address, "/v1/chat/completions", &body).unwrap();
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["message"]["content"].clone()
}

pub fn question() -> Value {
    let message = json!({"role": "user", "content": "What is the currency of Japan?"});
    json!({"model": "demo-moe", "temperature": 0, "max_tokens": 64, "messages": [message]})
}

/// A long answer, of which the head and the first token came.
pub fn stream(address: SocketAddr, tokens: usize) -> http::Response {
    let body = json!({"prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true}});
    let mut answer = http::send(address, "POST", "/v1/completions", Some(body.to_string().as_bytes())).unwrap();
    assert_eq!(answer.status, 200);
    answer.event().unwrap().unwrap();
    answer
}
