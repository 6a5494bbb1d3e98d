//! `Placer`: what is asked and answered arrives whole, and errors keep all that they say.
use crate::soon;
use futures::future::{BoxFuture, FutureExt};
use moesaic_types::boundary::{PlaceRequest, Placed, Placer};
use moesaic_types::{BlockHash, Digest, Error, ErrorCode, Priority, ReplicaId, RequestId, Result, TenantId};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Checks a way to reach routers: `reach` is given one in this process and returns the one under test, which leads
/// there.
pub async fn placer<F: Future<Output = Arc<dyn Placer>>>(reach: impl Fn(Arc<dyn Placer>) -> F) {
    let own = Arc::new(Own::default());
    let placer = reach(own.clone()).await;
    for blocks in [0, 1, 20_000] {
        let asked = PlaceRequest {
            id: RequestId::new("r-1"),
            blocks: (0..blocks).map(|i: u32| BlockHash(u128::from(i).to_le_bytes())).collect(),
            prompt_tokens: 1_280_000,
            max_tokens: 77,
            exclude: vec![ReplicaId::new("b"), ReplicaId::new("caf\u{e9} 9")],
            full: vec![ReplicaId::new("b")],
            model: (blocks > 0).then(|| Digest::of(b"model")),
            tenant: TenantId::derive(b"secret", "key"),
            priority: Priority(-100),
            deadline: None,
        };
        let placed = Placed { replica: ReplicaId::new("host.example:9020"), overlap_blocks: 12 };
        own.answer(Ok(placed.clone()), Ok(vec![placed.replica.clone(), ReplicaId::new("c")]));
        assert_eq!(soon("the placement", placer.place(asked.clone())).await, Ok(placed.clone()));
        assert_eq!(own.seen.lock().expect("no test panics here").take(), Some(asked));
        assert_eq!(soon("the list", placer.ready()).await, Ok(vec![placed.replica, ReplicaId::new("c")]));
    }
    let full = Error { field: Some("blocks".into()), ..Error::exhausted("the queue is full", Duration::from_secs(7)) };
    for error in [Error::unavailable("no replica is ready"), full, Error::new(ErrorCode::Internal, "a bug")] {
        own.answer(Err(error.clone()), Err(error.clone()));
        let asked = PlaceRequest::new(RequestId::new(""), 0, 0);
        assert_eq!(soon("the refusal", placer.place(asked)).await, Err(error.clone()));
        assert_eq!(soon("the refusal", placer.ready()).await, Err(error));
    }
}

#[derive(Debug, Default)]
struct Own {
    seen: Mutex<Option<PlaceRequest>>,
    answers: Mutex<Option<Answers>>,
}

type Answers = (Result<Placed>, Result<Vec<ReplicaId>>);

impl Own {
    fn answer(&self, placed: Result<Placed>, ready: Result<Vec<ReplicaId>>) {
        *self.answers.lock().expect("no test panics here") = Some((placed, ready));
    }

    fn answers(&self) -> Answers {
        self.answers.lock().expect("no test panics here").clone().expect("answers were set")
    }
}

impl Placer for Own {
    fn place(&self, request: PlaceRequest) -> BoxFuture<'_, Result<Placed>> {
        *self.seen.lock().expect("no test panics here") = Some(request);
        let placed = self.answers().0;
        async move { placed }.boxed()
    }

    fn ready(&self) -> BoxFuture<'_, Result<Vec<ReplicaId>>> {
        let ready = self.answers().1;
        async move { ready }.boxed()
    }
}
