//! A cluster of processes on loopback: gateway, router and schedulers of the demo model, with Redis and NATS of its own.
use crate::process::{Process, metric};
use crate::{http, root};
use anyhow::{Context, Result, bail};
use moesaic_testkit::servers::{self, ports};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use tempfile::TempDir;

/// The admin server listens so many ports above gRPC.
const ADMIN_OFFSET: u16 = 1000;

/// One service's process, which can be started again.
pub struct Member {
    /// Where `/metrics`, `/live` and `/ready` are.
    pub admin: SocketAddr,
    name: &'static str,
    log_name: String,
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
        let admin = SocketAddr::from(([127, 0, 0, 1], port + ADMIN_OFFSET));
        let log_name = format!("{id}.log");
        let process = Process::start(name, &arguments, folder, &log_name)?;
        Ok(Self { admin, name, log_name, arguments, folder: folder.to_owned(), process })
    }

    /// Starts it again, at its port and under its name; kills it first where it runs.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process = Process::start(self.name, &self.arguments, &self.folder, &self.log_name)?;
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
        let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "stream_options": {"include_usage": true}});
        let answer = http::send(self.http, "POST", "/v1/completions", Some(body.to_string().as_bytes()))?;
        if answer.status != 200 {
            bail!("{}\n{}", answer.status, self.gateway.log());
        }
        Ok(Streaming { answer, text: String::new(), completion_tokens: None })
    }

    /// Which scheduler works on a request now.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn busy(&self) -> Result<Option<usize>> {
        for (index, scheduler) in self.schedulers.iter().enumerate() {
            if scheduler.metric("vllm:num_requests_running")? > 0.0 {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }
}

/// An answer under way.
pub struct Streaming {
    answer: http::Response,
    /// What came so far.
    pub text: String,
    /// Tokens of the answer, once it ended.
    pub completion_tokens: Option<u64>,
}

impl Streaming {
    /// Reads so many events, fewer at the end.
    ///
    /// # Errors
    /// When the connection fails or an event is an error.
    pub fn read(&mut self, events: usize) -> Result<()> {
        for _ in 0..events {
            let Some(event) = self.answer.event()? else { return Ok(()) };
            if event == "[DONE]" {
                return Ok(());
            }
            let event: Value = serde_json::from_str(&event).with_context(|| format!("event {event:?}"))?;
            if event.get("error").is_some() {
                bail!("after {:?}: {event}", self.text);
            }
            if let Some(text) = event["choices"][0]["text"].as_str() {
                self.text += text;
            }
            self.completion_tokens = event["usage"]["completion_tokens"].as_u64().or(self.completion_tokens);
        }
        Ok(())
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn finish(&mut self) -> Result<()> {
        self.read(usize::MAX)
    }
}
