//! The in-process implementations keep the boundaries' promises.
#![forbid(unsafe_code)]
use moesaic_testkit::conformance;
use moesaic_transport::{FileQueue, MemoryBus, MemoryMetadata};
use moesaic_types::boundary::JobQueue;
use std::sync::Arc;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_bus() {
    conformance::event_bus(Arc::new(MemoryBus::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn memory_metadata() {
    conformance::metadata(Arc::new(MemoryMetadata::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn file_queue() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let queue = FileQueue::open(&folder.path().join("jobs")).expect("a new file opens");
    conformance::job_queue(Arc::new(queue)).await;
}

#[tokio::test]
async fn jobs_of_a_file_survive_its_process_and_their_leases_do_not() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join("jobs");
    let lease = Duration::from_secs(60);
    {
        let queue = FileQueue::open(&path).expect("a new file opens");
        assert!(queue.push("q", "id", "payload".into()).await.expect("push works"));
        assert!(queue.pull("q", lease).await.expect("pull works").is_some());
        assert!(FileQueue::open(&path).is_err(), "one process has the file");
    }
    let queue = FileQueue::open(&path).expect("the file opens again");
    let job = queue.pull("q", lease).await.expect("pull works").expect("the job is still there");
    assert_eq!((&*job.id, job.payload.as_ref(), job.deliveries), ("id", &b"payload"[..], 2));
}
