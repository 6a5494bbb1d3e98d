//! moesaic-expert-shard
