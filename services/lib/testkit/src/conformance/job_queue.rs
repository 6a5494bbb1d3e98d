//! `JobQueue`: order, leases, redelivery, and one worker for a job at a time.
use super::unique;
use crate::until;
use bytes::Bytes;
use moesaic_types::boundary::{Job, JobQueue};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

/// Checks a queue.
pub async fn job_queue(queue: Arc<dyn JobQueue>) {
    let root = unique();
    order(&*queue, &format!("{root}-order")).await;
    leases(&*queue, &format!("{root}-leases")).await;
    workers(&queue, &format!("{root}-workers")).await;
}

async fn push(queue: &dyn JobQueue, name: &str, id: &str) -> bool {
    queue.push(name, id, Bytes::from(format!("payload of {id}"))).await.expect("push works")
}

async fn pull(queue: &dyn JobQueue, name: &str, lease: Duration) -> Option<Job> {
    queue.pull(name, lease).await.expect("pull works")
}

async fn order(queue: &dyn JobQueue, name: &str) {
    assert_eq!(pull(queue, name, LONG).await, None);
    for id in ["b", "a", "c"] {
        assert!(push(queue, name, id).await);
    }
    assert!(!push(queue, name, "a").await, "an id that is not done is refused");
    assert_eq!(queue.pending(name).await, Ok(3));
    assert_eq!(queue.pending("another").await, Ok(0));
    for id in ["b", "a", "c"] {
        let job = pull(queue, name, LONG).await.expect("three jobs are there");
        assert_eq!((&*job.id, job.deliveries), (id, 1));
        assert_eq!(job.payload, format!("payload of {id}"));
        assert_eq!(queue.ack(&job).await, Ok(true));
        assert_eq!(queue.ack(&job).await, Ok(false), "done once");
    }
    assert_eq!(queue.pending(name).await, Ok(0));
    assert!(push(queue, name, "a").await, "a done id can come again");
    let again = pull(queue, name, LONG).await.expect("it is there");
    assert_eq!(queue.ack(&again).await, Ok(true));
}

async fn leases(queue: &dyn JobQueue, name: &str) {
    push(queue, name, "job").await;
    let lost = pull(queue, name, SHORT).await.expect("it is there");
    assert_eq!(pull(queue, name, LONG).await, None, "one worker at a time");
    until("the lease runs out", || async { !is_held(queue, name).await }).await;
    assert_eq!(queue.pending(name).await, Ok(1), "a lost lease loses no job");
    let second = pull(queue, name, LONG).await.expect("it is delivered again");
    assert!(second.deliveries > lost.deliveries);
    assert_eq!(queue.ack(&lost).await, Ok(false), "who lost the lease cannot acknowledge");
    assert_eq!(queue.release(&lost).await, Ok(false));
    assert_eq!(queue.in_progress(&second, LONG).await, Ok(true));
    assert_eq!(queue.release(&second).await, Ok(true));
    let third = pull(queue, name, LONG).await.expect("a released job is free at once");
    assert_eq!(queue.ack(&third).await, Ok(true));
}

/// Whether the only job of the queue is leased; gives it back at once where it is not.
async fn is_held(queue: &dyn JobQueue, name: &str) -> bool {
    match pull(queue, name, LONG).await {
        None => true,
        Some(job) => {
            assert_eq!(queue.release(&job).await, Ok(true));
            false
        }
    }
}

async fn workers(queue: &Arc<dyn JobQueue>, name: &str) {
    for i in 0..40 {
        push(&**queue, name, &format!("{i}")).await;
    }
    let work = |_| {
        let (queue, name) = (queue.clone(), name.to_owned());
        tokio::spawn(async move {
            let mut done = Vec::new();
            while let Some(job) = pull(&*queue, &name, LONG).await {
                assert_eq!(queue.ack(&job).await, Ok(true));
                done.push(job.id);
            }
            done
        })
    };
    let mut counts: HashMap<Arc<str>, u32> = HashMap::new();
    for worker in (0..4).map(work).collect::<Vec<_>>() {
        for id in worker.await.expect("a worker does not panic") {
            *counts.entry(id).or_default() += 1;
        }
    }
    assert_eq!(counts.len(), 40);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
}
