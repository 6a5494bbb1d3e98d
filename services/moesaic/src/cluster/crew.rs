//! All processes of the cluster, as their keepers tell of them.
use super::child::last_lines;
use super::keeper::{News, Order, Spec};
use super::ports::Ports;
use anyhow::{Result, bail};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval_at};

/// How often those are named that are still waited for.
const REMIND: Duration = Duration::from_secs(10);

/// News that wait to be heard.
const NEWS: usize = 256;

/// Lines of a log that are shown when a process could not start.
const SHOWN: usize = 5;

/// The processes, and what is known of them.
pub struct Crew {
    ports: Arc<Ports>,
    hands: Vec<Hand>,
    tell: mpsc::Sender<(String, News)>,
    hear: mpsc::Receiver<(String, News)>,
}

struct Hand {
    name: String,
    log: PathBuf,
    ends: usize,
    orders: watch::Sender<Order>,
    keeper: Option<JoinHandle<()>>,
    address: Option<SocketAddr>,
    /// Whether it does its job, or why not.
    ready: Result<(), String>,
    was_ready: bool,
}

impl Crew {
    /// Without anyone yet; processes take ports of these.
    pub fn new(ports: Arc<Ports>) -> Self {
        let (tell, hear) = mpsc::channel(NEWS);
        Self { ports, hands: Vec::new(), tell, hear }
    }

    /// Starts a process, and keeps it running; it ends in this turn.
    pub fn add(&mut self, spec: Spec, ends: usize) {
        let (orders, taken) = watch::channel(Order::Run);
        let (name, log) = (spec.name.clone(), spec.log.clone());
        let keeper = Some(tokio::spawn(spec.keep(Arc::clone(&self.ports), taken, self.tell.clone())));
        let ready = Err("it is being started".into());
        self.hands.push(Hand { name, log, ends, orders, keeper, address: None, ready, was_ready: false });
    }

    /// Where a process listens.
    pub fn address(&self, name: &str) -> Option<SocketAddr> {
        self.hands.iter().find(|hand| hand.name == name)?.address
    }

    /// Waits until all are ready. May be dropped and called again.
    ///
    /// # Errors
    /// When one could not start.
    pub async fn are_ready(&mut self) -> Result<()> {
        let mut reminders = interval_at(tokio::time::Instant::now() + REMIND, REMIND);
        reminders.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.hands.iter().any(|hand| hand.ready.is_err()) {
            // both are cancel-safe
            tokio::select! {
                Some((name, news)) = self.hear.recv() => self.note(&name, news)?,
                _ = reminders.tick() => self.remind(),
            }
        }
        Ok(())
    }

    /// Tells of what happens, for ever. May be dropped and called again.
    ///
    /// # Errors
    /// When a process that was not there at the start could not start.
    pub async fn work(&mut self) -> Result<()> {
        while let Some((name, news)) = self.hear.recv().await {
            self.note(&name, news)?;
        }
        bail!("nobody is left")
    }

    /// Ends all, turn by turn, each as soon as what it does is done; returns when all are gone. May be dropped and called
    /// again.
    pub async fn drain(&mut self) {
        let mut turns: Vec<usize> = self.hands.iter().map(|hand| hand.ends).collect();
        turns.sort_unstable();
        turns.dedup();
        for turn in turns {
            let names: Vec<&str> = self.hands.iter().filter(|h| h.ends == turn).map(|h| &*h.name).collect();
            tracing::info!(processes = names.join(" "), "ending");
            self.end(Order::Drain, |hand| hand.ends == turn).await;
        }
    }

    /// Ends all at once.
    pub async fn kill(&mut self) {
        self.end(Order::End, |_| true).await;
    }

    async fn end(&mut self, order: Order, whose: impl Fn(&Hand) -> bool) {
        for hand in self.hands.iter().filter(|hand| whose(hand)) {
            // one that was told to end now is not told to take its time
            hand.orders.send_if_modified(|at| {
                let is_new = *at == Order::Run || order == Order::End;
                if is_new {
                    *at = order;
                }
                is_new
            });
        }
        for index in 0..self.hands.len() {
            while whose(&self.hands[index]) {
                let Some(keeper) = &mut self.hands[index].keeper else { break };
                // both are cancel-safe; news are heard, for keepers wait until they are
                tokio::select! {
                    ended = keeper => {
                        self.hands[index].keeper = None;
                        if let Err(error) = ended {
                            tracing::error!(process = self.hands[index].name, %error, "the keeper failed");
                        }
                    }
                    Some((name, news)) = self.hear.recv() => if news == News::Overdue {
                        tracing::warn!(process = name, "killed, for it took too long to end");
                    },
                }
            }
        }
    }

    /// Notes what is heard, and tells of it.
    fn note(&mut self, name: &str, news: News) -> Result<()> {
        let Some(hand) = self.hands.iter_mut().find(|hand| hand.name == name) else { return Ok(()) };
        match news {
            News::Started { pid, address } => {
                hand.address = Some(address);
                tracing::info!(process = name, pid, %address, "started");
            }
            News::Ready(after) => {
                hand.ready = Ok(());
                hand.was_ready = true;
                let seconds = format!("{:.1}", after.as_secs_f32());
                tracing::info!(process = name, seconds, "ready");
            }
            News::Unready(reason) => {
                if hand.ready.is_ok() {
                    tracing::warn!(process = name, reason, "not ready any longer");
                }
                hand.ready = Err(reason);
            }
            News::Ended { how, again_in } => {
                let pause_s = again_in.as_secs_f32();
                tracing::warn!(process = name, how, pause_s, log = %hand.log.display(), "ended; it is started again");
                hand.ready = Err(format!("it ended: {how}"));
            }
            News::Overdue => {}
            News::Failed(reason) => {
                let lines = last_lines(&hand.log, SHOWN);
                let log = hand.log.display();
                bail!("{name} could not start: {reason}; the end of its log, {log}:\n{lines}");
            }
        }
        Ok(())
    }

    fn remind(&self) {
        for hand in &self.hands {
            if let Err(reason) = &hand.ready {
                tracing::info!(process = hand.name, reason, "waiting for it");
            }
        }
    }
}
