//! The events' ways: KV events into the index, loads and other routers' news into the table, and what this router tells.
use crate::actors::prefix_index::{Apply, IndexActor};
use crate::actors::replica_table::{Heard, ReplicaTable};
use crate::news::{self, News};
use actix::dev::ToEnvelope;
use actix::{Actor, Context, Handler, Message};
use bytes::Bytes;
use futures::StreamExt;
use moesaic_actors::{AskError, Handle, WeakHandle};
use moesaic_transport::subjects::{Plane, Subject};
use moesaic_types::ReplicaId;
use moesaic_types::boundary::{Event, EventBus, ReplicaLoad};
use moesaic_types::cluster::Service;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

/// Pause before the bus is tried again.
const RESUBSCRIBE_AFTER: Duration = Duration::from_millis(500);

/// How long an event waits for an actor that has too much to do; then it is lost, as on the bus.
const PATIENCE: Duration = Duration::from_secs(5);

/// The tasks; they end with this.
pub struct Feeds(Vec<AbortHandle>);

impl Drop for Feeds {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl Feeds {
    /// Feeds the actors from the bus, and publishes news and questions under this name.
    pub fn start(
        events: Arc<dyn EventBus>,
        name: String,
        index: &Handle<IndexActor>,
        table: &Handle<ReplicaTable>,
        news: mpsc::Receiver<News>,
        questions: mpsc::Receiver<Subject>,
    ) -> Self {
        let name: Arc<str> = name.into();
        let own = Arc::clone(&name);
        let tasks = [
            tokio::spawn(feed(Arc::clone(&events), Plane::Kv, index.downgrade(), |event| Apply::read(&event))),
            tokio::spawn(feed(Arc::clone(&events), Plane::Load, table.downgrade(), move |event| heard(&own, &event))),
            tokio::spawn(tell(Arc::clone(&events), Arc::clone(&name), news)),
            tokio::spawn(ask(events, name, questions)),
        ];
        Self(tasks.map(|task| task.abort_handle()).into())
    }
}

/// What the table is told of an event on the plane of loads.
fn heard(own: &str, event: &Event) -> Option<Heard> {
    let subject = Subject::parse(&event.subject)?;
    if subject.service == Service::Scheduler.name() {
        let load: ReplicaLoad = serde_json::from_slice(&event.payload).ok()?;
        return Some(Heard::Load(ReplicaId::new(subject.instance), load, std::time::Instant::now()));
    }
    let is_others = subject.service == Service::Router.name() && *event.source != *own;
    is_others.then(|| serde_json::from_slice(&event.payload).ok()).flatten().map(Heard::News)
}

/// Feeds an actor with a plane's events until it is gone. An event that it does not take in time is lost, as on the bus.
async fn feed<A, M>(
    events: Arc<dyn EventBus>,
    plane: Plane,
    actor: WeakHandle<A>,
    read: impl Fn(Event) -> Option<M> + Send,
) where
    A: Actor<Context = Context<A>> + Handler<M>,
    Context<A>: ToEnvelope<A, M>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    let plane = plane.prefix();
    loop {
        match events.subscribe(&plane).await {
            Ok(mut stream) => {
                while let Some(event) = stream.next().await {
                    let Some(message) = read(event) else { continue };
                    let Some(actor) = actor.upgrade() else { return };
                    if let Err((message, _)) = actor.try_tell(message) {
                        // Full: wait for room, while the bus holds what comes.
                        if let Err(error) = wait_for_room(&actor, message).await {
                            tracing::debug!(%error, plane, "an event is lost");
                        }
                    }
                }
                tracing::warn!(plane, "events ended, subscribing again");
            }
            Err(error) => tracing::warn!(%error, plane, "subscribe to events"),
        }
        sleep(RESUBSCRIBE_AFTER).await;
    }
}

/// Tries again, with growing pauses, until the actor takes the message.
async fn wait_for_room<A, M>(actor: &Handle<A>, mut message: M) -> Result<(), AskError>
where
    A: Actor<Context = Context<A>> + Handler<M>,
    Context<A>: ToEnvelope<A, M>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    let give_up = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(200);
    loop {
        sleep(pause).await;
        match actor.try_tell(message) {
            Ok(()) => return Ok(()),
            Err((_, error)) if Instant::now() >= give_up => return Err(error),
            Err((again, _)) => message = again,
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Tells the other routers; what is lost they learn from the replicas' loads.
async fn tell(events: Arc<dyn EventBus>, own: Arc<str>, mut news: mpsc::Receiver<News>) {
    let subject = news::subject(&own).to_string();
    while let Some(news) = news.recv().await {
        let Ok(payload) = serde_json::to_vec(&news) else { continue };
        if let Err(error) = events.publish(&own, &subject, Bytes::from(payload)).await {
            tracing::debug!(%error, "tell the other routers");
        }
    }
}

/// Asks owners of blocks to say everything anew; what is lost is asked again with their next event.
async fn ask(events: Arc<dyn EventBus>, own: Arc<str>, mut questions: mpsc::Receiver<Subject>) {
    while let Some(question) = questions.recv().await {
        if let Err(error) = events.publish(&own, &question.to_string(), Bytes::new()).await {
            tracing::debug!(%error, %question, "ask for all blocks");
        }
    }
}
