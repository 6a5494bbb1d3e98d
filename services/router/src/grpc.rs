//! The router in a cluster: its replicas are those that the directory shows, and requests come over gRPC.
use crate::app::Router;
use moesaic_transport::channel::channel;
use moesaic_transport::grpc::placer_service;
use moesaic_transport::membership::{Peers, Record, View};
use moesaic_transport::{Directory, GrpcReplica};
use moesaic_types::boundary::Replica;
use moesaic_types::cluster::{Member, MemberState, Role};
use moesaic_types::{ReplicaId, Result};
use std::sync::{Arc, Weak};
use tokio::task::AbortHandle;
use tonic::service::Routes;

/// The router's gRPC services.
pub fn services(router: Arc<Router>) -> Routes {
    Routes::new(placer_service(router))
}

/// Keeps a router's replicas in line with a directory, until it or the router is dropped.
#[derive(Debug)]
pub struct Following(AbortHandle);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Registers the replicas of a directory of schedulers with a router as they become ready, and takes them out when they
/// drain or go. One that does not answer stays registered: the router finds out by itself.
pub fn follow(router: &Arc<Router>, directory: Directory) -> Following {
    Following(tokio::spawn(keep(Arc::downgrade(router), directory)).abort_handle())
}

async fn keep(router: Weak<Router>, directory: Directory) {
    let mut views = directory.watch();
    let mut peers = Peers::default();
    loop {
        let view = Arc::clone(&views.borrow_and_update());
        let Some(router) = router.upgrade() else { return };
        let followed = peers.follow(takers(&view), reach);
        for (id, replica) in followed.came {
            tracing::info!(replica = &*id, "replica joins");
            // who came is in the view, with a model
            let Some(Role::Replica(info)) = view.get(&id).map(|record| &record.member.role) else { continue };
            router.register_serving(ReplicaId::new(id), replica, info.model.hasher().digest());
        }
        for id in followed.went {
            tracing::info!(replica = &*id, "replica leaves");
            router.deregister(&ReplicaId::new(id));
        }
        drop(router);
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps the kv-stores that a router hears in line with a directory. Until that was read once, all are heard.
pub fn follow_stores(router: &Arc<Router>, directory: Directory) -> Following {
    Following(tokio::spawn(keep_stores(Arc::downgrade(router), directory)).abort_handle())
}

async fn keep_stores(router: Weak<Router>, directory: Directory) {
    let (mut views, mut was_read) = (directory.watch(), false);
    loop {
        let view = Arc::clone(&views.borrow_and_update());
        let Some(router) = router.upgrade() else { return };
        was_read |= !view.is_stale;
        if was_read {
            router.set_stores(view.members.keys().cloned().collect());
        }
        drop(router);
        if views.changed().await.is_err() {
            return;
        }
    }
}

/// Members that requests may go to: a later stage of a pipeline takes none.
fn takers(view: &View) -> impl Iterator<Item = &Record> {
    view.ready().filter(|record| matches!(record.member.role, Role::Replica(_)))
}

fn reach(member: &Member) -> Result<Arc<dyn Replica>> {
    debug_assert_eq!(member.state, MemberState::Ready);
    Ok(Arc::new(GrpcReplica::new(&format!("replica {}", member.id), channel(member)?)))
}
