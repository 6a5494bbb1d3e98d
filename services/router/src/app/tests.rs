//! A table that panics: what only a bug of ours can bring about.
#[path = "../../tests/fake/mod.rs"]
mod fake;

use super::*;
use actix::{Context, Handler, Message};
use fake::{Fake, config, id, request};
use moesaic_testkit::{soon, until};
use moesaic_transport::MemoryBus;
use moesaic_types::ErrorCode;
use moesaic_types::boundary::ReplicaLoad;
use std::time::Duration;

/// The table panics.
#[derive(Message)]
#[rtype(result = "()")]
struct Panic;

impl Handler<Panic> for ReplicaTable {
    type Result = ();

    fn handle(&mut self, _: Panic, _: &mut Context<Self>) {
        panic!("asked to panic");
    }
}

async fn panic(router: &Router) {
    assert!(router.table.ask(Panic, Duration::from_secs(10)).await.is_err());
}

fn start(config: &Config) -> Arc<Router> {
    Router::start(config, Arc::new(MemoryBus::new())).unwrap()
}

#[tokio::test]
async fn a_table_that_panics_comes_back_with_the_registered_replicas() {
    let router = start(&config());
    router.register(id("a"), Fake::new(0));
    router.register(id("b"), Fake::new(1));
    let is_known = || async {
        match router.replicas().await {
            Ok(statuses) => statuses.len() == 2 && statuses.iter().all(|s| s.ready && s.load.is_some()),
            Err(error) => {
                assert_eq!(error.code, ErrorCode::Unavailable);
                false
            }
        }
    };
    until("both have answered", is_known).await;
    // In flight while it fails: a clear error. After: it works again, with both replicas.
    panic(&router).await;
    until("the table is back and has heard of both", is_known).await;
    assert!(router.place(request(&[])).await.is_ok());
}

#[tokio::test]
async fn a_table_that_panics_loses_nobody_who_waits() {
    let router = start(&config());
    let full = ReplicaLoad { running: 4, waiting: 2, max_running: 4, ..ReplicaLoad::default() };
    let fake = Fake::with(Ok(full));
    router.register(id("a"), fake.clone());
    until("it has answered", || async { router.replicas().await.unwrap()[0].load.is_some() }).await;
    let asked = Arc::clone(&router);
    let waiting = tokio::spawn(async move { asked.place(request(&[])).await });
    until("it stands in line", || async { router.waiting().await == Ok(1) }).await;
    fake.set(Ok(ReplicaLoad { max_running: 4, ..ReplicaLoad::default() }));
    panic(&router).await;
    // it asks again by itself
    assert_eq!(soon("an answer", waiting).await.unwrap().unwrap().replica, id("a"));
}
