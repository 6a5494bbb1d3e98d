//! All kv-stores of a cluster, and where each group of blocks belongs among them.
use super::node::KvNode;
use super::patience::Patience;
use super::places::ranked;
use super::record::Holding;
use crate::membership::{Clients, Directory};
use bytes::Bytes;
use moesaic_types::boundary::{Metadata, Versioned};
use moesaic_types::{BlockHash, ErrorCode, Link, Result};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Records that are asked for at once.
const RECORDS: usize = 256;

/// The nodes that a directory shows.
pub struct KvNodes {
    clients: Clients<KvNode>,
    metadata: Arc<dyn Metadata>,
    is_unreadable: AtomicBool,
}

impl KvNodes {
    /// Nodes of a directory of kv-stores; each may take `patience` for an answer.
    pub fn new(directory: Directory, metadata: Arc<dyn Metadata>, patience: Patience) -> Self {
        let clients = Clients::new(directory, move |member| KvNode::new(member, patience));
        Self { clients, metadata, is_unreadable: AtomicBool::new(false) }
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        self.clients.directory()
    }

    /// The nodes that take work, those first where a group belongs.
    pub fn ranked(&self, group: &BlockHash) -> Vec<(Arc<str>, KvNode)> {
        let view = self.directory().view();
        let ready: Vec<&str> = view.ready().map(|record| &*record.member.id).collect();
        let known = |id: &str| Some((Arc::from(id), self.clients.get(id)?));
        ranked(group, ready).into_iter().filter_map(known).collect()
    }

    /// All nodes, also those that take no work.
    pub fn all(&self) -> Vec<KvNode> {
        let view = self.directory().view();
        view.members.keys().filter_map(|id| self.clients.get(id)).collect()
    }

    /// Of how many groups the metadata say in one answer which nodes have them.
    pub fn groups_at_once(&self) -> usize {
        (RECORDS / self.directory().view().members.len().max(1)).max(1)
    }

    /// Nodes beside the first that say in the metadata that they have blocks of these groups; RAM first. What an earlier
    /// life of a node said is not listened to. Where the metadata cannot be read there are none.
    pub async fn exceptions(&self, groups: &[BlockHash]) -> Vec<Vec<KvNode>> {
        let view = self.directory().view();
        let mut keys = Vec::new();
        let mut asked = Vec::new();
        for (at, group) in groups.iter().enumerate() {
            let first = ranked(group, view.ready().map(|record| &*record.member.id)).first().copied();
            for record in view.members.values().filter(|record| Some(&*record.member.id) != first) {
                keys.push(Holding::key(group, &record.member.id));
                asked.push((at, &record.member));
            }
        }
        let mut holders: Vec<Vec<_>> = vec![Vec::new(); groups.len()];
        if keys.is_empty() {
            return vec![Vec::new(); groups.len()];
        }
        let mut found = Vec::with_capacity(keys.len());
        for keys in keys.chunks(RECORDS) {
            let read = self.read(keys).await;
            if read.len() < keys.len() {
                break;
            }
            found.extend(read);
        }
        for ((at, member), value) in asked.into_iter().zip(found) {
            let holding = value.and_then(|(bytes, _)| Holding::read(&bytes));
            if let Some(holding) = holding.filter(|holding| holding.generation == member.generation)
                && let Some(node) = self.clients.get(&member.id).filter(KvNode::is_usable)
            {
                holders[at].push((holding.tier, node));
            }
        }
        let sorted = |mut nodes: Vec<(_, KvNode)>| {
            nodes.sort_by_key(|(tier, _)| *tier);
            nodes.into_iter().map(|(_, node)| node).collect()
        };
        holders.into_iter().map(sorted).collect()
    }

    async fn read(&self, keys: &[String]) -> Vec<Option<Versioned>> {
        let found = self.metadata.get_many(keys).await;
        let was_unreadable = self.is_unreadable.swap(found.is_err(), Ordering::Relaxed);
        found.unwrap_or_else(|error| {
            if !was_unreadable {
                tracing::warn!(%error, "read where KV blocks are; looking for them only where they belong");
            }
            Vec::new()
        })
    }

    /// How many blocks a chain's part has at the best of some nodes.
    pub async fn best(&self, chain: &[BlockHash], part: Range<usize>, nodes: &[KvNode]) -> usize {
        let mut best = 0;
        for node in nodes {
            best = node.longest(&chain[part.clone()]).await.unwrap_or(0).max(best);
            if best == part.len() {
                break;
            }
        }
        best
    }

    /// Copies a block to the first `copies` nodes where its group belongs, beside `own`; how many took it or had it.
    ///
    /// # Errors
    /// The last node's that could not be asked, when none could.
    pub async fn copy(&self, own: &str, link: &Link, block: &Bytes, copies: usize) -> Result<usize> {
        let others = self.ranked(&link.group).into_iter().filter(|(id, node)| &**id != own && node.is_usable());
        let (mut done, mut failure) = (0, None);
        for (_, node) in others.take(copies) {
            match give(&node, link, block, false).await {
                Ok(_) => done += 1,
                Err(error) => failure = Some(error),
            }
        }
        failure.filter(|_| done == 0).map_or(Ok(done), Err)
    }
}

/// Blocks that are smaller are offered without asking first whether the node has them.
const WORTH_ASKING: usize = 64 << 10;

/// Offers a block to a node that may have it.
pub(super) async fn give(node: &KvNode, link: &Link, block: &Bytes, replicate: bool) -> Result<bool> {
    if block.len() >= WORTH_ASKING && node.longest(&[link.hash]).await? == 1 {
        return Ok(false);
    }
    match node.offer(link, block.clone(), replicate).await {
        Err(error) if error.code == ErrorCode::ResourceExhausted => Ok(false),
        answer => answer,
    }
}
