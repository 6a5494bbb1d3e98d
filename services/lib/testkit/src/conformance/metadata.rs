//! `Metadata`: compare-and-set with versions that never come back, expiry, counters.
use super::unique;
use crate::until;
use bytes::Bytes;
use moesaic_types::boundary::Metadata;
use std::sync::Arc;
use std::time::Duration;

/// Checks a metadata store.
pub async fn metadata(store: Arc<dyn Metadata>) {
    let root = unique();
    versions(&*store, &format!("{root}/versions")).await;
    expiry(&*store, &format!("{root}/expiry")).await;
    counters(&*store, &format!("{root}/counters")).await;
    keys(&*store, &format!("{root}/keys")).await;
    many(&*store, &format!("{root}/many")).await;
    races(&store, &format!("{root}/races")).await;
}

/// Long enough to look at the key before it expires.
const SHORT: Duration = Duration::from_millis(300);

async fn set(store: &dyn Metadata, key: &str, expected: Option<u64>, value: &'static str) -> Option<u64> {
    store
        .compare_and_set(key, expected, Bytes::from_static(value.as_bytes()), None)
        .await
        .expect("compare and set works")
}

async fn get(store: &dyn Metadata, key: &str) -> Option<(Bytes, u64)> {
    store.get(key).await.expect("get works")
}

async fn versions(store: &dyn Metadata, key: &str) {
    assert_eq!(get(store, key).await, None);
    let first = set(store, key, None, "one").await.expect("absent, so it is written");
    assert_eq!(get(store, key).await, Some((Bytes::from_static(b"one"), first)));
    assert_eq!(set(store, key, None, "two").await, None, "present, so 'if absent' fails");
    assert_eq!(set(store, key, Some(first + 1_000_000), "two").await, None, "another version fails");
    let second = set(store, key, Some(first), "two").await.expect("the version fits");
    assert_ne!(first, second);
    assert_eq!(get(store, key).await, Some((Bytes::from_static(b"two"), second)));
    assert_eq!(store.remove(key, first).await, Ok(false), "an old version does not remove");
    assert_eq!(store.remove(key, second).await, Ok(true));
    assert_eq!(get(store, key).await, None);
    assert_eq!(store.remove(key, second).await, Ok(false));
    assert_eq!(set(store, key, Some(second), "three").await, None, "absent, so a version fails");
    let third = set(store, key, None, "three").await.expect("absent again");
    assert!(third != first && third != second, "versions do not come back with the key");
}

async fn expiry(store: &dyn Metadata, key: &str) {
    let value = Bytes::from_static(b"lease");
    let lease = store.compare_and_set(key, None, value.clone(), Some(SHORT)).await.expect("set").expect("absent");
    assert_eq!(get(store, key).await, Some((value.clone(), lease)));
    until("the key expires", || async { get(store, key).await.is_none() }).await;
    assert_eq!(set(store, key, Some(lease), "late").await, None, "an expired lease cannot be renewed");
    assert!(!store.keys(key).await.expect("keys works").contains(&key.to_owned()));

    let lease = store.compare_and_set(key, None, value.clone(), Some(SHORT)).await.expect("set").expect("absent");
    let kept = set(store, key, Some(lease), "kept").await.expect("the version fits");
    let watch = format!("{key}/watch");
    store.compare_and_set(&watch, None, value, Some(SHORT * 2)).await.expect("set").expect("absent");
    until("a later key expires", || async { get(store, &watch).await.is_none() }).await;
    assert_eq!(
        get(store, key).await,
        Some((Bytes::from_static(b"kept"), kept)),
        "written anew without expiry, it stays"
    );
}

async fn counters(store: &dyn Metadata, key: &str) {
    assert_eq!(store.add(key, 5, None).await, Ok(5));
    assert_eq!(store.add(key, -7, None).await, Ok(-2));
    let short = format!("{key}/short");
    assert_eq!(store.add(&short, 1, Some(SHORT)).await, Ok(1));
    assert_eq!(store.add(&short, 1, Some(Duration::from_secs(3600))).await, Ok(2));
    // Had the second addition moved the expiry, this would not come true.
    until("the counter expires", || async { store.add(&short, 0, Some(SHORT)).await == Ok(0) }).await;
    assert_eq!(store.add(key, 0, None).await, Ok(-2));
}

async fn keys(store: &dyn Metadata, root: &str) {
    for name in ["b", "a", "a/x"] {
        set(store, &format!("{root}/{name}"), None, "").await.expect("absent");
    }
    let named = |names: &[&str]| names.iter().map(|name| format!("{root}/{name}")).collect::<Vec<_>>();
    assert_eq!(store.keys(&format!("{root}/")).await, Ok(named(&["a", "a/x", "b"])));
    assert_eq!(store.keys(&format!("{root}/a")).await, Ok(named(&["a", "a/x"])));
    assert_eq!(store.keys(&format!("{root}/c")).await, Ok(vec![]));
}

async fn many(store: &dyn Metadata, root: &str) {
    let name = |n: u32| format!("{root}/{n}");
    let first = set(store, &name(1), None, "one").await.expect("absent");
    let third = set(store, &name(3), None, "three").await.expect("absent");
    let short = store.compare_and_set(&name(4), None, Bytes::new(), Some(Duration::from_millis(1))).await;
    short.expect("set").expect("absent");
    until("the fourth expires", || async { get(store, &name(4)).await.is_none() }).await;
    let (one, three) = (Some(("one".into(), first)), Some(("three".into(), third)));
    let names = [name(3), name(2), name(1), name(3), name(4)];
    assert_eq!(store.get_many(&names).await, Ok(vec![three.clone(), None, one, three, None]));
    assert_eq!(store.get_many(&[]).await, Ok(vec![]));
}

async fn races(store: &Arc<dyn Metadata>, root: &str) {
    const TASKS: u64 = 16;
    let (elected, number, counter) = (format!("{root}/elected"), format!("{root}/number"), format!("{root}/counter"));
    set(&**store, &number, None, "0").await.expect("absent");
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (store, elected, number, counter) =
                (Arc::clone(store), elected.clone(), number.clone(), counter.clone());
            tokio::spawn(async move {
                store.add(&counter, 1, None).await.expect("add works");
                loop {
                    let (value, version) = get(&*store, &number).await.expect("the number is there");
                    let text = std::str::from_utf8(&value).expect("a number was written");
                    let next = Bytes::from((text.parse::<u64>().expect("a number was written") + 1).to_string());
                    let written = store.compare_and_set(&number, Some(version), next, None).await;
                    if written.expect("compare and set works").is_some() {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                set(&*store, &elected, None, "me").await.is_some()
            })
        })
        .collect();
    let mut winners = 0;
    for task in tasks {
        winners += u64::from(task.await.expect("no task panics"));
    }
    assert_eq!(winners, 1, "one task creates the key");
    assert_eq!(get(&**store, &number).await.map(|(value, _)| value), Some(Bytes::from(TASKS.to_string())));
    assert_eq!(store.add(&counter, 0, None).await, Ok(16));
}
