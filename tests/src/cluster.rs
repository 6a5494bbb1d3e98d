//! A cluster of processes on loopback: gateway, router and schedulers of the demo model, with Redis and NATS of its own.
use crate::process::{Process, metric, program};
use crate::{http, root, until};
use anyhow::{Context, Result, bail};
use moesaic_testkit::servers::{self, ports};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use tempfile::TempDir;

/// The admin server listens so many ports above gRPC.
const ADMIN_OFFSET: u16 = 1000;

/// One service's process, which can be started again.
pub struct Member {
    /// Its gRPC door.
    pub grpc: SocketAddr,
    /// Where `/metrics`, `/live` and `/ready` are.
    pub admin: SocketAddr,
    name: &'static str,
    id: String,
    arguments: Vec<OsString>,
    folder: PathBuf,
    process: Process,
}

impl Member {
    fn start(name: &'static str, id: &str, folder: &Path, file: &Path, settings: &[String]) -> Result<Self> {
        let section = name.trim_start_matches("moesaic-").replace('-', "_");
        let port = ports::free_with(&[ADMIN_OFFSET]);
        let mut arguments: Vec<OsString> = vec!["--config".into(), file.into()];
        let own = [format!("{section}.grpc=127.0.0.1:{port}"), format!("cluster.id={id}")];
        for setting in own.iter().chain(settings) {
            arguments.extend(["--set".into(), setting.into()]);
        }
        let [grpc, admin] = [port, port + ADMIN_OFFSET].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let (id, folder) = (id.to_owned(), folder.to_owned());
        let process = Self::run(name, &id, &arguments, &folder)?;
        Ok(Self { grpc, admin, name, id, arguments, folder, process })
    }

    fn run(name: &str, id: &str, arguments: &[OsString], folder: &Path) -> Result<Process> {
        let mut command = Command::new(program(name)?);
        command.args(arguments);
        Process::spawn(command, folder, &format!("{id}.log")).with_context(|| format!("start {name}"))
    }

    /// Starts it again, at its port and under its name; kills it first where it runs.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = Self::run(self.name, &self.id, &self.arguments, &self.folder)?;
        Ok(())
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Sends SIGTERM.
    ///
    /// # Errors
    /// When `kill` cannot be run.
    pub fn terminate(&self) -> Result<()> {
        self.process.signal("TERM")
    }

    /// Stops it where it is (SIGSTOP): its connections stand, and it answers nothing.
    ///
    /// # Errors
    /// When `kill` cannot be run.
    pub fn freeze(&self) -> Result<()> {
        self.process.signal("STOP")
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When `kill` cannot be run.
    pub fn thaw(&self) -> Result<()> {
        self.process.signal("CONT")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not come in time.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        self.process.ended()
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// With its log when it ends before, or does not in time.
    pub fn is_ready(&mut self) -> Result<()> {
        self.process.answers(self.admin, "/ready")
    }

    /// Whether it is ready, and what it says of that.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn readiness(&self) -> Result<(u16, Value)> {
        let mut answer = http::send(self.admin, "GET", "/ready", None)?;
        Ok((answer.status, serde_json::from_str(&answer.text()?)?))
    }

    /// A metric's value, 0 where it is not there yet.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        Ok(metric(self.admin, name)?.unwrap_or(0.0))
    }

    /// What it wrote.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

/// The processes; ended when they are dropped, the servers last.
pub struct Cluster {
    /// The HTTP door.
    pub http: SocketAddr,
    /// The gateway.
    pub gateway: Member,
    /// The router.
    pub router: Member,
    /// The schedulers.
    pub schedulers: Vec<Member>,
    /// The expert-shards, group by group.
    pub shards: Vec<Member>,
    /// Redis.
    pub redis: servers::Server,
    /// NATS.
    pub nats: servers::Server,
    folder: TempDir,
}

impl Cluster {
    /// Starts all of it and waits until it is ready. `model` are keys of the `[model]` section.
    ///
    /// # Errors
    /// With the log of who does not become ready.
    pub fn start(schedulers: usize, model: &str) -> Result<Self> {
        let mut cluster = Self::launch(schedulers, model, servers::redis(), servers::nats())?;
        cluster.is_ready()?;
        Ok(cluster)
    }

    /// Starts all of it with `groups` x `ranks` shards that execute the experts. `placement` are keys of the
    /// `[router.placement]` section.
    ///
    /// # Errors
    /// With the log of who does not become ready.
    pub fn start_with_shards(schedulers: usize, groups: usize, ranks: usize, placement: &str) -> Result<Self> {
        let sections = format!(
            "weights = \"f32\"\nkv = \"f32\"\n[scheduler]\nexperts = \"shards\"\n[router.placement]\n\
             min_groups = {groups}\nsettle = \"200ms\"\n{placement}\n"
        );
        let mut cluster = Self::launch(schedulers, &sections, servers::redis(), servers::nats())?;
        for group in 0..groups {
            for rank in 0..ranks {
                let own = [("group", group), ("rank", rank), ("ranks", ranks)];
                let own = own.map(|(key, value)| format!("expert_shard.{key}={value}"));
                let shard = cluster.add("moesaic-expert-shard", &format!("e{group}-{rank}"), &own)?;
                cluster.shards.push(shard);
            }
        }
        cluster.is_ready()?;
        Ok(cluster)
    }

    /// Starts all processes and does not wait for them.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn launch(schedulers: usize, model: &str, redis: servers::Server, nats: servers::Server) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let http = SocketAddr::from(([127, 0, 0, 1], ports::free()));
        let file = folder.path().join("shared.toml");
        let path = root().join("deploy/models/demo-moe");
        let shared = format!(
            "[model]\npath = {path:?}\nthreads = 1\n{model}\n[gateway]\nhttp = \"{http}\"\n[cluster]\n\
             redis_url = \"{}\"\nnats_url = \"{}\"\nlease = \"1s\"\nsocket_folder = {:?}\n",
            redis.url(),
            nats.url(),
            folder.path().join("s"),
        );
        std::fs::write(&file, shared)?;
        let start = |name, id: &str| Member::start(name, id, folder.path(), &file, &[]);
        let ids = (0..schedulers).map(|number| format!("s{number}"));
        let schedulers = ids.map(|id| start("moesaic-scheduler", &id)).collect::<Result<_>>()?;
        let (router, gateway) = (start("moesaic-router", "r0")?, start("moesaic-gateway", "g0")?);
        Ok(Self { http, gateway, router, schedulers, shards: Vec::new(), redis, nats, folder })
    }

    /// Waits until all are ready.
    ///
    /// # Errors
    /// With the log of who does not become so.
    pub fn is_ready(&mut self) -> Result<()> {
        for member in self.shards.iter_mut().chain(&mut self.schedulers) {
            member.is_ready()?;
        }
        self.router.is_ready()?;
        self.gateway.is_ready()
    }

    /// Starts one process more, with the cluster's settings and further ones.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn add(&self, name: &'static str, id: &str, settings: &[String]) -> Result<Member> {
        Member::start(name, id, self.folder.path(), &self.folder.path().join("shared.toml"), settings)
    }

    /// A greedy completion's text.
    ///
    /// # Errors
    /// When it is not answered with 200.
    pub fn complete(&self, prompt: &str, max_tokens: usize) -> Result<String> {
        let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
        let (status, answer) = http::post(self.http, "/v1/completions", &body)?;
        if status != 200 {
            bail!("{status}: {answer}\n{}", self.gateway.log());
        }
        Ok(answer["choices"][0]["text"].as_str().context("no text")?.to_owned())
    }

    /// The same as a stream.
    ///
    /// # Errors
    /// When it is not accepted.
    pub fn stream(&self, prompt: &str, max_tokens: usize) -> Result<Streaming> {
        Streaming::ask(self.http, prompt, max_tokens).with_context(|| self.gateway.log())
    }

    /// Waits until a scheduler works on a request, and tells which.
    ///
    /// # Errors
    /// When one does not answer, or none works in time.
    pub fn becomes_busy(&self) -> Result<usize> {
        let mut busy = None;
        until("a scheduler works", || {
            for (index, scheduler) in self.schedulers.iter().enumerate() {
                if scheduler.metric("vllm:num_requests_running")? > 0.0 {
                    busy = Some(index);
                }
            }
            Ok(busy.is_some())
        })?;
        busy.context("one works")
    }
}

/// An answer under way.
pub struct Streaming {
    answer: http::Response,
    /// What came so far.
    pub text: String,
    /// Tokens of the answer, once it ended.
    pub completion_tokens: Option<u64>,
    /// The error that it ended with, if one came.
    pub error: Option<Value>,
}

impl Streaming {
    /// Asks at an HTTP door for a greedy completion as a stream.
    ///
    /// # Errors
    /// When it is not accepted.
    pub fn ask(http: SocketAddr, prompt: &str, max_tokens: usize) -> Result<Self> {
        let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true}});
        let mut answer = http::send(http, "POST", "/v1/completions", Some(body.to_string().as_bytes()))?;
        if answer.status != 200 {
            let text = answer.text()?;
            bail!("{}: {text}", answer.status);
        }
        Ok(Self { answer, text: String::new(), completion_tokens: None, error: None })
    }

    /// Reads an event; whether there was one.
    ///
    /// # Errors
    /// When the connection fails or the event is an error.
    pub fn event(&mut self) -> Result<bool> {
        let Some(event) = self.answer.event()?.filter(|event| event != "[DONE]") else { return Ok(false) };
        let event: Value = serde_json::from_str(&event).with_context(|| format!("event {event:?}"))?;
        if let Some(error) = event.get("error") {
            self.error = Some(error.clone());
            bail!("after {:?}: {event}", self.text);
        }
        if let Some(text) = event["choices"][0]["text"].as_str() {
            self.text += text;
        }
        self.completion_tokens = event["usage"]["completion_tokens"].as_u64().or(self.completion_tokens);
        Ok(true)
    }

    /// Reads so many events, fewer at the end.
    ///
    /// # Errors
    /// As [`Self::event`].
    pub fn read(&mut self, events: usize) -> Result<()> {
        for _ in 0..events {
            if !self.event()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// As [`Self::event`].
    pub fn finish(&mut self) -> Result<()> {
        self.read(usize::MAX)
    }
}
