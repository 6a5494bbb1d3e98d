//! One fault after another on a running cluster under load: made, ended, and looked at.
use crate::cluster::{Cluster, Kind};
use crate::load::{Ended, Load, Outcome};
use crate::report::Report;
use anyhow::{Context, Result, bail};
use moesaic_tests::{http, until};
use serde_json::json;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a fault lasts where nothing else is said: longer than a lease, and than it takes to notice a silent peer.
const LASTS: Duration = Duration::from_secs(4);

/// Metrics that grow as long as a scheduler, a shard, or a router works.
pub const GENERATED: &str = "vllm:generation_tokens_total";
pub const EXPERT_TOKENS: &str = "moesaic_expert_tokens_total";
pub const PLACED: &str = "moesaic_router_placements_total";
/// What a scheduler works on now.
pub const RUNNING: &str = "vllm:num_requests_running";
pub const MIGRATIONS: &str = "moesaic_migrations_total";
/// Grows as long as steps wait for experts that nobody has.
pub const STEP_RETRIES: &str = "moesaic_step_retries_total";
/// What the kv-stores found of what they were asked for, and what a scheduler read from them.
const FOUND: &str = "moesaic_kv_store_hits_total";
const FETCHED: &str = "moesaic_prefix_store_fetched_blocks_total";

/// Replicas that a router places at.
const READY: &str = "moesaic_router_replicas_ready";
/// Of the router that leads.
pub const EPOCH: &str = "moesaic_placement_epoch";
pub const LEADER: &str = "moesaic_placement_leader";

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

/// Waits until the kv-stores are used, of which `stores` run: a scheduler that starts empty finds blocks there.
///
/// # Errors
/// When it does not, in time.
pub fn stores_are_used(cluster: &mut Cluster, scheduler: &str, stores: &[&'static str]) -> Result<()> {
    for store in stores {
        until(&format!("{store} is ready"), || Ok(cluster.member(store).is_ready()))?;
    }
    cluster.kill(scheduler)?;
    let found = |cluster: &Cluster| stores.iter().map(|store| cluster.member(store).metric(FOUND)).sum::<Result<f64>>();
    let before = found(cluster)?;
    cluster.start(scheduler)?;
    until("the kv-stores find what is asked for", || Ok(found(cluster)? > before))?;
    let fetched = || cluster.member(scheduler).metric(FETCHED);
    until(&format!("{scheduler} reads from the kv-stores"), || Ok(fetched().is_ok_and(|blocks| blocks > 0.0)))
}

/// Whether a request may end in this way, other than with the undisturbed answer.
type Allows = Box<dyn Fn(&Ended) -> bool>;

/// What must come true before a fault is ended.
type Condition = Box<dyn Fn(&Watch<'_>) -> Result<()>>;

/// A fault to be made, and what is expected of it.
pub struct Fault {
    name: String,
    expected: &'static str,
    lasts: Duration,
    allows: Allows,
    meanwhile: Vec<Condition>,
    grow: Vec<(Vec<&'static str>, &'static str)>,
    works_again: Vec<(&'static str, &'static str)>,
}

impl Fault {
    /// A fault after which every request ends as in an undisturbed run.
    pub fn new(name: impl Into<String>, expected: &'static str) -> Self {
        let allows = Box::new(|_: &Ended| false);
        let (meanwhile, grow, works_again) = (Vec::new(), Vec::new(), Vec::new());
        Self { name: name.into(), expected, lasts: LASTS, allows, meanwhile, grow, works_again }
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

    /// What must come true while it lasts: it is not ended before, and a condition that fails is not as expected.
    pub fn meanwhile(mut self, condition: impl Fn(&Watch<'_>) -> Result<()> + 'static) -> Self {
        self.meanwhile.push(Box::new(condition));
        self
    }

    /// While it lasts each client gets a whole answer to what it asks.
    pub fn goes_on(self) -> Self {
        self.meanwhile(|watch| watch.load.all_answered(watch.begun))
    }

    /// While it lasts a new request at this door is refused with `unavailable`.
    pub fn refuses(self, door: SocketAddr) -> Self {
        self.meanwhile(move |_| {
            let body = json!({"prompt": "Is anybody there?", "max_tokens": 1});
            until("a new request is refused", || {
                let (status, answer) = http::post(door, "/v1/completions", &body)?;
                Ok(status == 503 && answer["error"]["code"] == "unavailable")
            })
        })
    }

    /// While it lasts these routers come to place at one replica and no other.
    pub fn leaves_one(self, routers: &'static [&'static str]) -> Self {
        self.meanwhile(move |watch| {
            let knows_one = |router: &&str| watch.cluster.member(router).metric(READY).is_ok_and(|ready| ready == 1.0);
            until(&format!("{routers:?} place at one replica"), || Ok(routers.iter().all(knows_one)))
        })
    }

    /// While it lasts this metric of one of these members grows.
    pub fn grows(mut self, members: &[&'static str], metric: &'static str) -> Self {
        self.grow.push((members.to_vec(), metric));
        self
    }

    /// A member that works again afterwards: this metric of its grows.
    pub fn then_works(mut self, member: &'static str, metric: &'static str) -> Self {
        self.works_again.push((member, metric));
        self
    }
}

/// A cluster while a fault lasts.
pub struct Watch<'a> {
    pub cluster: &'a Cluster,
    pub load: &'a Load,
    /// When the fault had been made.
    pub begun: Instant,
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
        let mut meanwhile = Ok(());
        let counts = self.counts(&fault);
        let recovered = (|| {
            begin(&mut self.cluster).context("begin")?;
            let begun = Instant::now();
            // the load goes on meanwhile; how long it lasts is a part of the fault
            std::thread::sleep(fault.lasts);
            meanwhile = counts.and_then(|counts| self.meanwhile(&fault, &counts, begun)).context("meanwhile");
            end(&mut self.cluster).context("end")?;
            ended_at = Instant::now();
            self.cluster.becomes_whole()
        })();
        let ready = ended_at.elapsed();
        self.is_broken = recovered.is_err();
        let recovered =
            recovered.and_then(|()| self.works_again(&fault)).and_then(|()| self.load.all_answered(ended_at));
        let window = self.load.take();
        let outcome = meanwhile.and(recovered).and_then(|()| check(&fault, &window.ended));
        self.report.add(&fault.name, fault.expected, &window, ready, outcome);
    }

    /// Makes no fault: how long clients wait for tokens anyway.
    pub fn undisturbed(&mut self) {
        let fault = Fault::new("none: nothing is disturbed", "the gaps are those of the load").goes_on();
        self.fault(fault, |_| Ok(()), |_| Ok(()));
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

    /// What the metrics are that are to grow.
    fn counts(&self, fault: &Fault) -> Result<Vec<Vec<f64>>> {
        let of = |(members, metric): &(Vec<&'static str>, &'static str)| {
            members.iter().map(|name| self.cluster.member(name).metric(metric)).collect()
        };
        fault.grow.iter().map(of).collect()
    }

    fn meanwhile(&self, fault: &Fault, before: &[Vec<f64>], begun: Instant) -> Result<()> {
        let watch = Watch { cluster: &self.cluster, load: &self.load, begun };
        for ((members, metric), before) in fault.grow.iter().zip(before) {
            let grew = |(name, before): (&&str, &f64)| {
                // one that does not answer now may do so at the next look
                self.cluster.member(name).metric(metric).is_ok_and(|now| now > *before)
            };
            until(&format!("{metric} of {members:?} grows"), || Ok(members.iter().zip(before).any(grew)))?;
        }
        fault.meanwhile.iter().try_for_each(|condition| condition(&watch))
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
