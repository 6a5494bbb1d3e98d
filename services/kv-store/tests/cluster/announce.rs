//! What nodes say in the metadata is true in the end, whatever the metadata do.
use super::*;
use moesaic_testkit::Severed;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_went_while_the_metadata_were_away_is_said_when_they_are_back() {
    let ground = Ground::memory();
    let severed = Severed::over(ground.metadata.clone());
    // room for one block
    let config = Config { capacity: ByteSize(block(0).1.len() as u64), ..Config::default() };
    let node = node_that_tells(&ground, "a", &config, severed.clone()).await;
    let remote = ground.remote();
    sees(&remote, 1).await;
    let alone = |n: u32| chain([n]);
    let push = async |n: u32| assert_eq!(node.store.offer(Link::of(&alone(n), 0), block(n).1).await, Ok(true));
    push(0).await;
    until("it says so", || async { ground.holding(&alone(0)[0], "a").await.is_some() }).await;
    severed.cut(true);
    for n in 1..5 {
        push(n).await;
        let before = severed.refused();
        until("it was tried", || async { severed.refused() > before }).await;
    }
    severed.cut(false);
    until("what is here is said", || async { ground.holding(&alone(4)[0], "a").await.is_some() }).await;
    for n in 0..4 {
        until("and nothing else", || async { ground.holding(&alone(n)[0], "a").await.is_none() }).await;
    }
}

/// Whether a record stands for each group.
async fn all_told(ground: &Ground, groups: &[BlockHash]) -> bool {
    for group in groups {
        let found = ground.metadata.get(&Holding::key(group, "a")).await;
        if !found.is_ok_and(|found| found.is_some()) {
            return false;
        }
    }
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn metadata_that_come_back_empty_are_told_again() {
    let mut redis = servers::redis();
    let metadata = Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap());
    let ground = Ground { metadata, events: Arc::new(MemoryBus::new()) };
    let node = node(&ground, "a", &Config::default()).await;
    let remote = ground.remote();
    sees(&remote, 1).await;
    let chain = chain(0..40);
    offer(&*node.store, &chain, 0..40).await;
    let groups: Vec<_> = chain.iter().step_by(16).copied().collect();
    until("it says what it has", || all_told(&ground, &groups)).await;
    redis.restart_empty();
    until("redis answers", || async { ground.metadata.get("x").await == Ok(None) }).await;
    until("it says it again", || all_told(&ground, &groups)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_record_of_a_higher_generation_does_not_silence_a_node_that_others_see() {
    let ground = Ground::memory();
    let chain = chain(0..1);
    let key = Holding::key(&chain[0], "a");
    let old = Holding { generation: u64::MAX / 2, tier: Tier::Disk }.to_bytes();
    ground.metadata.compare_and_set(&key, None, old, None).await.unwrap().unwrap();
    let node = node(&ground, "a", &Config::default()).await;
    let remote = ground.remote();
    sees(&remote, 1).await;
    offer(&*node.store, &chain, 0..1).await;
    until("it says what it has", || async {
        let seen = node.views.borrow().get("a").map(|record| record.member.generation);
        let said = ground.holding(&chain[0], "a").await.map(|holding| holding.generation);
        seen.is_some() && said == seen
    })
    .await;
}
