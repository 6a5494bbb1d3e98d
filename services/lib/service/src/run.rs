//! From the start of a process to its end.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program's outermost frame")]
use crate::args::Args;
use crate::cluster::Cluster;
use crate::doors::{self, Bound};
use crate::process::{Process, Settings};
use crate::status::{Phase, Status};
use crate::{admin, settings};
use clap::{CommandFactory, FromArgMatches};
use moesaic_telemetry::TelemetryConfig;
use moesaic_transport::Registration;
use moesaic_transport::membership::Standing;
use moesaic_types::cluster::{Member, MemberState, Role};
use moesaic_types::{Error, Result};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{MissedTickBehavior, interval_at, timeout_at};

/// How often the process looks at itself.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long answers that are ready may take to leave when the drain is over.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Runs a service to its end. The exit status is 0 after a stop by signal, 2 when it could not start, 1 when it failed
/// later or a second signal cut its work off.
pub fn main<P: Process>(name: &'static str, about: &'static str) -> ExitCode {
    let matches = Args::command().name(name).about(about).get_matches();
    match Args::from_arg_matches(&matches) {
        Ok(args) => run::<P>(name, &args),
        Err(error) => error.exit(),
    }
}

/// The same with arguments that were read already.
pub fn run<P: Process>(name: &'static str, args: &Args) -> ExitCode {
    match start::<P>(name, args) {
        Ok(code) => code,
        Err(failure) => {
            let (error, code) = match failure {
                Failure::Start(error) => (error, 2),
                Failure::Later(error) => (error, 1),
            };
            eprintln!("{name}: {error}");
            ExitCode::from(code)
        }
    }
}

/// When it failed.
enum Failure {
    Start(Error),
    Later(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Start(error)
    }
}

fn start<P: Process>(name: &'static str, args: &Args) -> Result<ExitCode, Failure> {
    let settings: P::Settings = settings::load(&args.settings, Vec::new())?;
    settings.validate()?;
    settings.cluster().validate()?;
    if args.dump_config {
        let text = moesaic_config::dump(&settings, settings::UNSET);
        print!("{}", text.map_err(|error| Error::internal(error.to_string()))?);
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::internal(format!("start the runtime: {error}")))?;
    let ended = runtime.block_on(life::<P>(name, settings));
    // a model that is being loaded is not waited for
    runtime.shutdown_background();
    ended
}

/// How the process was told to end.
enum End {
    Signal,
    /// It must not go on, but what runs may end.
    Replaced(Error),
    Failed(Failure),
}

async fn life<P: Process>(name: &'static str, settings: P::Settings) -> Result<ExitCode, Failure> {
    let internal = |what: &str, error: &dyn std::fmt::Display| Error::internal(format!("{what}: {error}"));
    let own_name = settings.telemetry().service_name.clone().filter(|name| !name.is_empty());
    let telemetry =
        TelemetryConfig { service_name: own_name.or_else(|| Some(name.into())), ..settings.telemetry().clone() };
    // a wrong address is an error a little later
    let port = settings.grpc().1.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let instance = port.map(|port| settings.cluster().id_of(port));
    let telemetry = moesaic_telemetry::init_as(&telemetry, instance.as_deref());
    let _telemetry = telemetry.map_err(|error| internal("set up telemetry", &error))?;
    moesaic_telemetry::metrics::install().map_err(|error| internal("set up metrics", &error))?;
    let mut signals = Signals::listen()?;
    let (key, address) = settings.grpc();
    let bound = doors::bind(key, address, P::SERVICE, settings.cluster()).await?;
    let Bound { doors, address, socket, admin, admin_address } = bound;
    let cluster = Cluster::connect(settings.cluster(), P::SERVICE, address).await?;
    let process = Arc::new(P::new(settings.clone(), cluster.clone()).await?);
    let member = Member {
        service: P::SERVICE,
        id: Arc::clone(&cluster.id),
        generation: 0,
        address: cluster.address.to_string(),
        socket,
        state: MemberState::Starting,
        role: Role::Plain,
    };
    tracing::info!(id = &*cluster.id, grpc = %address, admin = %admin_address, advertise = member.address, "starting");
    let registration =
        Registration::start(Arc::clone(&cluster.metadata), Arc::clone(&cluster.events), member, cluster.lease);
    cluster.registered(registration.generation());
    let registration = Arc::new(registration);
    let (phase, at) = watch::channel(Phase::Starting);
    let status = Arc::new(Status::new(Arc::clone(&process), cluster, at, registration.watch()));
    let admin = tokio::spawn(admin::serve(admin, Arc::clone(&status)));
    let observer = tokio::spawn(observe(status, Arc::clone(&registration)));
    let (stop, stopped) = watch::channel(false);
    let mut serving = tokio::spawn(Arc::clone(&process).serve(doors, stopped));

    let end = live(&process, &registration, &phase, &mut serving, &mut signals).await;
    phase.send_replace(Phase::Draining);
    registration.set_state(MemberState::Draining);
    let ended = match end {
        End::Signal => drain(&*process, settings.drain_timeout(), stop, &mut serving, &mut signals).await,
        End::Replaced(error) => {
            tracing::error!(%error, "this process is out");
            let drained = drain(&*process, settings.drain_timeout(), stop, &mut serving, &mut signals).await;
            drained.and(Err(Failure::Later(error)))
        }
        End::Failed(failure) => Err(failure),
    };
    serving.abort();
    observer.abort();
    // so that nobody else has the registration; an abort is no error here
    let _ = observer.await;
    if let Some(registration) = Arc::into_inner(registration) {
        registration.leave().await;
    }
    admin.abort();
    tracing::info!("ended");
    ended
}

/// Until it must end.
async fn live<P: Process>(
    process: &Arc<P>,
    registration: &Registration,
    phase: &watch::Sender<Phase>,
    serving: &mut JoinHandle<Result<()>>,
    signals: &mut Signals,
) -> End {
    let mut preparing = tokio::spawn(Arc::clone(process).prepare());
    let mut standing = registration.watch();
    let mut is_prepared = false;
    let mut looks = interval_at(tokio::time::Instant::now() + LOOK_EVERY, LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = loop {
        // all are cancel-safe
        tokio::select! {
            () = signals.received() => break End::Signal,
            prepared = &mut preparing, if !is_prepared => match flat(prepared) {
                Ok(role) => {
                    is_prepared = true;
                    phase.send_replace(Phase::Running);
                    registration.set_role(role);
                    registration.set_state(MemberState::Ready);
                }
                Err(error) => break End::Failed(Failure::Start(error)),
            },
            served = &mut *serving => {
                let error = flat(served).err().unwrap_or_else(|| Error::internal("the server ended by itself"));
                break End::Failed(Failure::Later(error));
            }
            // an error means that the registration is gone, and it is not
            Ok(fenced) = standing.wait_for(|standing| *standing == Standing::Fenced) => {
                drop(fenced);
                let id = registration.record().member.id;
                let message = format!("a later process has the name '{id}'; give each its own cluster.id");
                break End::Replaced(Error::unavailable(message));
            }
            // who started it starts it again; a probe of /live would do the same, where there is one
            _ = looks.tick() => if let Err(error) = process.live() {
                break End::Failed(Failure::Later(error));
            },
        }
    };
    preparing.abort();
    end
}

fn flat<T>(joined: Result<Result<T>, JoinError>) -> Result<T> {
    joined.unwrap_or_else(|error| Err(Error::internal(format!("a task of the process failed: {error}"))))
}

/// Ends what runs.
async fn drain<P: Process>(
    process: &P,
    timeout: Duration,
    stop: watch::Sender<bool>,
    serving: &mut JoinHandle<Result<()>>,
    signals: &mut Signals,
) -> Result<ExitCode, Failure> {
    tracing::info!(drain_s = timeout.as_secs_f32(), "stopping: running work may finish; a second signal ends now");
    let deadline = Instant::now() + timeout;
    let ending = async {
        let mut all_ended = process.drain(deadline).await;
        stop.send_replace(true);
        let last = deadline.max(Instant::now() + LAST_WORDS);
        match timeout_at(last.into(), serving).await {
            Ok(served) => flat(served)?,
            Err(_) => all_ended = false,
        }
        if !all_ended {
            tracing::warn!(drain_s = timeout.as_secs_f32(), "work still ran at the end of the drain; cut off");
        }
        Ok::<_, Error>(())
    };
    tokio::select! {
        ended = ending => ended.map(|()| ExitCode::SUCCESS).map_err(Failure::Later),
        () = signals.received() => {
            tracing::warn!("a second signal: running work is cut off");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Tells others how busy the process is, and the log when it becomes ready or not, or begins to miss something. Ends
/// with the process; nothing is lost on cancel.
async fn observe<P: Process>(status: Arc<Status<P>>, registration: Arc<Registration>) {
    let mut ticks = interval_at(tokio::time::Instant::now() + LOOK_EVERY, LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut was_ready, mut missed) = (None, Vec::new());
    loop {
        ticks.tick().await;
        if let Some(load) = status.process.load().await {
            registration.set_load(load);
        }
        let look = status.look().await;
        if was_ready != Some(look.ready.is_ok()) {
            match &look.ready {
                Ok(()) => tracing::info!("ready"),
                Err(error) => tracing::info!(reason = error.message, "not ready"),
            }
            was_ready = Some(look.ready.is_ok());
        }
        if look.degraded != missed {
            for reason in look.degraded.iter().filter(|reason| !missed.contains(*reason)) {
                tracing::warn!(reason, "degraded");
            }
            if look.degraded.is_empty() {
                tracing::info!("nothing is missing any longer");
            }
            missed = look.degraded;
        }
    }
}

/// The signals that ask for the end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen =
            |kind: SignalKind| signal(kind).map_err(|error| Error::internal(format!("listen for signals: {error}")));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Waits for the next one. Cancel-safe.
    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
