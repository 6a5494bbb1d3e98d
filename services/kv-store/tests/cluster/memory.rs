//! Blocks on their way take no more memory than is set, and those who do not read keep nobody waiting.
use super::*;
use moesaic_config::HumanDuration;
use moesaic_proto::hashes_to_wire;
use moesaic_transport::channel::MAX_MESSAGE;
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::Channel;

/// Two of these are on their way at once in 64 MiB.
const LARGE: usize = 30 << 20;

const CHAIN: u8 = 3;

async fn store_of_large_blocks(ground: &Ground, idle: HumanDuration) -> (Node, KvStoreServiceClient<Channel>) {
    let config = Config { transfer_memory: ByteSize::mib(64), stream_idle: idle, ..Config::default() };
    let node = node(ground, "a", &config).await;
    let chain = names();
    for position in 0..chain.len() {
        let block = Bytes::from(vec![position as u8; LARGE]);
        assert_eq!(node.store.offer(Link::of(&chain, position), block).await, Ok(true));
    }
    let client = KvStoreServiceClient::new(to_address(&format!("http://{}", node.address)).unwrap());
    (node, client.max_decoding_message_size(MAX_MESSAGE))
}

fn names() -> Vec<BlockHash> {
    (1..=CHAIN).map(|n| BlockHash([n; 16])).collect()
}

async fn fetch(client: &KvStoreServiceClient<Channel>, chain: &[BlockHash]) -> Streaming<wire::FetchResponse> {
    let mut client = client.clone();
    soon("it begins", client.fetch(wire::FetchRequest { chain: hashes_to_wire(chain) })).await.unwrap().into_inner()
}

async fn first(coming: &mut Streaming<wire::FetchResponse>) -> usize {
    soon("a block", coming.message()).await.unwrap().unwrap().block.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_block_waits_until_others_have_left() {
    let ground = Ground::memory();
    let (_node, client) = store_of_large_blocks(&ground, HumanDuration::from_secs(3600)).await;
    let chain = names();
    // how large they are is known from the first
    assert_eq!(first(&mut fetch(&client, &chain[..1]).await).await, LARGE);
    // one that reads nothing: a block is at its door, and the next ready
    let unread = fetch(&client, &chain).await;
    until("there is no room for a third", || async {
        let mut third = fetch(&client, &chain[..1]).await;
        timeout(Duration::from_millis(300), third.message()).await.is_err()
    })
    .await;
    let mut third = fetch(&client, &chain[..1]).await;
    drop(unread);
    assert_eq!(first(&mut third).await, LARGE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_does_not_read_keeps_nobody_waiting() {
    let ground = Ground::memory();
    let (_node, client) = store_of_large_blocks(&ground, HumanDuration::from_millis(200)).await;
    let chain = names();
    assert_eq!(first(&mut fetch(&client, &chain[..1]).await).await, LARGE);
    let _unread = fetch(&client, &chain).await;
    until("another has its block", || async {
        let mut other = fetch(&client, &chain[..1]).await;
        other.message().await.is_ok_and(|found| found.is_some_and(|found| found.block.len() == LARGE))
    })
    .await;
}
