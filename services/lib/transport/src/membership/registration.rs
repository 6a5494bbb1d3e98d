//! A member's own record: taken, renewed, and given back.
use super::record::{Change, Found, MembershipEvent, Record, Take, claims, key, take};
use crate::subjects::Subject;
use bytes::Bytes;
use moesaic_types::Result;
use moesaic_types::boundary::{EventBus, Metadata, ReplicaLoad};
use moesaic_types::cluster::{Member, MemberState, Role};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Whether a member's record is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Not yet, or not any longer because the metadata did not answer for a whole lease. It is taken as soon as they do.
    Joining,
    /// Others see it.
    Held,
    /// A later process has the name. This one is out for good and must stop.
    Fenced,
}

/// A member's place in the cluster. Dropping it gives the place back in the background; [`Registration::leave`] waits
/// for that.
#[derive(Debug)]
pub struct Registration {
    record: watch::Sender<Record>,
    standing: watch::Receiver<Standing>,
    generation: watch::Receiver<Option<u64>>,
    /// Dropped to end the task.
    stay: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Registration {
    /// Takes a place for `member` and keeps it: renewed at every third of `lease`. The member's generation is set here
    /// as soon as the metadata answer: it is higher than that of any earlier life, whatever the hosts' clocks say.
    pub fn start(
        metadata: Arc<dyn Metadata>,
        events: Arc<dyn EventBus>,
        mut member: Member,
        lease: Duration,
    ) -> Registration {
        member.generation = 0;
        // a life's own, so that it numbers its events from 1
        let life = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let source = format!("{}.{}.{life}", member.service, member.id).into();
        let subject = Subject::membership(member.service, &member.id).to_string();
        let (key, claims) = (key(member.service, &member.id), claims(member.service, &member.id));
        let (record, wanted) = watch::channel(Record { member, load: None });
        let (told, standing) = watch::channel(Standing::Joining);
        let (held_as, held) = watch::channel(None);
        let (stay, leave) = oneshot::channel();
        let place = Place {
            metadata,
            events,
            lease,
            key,
            claims,
            source,
            subject,
            generation: 0,
            version: None,
            renewed: None,
            announced: None,
            told_at: None,
            wanted,
            standing: told,
            held_as,
        };
        let task = tokio::spawn(place.keep(leave));
        Self { record, standing, generation: held, stay, task }
    }

    /// Says whether it takes work; others know at once.
    pub fn set_state(&self, state: MemberState) {
        self.change(|record| record.member.state = state);
    }

    /// Says what peers must know of it; others know at once.
    pub fn set_role(&self, role: Role) {
        self.change(|record| record.member.role = role);
    }

    /// Says how busy it is; others know at the next renewal.
    pub fn set_load(&self, load: ReplicaLoad) {
        self.record.send_if_modified(|record| {
            record.load = Some(load);
            false
        });
    }

    fn change(&self, change: impl FnOnce(&mut Record)) {
        self.record.send_if_modified(|record| {
            let before = record.clone();
            change(record);
            *record != before
        });
    }

    /// What it says of itself. The generation is the task's own.
    pub fn record(&self) -> Record {
        self.record.borrow().clone()
    }

    /// Whether others see it.
    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// The same, to wait for.
    pub fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// The generation under which this process itself took its place, once it has; never a later process's of this name.
    pub fn generation(&self) -> watch::Receiver<Option<u64>> {
        self.generation.clone()
    }

    /// Gives the place back, tells others, and returns when that is done, or cannot be: then the lease runs out.
    pub async fn leave(self) {
        drop(self.stay);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "leave the cluster");
        }
    }
}

/// The task's own.
struct Place {
    metadata: Arc<dyn Metadata>,
    events: Arc<dyn EventBus>,
    lease: Duration,
    key: String,
    claims: String,
    source: Arc<str>,
    subject: String,
    /// 0: none yet.
    generation: u64,
    /// Of our record, where we know it.
    version: Option<u64>,
    /// When the last write that was confirmed was begun.
    renewed: Option<Instant>,
    /// What others were told.
    announced: Option<Record>,
    /// When they were.
    told_at: Option<Instant>,
    wanted: watch::Receiver<Record>,
    standing: watch::Sender<Standing>,
    /// The generation, told once the record was written.
    held_as: watch::Sender<Option<u64>>,
}

impl Place {
    async fn keep(mut self, mut leave: oneshot::Receiver<()>) {
        let mut was_refused = false;
        loop {
            let pause = match self.renew().await {
                Ok(true) => {
                    was_refused = false;
                    self.lease / 3
                }
                Ok(false) => return,
                Err(error) => {
                    if !was_refused {
                        tracing::warn!(%error, key = self.key, "renew the place in the cluster");
                    }
                    was_refused = true;
                    self.notice_loss();
                    self.tell_presence().await;
                    self.lease / 10
                }
            };
            tokio::select! {
                _ = &mut leave => break,
                () = sleep(pause) => {}
                // an error: the registration is gone, and `leave` says so as well
                Ok(()) = self.wanted.changed() => {}
            }
        }
        self.give_back().await;
    }

    fn tell(&self, standing: Standing) {
        self.standing.send_if_modified(|told| std::mem::replace(told, standing) != standing);
    }

    fn notice_loss(&self) {
        if self.renewed.is_none_or(|renewed| renewed.elapsed() >= self.lease) {
            self.tell(Standing::Joining);
        }
    }

    /// Tells by events what cannot be written: changes at once, and again and again that it is there. Those who can read
    /// the metadata would else take it for dead when its lease has run out.
    async fn tell_presence(&mut self) {
        let mut record = self.wanted.borrow().clone();
        record.member.generation = self.generation;
        let Some(announced) = &self.announced else { return };
        let is_change = announced.member.state != record.member.state || announced.member.role != record.member.role;
        if is_change || self.told_at.is_none_or(|told| told.elapsed() >= self.lease / 3) {
            self.announced = Some(record.clone());
            self.publish(MembershipEvent { change: Change::Changed, record }).await;
        }
    }

    /// Writes the record; false when it is another's for good.
    async fn renew(&mut self) -> Result<bool> {
        let begun = Instant::now();
        if self.generation == 0 {
            self.generation = self.claim().await?;
        }
        let mut record = self.wanted.borrow_and_update().clone();
        record.member.generation = self.generation;
        let is_renewal = self.version.is_some();
        if let Some(version) = self.version.take()
            && let Some(version) = self.write(&record, Some(version)).await?
        {
            self.settle(version, begun, record, Change::Changed).await;
            return Ok(true);
        }
        if is_renewal {
            tracing::warn!(key = self.key, "the place in the cluster was lost; taking it again");
        }
        loop {
            let found = self.metadata.get(&self.key).await?.map(|(bytes, version)| Found {
                generation: Record::read(&bytes).map_or(0, |record| record.member.generation),
                version,
            });
            match take(self.generation, self.renewed.is_some(), found) {
                Take::Fenced { by } => {
                    tracing::error!(key = self.key, by, "a later process has this name; this one is out");
                    self.tell(Standing::Fenced);
                    return Ok(false);
                }
                Take::Write { expected, generation } => {
                    // a write of ours of which we did not hear
                    let is_ours = found.is_some_and(|found| found.generation == self.generation);
                    let change = if is_ours && self.announced.is_some() { Change::Changed } else { Change::Joined };
                    (self.generation, record.member.generation) = (generation, generation);
                    if let Some(version) = self.write(&record, expected).await? {
                        self.settle(version, begun, record, change).await;
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// A number above those of all earlier lives: a version of the metadata, which never comes back. Clocks would not do:
    /// a life that was frozen past its lease would put out its successor on a host whose clock is behind.
    async fn claim(&self) -> Result<u64> {
        loop {
            let found = self.metadata.get(&self.claims).await?.map(|(_, version)| version);
            let claimed = self.metadata.compare_and_set(&self.claims, found, Bytes::new(), Some(self.lease)).await?;
            if let Some(generation) = claimed {
                return Ok(generation);
            }
        }
    }

    async fn write(&self, record: &Record, expected: Option<u64>) -> Result<Option<u64>> {
        self.metadata.compare_and_set(&self.key, expected, record.to_bytes(), Some(self.lease)).await
    }

    /// The record is ours.
    async fn settle(&mut self, version: u64, begun: Instant, record: Record, change: Change) {
        (self.version, self.renewed) = (Some(version), Some(begun));
        self.held_as.send_replace(Some(record.member.generation));
        self.tell(Standing::Held);
        if change == Change::Joined || self.announced.as_ref() != Some(&record) {
            self.announced = Some(record.clone());
            self.publish(MembershipEvent { change, record }).await;
        }
    }

    async fn give_back(mut self) {
        let mut record = self.wanted.borrow_and_update().clone();
        record.member.generation = self.generation;
        if let Some(version) = self.version
            && let Err(error) = self.metadata.remove(&self.key, version).await
        {
            tracing::warn!(%error, key = self.key, "give the place in the cluster back");
        }
        // those who know a later life of this name do not listen
        self.publish(MembershipEvent { change: Change::Left, record }).await;
    }

    async fn publish(&mut self, event: MembershipEvent) {
        self.told_at = Some(Instant::now());
        // a lost event is no loss: who watches asks the metadata as well
        if let Err(error) = self.events.publish(&self.source, &self.subject, event.to_bytes()).await {
            tracing::debug!(%error, subject = self.subject, "publish a membership event");
        }
    }
}
