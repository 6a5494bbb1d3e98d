//! Who is in the cluster, and which experts are where: the records that stand in the metadata.
use crate::{BlockHasher, Digest, KvFormat, WeightFormat};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// The services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// The door.
    Gateway,
    /// Decides where things go.
    Router,
    /// A replica, or a pipeline stage of one.
    Scheduler,
    /// Executes experts.
    ExpertShard,
    /// Keeps KV blocks.
    KvStore,
}

impl Service {
    /// As it stands in keys, subjects and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Router => "router",
            Self::Scheduler => "scheduler",
            Self::ExpertShard => "expert-shard",
            Self::KvStore => "kv-store",
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One process of the cluster, as it says itself. It is there as long as its lease is renewed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// What it is.
    pub service: Service,
    /// Its name; unique among those of its service.
    pub id: Arc<str>,
    /// Grows with each start of the process: an older life of the same name is fenced by it.
    pub generation: u64,
    /// Where it answers gRPC: `http://host:port`.
    pub address: String,
    /// Where it answers on its own host; used by peers that run there.
    pub socket: Option<Socket>,
    /// Whether it takes work.
    pub state: MemberState,
    /// What peers must know of it.
    pub role: Role,
}

/// A Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// The host that it is on, by what the kernel says of this boot and network.
    pub host: String,
    /// Its path.
    pub path: PathBuf,
}

/// Whether a member takes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    /// Not yet: it loads, or waits for others.
    Starting,
    /// Yes.
    Ready,
    /// Not any longer: it ends what it has.
    Draining,
}

/// What peers must know of a member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Role {
    /// Nothing more.
    Plain,
    /// A scheduler that takes requests.
    Replica(ReplicaInfo),
    /// A scheduler that runs later layers of a replica.
    Stage(StageInfo),
    /// A shard.
    Shard(ShardInfo),
}

/// A model as it is served: equal ones give equal blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedAs {
    /// Of the weights, and of what else decides what is in a block but the formats.
    pub digest: Digest,
    /// How weights are held; `None`: as they are stored.
    pub weights: Option<WeightFormat>,
    /// How keys and values are cached.
    pub kv: KvFormat,
}

impl ServedAs {
    /// Names the blocks of the model as it is served.
    pub fn hasher(&self) -> BlockHasher {
        BlockHasher::new(&self.digest, self.weights.unwrap_or_default(), self.kv, None)
    }
}

/// A scheduler that takes requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaInfo {
    /// The model.
    pub model: ServedAs,
    /// Of its configuration and tokenizer: a gateway with the same gives tokens the same meaning.
    pub text: Digest,
    /// The longest context that it can hold, in tokens.
    pub max_context: usize,
}

/// A scheduler that runs later layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageInfo {
    /// The model.
    pub model: ServedAs,
    /// The replica that it is part of.
    pub replica: Arc<str>,
    /// Which stage, from 1; the replica's own scheduler is stage 0.
    pub stage: usize,
    /// Stages of the replica.
    pub stages: usize,
}

/// A shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// The model's weights.
    pub model: Digest,
    /// The expert-parallel group: shards of one group hold slices of the same experts.
    pub group: usize,
    /// Which slice, from 0.
    pub rank: usize,
    /// Slices in the group.
    pub ranks: usize,
}

/// Which groups hold which experts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Grows with each placement.
    pub epoch: u64,
    /// The model's weights.
    pub model: Digest,
    /// Expert-parallel groups.
    pub groups: usize,
    /// By the decoder's index of a layer, then by expert: the groups that hold it, ascending, at least one.
    pub layers: BTreeMap<usize, Vec<Vec<usize>>>,
}

/// Experts by the decoder's index of a layer, ascending.
pub type Shares = BTreeMap<usize, Vec<u32>>;

impl Placement {
    /// What a group holds.
    pub fn shares(&self, group: usize) -> Shares {
        let of_layer = |experts: &Vec<Vec<usize>>| {
            let held = experts.iter().enumerate().filter(|(_, groups)| groups.contains(&group));
            held.map(|(expert, _)| expert as u32).collect()
        };
        self.layers.iter().map(|(layer, experts)| (*layer, of_layer(experts))).collect()
    }

    /// Whether every expert is in a group that exists.
    pub fn is_complete(&self) -> bool {
        let placed = |groups: &Vec<usize>| !groups.is_empty() && groups.iter().all(|group| *group < self.groups);
        self.layers.values().flatten().all(placed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_s_shares_are_the_experts_that_name_it() {
        let layers = BTreeMap::from([(1, vec![vec![0], vec![1], vec![0, 1]]), (2, vec![vec![1], vec![1], vec![1]])]);
        let placement = Placement { epoch: 3, model: Digest::default(), groups: 2, layers };
        assert_eq!(placement.shares(0), Shares::from([(1, vec![0, 2]), (2, vec![])]));
        assert_eq!(placement.shares(1), Shares::from([(1, vec![1, 2]), (2, vec![0, 1, 2])]));
        assert!(placement.is_complete());
        assert!(!Placement { groups: 1, ..placement.clone() }.is_complete());
        let json = serde_json::to_string(&placement).expect("plain data");
        assert_eq!(serde_json::from_str::<Placement>(&json).expect("as written"), placement);
    }
}
