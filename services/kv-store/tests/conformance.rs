//! The store keeps the boundary's promises.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)] // A test fails by panicking.
use bytes::Bytes;
use moesaic_config::ByteSize;
use moesaic_kv_store::{Config, KvStore};
use moesaic_proto::kv::v1 as wire;
use moesaic_proto::kv::v1::kv_store_service_client::KvStoreServiceClient;
use moesaic_testkit::conformance::{self, block};
use moesaic_transport::GrpcPrefixStore;
use moesaic_transport::channel::to_address;
use moesaic_transport::grpc::prefix_service;
use moesaic_types::ErrorCode;
use moesaic_types::boundary::PrefixStore;
use std::sync::Arc;
use tonic::service::Routes;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_conforms() {
    conformance::prefix_store(KvStore::start(&Config::default()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_store_behind_grpc_conforms_and_names_what_is_wrong() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let routes = Routes::new(prefix_service(KvStore::start(&Config::default()).unwrap()));
    let serving = tokio::spawn(moesaic_transport::serve(routes, listener, None, stopped));
    let channel = to_address(&address).unwrap();
    let store = Arc::new(GrpcPrefixStore::new("kv-store k0", channel.clone()));
    conformance::prefix_store(store.clone()).await;

    let mut raw = KvStoreServiceClient::new(channel);
    let odd = raw.longest(wire::LongestRequest { chain: Bytes::from_static(&[0; 17]) }).await.unwrap_err();
    assert_eq!(moesaic_proto::from_status(&odd).field.as_deref(), Some("chain"));
    let offer = wire::OfferRequest { hash: Bytes::from_static(b"short"), ..wire::OfferRequest::default() };
    let mut answers = raw.offer(tokio_stream::iter([offer])).await.unwrap().into_inner();
    let refused = moesaic_proto::from_status(&answers.message().await.unwrap_err());
    assert_eq!(refused.field.as_deref(), Some("hash"));

    drop((raw, answers));
    stop.send_replace(true);
    serving.await.unwrap().unwrap();
    let gone = store.longest(&[block(0).0]).await.unwrap_err();
    assert!(gone.code == ErrorCode::Unavailable && gone.message.contains("kv-store k0"), "{gone}");
}

#[tokio::test]
async fn a_chain_that_is_used_goes_from_its_end() {
    let len = block(0).1.len() as u64;
    let store = KvStore::start(&Config { capacity: ByteSize(3 * len), ..Config::default() }).unwrap();
    let chain: Vec<_> = (0..3).map(|number| block(number).0).collect();
    for number in 0..3 {
        let (hash, bytes) = block(number);
        assert!(store.offer(hash, bytes).await.unwrap());
    }
    assert_eq!(store.fetch(&chain).await.unwrap().len(), 3);
    for (number, left) in [(10, 2), (11, 1), (12, 0)] {
        let (hash, bytes) = block(number);
        assert!(store.offer(hash, bytes).await.unwrap());
        assert_eq!(store.longest(&chain).await.unwrap(), left);
    }
    assert!(!store.offer(block(13).0, Bytes::from(vec![0; 4 * len as usize])).await.unwrap(), "larger than the store");
}
