//! KV blocks that all replicas share: the kv-stores of a cluster as one `PrefixStore`.
//!
//! A chain is cut into groups of 16 blocks, and the names of a group's first block and of the nodes decide where it
//! belongs: asking there needs no metadata. Only what is elsewhere (a node came or went, or could not be asked when a
//! block was offered) is looked for in the metadata, where each node says under a lease which groups it has, in which
//! life and in which tier.
mod events;
mod node;
mod nodes;
mod patience;
mod places;
mod record;

pub use events::{KvCue, KvCues, in_parts, sign};
pub use node::{Blocks, KvNode};
pub use nodes::KvNodes;
pub use patience::Patience;
pub use places::{parts, ranked};
pub use record::{Holding, LEASE, Tier};

use crate::membership::Directory;
use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt, join_all};
use futures::stream::{BoxStream, StreamExt};
use moesaic_types::boundary::{Metadata, PrefixStore};
use moesaic_types::{BlockHash, ErrorCode, GROUP_BLOCKS, Link, Result};
use nodes::give;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

/// Nodes that a block is offered to, or asked for where it belongs, one after another, until one answers.
const TRIES: usize = 2;

/// Blocks that are read ahead of who takes them.
const READ_AHEAD: usize = 2;

/// The kv-stores of a cluster; cheap to clone.
#[derive(Clone)]
pub struct RemotePrefixStore {
    nodes: Arc<KvNodes>,
    /// The nodes failed when they were last asked.
    is_away: Arc<AtomicBool>,
    /// The last block that was offered came too late.
    is_late: Arc<AtomicBool>,
}

impl RemotePrefixStore {
    /// The nodes of a directory of kv-stores. Each may take `patience` for an answer, or for the next block of one.
    pub fn new(directory: Directory, metadata: Arc<dyn Metadata>, patience: Patience) -> Self {
        let nodes = Arc::new(KvNodes::new(directory, metadata, patience));
        Self { nodes, is_away: Arc::default(), is_late: Arc::default() }
    }

    /// The nodes.
    pub fn nodes(&self) -> &KvNodes {
        &self.nodes
    }

    /// Says once that nodes fail, and once that they work again.
    fn notice<T>(&self, outcome: &Result<T>) {
        let was_away = self.is_away.swap(outcome.is_err(), Ordering::Relaxed);
        match outcome {
            Err(error) if !was_away => tracing::warn!(%error, "the kv-stores fail; their blocks are computed instead"),
            Ok(_) if was_away => tracing::info!("the kv-stores answer again"),
            _ => {}
        }
    }

    /// Says once that blocks take too long to nodes that answer.
    fn notice_late(&self, outcome: &Result<bool>) {
        let is_late = outcome.as_ref().is_err_and(|error| error.code == ErrorCode::DeadlineExceeded);
        if !is_late {
            self.notice(outcome);
        }
        if let Err(error) = outcome
            && !self.is_late.swap(is_late, Ordering::Relaxed)
            && is_late
        {
            tracing::warn!(%error, "blocks are not offered in time; the link is slower than cluster.kv_rate");
        }
    }

    /// What the node has where a part belongs; where that node is away, what the next has: copies go there, and offers.
    async fn at_its_place(&self, chain: &[BlockHash], part: &Range<usize>) -> usize {
        for node in self.places(&group(chain, part)) {
            let found = node.longest(&chain[part.clone()]).await;
            self.notice(&found);
            if let Ok(found) = found {
                return found;
            }
        }
        0
    }

    /// The nodes where a group belongs, those left out that are away.
    fn places(&self, group: &BlockHash) -> Vec<KvNode> {
        let nodes = self.nodes.ranked(group).into_iter().map(|(_, node)| node);
        nodes.filter(KvNode::is_usable).take(TRIES).collect()
    }

    async fn count(&self, chain: &[BlockHash], from: usize) -> usize {
        if self.nodes.directory().view().members.is_empty() {
            return 0;
        }
        let parts = parts(chain.len(), from);
        let mut found = join_all(parts.iter().map(|part| self.at_its_place(chain, part))).await;
        let is_short = |at: &usize| found[*at] < parts[*at].len();
        let short: Vec<usize> = (0..parts.len()).filter(is_short).collect();
        'all: for short in short.chunks(self.nodes.groups_at_once()) {
            let groups: Vec<_> = short.iter().map(|at| group(chain, &parts[*at])).collect();
            let holders = self.nodes.exceptions(&groups).await;
            for (at, holders) in short.iter().copied().zip(holders) {
                let elsewhere = self.nodes.best(chain, parts[at].clone(), &holders).await;
                found[at] = found[at].max(elsewhere);
                // nothing behind a gap is asked for
                if found[at] < parts[at].len() {
                    break 'all;
                }
            }
        }
        let mut blocks = 0;
        for (found, part) in found.into_iter().zip(parts) {
            blocks += found;
            if found < part.len() {
                break;
            }
        }
        blocks
    }

    /// Sends a chain's blocks in order, until one is nowhere or nobody listens.
    async fn pump(self, chain: Vec<BlockHash>, from: usize, blocks: mpsc::Sender<Result<Bytes>>) {
        for mut part in parts(chain.len(), from) {
            let mut failure = None;
            for node in self.places(&group(&chain, &part)) {
                let outcome = relay(&node, &chain, &mut part, &blocks).await;
                self.notice(&outcome);
                failure = outcome.err();
                // one that answers has what it has
                if failure.is_none() {
                    break;
                }
            }
            if !part.is_empty() && !blocks.is_closed() {
                let holders = self.nodes.exceptions(&[group(&chain, &part)]).await;
                for node in holders.into_iter().flatten() {
                    failure = relay(&node, &chain, &mut part, &blocks).await.err().or(failure);
                    if part.is_empty() {
                        break;
                    }
                }
            }
            if part.is_empty() {
                continue;
            }
            if let Some(error) = failure {
                // nobody listens: then nobody needs it
                let _ = blocks.send(Err(error)).await;
            }
            return;
        }
    }
}

/// The first block of a part's group.
fn group(chain: &[BlockHash], part: &Range<usize>) -> BlockHash {
    chain[part.start - part.start % GROUP_BLOCKS]
}

/// Passes on what a node has of a part, which begins after that then.
async fn relay(
    node: &KvNode,
    chain: &[BlockHash],
    part: &mut Range<usize>,
    blocks: &mpsc::Sender<Result<Bytes>>,
) -> Result<()> {
    let mut found = node.fetch(&chain[part.clone()]).await?;
    while part.start < part.end
        && let Some(block) = found.next().await?
    {
        if blocks.send(Ok(block)).await.is_err() {
            return Ok(());
        }
        part.start += 1;
    }
    Ok(())
}

impl PrefixStore for RemotePrefixStore {
    fn longest(&self, chain: &[BlockHash], from: usize) -> BoxFuture<'_, Result<usize>> {
        let chain = chain.to_vec();
        async move { Ok(self.count(&chain, from).await) }.boxed()
    }

    fn fetch(&self, chain: &[BlockHash], from: usize) -> BoxStream<'static, Result<Bytes>> {
        let (sender, blocks) = mpsc::channel(READ_AHEAD);
        let (this, chain) = (self.clone(), chain.to_vec());
        tokio::spawn(
            async move {
                let unread = sender.clone();
                tokio::select! {
                    () = this.pump(chain, from, sender) => {}
                    () = unread.closed() => {}
                }
            }
            .in_current_span(),
        );
        ReceiverStream::new(blocks).boxed()
    }

    fn offer(&self, link: Link, bytes: Bytes) -> BoxFuture<'_, Result<bool>> {
        async move {
            let mut outcome = Ok(false);
            for node in self.places(&link.group) {
                outcome = give(&node, &link, &bytes, true).await;
                // one that is slow would not be faster with another on the link
                if outcome.as_ref().map_or_else(|error| error.code != ErrorCode::Unavailable, |_| true) {
                    break;
                }
            }
            self.notice_late(&outcome);
            outcome
        }
        .boxed()
    }

    fn forget(&self, blocks: &[BlockHash]) -> BoxFuture<'_, Result<()>> {
        let blocks = blocks.to_vec();
        async move {
            // copies may be anywhere, and this is rare
            let nodes = self.nodes.all();
            let answers = join_all(nodes.iter().map(|node| node.forget(&blocks))).await;
            answers.into_iter().try_for_each(|answer| answer.map(|_| ()))
        }
        .boxed()
    }

    fn is_shared(&self) -> bool {
        true
    }
}
