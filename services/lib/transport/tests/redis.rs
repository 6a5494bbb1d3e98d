//! Metadata on a real Redis: the boundary's promises, and what happens when Redis dies, freezes, or comes back.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use moesaic_testkit::{conformance, servers, until};
use moesaic_transport::RedisMetadata;
use moesaic_types::ErrorCode;
use moesaic_types::boundary::Metadata;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The deadline of a call, and what a busy machine adds to it.
const AT_MOST: Duration = Duration::from_millis(1500);

async fn set(store: &RedisMetadata, key: &str, expected: Option<u64>, value: &str) -> Option<u64> {
    store.compare_and_set(key, expected, Bytes::copy_from_slice(value.as_bytes()), None).await.unwrap()
}

/// Each kind of call fails as it should, and soon.
async fn is_unavailable(store: &RedisMetadata) {
    let calls = [
        store.get("k").await.map(|_| ()),
        store.get_many(&["k".into(), "l".into()]).await.map(|_| ()),
        store.compare_and_set("k", None, Bytes::new(), None).await.map(|_| ()),
        store.remove("k", 1).await.map(|_| ()),
        store.add("n", 1, None).await.map(|_| ()),
        store.keys("").await.map(|_| ()),
    ];
    for call in calls {
        let error = call.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        assert!(error.message.contains("redis at 127.0.0.1:"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn it_keeps_the_boundary_s_promises() {
    let redis = servers::redis();
    conformance::metadata(Arc::new(RedisMetadata::connect(&redis.url(), "test").unwrap())).await;
}

#[tokio::test]
async fn values_are_bytes_counters_saturate_and_prefixes_are_apart() {
    let redis = servers::redis();
    let store = RedisMetadata::connect(&redis.url(), "a*[x]?").unwrap();
    let other = RedisMetadata::connect(&redis.url(), "a").unwrap();
    let value = Bytes::from_static(&[0, 255, 13, 10, 128]);
    let version = store.compare_and_set("k\u{e9}*", None, value.clone(), None).await.unwrap().unwrap();
    assert_eq!(store.get("k\u{e9}*").await.unwrap(), Some((value, version)));
    assert_eq!(store.keys("k\u{e9}").await.unwrap(), ["k\u{e9}*"]);
    assert_eq!(other.keys("").await.unwrap(), [""; 0]);
    assert_eq!(other.get("k\u{e9}*").await.unwrap(), None);
    let version = set(&other, "stays", None, "x").await.unwrap();
    let nested = RedisMetadata::connect(&redis.url(), "a*[x]?b").unwrap();
    set(&nested, "stays", None, "x").await.unwrap();
    assert_eq!(store.add("n", 1, None).await, Ok(1));
    store.clear().await.unwrap();
    assert_eq!((store.get("k\u{e9}*").await, store.keys("").await), (Ok(None), Ok(Vec::new())));
    assert_eq!(store.add("n", 1, None).await, Ok(1), "counters went as well");
    assert_eq!(other.get("stays").await, Ok(Some(("x".into(), version))), "what others have stays");
    assert_eq!(nested.keys("").await.unwrap(), ["stays"]);
    for (key, limit) in [("up", i64::MAX), ("down", i64::MIN)] {
        assert_eq!(store.add(key, limit, None).await, Ok(limit), "to the last digit");
        assert_eq!(store.add(key, limit.signum(), None).await, Ok(limit));
    }
}

#[tokio::test]
async fn many_keys_are_listed_page_by_page_and_expired_ones_do_not_pile_up() {
    let redis = servers::redis();
    let store = RedisMetadata::connect(&redis.url(), "test").unwrap();
    for i in 0..2500 {
        store
            .compare_and_set(&format!("short/{i:04}"), None, Bytes::new(), Some(Duration::from_millis(1)))
            .await
            .unwrap();
    }
    until("the last of them expires", || async { store.get("short/2499").await.unwrap().is_none() }).await;
    for i in 0..2500 {
        set(&store, &format!("long/{i:04}"), None, "").await.unwrap();
    }
    let listed = store.keys("long/").await.unwrap();
    assert_eq!(listed, (0..2500).map(|i| format!("long/{i:04}")).collect::<Vec<_>>());
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let names = async |connection: &mut _| {
        redis::cmd("ZCARD").arg("test:values").query_async::<usize>(connection).await.unwrap()
    };
    let after_writes = names(&mut connection).await;
    assert!(after_writes < 4500, "{after_writes} names of 2500 keys: writing removes expired ones");
    assert_eq!(store.keys("short/").await.unwrap(), [""; 0]);
    assert_eq!(names(&mut connection).await, 2500, "looking removes the rest");
}

#[tokio::test]
async fn a_killed_redis_is_unavailable_at_once_and_its_data_are_back_with_it() {
    let mut redis = servers::redis();
    let store = RedisMetadata::connect(&redis.url(), "test").unwrap();
    let version = set(&store, "k", None, "v").await.unwrap();
    redis.kill();
    let start = Instant::now();
    is_unavailable(&store).await;
    assert!(start.elapsed() < Duration::from_secs(1), "a refused connection needs no deadline: {:?}", start.elapsed());
    redis.restart();
    until("it works again", || async { store.get("k").await.is_ok() }).await;
    assert_eq!(store.get("k").await.unwrap(), Some(("v".into(), version)));
    assert!(set(&store, "k", Some(version), "w").await.unwrap() > version);
}

#[tokio::test]
async fn a_frozen_redis_is_unavailable_after_the_deadline_and_answers_are_not_mixed_up_afterwards() {
    let redis = servers::redis();
    let store = RedisMetadata::connect(&redis.url(), "test").unwrap();
    let version = set(&store, "k", None, "v").await.unwrap();
    redis.stop();
    // the second call must connect anew, to a server that accepts and says nothing
    for _ in 0..2 {
        let start = Instant::now();
        let (one, two) = tokio::join!(store.get("k"), store.add("n", 1, None));
        let elapsed = start.elapsed();
        assert!(elapsed < AT_MOST, "{elapsed:?}");
        assert_eq!((one.unwrap_err().code, two.unwrap_err().code), (ErrorCode::Unavailable, ErrorCode::Unavailable));
    }
    redis.cont();
    until("it works again", || async { store.get("k").await.is_ok() }).await;
    assert_eq!(store.get("k").await.unwrap(), Some(("v".into(), version)));
    assert!(matches!(store.add("n", 0, None).await, Ok(0..=2)), "each unanswered call counted once at most");
}

#[tokio::test]
async fn versions_do_not_come_back_with_an_empty_redis() {
    let mut redis = servers::redis();
    let store = RedisMetadata::connect(&redis.url(), "test").unwrap();
    let before = set(&store, "k", None, "v").await.unwrap();
    redis.restart_empty();
    until("it works again", || async { store.get("k").await.is_ok() }).await;
    assert_eq!(store.get("k").await.unwrap(), None);
    let after = set(&store, "k", None, "v").await.unwrap();
    assert!(after > before, "{after} after {before}");
    assert_eq!(set(&store, "k", Some(before), "w").await, None, "who held the old key cannot write the new one");
}

#[tokio::test]
async fn versions_do_not_come_back_with_older_data() {
    let redis = servers::redis();
    let store = RedisMetadata::connect(&redis.url(), "test").unwrap();
    let before = set(&store, "k", None, "v").await.unwrap();
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    // as from a snapshot that was made earlier
    redis::cmd("SET").arg("test:version").arg(before - 1000).query_async::<()>(&mut connection).await.unwrap();
    let after = set(&store, "other", None, "v").await.unwrap();
    assert!(after > before, "{after} after {before}");
}

#[tokio::test]
async fn it_can_be_made_before_redis_is_there() {
    let mut redis = servers::redis();
    redis.kill();
    let store = RedisMetadata::connect(&redis.url(), "test").unwrap();
    is_unavailable(&store).await;
    redis.restart();
    until("it works", || async { store.get("k").await == Ok(None) }).await;
}

#[tokio::test]
async fn a_wrong_url_names_its_field_and_no_message_tells_the_password() {
    for url in ["", "redis", "http://host", "redis://host:port", "redis://u:hunter2@host:99999"] {
        let error = RedisMetadata::connect(url, "test").unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (ErrorCode::InvalidArgument, Some("cluster.redis_url")));
        assert!(!error.message.contains("hunter2"), "{error}");
    }
    let redis = servers::redis();
    let url = format!("redis://:hunter2@127.0.0.1:{}", redis.port());
    let error = RedisMetadata::connect(&url, "test").unwrap().get("k").await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(!error.message.contains("hunter2"), "{error}");
}
