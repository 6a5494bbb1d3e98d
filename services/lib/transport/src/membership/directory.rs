//! All members of a service, as they come and go.
use super::record::{Change, MembershipEvent, Record, folder, key};
use super::view::{Known, View};
use crate::cues::{Cue, Cues};
use crate::subjects::{Plane, Subject};
use futures::{StreamExt, TryStreamExt, stream};
use moesaic_types::Result;
use moesaic_types::boundary::{Event, EventBus, Metadata};
use moesaic_types::cluster::Service;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// How often the metadata are read, whether or not events come.
const POLL: Duration = Duration::from_secs(1);

/// Records that are asked for at the same time.
const AT_ONCE: usize = 64;

/// Watches a service's members. Ends when it is dropped.
#[derive(Debug)]
pub struct Directory {
    view: watch::Receiver<Arc<View>>,
    task: AbortHandle,
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Directory {
    /// Starts to watch. The view is empty and stale until the metadata are first read. `lease` is that of the members:
    /// any that vanishes without a word is kept so long.
    pub fn start(
        metadata: Arc<dyn Metadata>,
        events: Arc<dyn EventBus>,
        service: Service,
        lease: Duration,
    ) -> Directory {
        let known = Known::new(lease);
        let (told, view) = watch::channel(Arc::new(known.view()));
        let watcher = Watcher { metadata, events, service, known, told, was_unreadable: false };
        let task = tokio::spawn(watcher.run()).abort_handle();
        Self { view, task }
    }

    /// The members now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// The same, to wait for changes.
    pub fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }
}

struct Watcher {
    metadata: Arc<dyn Metadata>,
    events: Arc<dyn EventBus>,
    service: Service,
    known: Known,
    told: watch::Sender<Arc<View>>,
    was_unreadable: bool,
}

impl Watcher {
    async fn run(mut self) {
        let prefix = format!("{}{}.", Plane::Membership.prefix(), self.service);
        let mut cues = Cues::new(Arc::clone(&self.events), prefix, POLL);
        loop {
            match cues.next().await {
                Cue::Time => self.poll().await,
                Cue::Event(event) => self.hear(&event).await,
            }
            let view = self.known.view();
            self.told.send_if_modified(|told| {
                let is_new = **told != view;
                if is_new {
                    *told = Arc::new(view);
                }
                is_new
            });
        }
    }

    async fn poll(&mut self) {
        let found = self.read().await;
        match found {
            Ok(found) => {
                self.known.read(Instant::now(), found);
                self.was_unreadable = false;
            }
            Err(error) => {
                if !self.was_unreadable {
                    let service = self.service.name();
                    tracing::warn!(%error, service, "read the members; going on with those last known");
                }
                self.was_unreadable = true;
                self.known.unreadable();
            }
        }
    }

    async fn read(&self) -> Result<BTreeMap<Arc<str>, Record>> {
        let keys = self.metadata.keys(&folder(self.service)).await?;
        let get = |key: String| async move { self.metadata.get(&key).await };
        let found = stream::iter(keys.into_iter().map(get)).buffer_unordered(AT_ONCE);
        // a key may expire between the two, and a record may be of a later version of us
        let records = found.try_filter_map(async |value| Ok(value.and_then(|(bytes, _)| Record::read(&bytes))));
        records.map_ok(|record| (Arc::clone(&record.member.id), record)).try_collect().await
    }

    /// Takes an event in. The metadata know of a later life than an event that is old. Where they have no record, the
    /// member may be cut off from them; where they cannot be read, they are not waited for at each event.
    async fn hear(&mut self, event: &Event) {
        let is_ours = Subject::parse(&event.subject).is_some_and(|subject| subject.service == self.service.name());
        let Some(heard) = MembershipEvent::read(&event.payload).filter(|_| is_ours) else { return };
        if heard.change == Change::Left || self.known.is_stale() {
            self.known.told(Instant::now(), heard);
            return;
        }
        match self.metadata.get(&key(self.service, &heard.record.member.id)).await {
            Ok(Some((bytes, _))) => {
                let record = Record::read(&bytes);
                self.known.told(Instant::now(), heard);
                if let Some(record) = record {
                    self.known.set(record);
                }
            }
            Ok(None) | Err(_) => self.known.told(Instant::now(), heard),
        }
    }
}
