//! One fault after another on a running cluster under load: made, ended, and looked at.
use crate::cluster::{Cluster, Kind};
use crate::load::{Ended, Load, Outcome};
use crate::report::Report;
use anyhow::{Context, Result, bail};
use moesaic_tests::until;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a fault lasts where nothing else is said: longer than a lease, and than it takes to notice a silent peer.
const LASTS: Duration = Duration::from_secs(4);

/// Metrics that grow as long as a scheduler, a shard, or a router works.
pub const GENERATED: &str = "vllm:generation_tokens_total";
pub const EXPERT_TOKENS: &str = "moesaic_expert_tokens_total";
pub const PLACED: &str = "moesaic_router_placements_total";
const FOUND: &str = "moesaic_kv_store_hits_total";
const KEPT: &str = "moesaic_kv_store_bytes";

const LEADER: &str = "moesaic_placement_leader";

/// The router that leads the placement of experts.
///
/// # Errors
/// When none does, in time.
pub fn leader(cluster: &Cluster) -> Result<&'static str> {
    let mut found = None;
    until("a router leads", || {
        let leads = |name: &&'static str| cluster.member(name).metric(LEADER).is_ok_and(|leads| leads > 0.0);
        found = cluster.names(Kind::Router).into_iter().find(leads);
        Ok(found.is_some())
    })?;
    found.context("a router leads")
}

/// The same where those who are concerned notice at once.
const SHORT: Duration = Duration::from_secs(2);

/// Waits until the kv-stores are used: a scheduler that starts empty asks them, and offers what they have not.
///
/// # Errors
/// When they are not, in time.
pub fn stores_are_used(cluster: &mut Cluster, scheduler: &str) -> Result<()> {
    let used = |cluster: &Cluster| -> Vec<Option<f64>> {
        let stores = cluster.names(Kind::Store).into_iter().map(|name| cluster.member(name));
        // one that is lost is not used
        stores.map(|store| Some(store.metric(FOUND).ok()? + store.metric(KEPT).ok()?)).collect()
    };
    cluster.kill(scheduler)?;
    let before = used(cluster);
    cluster.start(scheduler)?;
    until("the kv-stores are used", || Ok(used(cluster).iter().zip(&before).any(|(now, before)| now > before)))
}

/// Whether a request may end in this way, other than with the undisturbed answer.
type Allows = Box<dyn Fn(&Ended) -> bool>;

/// A fault to be made, and what is expected of it.
pub struct Fault {
    name: String,
    expected: &'static str,
    lasts: Duration,
    allows: Allows,
    works_again: Vec<(&'static str, &'static str)>,
}

impl Fault {
    /// A fault after which every request ends as in an undisturbed run.
    pub fn new(name: impl Into<String>, expected: &'static str) -> Self {
        let allows = Box::new(|_: &Ended| false);
        Self { name: name.into(), expected, lasts: LASTS, allows, works_again: Vec::new() }
    }

    /// How long it lasts.
    pub fn lasting(self, lasts: Duration) -> Self {
        Self { lasts, ..self }
    }

    /// As long as who lost a connection at once needs to find another way.
    pub fn lasting_shortly(self) -> Self {
        self.lasting(SHORT)
    }

    /// Other ends of requests that are right.
    pub fn allowing(self, allows: impl Fn(&Ended) -> bool + 'static) -> Self {
        Self { allows: Box::new(allows), ..self }
    }

    /// Requests at this door may be refused, and its connections may break: clients go to another.
    pub fn losing(self, door: SocketAddr) -> Self {
        self.allowing(move |ended| {
            ended.door == door && matches!(ended.outcome, Outcome::Refused { .. } | Outcome::Cut { .. })
        })
    }

    /// Requests may end with an error that says who is missing: before they are accepted, or in the stream.
    pub fn unavailable(self) -> Self {
        self.allowing(|ended| match &ended.outcome {
            Outcome::Refused { status: Some(503), why } => why.contains("\"unavailable\""),
            Outcome::Failed { error } => error["code"] == "unavailable",
            _ => false,
        })
    }

    /// A member that works again afterwards: this metric of its grows.
    pub fn then_works(mut self, member: &'static str, metric: &'static str) -> Self {
        self.works_again.push((member, metric));
        self
    }
}

/// A cluster under load.
pub struct Suite {
    pub cluster: Cluster,
    load: Load,
    report: Report,
    /// It did not recover: what would come next would say nothing.
    is_broken: bool,
}

impl Suite {
    /// Waits for the cluster and begins the load.
    ///
    /// # Errors
    /// When the cluster does not become whole, or does not answer.
    pub fn start(family: &'static str, cluster: Cluster) -> Result<Self> {
        let report = Report::new(family);
        let started = cluster.becomes_whole().and_then(|()| Load::start(cluster.doors()));
        if started.is_err() {
            cluster.keep_logs(&report.logs()?)?;
        }
        let load = started?;
        load.all_answered(Instant::now())?;
        Ok(Self { cluster, load, report, is_broken: false })
    }

    /// Makes a fault with `begin` and ends it with `end`.
    pub fn fault(
        &mut self,
        fault: Fault,
        begin: impl FnOnce(&mut Cluster) -> Result<()>,
        end: impl FnOnce(&mut Cluster) -> Result<()>,
    ) {
        if self.is_broken {
            return self.report.skip(&fault.name, "the cluster did not recover from an earlier fault");
        }
        self.load.begin();
        let mut ended_at = Instant::now();
        let recovered = (|| {
            begin(&mut self.cluster).context("begin")?;
            // the load goes on meanwhile; how long it lasts is a part of the fault
            std::thread::sleep(fault.lasts);
            end(&mut self.cluster).context("end")?;
            ended_at = Instant::now();
            self.cluster.becomes_whole()
        })();
        let ready = ended_at.elapsed();
        self.is_broken = recovered.is_err();
        let recovered =
            recovered.and_then(|()| self.works_again(&fault)).and_then(|()| self.load.all_answered(ended_at));
        let window = self.load.take();
        let outcome = recovered.and_then(|()| check(&fault, &window.ended));
        self.report.add(&fault.name, fault.expected, &window, ready, outcome);
    }

    /// Notes a fault that cannot be made here.
    pub fn skip(&mut self, fault: &str, why: &str) {
        self.report.skip(fault, why);
    }

    /// Notes that a family's faults cannot be made here.
    ///
    /// # Errors
    /// When the table cannot be written.
    pub fn skip_all(family: &'static str, faults: &str, why: &str) -> Result<()> {
        let mut report = Report::new(family);
        report.skip(faults, why);
        report.finish()
    }

    fn works_again(&self, fault: &Fault) -> Result<()> {
        for (name, metric) in &fault.works_again {
            let member = self.cluster.member(name);
            let before = member.metric(metric)?;
            until(&format!("{name} works again"), || Ok(member.metric(metric)? > before))?;
        }
        Ok(())
    }

    /// Writes the table.
    ///
    /// # Errors
    /// When it cannot be written.
    ///
    /// # Panics
    /// When something was not as expected.
    pub fn finish(self) -> Result<()> {
        if self.report.has_failures() {
            self.cluster.keep_logs(&self.report.logs()?)?;
        }
        drop(self.load);
        self.report.finish()
    }
}

/// Whether each request ended as it should.
fn check(fault: &Fault, ended: &[Ended]) -> Result<()> {
    let is_right = |ended: &&Ended| ended.outcome == Outcome::Equal || (fault.allows)(ended);
    let wrong: Vec<&Ended> = ended.iter().filter(|ended| !is_right(ended)).collect();
    if !wrong.is_empty() {
        let show = |ended: &&Ended| {
            let Ended { client, door, took, outcome, .. } = ended;
            format!("\n  client {client} at {door} after {took:?}: {outcome:?}")
        };
        let shown: String = wrong.iter().take(5).map(show).collect();
        bail!("{} of {} requests did not end as expected:{shown}", wrong.len(), ended.len());
    }
    Ok(())
}
