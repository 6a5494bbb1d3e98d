//! Blocks over a link that is slow: they are shared as long as they move, and what is late costs no reader.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use futures::future::join_all;
use moesaic_kv_store::{Config, KvStore, kv_service};
use moesaic_testkit::{soon, until};
use moesaic_transport::kv::{KvNode, Patience};
use moesaic_types::boundary::PrefixStore;
use moesaic_types::cluster::{Member, MemberState, Role, Service};
use moesaic_types::{BlockHash, ErrorCode, Link};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tonic::service::Routes;

/// Bytes that the link moves in a second, each way.
const RATE: usize = 4 << 20;

/// Bytes that it moves at once.
const PIECE: usize = 16 << 10;

/// A block that takes a quarter of a second alone.
const BLOCK: usize = 1 << 20;

const BLOCKS: usize = 6;

async fn move_slowly(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    let mut piece = vec![0; PIECE];
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        if to.write_all(&piece[..count]).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_secs_f64(count as f64 / RATE as f64)).await;
    }
}

/// A link to an address; where its near end is.
async fn link(far: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = TcpStream::connect(far).await.unwrap().into_split();
            tokio::spawn(move_slowly(from_client, to_server));
            tokio::spawn(move_slowly(from_server, to_client));
        }
    });
    near
}

/// A store behind such a link, and its end of a client.
async fn behind_a_link(patience: Patience) -> (Arc<KvStore>, KvNode, watch::Sender<bool>) {
    let config = Config::default();
    let store = KvStore::start(&config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = link(listener.local_addr().unwrap()).await;
    let (stop, stopped) = watch::channel(false);
    let routes = Routes::new(kv_service(store.clone(), None, &config));
    tokio::spawn(moesaic_transport::serve(routes, listener, None, stopped));
    let member = Member {
        service: Service::KvStore,
        id: "far".into(),
        generation: 1,
        address: format!("http://{near}"),
        socket: None,
        state: MemberState::Ready,
        role: Role::Plain,
    };
    (store, KvNode::new(&member, patience).unwrap(), stop)
}

fn chain() -> Vec<BlockHash> {
    (0..BLOCKS as u8).map(|n| BlockHash([n + 1; 16])).collect()
}

fn block(n: usize) -> Bytes {
    (0..BLOCK).map(|at| (at * 7 + n) as u8).collect::<Vec<_>>().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_that_share_a_slow_link_are_waited_for_as_long_as_they_may_take() {
    let patience = Patience { answer: Duration::from_millis(400), rate: (RATE / 8) as u64 };
    let (store, node, _stop) = behind_a_link(patience).await;
    let chain = chain();
    assert_eq!(soon("an answer", node.longest(&chain)).await, Ok(0));
    // each would take a quarter of a second alone, and all together a second and a half
    let offers = (0..BLOCKS).map(|n| {
        let (node, link) = (node.clone(), Link::of(&chain, n));
        async move { node.offer(&link, block(n), false).await }
    });
    assert_eq!(soon("all are there", join_all(offers)).await, vec![Ok(true); BLOCKS]);
    assert_eq!(store.longest(&chain, 0).await, Ok(BLOCKS));
    let fetches = (0..BLOCKS).map(|n| {
        let (node, hash) = (node.clone(), chain[n]);
        async move { node.fetch(&[hash]).await?.next().await }
    });
    let expected: Vec<_> = (0..BLOCKS).map(|n| Ok(Some(block(n)))).collect();
    assert!(soon("all are back", join_all(fetches)).await == expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_that_is_late_does_not_keep_readers_away() {
    let patience = Patience { answer: Duration::from_millis(50), rate: 1 << 40 };
    let (_store, node, _stop) = behind_a_link(patience).await;
    let chain = chain();
    until("it answers", || async { node.longest(&chain).await == Ok(0) }).await;
    let late = node.offer(&Link::of(&chain, 0), block(0), false).await.unwrap_err();
    assert_eq!(late.code, ErrorCode::DeadlineExceeded, "{late}");
    assert!(node.is_usable());
}
