//! The services as processes on loopback, for one measurement; ended when they are dropped, the servers last.
use crate::client::Connection;
use crate::scrape::{Scrape, Threads};
use anyhow::{Context, Result, anyhow, bail};
use moesaic_testkit::servers::process::Process;
use moesaic_testkit::servers::{self, ports};
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The admin server listens so many ports above gRPC.
const ADMIN_OFFSET: u16 = 1000;

/// How long a process may take to be ready: it loads a model.
const START_DEADLINE: Duration = Duration::from_secs(300);

/// Between two looks at whether it is.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A binary beside this one's own.
///
/// # Errors
/// Says how to build it where it is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(3).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is not built; run `cargo build --release --workspace --bins`"))
}

/// What the file at a path has after the last `bytes` of it.
fn tail(path: &Path, bytes: usize) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(bytes)..]).into_owned()
}

/// One process.
pub struct Member {
    /// Its name in the cluster and in tables.
    pub id: String,
    /// Where it answers gRPC.
    pub grpc: SocketAddr,
    /// Where `/metrics` and `/ready` are.
    pub admin: SocketAddr,
    process: Process,
    log: PathBuf,
}

/// What a process counted, at one moment or between two.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Its metrics.
    pub metrics: Scrape,
    /// Its threads.
    pub threads: Threads,
}

impl Counted {
    /// What was added since.
    pub fn since(&self, before: &Self) -> Self {
        Self { metrics: self.metrics.since(&before.metrics), threads: self.threads.since(&before.threads) }
    }
}

impl Member {
    /// Starts a program of ours in `folder`; `core` pins it to one core.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        name: &str,
        id: &str,
        arguments: Vec<String>,
        (grpc, admin): (SocketAddr, SocketAddr),
        folder: &Path,
        core: Option<usize>,
    ) -> Result<Self> {
        let log = folder.join(format!("{id}.log"));
        let (program, arguments) = match core {
            None => (program(name)?, arguments),
            Some(core) => {
                let own = program(name)?.display().to_string();
                let pinned = ["-c".to_owned(), core.to_string(), own].into_iter().chain(arguments).collect();
                // taskset becomes the program: the process id is the program's
                (servers::program("taskset"), pinned)
            }
        };
        let process = Process::start(&program, &arguments, &log).map_err(|error| anyhow!("start {name}: {error}"))?;
        Ok(Self { id: id.to_owned(), grpc, admin, process, log })
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// With the end of its log when it ends before, or does not in time.
    pub async fn is_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let ready = async { Connection::open(self.admin).await?.get("/ready").await };
            let reason = match ready.await {
                Ok(_) => return Ok(()),
                Err(reason) => reason,
            };
            if self.process.has_ended() || Instant::now() > deadline {
                bail!("{} is not ready: {reason:#}\nits log ends:\n{}", self.id, tail(&self.log, 4000));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What it counted until now.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn counted(&self) -> Result<Counted> {
        let threads = Threads::of(self.process.id())?;
        Ok(Counted { metrics: Scrape::of(self.admin).await?, threads })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        tail(&self.log, 4000)
    }
}

/// What a cluster is made of.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The model.
    pub model: PathBuf,
    /// Replicas.
    pub schedulers: usize,
    /// Expert-shards, each a group of its own; 0: the replicas have their experts in their own processes.
    pub shards: usize,
    /// Nodes that keep prefixes.
    pub kv_stores: usize,
    /// Settings of all processes, as lines of TOML in their sections, `[model]` and `[cluster]` aside.
    pub settings: String,
    /// Settings `section.key=value` of each scheduler.
    pub scheduler: Vec<String>,
    /// The core that the gateway is pinned to, and the one that everything else is.
    pub cores: Option<(usize, usize)>,
}

/// The processes.
pub struct Cluster {
    /// The HTTP door.
    pub http: SocketAddr,
    /// All processes of ours: gateway, router, schedulers, shards, stores.
    pub members: Vec<Member>,
    file: PathBuf,
    cores: Option<(usize, usize)>,
    /// Redis.
    pub redis: servers::Server,
    /// NATS.
    pub nats: servers::Server,
    folder: TempDir,
}

impl Cluster {
    /// Starts all of it and waits until it is ready.
    ///
    /// # Errors
    /// With the log of who does not become ready.
    pub async fn start(plan: &Plan) -> Result<Self> {
        let mut cluster = Self::launch(plan)?;
        cluster.is_ready().await?;
        Ok(cluster)
    }

    /// Starts all of it, and does not wait.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn launch(plan: &Plan) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (redis, nats) = (servers::redis(), servers::nats());
        let http = SocketAddr::from(([127, 0, 0, 1], ports::free()));
        let file = folder.path().join("shared.toml");
        let mut shared = String::new();
        let model = std::path::absolute(&plan.model)?;
        writeln!(shared, "[model]\npath = {model:?}\nthreads = 1\nname = \"benchmark\"")?;
        writeln!(shared, "[cluster]\nredis_url = \"{}\"\nnats_url = \"{}\"", redis.url(), nats.url())?;
        writeln!(shared, "socket_folder = {:?}", folder.path().join("s"))?;
        writeln!(shared, "{}", plan.settings)?;
        std::fs::write(&file, shared)?;
        let mut cluster = Self { http, members: Vec::new(), file, cores: plan.cores, redis, nats, folder };
        for number in 0..plan.shards {
            let settings = [format!("expert_shard.group={number}")];
            cluster.add("expert-shard", &format!("shard-{number}"), &settings)?;
        }
        for number in 0..plan.kv_stores {
            cluster.add("kv-store", &format!("kv-{number}"), &[])?;
        }
        for number in 0..plan.schedulers {
            cluster.add("scheduler", &format!("scheduler-{number}"), &plan.scheduler)?;
        }
        let placement = [format!("router.placement.min_groups={}", plan.shards.max(1))];
        cluster.add("router", "router", &placement)?;
        cluster.add("gateway", "gateway", &[format!("gateway.http={http}")])?;
        Ok(cluster)
    }

    fn add(&mut self, service: &str, id: &str, settings: &[String]) -> Result<()> {
        let port = ports::free_with(&[ADMIN_OFFSET]);
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let section = service.replace('-', "_");
        let mut arguments = vec!["--config".to_owned(), self.file.display().to_string()];
        let own = [format!("{section}.grpc={}", at(port)), format!("cluster.id={id}")];
        arguments.extend(own.iter().chain(settings).flat_map(|setting| ["--set".to_owned(), setting.clone()]));
        let core = self.cores.map(|(gateway, others)| if service == "gateway" { gateway } else { others });
        let doors = (at(port), at(port + ADMIN_OFFSET));
        let name = format!("moesaic-{service}");
        self.members.push(Member::start(&name, id, arguments, doors, self.folder.path(), core)?);
        Ok(())
    }

    /// Waits until all are ready.
    ///
    /// # Errors
    /// With the log of who does not become so.
    pub async fn is_ready(&mut self) -> Result<()> {
        for member in &mut self.members {
            member.is_ready().await?;
        }
        Ok(())
    }

    /// What all processes counted until now, by their names.
    ///
    /// # Errors
    /// When one does not answer.
    pub async fn counted(&self) -> Result<Vec<(String, Counted)>> {
        let mut all = Vec::with_capacity(self.members.len());
        for member in &self.members {
            all.push((member.id.clone(), member.counted().await?));
        }
        Ok(all)
    }

    /// A folder that goes with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// `moesaic up`: all services in one process.
pub struct Embedded {
    /// The HTTP door.
    pub http: SocketAddr,
    /// Its process.
    pub member: Member,
    _folder: TempDir,
}

impl Embedded {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// With its log when it does not become so.
    pub async fn start(model: &Path, threads: usize, settings: &[String]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let (http, grpc) = (at(ports::free()), at(ports::free()));
        let model = std::path::absolute(model)?.display().to_string();
        let mut arguments: Vec<String> = vec!["up".into(), "--model".into(), model];
        let flags = [("--http", http.to_string()), ("--grpc", grpc.to_string()), ("--threads", threads.to_string())];
        arguments.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        arguments.extend(settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]));
        let mut member = Member::start("moesaic", "embedded", arguments, (grpc, http), folder.path(), None)?;
        member.is_ready().await?;
        Ok(Self { http, member, _folder: folder })
    }
}

/// The difference of what processes counted, by name.
pub fn between(before: &[(String, Counted)], after: &[(String, Counted)]) -> Vec<(String, Counted)> {
    let zipped = after.iter().zip(before);
    zipped.map(|((name, after), (_, before))| (name.clone(), after.since(before))).collect()
}
