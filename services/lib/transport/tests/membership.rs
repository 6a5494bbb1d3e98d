//! Members and those who watch them: over memory, over real Redis and NATS, and while those die and come back.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use moesaic_testkit::servers::{self, Server};
use moesaic_testkit::{Severed, soon, until};
use moesaic_transport::membership::{Directory, Record, Registration, Standing, View};
use moesaic_transport::{MemoryBus, MemoryMetadata, Nats, NatsBus, RedisMetadata};
use moesaic_types::boundary::{EventBus, Metadata, ReplicaLoad};
use moesaic_types::cluster::{Member, MemberState, Role, Service};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// What a cluster stands on.
#[derive(Clone)]
struct Ground {
    metadata: Arc<dyn Metadata>,
    events: Arc<dyn EventBus>,
    lease: Duration,
}

impl Ground {
    fn memory() -> Self {
        let (metadata, events) = (Arc::new(MemoryMetadata::new()), Arc::new(MemoryBus::new()));
        Self { metadata, events, lease: Duration::from_secs(3) }
    }

    async fn real(redis: &Server, nats: &Server) -> Self {
        let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
        let nats = Nats::connect(&nats.url(), "test").await.unwrap();
        assert!(nats.connected(moesaic_testkit::DEADLINE).await);
        Self { metadata, events: Arc::new(NatsBus::new(nats)), lease: Duration::from_secs(1) }
    }

    fn register(&self, id: &str) -> Registration {
        Registration::start(self.metadata.clone(), self.events.clone(), member(id), self.lease)
    }

    fn directory(&self) -> Directory {
        Directory::start(self.metadata.clone(), self.events.clone(), Service::Scheduler, self.lease)
    }
}

fn member(id: &str) -> Member {
    Member {
        service: Service::Scheduler,
        id: id.into(),
        generation: 0,
        address: format!("http://{id}:9020"),
        socket: None,
        state: MemberState::Starting,
        role: Role::Plain,
    }
}

fn key(id: &str) -> String {
    format!("members/scheduler/{id}")
}

/// Waits for a view that fits.
async fn sees(views: &mut watch::Receiver<Arc<View>>, what: &str, fits: impl Fn(&View) -> bool) -> Arc<View> {
    Arc::clone(&*soon(what, views.wait_for(|view| fits(view))).await.unwrap())
}

async fn stands(registration: &Registration, standing: Standing) {
    let mut watch = registration.watch();
    soon(&format!("it is {standing:?}"), watch.wait_for(|now| *now == standing)).await.unwrap();
}

fn state(view: &View, id: &str) -> Option<MemberState> {
    view.get(id).map(|record| record.member.state)
}

/// What holds on any ground.
async fn suite(ground: Ground) {
    members_come_change_and_go(&ground).await;
    a_lost_place_is_taken_again(&ground).await;
    a_later_process_of_the_same_name_fences_the_earlier_one(&ground).await;
    others_are_not_mixed_up(&ground).await;
}

async fn members_come_change_and_go(ground: &Ground) {
    let directory = ground.directory();
    let mut views = directory.watch();
    sees(&mut views, "the first reading", |view| !view.is_stale && view.members.is_empty()).await;
    let (a, b) = (ground.register("a"), ground.register("b/x.y z"));
    sees(&mut views, "both", |view| view.members.len() == 2).await;
    stands(&a, Standing::Held).await;
    assert_eq!(state(&directory.view(), "a"), Some(MemberState::Starting));
    assert_eq!(directory.view().ready().count(), 0);
    a.set_state(MemberState::Ready);
    let view = sees(&mut views, "its state", |view| state(view, "a") == Some(MemberState::Ready)).await;
    assert_eq!(view.ready().count(), 1);
    let generation = view.get("a").unwrap().member.generation;
    assert_eq!(view.get("a").unwrap().member, Member { generation, ..a.record().member });
    let load = ReplicaLoad { running: 3, ..ReplicaLoad::default() };
    a.set_load(load.clone());
    sees(&mut views, "its load", |view| view.get("a").is_some_and(|a| a.load == Some(load.clone()))).await;
    soon("it leaves", a.leave()).await;
    sees(&mut views, "one alone", |view| view.members.len() == 1).await;
    assert_eq!(ground.metadata.get(&key("a")).await, Ok(None), "its place is free when leave returns");
    drop(b);
    sees(&mut views, "nobody", |view| view.members.is_empty()).await;
}

async fn a_lost_place_is_taken_again(ground: &Ground) {
    let a = ground.register("a");
    stands(&a, Standing::Held).await;
    let (_, version) = ground.metadata.get(&key("a")).await.unwrap().unwrap();
    a.set_load(ReplicaLoad::default());
    until("it is removed", || async {
        match ground.metadata.get(&key("a")).await.unwrap() {
            Some((_, version)) => ground.metadata.remove(&key("a"), version).await.unwrap(),
            None => false,
        }
    })
    .await;
    until("it is back", || async {
        let found = ground.metadata.get(&key("a")).await.unwrap();
        found.is_some_and(|(_, now)| now > version)
    })
    .await;
    assert_eq!(a.standing(), Standing::Held);
    a.leave().await;
}

async fn a_later_process_of_the_same_name_fences_the_earlier_one(ground: &Ground) {
    let directory = ground.directory();
    let mut views = directory.watch();
    let earlier = ground.register("a");
    stands(&earlier, Standing::Held).await;
    let later = ground.register("a");
    stands(&later, Standing::Held).await;
    later.set_state(MemberState::Ready);
    stands(&earlier, Standing::Fenced).await;
    assert_eq!(later.standing(), Standing::Held);
    let generation = |registration: &Registration| registration.record().member.generation;
    assert_eq!((generation(&earlier), generation(&later)), (0, 0), "they are the tasks' own");
    let [of_earlier, of_later] = [&earlier, &later].map(|registration| *registration.generation().borrow());
    assert!(of_earlier.is_some() && of_earlier < of_later, "each knows its own: {of_earlier:?}, {of_later:?}");
    earlier.set_state(MemberState::Draining);
    earlier.leave().await;
    sees(&mut views, "the later one", |view| state(view, "a") == Some(MemberState::Ready)).await;
    let (bytes, _) = ground.metadata.get(&key("a")).await.unwrap().expect("the earlier one's end is not the later's");
    let record: Record = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(record.member.state, MemberState::Ready);
    soon("it leaves", later.leave()).await;
    let last = ground.register("a");
    let view = sees(&mut views, "the last", |view| state(view, "a") == Some(MemberState::Starting)).await;
    assert!(view.get("a").is_some_and(|a| a.member.generation > record.member.generation));
    last.leave().await;
}

async fn others_are_not_mixed_up(ground: &Ground) {
    let mut store = member("k");
    store.service = Service::KvStore;
    let store = Registration::start(ground.metadata.clone(), ground.events.clone(), store, ground.lease);
    stands(&store, Standing::Held).await;
    // what another version of us may write
    let lease = Some(Duration::from_secs(60));
    let unknown = ground.metadata.compare_and_set(&key("odd"), None, "{\"new\":1}".into(), lease).await.unwrap();
    let a = ground.register("a");
    let directory = ground.directory();
    let view = sees(&mut directory.watch(), "the scheduler alone", |view| !view.members.is_empty()).await;
    assert_eq!(view.members.keys().map(|id| &**id).collect::<Vec<_>>(), ["a"]);
    assert!(ground.metadata.remove(&key("odd"), unknown.unwrap()).await.unwrap());
    a.leave().await;
    store.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn over_memory() {
    suite(Ground::memory()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn over_redis_and_nats() {
    let (redis, nats) = (servers::redis(), servers::nats());
    suite(Ground::real(&redis, &nats).await).await;
}

#[tokio::test(start_paused = true)]
async fn events_make_changes_known_at_once() {
    let ground = Ground::memory();
    let directory = ground.directory();
    let mut views = directory.watch();
    sees(&mut views, "the first reading", |view| !view.is_stale).await;
    let start = tokio::time::Instant::now();
    let a = ground.register("a");
    sees(&mut views, "it joins", |view| view.members.len() == 1).await;
    a.set_state(MemberState::Ready);
    sees(&mut views, "its state", |view| state(view, "a") == Some(MemberState::Ready)).await;
    a.leave().await;
    sees(&mut views, "it leaves", |view| view.members.is_empty()).await;
    assert_eq!(start.elapsed(), Duration::ZERO, "nobody waited for a clock");
}

#[tokio::test(start_paused = true)]
async fn one_that_dies_is_gone_with_its_lease() {
    let ground = Ground::memory();
    let directory = ground.directory();
    let mut views = directory.watch();
    let stays = ground.register("stays");
    // as a process that was killed leaves it
    let bytes = serde_json::to_vec(&Record { member: member("dies"), load: None }).unwrap();
    ground.metadata.compare_and_set(&key("dies"), None, bytes.into(), Some(ground.lease)).await.unwrap();
    sees(&mut views, "both", |view| view.members.len() == 2).await;
    let start = tokio::time::Instant::now();
    sees(&mut views, "one", |view| view.members.len() == 1).await;
    let elapsed = start.elapsed();
    assert!(elapsed <= 2 * ground.lease + Duration::from_secs(1), "{elapsed:?}");
    assert_eq!(stays.standing(), Standing::Held, "its lease was renewed meanwhile");
}

#[tokio::test(start_paused = true)]
async fn members_that_cannot_write_are_there_as_long_as_they_are_heard() {
    let ground = Ground::memory();
    let metadata = Severed::over(ground.metadata.clone());
    let severed = Ground { metadata: metadata.clone(), ..ground.clone() };
    let directory = ground.directory();
    let mut views = directory.watch();
    let (a, b) = (severed.register("a"), ground.register("b"));
    sees(&mut views, "both", |view| view.members.len() == 2).await;
    let mut every = directory.watch();
    metadata.cut(true);
    stands(&a, Standing::Joining).await;
    let mut is_gone = async || drop(every.wait_for(|view| view.members.len() != 2).await);
    assert!(tokio::time::timeout(10 * ground.lease, is_gone()).await.is_err(), "it went while it was heard");
    assert_eq!(ground.metadata.get(&key("a")).await, Ok(None), "its lease has run out");
    a.leave().await;
    sees(&mut views, "the other", |view| view.members.len() == 1).await;
    assert_eq!(b.standing(), Standing::Held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_dead_redis_leaves_the_last_view_and_one_that_is_back_empty_forgets_nobody() {
    let (mut redis, nats) = (servers::redis(), servers::nats());
    let ground = Ground::real(&redis, &nats).await;
    let directory = ground.directory();
    let mut views = directory.watch();
    let (a, b) = (ground.register("a"), ground.register("b"));
    sees(&mut views, "both", |view| view.members.len() == 2).await;
    redis.kill();
    let view = sees(&mut views, "that it is stale", |view| view.is_stale).await;
    assert_eq!(view.members.len(), 2);
    stands(&a, Standing::Joining).await;
    assert_eq!(directory.view().members.len(), 2, "longer than a lease");
    // from here on every view must have both
    let mut every = directory.watch();
    let watching = tokio::spawn(async move {
        while every.changed().await.is_ok() {
            assert_eq!(every.borrow_and_update().members.len(), 2);
        }
    });
    redis.restart_empty();
    stands(&a, Standing::Held).await;
    stands(&b, Standing::Held).await;
    sees(&mut views, "that it is fresh", |view| !view.is_stale).await;
    a.set_state(MemberState::Ready);
    sees(&mut views, "a change", |view| state(view, "a") == Some(MemberState::Ready)).await;
    drop((directory, views));
    soon("the watcher ends", watching).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_redis_that_takes_no_writes_forgets_nobody() {
    let (redis, nats) = (servers::redis(), servers::nats());
    let ground = Ground::real(&redis, &nats).await;
    let directory = ground.directory();
    let mut views = directory.watch();
    let (a, b) = (ground.register("a"), ground.register("b"));
    sees(&mut views, "both", |view| view.members.len() == 2).await;
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut limit = async |bytes: u64| {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg("maxmemory").arg(bytes).query_async::<()>(&mut connection).await.unwrap();
    };
    limit(1).await;
    stands(&a, Standing::Joining).await;
    stands(&b, Standing::Joining).await;
    until("their leases ran out", || async {
        let records = ground.metadata.get_many(&[key("a"), key("b")]).await.unwrap();
        records.iter().all(Option::is_none)
    })
    .await;
    // for as long as those who vanish are doubted at most, each view must have both
    let doubt = tokio::time::sleep(2 * ground.lease);
    let forgets = async { views.wait_for(|view| view.members.len() < 2 || !view.is_stale).await.is_ok() };
    assert!(!tokio::select! { () = doubt => false, forgot = forgets => forgot });
    limit(0).await;
    stands(&a, Standing::Held).await;
    stands(&b, Standing::Held).await;
    assert_eq!(sees(&mut views, "that it is fresh", |view| !view.is_stale).await.members.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_nats_changes_are_seen_by_asking() {
    let (redis, mut nats) = (servers::redis(), servers::nats());
    let ground = Ground::real(&redis, &nats).await;
    let directory = ground.directory();
    let mut views = directory.watch();
    let a = ground.register("a");
    sees(&mut views, "it joins", |view| view.members.len() == 1).await;
    nats.kill();
    a.set_state(MemberState::Ready);
    sees(&mut views, "its state", |view| state(view, "a") == Some(MemberState::Ready)).await;
    let start = Instant::now();
    soon("it leaves", a.leave()).await;
    assert!(start.elapsed() < Duration::from_secs(2), "leaving does not wait for nats: {:?}", start.elapsed());
    sees(&mut views, "nobody", |view| view.members.is_empty()).await;
    nats.restart();
    let _b = ground.register("b");
    sees(&mut views, "another", |view| view.members.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn without_redis_members_are_heard_by_events() {
    let (mut redis, nats) = (servers::redis(), servers::nats());
    let ground = Ground::real(&redis, &nats).await;
    let directory = ground.directory();
    let mut views = directory.watch();
    let a = ground.register("a");
    sees(&mut views, "it joins", |view| view.members.len() == 1).await;
    redis.kill();
    sees(&mut views, "that it is stale", |view| view.is_stale).await;
    a.set_state(MemberState::Draining);
    sees(&mut views, "its word", |view| state(view, "a") == Some(MemberState::Draining)).await;
    soon("it leaves", a.leave()).await;
    assert!(sees(&mut views, "nobody", |view| view.members.is_empty()).await.is_stale);
}
