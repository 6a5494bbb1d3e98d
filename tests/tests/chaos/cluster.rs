//! A cluster of which each process has a host: gateways, routers, schedulers, expert-shards, kv-stores, Redis and NATS.
use crate::hosts::{Host, Hosts};
use anyhow::{Context, Result, bail};
use moesaic_testkit::servers;
use moesaic_tests::process::{Process, metric, program};
use moesaic_tests::{http, root, until};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// Which kind of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Gateway,
    Router,
    Scheduler,
    Shard,
    Store,
    Redis,
    Nats,
}

impl Kind {
    /// The program, the port of its service, and the section of its settings.
    fn service(self) -> Option<(&'static str, u16, &'static str)> {
        match self {
            Self::Gateway => Some(("moesaic-gateway", 9000, "gateway")),
            Self::Router => Some(("moesaic-router", 9010, "router")),
            Self::Scheduler => Some(("moesaic-scheduler", 9020, "scheduler")),
            Self::Shard => Some(("moesaic-expert-shard", 9030, "expert_shard")),
            Self::Store => Some(("moesaic-kv-store", 9040, "kv_store")),
            Self::Redis | Self::Nats => None,
        }
    }
}

const ADMIN_OFFSET: u16 = 1000;
const HTTP: u16 = 8000;
const REDIS: u16 = 6379;
const NATS: u16 = 4222;

/// A process and where it runs.
pub struct Member {
    pub name: &'static str,
    pub kind: Kind,
    pub host: Host,
    /// Where it answers: its HTTP door, its gRPC port, or the server's own.
    pub address: SocketAddr,
    /// `{data}` in them is where it keeps what it stores.
    settings: Vec<String>,
    process: Option<Process>,
}

/// The processes. Ended when it is dropped.
pub struct Cluster {
    members: Vec<Member>,
    pub hosts: Hosts,
    folder: TempDir,
    file: PathBuf,
    /// libfaketime, by which each service's process has a clock of its own.
    clocks: Option<PathBuf>,
}

impl Cluster {
    /// Redis and NATS, and nobody else yet. `clocks` is libfaketime, where clocks are to be set.
    ///
    /// # Errors
    /// When a host or a file cannot be made.
    pub fn new(mut hosts: Hosts, clocks: Option<PathBuf>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (redis, nats) = (hosts.add("redis")?, hosts.add("nats")?);
        let file = folder.path().join("shared.toml");
        let model = root().join("deploy/models/demo-moe");
        let (redis_at, nats_at) = (hosts.address(redis), hosts.address(nats));
        let servers = format!("redis_url = \"redis://{redis_at}:{REDIS}\"\nnats_url = \"nats://{nats_at}:{NATS}\"");
        std::fs::write(
            &file,
            format!(
                "[model]\npath = {model:?}\nthreads = 1\nweights = \"f32\"\nkv = \"f32\"\n[cluster]\n{servers}\n\
                 lease = \"2s\"\n"
            ),
        )?;
        let mut cluster = Self { members: Vec::new(), hosts, folder, file, clocks };
        for (name, kind, host, port) in [("redis", Kind::Redis, redis, REDIS), ("nats", Kind::Nats, nats, NATS)] {
            let address = SocketAddr::new(cluster.hosts.address(host), port);
            let settings = Vec::new();
            cluster.members.push(Member { name, kind, host, address, settings, process: None });
            cluster.start(name)?;
        }
        Ok(cluster)
    }

    /// Adds a service's process with settings of its own, and starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn add(&mut self, kind: Kind, name: &'static str, settings: &[&str]) -> Result<()> {
        let (_, port, _) = kind.service().context("not a service")?;
        let host = self.hosts.add(name)?;
        let port = if kind == Kind::Gateway { HTTP } else { port };
        let address = SocketAddr::new(self.hosts.address(host), port);
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        self.members.push(Member { name, kind, host, address, settings, process: None });
        self.start(name)
    }

    /// A member by its name.
    ///
    /// # Panics
    /// Where there is none.
    pub fn member(&self, name: &str) -> &Member {
        self.members.iter().find(|member| member.name == name).expect("a test names members that there are")
    }

    /// The same, to change.
    ///
    /// # Panics
    /// Where there is none.
    pub fn member_mut(&mut self, name: &str) -> &mut Member {
        self.members.iter_mut().find(|member| member.name == name).expect("a test names members that there are")
    }

    /// All members.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Names of a kind's members.
    pub fn names(&self, kind: Kind) -> Vec<&'static str> {
        self.members.iter().filter(|member| member.kind == kind).map(|member| member.name).collect()
    }

    /// The HTTP doors.
    pub fn doors(&self) -> Vec<SocketAddr> {
        self.members.iter().filter(|member| member.kind == Kind::Gateway).map(|member| member.address).collect()
    }

    /// A member's host.
    pub fn host(&self, name: &str) -> Host {
        self.member(name).host
    }

    /// Where a member keeps what it stores.
    pub fn data(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.data"))
    }

    fn clock(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.clock"))
    }

    /// Sets a member's clock to so many seconds before or after the right time; it is read again within a second.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set_clock(&self, name: &str, offset_s: i64) -> Result<()> {
        Ok(std::fs::write(self.clock(name), format!("{offset_s:+}"))?)
    }

    /// Starts a member's process, with what its folder has.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, name: &str) -> Result<()> {
        let data = self.data(name);
        std::fs::create_dir_all(&data)?;
        let member = self.member(name);
        let mut command = match member.kind.service() {
            Some((program_name, port, section)) => {
                let mut command = self.hosts.command(member.host, &program(program_name)?);
                let address = member.address.ip();
                let mut own = vec![format!("{section}.grpc={address}:{port}"), format!("cluster.id={name}")];
                if member.kind == Kind::Gateway {
                    own.push(format!("gateway.http={}", member.address));
                }
                command.arg("--config").arg(&self.file);
                for setting in own.iter().chain(&member.settings) {
                    command.args(["--set", &setting.replace("{data}", &data.display().to_string())]);
                }
                command
            }
            None => self.server(member, &data)?,
        };
        if let (Some(library), Some(_)) = (&self.clocks, self.member(name).kind.service()) {
            let clock = self.clock(name);
            if !clock.exists() {
                std::fs::write(&clock, "+0")?;
            }
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", clock);
            // read again each second; no clock that only goes forward is changed
            command.env("FAKETIME_CACHE_DURATION", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        let process = Process::spawn(command, self.folder.path(), &format!("{name}.log"))?;
        self.member_mut(name).process = Some(process);
        if self.member(name).kind.service().is_none() {
            let member = self.member(name);
            until(&format!("{name} serves"), || Ok(member.serves()))?;
        }
        Ok(())
    }

    fn server(&self, member: &Member, data: &Path) -> Result<Command> {
        let (address, port) = (member.address.ip().to_string(), member.address.port().to_string());
        if member.kind == Kind::Redis {
            let mut command = self.hosts.command(member.host, &servers::program("redis-server"));
            command.args(["--bind", &address, "--port", &port, "--save", "", "--protected-mode", "no"]);
            command.args(["--appendonly", "yes", "--appendfsync", "no", "--dir"]).arg(data);
            return Ok(command);
        }
        let config = format!("listen: \"{}\"\njetstream {{ store_dir: {data:?} }}\n", member.address);
        let file = self.folder.path().join("nats.conf");
        std::fs::write(&file, config)?;
        let mut command = self.hosts.command(member.host, &servers::program("nats-server"));
        command.arg("--config").arg(file);
        Ok(command)
    }

    /// Kills a member (SIGKILL) and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.process(name)?.kill()
    }

    /// Sends SIGTERM and waits for the end, which must be a success.
    ///
    /// # Errors
    /// When it does not end so.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        let process = self.process(name)?;
        process.signal("TERM")?;
        let status = process.ended()?;
        if !status.success() {
            bail!("{name} ended with {status}:\n{}", process.log());
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn signal(&mut self, name: &str, signal: &str) -> Result<()> {
        self.process(name)?.signal(signal)
    }

    /// Starts a member again with nothing stored; kills it first where it runs.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_empty(&mut self, name: &str) -> Result<()> {
        self.kill(name)?;
        std::fs::remove_dir_all(self.data(name))?;
        self.start(name)
    }

    /// The hour and minute, in minutes, of the last line that a service logged.
    ///
    /// # Errors
    /// When its log's last line has no time.
    pub fn last_logged(&self, name: &str) -> Result<i64> {
        let log = std::fs::read_to_string(self.folder.path().join(format!("{name}.log")))?;
        let line = log.lines().last().unwrap_or_default();
        let time = line.split_once('T').map(|(_, time)| time.split(':').map(str::parse::<i64>));
        let mut parts = time.with_context(|| format!("no time in {line:?}"))?;
        let (hour, minute) = (parts.next().context("no hour")??, parts.next().context("no minute")??);
        Ok(hour * 60 + minute)
    }

    fn process(&mut self, name: &str) -> Result<&mut Process> {
        self.member_mut(name).process.as_mut().with_context(|| format!("{name} was not started"))
    }

    /// Whether each member does its job and misses nothing.
    pub fn is_whole(&self) -> bool {
        self.members.iter().all(Member::is_whole)
    }

    /// Waits until each member does its job and misses nothing.
    ///
    /// # Errors
    /// With what those say that do not.
    pub fn becomes_whole(&self) -> Result<()> {
        until("all are ready and miss nothing", || Ok(self.is_whole())).with_context(|| {
            let missing = self.members.iter().filter(|member| !member.is_whole());
            missing.map(|member| format!("{}: {:?}\n", member.name, member.readiness())).collect::<String>()
        })
    }

    /// Whether Redis knows a scheduler as a member: its lease is not over.
    ///
    /// # Errors
    /// When Redis does not answer.
    pub fn has_lease(&self, scheduler: &str) -> Result<bool> {
        let count = format!("return #redis.call('keys', '*:value:members/scheduler/{scheduler}')");
        match &*self.member("redis").evaluate(&count)? {
            ":0" => Ok(false),
            ":1" => Ok(true),
            other => bail!("{count}: {other}"),
        }
    }

    /// Copies the logs to a folder.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn keep_logs(&self, to: &Path) -> Result<()> {
        std::fs::create_dir_all(to)?;
        for member in &self.members {
            let name = format!("{}.log", member.name);
            std::fs::copy(self.folder.path().join(&name), to.join(&name))?;
        }
        Ok(())
    }
}

/// How long a look at a process may take.
const LOOK: Duration = Duration::from_secs(3);

impl Member {
    fn admin(&self) -> Option<SocketAddr> {
        let (_, port, _) = self.kind.service()?;
        Some(SocketAddr::new(self.address.ip(), port + ADMIN_OFFSET))
    }

    /// Whether it does its job and misses nothing.
    pub fn is_whole(&self) -> bool {
        match self.readiness() {
            Ok(None) => true,
            Ok(Some((status, body))) => status == 200 && body["degraded"].as_array().is_some_and(Vec::is_empty),
            Err(_) => false,
        }
    }

    /// Whether it does its job, be it without somebody whom it misses.
    pub fn is_ready(&self) -> bool {
        self.readiness().is_ok_and(|said| said.is_none_or(|(status, _)| status == 200))
    }

    /// What it says of itself; `None` of a server that serves.
    fn readiness(&self) -> Result<Option<(u16, Value)>> {
        let Some(admin) = self.admin() else {
            return if self.serves() { Ok(None) } else { bail!("it does not serve") };
        };
        let mut answer = http::send_within(admin, "GET", "/ready", None, LOOK)?;
        let text = answer.text()?;
        Ok(Some((answer.status, serde_json::from_str(&text)?)))
    }

    /// Runs a Lua script, without double quotes in it, in Redis; the first line of its answer.
    ///
    /// # Errors
    /// When Redis does not answer, or with an error.
    pub fn evaluate(&self, script: &str) -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.address, LOOK)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.write_all(format!("EVAL \"{script}\" 0\r\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        if answer.starts_with('-') { bail!("{script}: {answer}") } else { Ok(answer.trim_end().to_owned()) }
    }

    /// A metric's value, 0 where it is not there yet.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        Ok(metric(self.admin().context("a server has no metrics")?, name)?.unwrap_or(0.0))
    }

    /// Whether Redis or NATS answers.
    fn serves(&self) -> bool {
        let ask = || -> Result<bool> {
            let mut stream = TcpStream::connect_timeout(&self.address, LOOK)?;
            stream.set_read_timeout(Some(LOOK))?;
            let mut answer = [0; 5];
            if self.kind == Kind::Redis {
                stream.write_all(b"PING\r\n")?;
            }
            stream.read_exact(&mut answer)?;
            Ok(matches!(&answer, b"+PONG" | b"INFO "))
        };
        ask().unwrap_or(false)
    }
}
