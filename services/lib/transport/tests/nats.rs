//! Events and jobs on a real NATS: the boundaries' promises, and what happens when NATS dies, freezes or comes back.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use moesaic_testkit::servers::Server;
use moesaic_testkit::{conformance, servers, soon, until};
use moesaic_transport::nats::{MAX_PAYLOAD, dead_letters};
use moesaic_transport::{JetStreamQueue, JobLimits, Nats, NatsBus};
use moesaic_types::ErrorCode;
use moesaic_types::boundary::{Event, EventBus, Job, JobQueue};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SUBJECT: &str = "moesaic.v1.kv.scheduler.r0.blocks";
const LONG: Duration = Duration::from_secs(60);

async fn connect(server: &Server) -> Nats {
    let nats = Nats::connect(&server.url(), "test").await.unwrap();
    assert!(nats.connected(moesaic_testkit::DEADLINE).await);
    nats
}

async fn bus(server: &Server) -> NatsBus {
    NatsBus::new(connect(server).await)
}

async fn queue(server: &Server, limits: JobLimits) -> JetStreamQueue {
    JetStreamQueue::new(connect(server).await, limits)
}

async fn next(events: &mut BoxStream<'static, Event>) -> Event {
    soon("an event", events.next()).await.unwrap()
}

/// Publishes until the reader gets an event, and returns it.
async fn first_after_return(publisher: &NatsBus, events: &mut BoxStream<'static, Event>) -> Event {
    soon("events flow again", async {
        loop {
            let _ = publisher.publish("life", SUBJECT, "back".into()).await;
            if let Ok(event) = tokio::time::timeout(Duration::from_millis(10), events.next()).await {
                return event.unwrap();
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_bus_keeps_the_boundary_s_promises() {
    let server = servers::nats();
    conformance::event_bus(Arc::new(bus(&server).await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_queue_keeps_the_boundary_s_promises() {
    let server = servers::nats();
    conformance::job_queue(Arc::new(queue(&server, JobLimits::default()).await)).await;
}

#[tokio::test]
async fn processes_hear_each_other_from_the_subscription_on() {
    let server = servers::nats();
    let (publisher, reader) = (bus(&server).await, bus(&server).await);
    for round in 1..=20 {
        let mut events = reader.subscribe(SUBJECT).await.unwrap();
        publisher.publish("life", SUBJECT, Bytes::new()).await.unwrap();
        assert_eq!(next(&mut events).await.sequence, round, "what is published after subscribe returned arrives");
    }
}

#[tokio::test]
async fn a_killed_nats_holds_nobody_up_and_the_reader_goes_on_with_a_gap() {
    let mut server = servers::nats();
    let (publisher, reader) = (bus(&server).await, bus(&server).await);
    let mut events = reader.subscribe("moesaic.v1.kv.").await.unwrap();
    publisher.publish("life", SUBJECT, "1".into()).await.unwrap();
    assert_eq!(next(&mut events).await.sequence, 1);
    server.kill();
    until("the loss is noticed", || async { publisher.publish("life", SUBJECT, "lost".into()).await.is_err() }).await;
    let start = Instant::now();
    for _ in 0..10_000 {
        let error = publisher.publish("life", SUBJECT, "lost".into()).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(error.message.contains("nats at 127.0.0.1:"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(2), "nobody waits: {:?}", start.elapsed());
    server.restart();
    let event = first_after_return(&publisher, &mut events).await;
    assert!(event.sequence > 10_000, "{} shows the gap", event.sequence);
    assert_eq!(event.payload, "back");
}

#[tokio::test]
async fn a_frozen_nats_holds_nobody_up() {
    let server = servers::nats();
    let (publisher, reader) = (bus(&server).await, bus(&server).await);
    let mut events = reader.subscribe(SUBJECT).await.unwrap();
    server.stop();
    let payload = Bytes::from(vec![0; MAX_PAYLOAD]);
    let start = Instant::now();
    let mut sent = 0;
    for _ in 0..2000 {
        sent += usize::from(publisher.publish("life", SUBJECT, payload.clone()).await.is_ok());
    }
    assert!(start.elapsed() < Duration::from_secs(5), "one wait for room, not thousands: {:?}", start.elapsed());
    assert!(sent < 2000, "what waits to be sent is bounded");
    server.cont();
    let mut last = 0;
    soon("events that were published later arrive", async {
        while last <= 2000 {
            let event = first_after_return(&publisher, &mut events).await;
            assert!(event.sequence > last, "numbers only grow");
            last = event.sequence;
        }
    })
    .await;
}

#[tokio::test]
async fn it_can_be_made_before_nats_is_there() {
    let mut server = servers::nats();
    server.kill();
    let nats = Nats::connect(&server.url(), "test").await.unwrap();
    let (bus, queue) = (NatsBus::new(nats.clone()), JetStreamQueue::new(nats, JobLimits::default()));
    let mut events = bus.subscribe(SUBJECT).await.unwrap();
    assert_eq!(bus.publish("life", SUBJECT, Bytes::new()).await.unwrap_err().code, ErrorCode::Unavailable);
    assert_eq!(queue.push("q", "id", Bytes::new()).await.unwrap_err().code, ErrorCode::Unavailable);
    server.restart();
    assert!(first_after_return(&bus, &mut events).await.sequence > 1);
    until("jobs are taken", || async { queue.push("q", "other", Bytes::new()).await.is_ok() }).await;
}

#[tokio::test]
async fn what_is_too_large_or_has_no_name_is_refused() {
    let server = servers::nats();
    let nats = connect(&server).await;
    let (bus, queue) = (NatsBus::new(nats.clone()), JetStreamQueue::new(nats, JobLimits::default()));
    let large = Bytes::from(vec![0; MAX_PAYLOAD + 1]);
    assert_eq!(bus.publish("s", SUBJECT, large.clone()).await.unwrap_err().code, ErrorCode::PayloadTooLarge);
    assert_eq!(queue.push("q", "id", large).await.unwrap_err().code, ErrorCode::PayloadTooLarge);
    for (source, subject) in [("s", ""), ("s", "a.*"), ("s", "a b"), ("", "a"), ("s\r\n", "a")] {
        let refused = bus.publish(source, subject, Bytes::new()).await;
        assert_eq!(refused.unwrap_err().code, ErrorCode::InvalidArgument, "{source:?} {subject:?}");
    }
    assert_eq!(bus.subscribe("a.*.b").await.err().unwrap().code, ErrorCode::InvalidArgument);
    assert_eq!(queue.push("q", "", Bytes::new()).await.unwrap_err().code, ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn messages_of_others_are_no_events() {
    let server = servers::nats();
    let bus = bus(&server).await;
    let mut events = bus.subscribe("").await.unwrap();
    let other = async_nats::connect(server.url()).await.unwrap();
    other.publish("moesaic.v1.kv.x", "no event".into()).await.unwrap();
    other.flush().await.unwrap();
    bus.publish("s", SUBJECT, Bytes::new()).await.unwrap();
    assert_eq!(next(&mut events).await.subject.as_ref(), SUBJECT);
}

async fn pull(queue: &JetStreamQueue, name: &str) -> Option<Job> {
    queue.pull(name, LONG).await.unwrap()
}

#[tokio::test]
async fn a_worker_that_died_loses_its_job_and_one_that_lives_keeps_it() {
    let server = servers::nats();
    let limits = JobLimits { ack_wait: Duration::from_millis(600), ..JobLimits::default() };
    let (dying, living, other) =
        (queue(&server, limits).await, queue(&server, limits).await, queue(&server, limits).await);
    assert!(dying.push("q", "dies", "1".into()).await.unwrap());
    assert!(dying.push("q", "lives", "2".into()).await.unwrap());
    let lost = pull(&dying, "q").await.unwrap();
    let kept = pull(&living, "q").await.unwrap();
    assert_eq!((&*lost.id, &*kept.id), ("dies", "lives"));
    drop(dying);
    // several acknowledgement times pass meanwhile
    for round in 1..=3 {
        let again = soon("it is given to another", async {
            loop {
                if let Some(job) = pull(&other, "q").await {
                    break job;
                }
            }
        })
        .await;
        assert_eq!((&*again.id, again.deliveries), ("dies", round + 1), "never the job of the one that lives");
        // this one dies as well
        assert_eq!(other.in_progress(&again, Duration::from_millis(1)).await, Ok(true));
    }
    assert_eq!(living.ack(&kept).await, Ok(true), "its lease was kept meanwhile");
    assert_eq!(living.pending("q").await, Ok(1));
}

#[tokio::test]
async fn no_job_is_lost_with_a_killed_nats() {
    let mut server = servers::nats();
    let queue = queue(&server, JobLimits::default()).await;
    for id in ["held", "waits"] {
        assert!(queue.push("q", id, id.into()).await.unwrap());
    }
    let held = pull(&queue, "q").await.unwrap();
    server.kill();
    assert_eq!(queue.pending("q").await.unwrap_err().code, ErrorCode::Unavailable);
    assert_eq!(queue.ack(&held).await.unwrap_err().code, ErrorCode::Unavailable);
    server.restart();
    until("it answers again", || async { queue.pending("q").await.is_ok() }).await;
    assert_eq!(queue.push("q", "held", Bytes::new()).await, Ok(false), "it is still there");
    // a server that was killed may have forgotten that it gave the job away: then it does not hear of its end either,
    // and gives it again
    let said_again = queue.ack(&held).await;
    assert!(said_again.is_ok_and(|done| done) || queue.pending("q").await == Ok(2));
    let mut done = Vec::new();
    while queue.pending("q").await != Ok(0) {
        let job = soon("what is not done is given", async {
            loop {
                if let Some(job) = pull(&queue, "q").await {
                    break job;
                }
            }
        })
        .await;
        assert_eq!(queue.ack(&job).await, Ok(true));
        done.push(job.id.to_string());
    }
    assert!(done == ["held", "waits"] || done == ["waits"], "{done:?}");
}

#[tokio::test]
async fn a_nats_that_came_back_empty_takes_jobs_again() {
    let mut server = servers::nats();
    let queue = queue(&server, JobLimits::default()).await;
    assert!(queue.push("q", "id", Bytes::new()).await.unwrap());
    server.restart_empty();
    until("the job can be pushed again", || async { queue.push("q", "id", Bytes::new()).await == Ok(true) }).await;
    assert_eq!(pull(&queue, "q").await.unwrap().deliveries, 1);
    server.restart_empty();
    until("there is nothing to pull", || async { queue.pull("q", LONG).await == Ok(None) }).await;
}

#[tokio::test]
async fn a_job_that_is_pulled_too_often_goes_to_the_dead_letters() {
    let server = servers::nats();
    let queue = queue(&server, JobLimits { max_deliveries: 3, ..JobLimits::default() }).await;
    for id in ["poison", "good"] {
        assert!(queue.push("q", id, id.into()).await.unwrap());
    }
    for deliveries in 1..=3 {
        let job = pull(&queue, "q").await.unwrap();
        assert_eq!((&*job.id, job.deliveries), ("poison", deliveries));
        assert_eq!(queue.release(&job).await, Ok(true));
    }
    let good = pull(&queue, "q").await.unwrap();
    assert_eq!(&*good.id, "good", "the poison is out of the way");
    assert_eq!(queue.ack(&good).await, Ok(true));
    assert_eq!(queue.pending("q").await, Ok(0));
    let dead = dead_letters("q");
    assert_eq!(queue.pending(&dead).await, Ok(1));
    for deliveries in 1..=5 {
        let job = pull(&queue, &dead).await.unwrap();
        assert_eq!((&*job.id, &*job.payload, job.deliveries), ("poison", &b"poison"[..], deliveries));
        assert_eq!(queue.release(&job).await, Ok(true), "a dead letter stays until someone answers it");
    }
    assert!(queue.push("q", "poison", Bytes::new()).await.unwrap(), "its place in the queue is free");
}

#[tokio::test]
async fn clusters_of_other_names_on_one_nats_do_not_hear_each_other() {
    let server = servers::nats();
    let mut buses = Vec::new();
    for name in ["moesaic", "moesaic.eu-1", "a"] {
        buses.push((name, NatsBus::new(connect(&server).await.of_cluster(name))));
    }
    let mut readers = Vec::new();
    for (name, bus) in &buses {
        for prefix in ["", "moesaic.v1.kv.", SUBJECT] {
            readers.push((name, prefix, bus.subscribe(prefix).await.unwrap()));
        }
    }
    for round in 1..=3 {
        for (name, bus) in &buses {
            bus.publish("life", SUBJECT, Bytes::copy_from_slice(name.as_bytes())).await.unwrap();
        }
        // with another's event between, the next one would not be its own
        for (name, prefix, events) in &mut readers {
            let event = next(events).await;
            assert_eq!((&*event.subject, event.sequence), (SUBJECT, round), "{name} {prefix:?}");
            assert_eq!(event.payload, name.as_bytes(), "{prefix:?}");
        }
    }
    let named = Arc::new(buses.swap_remove(1).1);
    conformance::event_bus(named).await;
}

#[tokio::test]
async fn clusters_of_other_names_on_one_nats_have_queues_of_their_own() {
    let server = servers::nats();
    let mut queues = Vec::new();
    for name in ["moesaic", "moesaic.eu-1", "a"] {
        let nats = connect(&server).await.of_cluster(name);
        queues.push((name, JetStreamQueue::new(nats, JobLimits::default())));
    }
    for (name, queue) in &queues {
        assert_eq!(queue.push("q", "id", Bytes::copy_from_slice(name.as_bytes())).await, Ok(true), "{name}");
    }
    for (name, queue) in &queues {
        let job = pull(queue, "q").await.unwrap();
        assert_eq!((&*job.id, &*job.payload), ("id", name.as_bytes()));
        assert_eq!(pull(queue, "q").await, None, "{name}");
        assert_eq!(queue.ack(&job).await, Ok(true));
        assert_eq!(queue.pending("q").await, Ok(0));
    }
    let named = Arc::new(queues.swap_remove(1).1);
    conformance::job_queue(named).await;
}
