//! Keeps one process running: starts it, looks at it, starts it again when it ends, and ends it when it is told to.
use super::child::{Child, Start};
use super::ports::{ADMIN_OFFSET, Ports, is_free};
use super::probe::Probe;
use super::servers::{Kind, Server};
use anyhow::{Context, Result};
use moesaic_transport::RedisMetadata;
use moesaic_types::cluster::Service;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

/// Between two looks at a process that is not ready, and at one that is.
const LOOK_SOON: Duration = Duration::from_millis(100);
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// So many times in a row a process must say that it cannot recover before it is killed.
const LOST_AFTER: usize = 3;

/// The pause before a process is started again; doubles up to the longest with each further end.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// One that ran for so long begins with the first pause again.
const LONG_LIFE: Duration = Duration::from_secs(60);

/// The exit status of a service that could not start, by its settings.
const COULD_NOT_START: i32 = 2;

/// What all services have in common.
#[derive(Debug)]
pub struct Common {
    /// This program.
    pub program: PathBuf,
    /// The file with their settings.
    pub file: PathBuf,
    /// What does not stand in files: secrets.
    pub environment: Vec<(String, String)>,
}

/// What a process is.
pub enum What {
    /// Redis or NATS.
    Server(Server),
    /// One of ours.
    Service {
        /// Which.
        service: Service,
        /// Its settings besides the common ones.
        settings: Vec<(&'static str, String)>,
        /// The common ones.
        common: Arc<Common>,
    },
}

/// A process that is to run.
pub struct Spec {
    /// Its name.
    pub name: String,
    /// What it is.
    pub what: What,
    /// Where it listens; a free port of the loopback interface where it may be any.
    pub address: Option<SocketAddr>,
    /// Where its output goes.
    pub log: PathBuf,
    /// How long it may take to end.
    pub grace: Duration,
}

/// What it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Run.
    Run,
    /// End what runs, then end.
    Drain,
    /// End now.
    End,
}

/// What is heard of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// It was started.
    Started { pid: i32, address: SocketAddr },
    /// It does its job, so long after it was started.
    Ready(Duration),
    /// It does not, and why.
    Unready(String),
    /// It ended by itself; it is started again after a pause.
    Ended { how: String, again_in: Duration },
    /// It could not start, and will not.
    Failed(String),
    /// It had to be killed, for it took too long to end.
    Overdue,
}

/// Tells of one process.
struct Teller {
    name: String,
    tell: mpsc::Sender<(String, News)>,
}

impl Teller {
    async fn tell(&self, news: News) {
        // nobody may listen any longer
        let _ = self.tell.send((self.name.clone(), news)).await;
    }
}

/// How a life ended.
enum End {
    Ordered,
    ByItself(String, Option<i32>),
}

impl Spec {
    /// Keeps it running until it is told to end; returns when it is gone.
    pub async fn keep(self, ports: Arc<Ports>, mut orders: watch::Receiver<Order>, tell: mpsc::Sender<(String, News)>) {
        let teller = Teller { name: self.name.clone(), tell };
        let was_ready = AtomicBool::new(false);
        let (mut address, mut pause) = (self.address, FIRST_PAUSE);
        loop {
            let started = Instant::now();
            let end = match self.place(&ports, &mut address, was_ready.load(Ordering::Acquire)) {
                Ok(at) => self.live(at, &mut orders, &was_ready, &teller).await,
                Err(error) => Err(error),
            };
            let (how, code) = match end {
                Ok(End::Ordered) => return,
                Ok(End::ByItself(how, code)) => (how, code),
                Err(error) => (format!("{error:#}"), Some(COULD_NOT_START)),
            };
            let is_settled = matches!(self.what, What::Server(_)) || code == Some(COULD_NOT_START);
            if is_settled && !was_ready.load(Ordering::Acquire) {
                // another process may have taken the port since it was found free
                let lost_its_port = self.address.is_none() && address.is_some_and(|address| !is_free(address));
                if !lost_its_port {
                    return teller.tell(News::Failed(how)).await;
                }
            }
            if started.elapsed() > LONG_LIFE {
                pause = FIRST_PAUSE;
            }
            teller.tell(News::Ended { how, again_in: pause }).await;
            tokio::select! {
                () = sleep(pause) => {}
                () = told(&mut orders, |order| order != Order::Run) => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Where it listens this time. Others know a server by its address once it was ready.
    fn place(&self, ports: &Ports, address: &mut Option<SocketAddr>, was_ready: bool) -> Result<SocketAddr> {
        let stays = self.address.is_some() || (was_ready && matches!(self.what, What::Server(_)));
        let last = address.filter(|address| stays || is_free(*address));
        let place = last.map_or_else(|| ports.take(), Ok)?;
        *address = Some(place);
        Ok(place)
    }

    /// One life of it.
    async fn live(
        &self,
        address: SocketAddr,
        orders: &mut watch::Receiver<Order>,
        was_ready: &AtomicBool,
        teller: &Teller,
    ) -> Result<End> {
        let start = self.start(address)?;
        let probe = self.probe(address)?;
        let mut child = Child::start(&start, &self.log)?;
        teller.tell(News::Started { pid: child.id(), address }).await;
        let lost = {
            let looks = look(&probe, was_ready, teller);
            // all are cancel-safe
            tokio::select! {
                status = child.ended() => return status.map(|status| End::ByItself(how(status), status.code())),
                () = told(orders, |order| order != Order::Run) => None,
                reason = looks => Some(reason),
            }
        };
        if let Some(reason) = lost {
            child.kill();
            child.ended().await?;
            return Ok(End::ByItself(format!("killed, for it said that it must be restarted: {reason}"), None));
        }
        if *orders.borrow() == Order::Drain {
            child.terminate();
            tokio::select! {
                status = child.ended() => return status.map(|_| End::Ordered),
                () = told(orders, |order| order == Order::End) => {}
                () = sleep(self.grace) => teller.tell(News::Overdue).await,
            }
        }
        child.kill();
        child.ended().await.map(|_| End::Ordered)
    }

    /// How it is started.
    fn start(&self, address: SocketAddr) -> Result<Start> {
        let (service, settings, common) = match &self.what {
            What::Server(server) => return server.prepare(address),
            What::Service { service, settings, common } => (service, settings, common),
        };
        let key = format!("{}.grpc", service.name().replace('-', "_"));
        let mut arguments: Vec<OsString> = vec!["service".into(), service.name().into(), "--end-with-stdin".into()];
        arguments.extend(["--config".into(), common.file.clone().into_os_string()]);
        let own = [(key.as_str(), address.to_string()), ("cluster.id", self.name.clone())];
        for (key, value) in own.iter().map(|(key, value)| (*key, value)).chain(settings.iter().map(|(k, v)| (*k, v))) {
            arguments.extend(["--set".into(), format!("{key}={value}").into()]);
        }
        Ok(Start { program: common.program.clone(), arguments, environment: common.environment.clone() })
    }

    fn probe(&self, address: SocketAddr) -> Result<Probe> {
        let What::Server(server) = &self.what else {
            let host = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
            return Ok(Probe::Admin(SocketAddr::new(host, address.port() + ADMIN_OFFSET)));
        };
        let url = server.url(address);
        Ok(match server.kind {
            Kind::Redis => Probe::Redis(RedisMetadata::connect(&url, "moesaic-up").context("connect to redis")?),
            Kind::Nats => Probe::Nats(address, url, Box::default()),
        })
    }
}

/// Waits for such an order. Cancel-safe.
async fn told(orders: &mut watch::Receiver<Order>, what: impl Fn(Order) -> bool) {
    // an error means that nobody gives orders any longer, which is one to end
    let _ = orders.wait_for(|order| what(*order)).await;
}

/// Looks at a process again and again, and tells when it becomes ready or not; returns when it says that it cannot recover.
async fn look(probe: &Probe, was_ready: &AtomicBool, teller: &Teller) -> String {
    let started = Instant::now();
    let mut last: Option<Result<(), String>> = None;
    let mut lost = 0;
    loop {
        let ready = probe.ready().await;
        let is_ready = ready.is_ok();
        if last.as_ref() != Some(&ready) {
            let news = match &ready {
                Ok(()) => News::Ready(started.elapsed()),
                Err(reason) => News::Unready(reason.clone()),
            };
            teller.tell(news).await;
        }
        last = Some(ready);
        if is_ready {
            was_ready.store(true, Ordering::Release);
            lost = 0;
        } else if let Some(reason) = probe.is_lost().await {
            lost += 1;
            if lost == LOST_AFTER {
                return reason;
            }
        }
        // between two looks at the condition
        sleep(if is_ready || lost > 0 { LOOK_EVERY } else { LOOK_SOON }).await;
    }
}

fn how(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}
