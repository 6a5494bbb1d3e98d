//! `moesaic up --cluster`: the services as processes of their own on this host, with Redis and NATS.
//!
//! `plan` says which processes there are, `crew` has them all, each with a `keeper` that runs it as a `child`.
mod child;
mod crew;
mod folder;
mod keeper;
mod memory;
mod namespace;
mod plan;
mod ports;
mod probe;
mod salt;
mod servers;

use crate::args::Counts;
use crate::config::Config;
use anyhow::{Context, Result, bail};
use crew::Crew;
use folder::Folder;
use keeper::{Common, Spec, What};
use moesaic_config::Secret;
use moesaic_model::memory::Memory;
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::{Nats, RedisMetadata};
use moesaic_types::boundary::Metadata;
use namespace::Guest;
use ports::Ports;
use servers::{Kind, Server};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long Redis and NATS may take to end; what they store goes away anyway.
const SERVERS_END_WITHIN: Duration = Duration::from_secs(5);

/// How long Redis and NATS that were named may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// The longest folder of Unix sockets; see `cluster.socket_folder`.
const LONGEST_SOCKET_FOLDER: usize = 50;

/// Starts the cluster and serves until a signal. The exit status is 0 after SIGTERM, SIGINT or SIGHUP, 1 where a second
/// one cut the work off; an error (2) is a cluster that could not start.
pub fn run(config: Config, counts: Counts) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")?;
    let ended = runtime.block_on(life(config, counts));
    // a file that is still being read holds nothing up
    runtime.shutdown_background();
    ended
}

async fn life(mut config: Config, counts: Counts) -> Result<ExitCode> {
    // the services send the traces
    let quiet = TelemetryConfig { otlp_endpoint: None, ..config.telemetry.clone() };
    let _telemetry = moesaic_telemetry::init(&quiet).context("set up telemetry")?;
    let mut signals = Signals::listen()?;
    let model = config.model.clone();
    let found = tokio::task::spawn_blocking(move || model.look());
    let found = tokio::select! {
        found = found => found.context("read the model")?.context("open the model")?,
        () = signals.received() => return Ok(ExitCode::SUCCESS),
    };
    let path = found.path.canonicalize().unwrap_or(found.path);
    let schedulers = usize::from(counts.replicas) * usize::from(counts.stages);
    let available = Memory::now().available;
    let kv = memory::of_each(&config.scheduler, &found.spec, memory::size_of(&path), available, schedulers);
    config.scheduler.kv_memory_bytes = config.scheduler.kv_memory_bytes.or(kv);
    config.model.path = Some(path);
    let ports = Arc::new(Ports::default());
    let (http, grpc) = doors(&config, &ports)?;
    config.gateway.http = http.to_string();
    let folder = Folder::make(counts.logs.as_deref())?;
    let guest = Guest::set_apart(&mut config.cluster, &folder)?;
    salt::keep(&mut config, counts.kv_stores)?;
    let mut crew = Crew::new(ports);
    let started = async {
        let environment = servers(&mut crew, &mut config, &folder).await?;
        services(&mut crew, config, &counts, grpc, environment, &folder)?;
        crew.are_ready().await
    };
    let served = tokio::select! {
        started = started => started,
        () = signals.received() => return end(crew, folder, guest, signals, Ok(())).await,
    };
    let served = match served {
        Err(error) => Err(error),
        Ok(()) => {
            let logs = folder.logs().display();
            tracing::info!(%logs, "ready: http://{http}/v1, grpc {grpc}; ctrl-c ends it");
            tokio::select! {
                worked = crew.work() => worked,
                () = signals.received() => Ok(()),
            }
        }
    };
    end(crew, folder, guest, signals, served).await
}

/// Ends all processes, and leaves nothing but the logs of what failed.
async fn end(
    mut crew: Crew,
    folder: Folder,
    guest: Option<Guest>,
    mut signals: Signals,
    served: Result<()>,
) -> Result<ExitCode> {
    if served.is_ok() {
        tracing::info!("ending: answers that are being given may finish; a second signal ends all now");
    }
    let is_cut = tokio::select! {
        () = crew.drain() => false,
        () = signals.received() => true,
    };
    if is_cut {
        tracing::warn!("a second signal: running work is cut off");
        crew.kill().await;
    }
    if let Some(guest) = guest {
        guest.leave().await;
    }
    if let Err(error) = served {
        folder.keep_logs();
        return Err(error);
    }
    drop(folder);
    tracing::info!("ended");
    Ok(if is_cut { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The gateway's HTTP and gRPC addresses, which are fixed and must be free; port 0 is any that is.
fn doors(config: &Config, ports: &Ports) -> Result<(SocketAddr, SocketAddr)> {
    let place = |key: &str, address: &str| -> Result<SocketAddr> {
        let resolved = address.to_socket_addrs().map(|mut all| all.next());
        let resolved = resolved.with_context(|| format!("{key} is '{address}', which cannot be bound"))?;
        let mut resolved = resolved.with_context(|| format!("{key} is '{address}', which is no address"))?;
        if resolved.port() == 0 {
            resolved.set_port(ports.take()?.port());
        }
        let bound = TcpListener::bind(resolved);
        bound.with_context(|| format!("{key} is '{address}', which cannot be bound; use another ADDR:PORT"))?;
        Ok(resolved)
    };
    let http = place("gateway.http", &config.gateway.http)?;
    let grpc = place("gateway.grpc", &config.gateway.grpc)?;
    if !ports::is_free(grpc) {
        let offset = ports::ADMIN_OFFSET;
        bail!("gateway.grpc is '{grpc}', and the port {offset} above, for /metrics, /live and /ready, cannot be bound");
    }
    ports.reserve(http);
    ports.reserve(grpc);
    Ok((http, grpc))
}

/// Finds or starts Redis and NATS; returns what services must know of them and is secret.
async fn servers(crew: &mut Crew, config: &mut Config, folder: &Folder) -> Result<Vec<(String, String)>> {
    let (redis, nats) = (config.cluster.redis_url.clone(), config.cluster.nats_url.clone());
    let mut own = Vec::new();
    for (kind, url) in [(Kind::Redis, &redis), (Kind::Nats, &nats)] {
        if url.expose().is_empty() {
            own.push(Server::find(kind, folder.path())?);
        }
    }
    if !redis.expose().is_empty() {
        let metadata = RedisMetadata::connect(redis.expose(), &config.cluster.key_prefix)?;
        let unset = "start it, or leave cluster.redis_url and REDIS_URL unset: then moesaic starts one";
        metadata
            .get("ready")
            .await
            .with_context(|| format!("the redis of cluster.redis_url does not answer; {unset}"))?;
    }
    if !nats.expose().is_empty() {
        let connection = Nats::connect(nats.expose(), "moesaic-up").await?;
        if !connection.connected(ANSWER_WITHIN).await {
            let unset = "start it, or leave cluster.nats_url and NATS_URL unset: then moesaic starts one";
            bail!("the nats of cluster.nats_url does not answer within {ANSWER_WITHIN:?}; {unset}");
        }
    }
    for server in &own {
        let name = server.kind.to_string();
        let log = folder.logs().join(format!("{name}.log"));
        let what = What::Server(server.clone());
        crew.add(Spec { name, what, address: None, log, grace: SERVERS_END_WITHIN }, usize::MAX);
    }
    crew.are_ready().await?;
    let mut urls = [redis, nats];
    for server in own {
        let address = crew.address(&server.kind.to_string()).context("a server that is ready has an address")?;
        urls[server.kind as usize] = Secret::new(server.url(address));
    }
    let salt = std::mem::take(&mut config.gateway.salt_secret);
    config.cluster.redis_url = Secret::default();
    config.cluster.nats_url = Secret::default();
    let [redis, nats] = urls;
    let secrets = [("CLUSTER__REDIS_URL", redis), ("CLUSTER__NATS_URL", nats), ("GATEWAY__SALT_SECRET", salt)];
    let variable = |(name, value): (&str, Secret)| (format!("MOESAIC__{name}"), value.expose().to_owned());
    Ok(secrets.into_iter().filter(|(_, value)| !value.expose().is_empty()).map(variable).collect())
}

/// Starts the services.
fn services(
    crew: &mut Crew,
    mut config: Config,
    counts: &Counts,
    grpc: SocketAddr,
    environment: Vec<(String, String)>,
    folder: &Folder,
) -> Result<()> {
    let sockets = folder.path().join("s");
    if config.cluster.socket_folder.is_none() && sockets.as_os_str().len() <= LONGEST_SOCKET_FOLDER {
        config.cluster.socket_folder = Some(sockets);
    }
    // each has its own
    config.cluster.id.clear();
    config.cluster.advertise.clear();
    let members = plan::members(counts, &config, config.model.threads());
    let file: PathBuf = folder.path().join("moesaic.toml");
    let text = moesaic_config::dump(&config, moesaic_service::UNSET).context("write the settings")?;
    std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    let program = std::env::current_exe().context("find this program")?;
    let common = Arc::new(Common { program, file, environment });
    for member in members {
        let is_gateway = member.service == moesaic_types::cluster::Service::Gateway;
        let log = folder.logs().join(format!("{}.log", member.name));
        let what = What::Service { service: member.service, settings: member.settings, common: Arc::clone(&common) };
        let address = is_gateway.then_some(grpc);
        crew.add(Spec { name: member.name, what, address, log, grace: member.grace }, member.ends);
    }
    Ok(())
}

/// The signals that ask for the end; a terminal that is closed sends the last.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` where whoever started us has it ignored, as nohup does.
    hang_up: Option<Signal>,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hang_up: if ignores_hang_up() { None } else { Some(listen(SignalKind::hangup())?) },
        })
    }

    /// Waits for the next one. Cancel-safe.
    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = hung_up(&mut self.hang_up) => {}
        }
    }
}

/// Waits for a SIGHUP that is listened for; for ever where none is. Cancel-safe.
async fn hung_up(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether SIGHUP, number 1, is ignored; where the system does not say, it is not.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}
