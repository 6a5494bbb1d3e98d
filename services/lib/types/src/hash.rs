//! Chained block hashes: the names of KV blocks across the whole cluster.
use crate::{BLOCK_TOKENS, KvFormat, TokenId, WeightFormat};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The name of one full KV block; equal names mean equal keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockHash(pub [u8; 16]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Consecutive blocks of a chain that are kept in the same place: a place is chosen for a group, by its first block.
/// Chains that share their first groups only, as those after one system prompt, are spread by their later ones.
pub const GROUP_BLOCKS: usize = 16;

/// A block and where it stands in its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub hash: BlockHash,
    /// The block before it; `None` for a chain's first.
    pub parent: Option<BlockHash>,
    /// Its index in the chain.
    pub position: u32,
    /// The first block of its group.
    pub group: BlockHash,
}

impl Link {
    /// The block at an index of a chain.
    ///
    /// # Panics
    /// When the chain has no such index.
    pub fn of(chain: &[BlockHash], position: usize) -> Self {
        Self {
            hash: chain[position],
            parent: position.checked_sub(1).map(|before| chain[before]),
            position: position.try_into().unwrap_or(u32::MAX),
            group: chain[position - position % GROUP_BLOCKS],
        }
    }
}

/// A content digest of a model's weights or of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest of this and what else decides how the thing is used.
    pub fn tagged(&self, tag: &str) -> Self {
        Self(*blake3::keyed_hash(&self.0, tag.as_bytes()).as_bytes())
    }
}

/// Keeps tenants' prefix blocks apart; derived by the gateway from the key, never taken from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct TenantSalt(pub [u8; 16]);

impl TenantSalt {
    /// That of requests which only show whether a replica works; no key has it.
    pub const CANARY: Self = Self(*b"moesaic's canary");

    /// The salt of one API key under the operator's secret.
    pub fn derive(secret: &[u8], key: &str) -> Self {
        let keyed = blake3::keyed_hash(blake3::hash(secret).as_bytes(), key.as_bytes());
        let mut salt = [0; 16];
        salt.copy_from_slice(&keyed.as_bytes()[..16]);
        Self(salt)
    }
}

/// Stands for a tenant where requests are shared out fairly; it tells nothing of the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct TenantId(pub [u8; 16]);

impl TenantId {
    /// The id of one API key under the operator's secret; no salt can be derived from it.
    pub fn derive(secret: &[u8], key: &str) -> Self {
        let context = blake3::keyed_hash(blake3::hash(secret).as_bytes(), b"tenant id");
        let keyed = blake3::keyed_hash(context.as_bytes(), key.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&keyed.as_bytes()[..16]);
        Self(id)
    }
}

/// Everything but the tokens that decides what is in a KV block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockHasher {
    root: [u8; 32],
}

impl BlockHasher {
    /// A hasher for one model, weight format, KV format and adapter.
    pub fn new(model: &Digest, weights: WeightFormat, kv: KvFormat, adapter: Option<&Digest>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("moesaic kv block v1");
        hasher.update(&model.0);
        hasher.update(weights.to_string().as_bytes());
        hasher.update(b"/");
        hasher.update(kv.to_string().as_bytes());
        hasher.update(&adapter.copied().unwrap_or_default().0);
        Self { root: *hasher.finalize().as_bytes() }
    }

    /// Stands for all that decides what is in a block but the tokens and the salt.
    pub fn digest(&self) -> Digest {
        Digest(self.root)
    }

    /// The names of the full blocks of `tokens`, in order; a partial last block has no name.
    pub fn chain(&self, salt: &TenantSalt, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut parent = None;
        tokens
            .chunks_exact(BLOCK_TOKENS)
            .map(|block| {
                let hash = self.next(salt, parent.as_ref(), block);
                parent = Some(hash);
                hash
            })
            .collect()
    }

    /// The name of the block that follows `parent` (`None`: the first block).
    pub fn next(&self, salt: &TenantSalt, parent: Option<&BlockHash>, block: &[TokenId]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.root);
        hasher.update(&salt.0);
        if let Some(parent) = parent {
            hasher.update(&parent.0);
        }
        for token in block {
            hasher.update(&token.to_le_bytes());
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        BlockHash(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hasher() -> BlockHasher {
        BlockHasher::new(&Digest::of(b"m"), WeightFormat::F32, KvFormat::F32, None)
    }

    #[test]
    fn a_chain_names_full_blocks_only_and_shares_prefixes() {
        let tokens: Vec<u32> = (0..200).collect();
        let salt = TenantSalt::default();
        let chain = hasher().chain(&salt, &tokens);
        assert_eq!(chain.len(), 3);
        let mut other = tokens.clone();
        other[130] = 7;
        let other = hasher().chain(&salt, &other);
        assert_eq!(chain[..2], other[..2]);
        assert_ne!(chain[2], other[2]);
    }

    #[test]
    fn a_link_says_where_a_block_stands() {
        let chain: Vec<_> = (0..40).map(|n| BlockHash([n; 16])).collect();
        let (first, later) = (Link::of(&chain, 0), Link::of(&chain, 33));
        assert_eq!((first.parent, first.position, first.group), (None, 0, chain[0]));
        assert_eq!((later.hash, later.parent, later.position), (chain[33], Some(chain[32]), 33));
        assert_eq!(later.group, chain[32]);
        assert_eq!(Link::of(&chain, 31).group, chain[16]);
    }

    #[test]
    fn a_tenants_id_is_its_own_and_not_its_salt() {
        let id = TenantId::derive(b"secret", "a");
        assert_eq!(id, TenantId::derive(b"secret", "a"));
        assert_ne!(id, TenantId::derive(b"secret", "b"));
        assert_ne!(id, TenantId::derive(b"other", "a"));
        assert_ne!(id.0, TenantSalt::derive(b"secret", "a").0);
    }

    #[test]
    fn tenants_formats_and_positions_have_other_names() {
        let tokens = [1u32; 128];
        let salt = TenantSalt::derive(b"secret", "a");
        let chain = hasher().chain(&salt, &tokens);
        assert_ne!(chain[0], chain[1]);
        assert_ne!(chain, hasher().chain(&TenantSalt::derive(b"secret", "b"), &tokens));
        let bf16 = BlockHasher::new(&Digest::of(b"m"), WeightFormat::F32, KvFormat::Bf16, None);
        assert_ne!(chain, bf16.chain(&salt, &tokens));
    }
}
