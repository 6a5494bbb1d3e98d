//! Names of the run's own in a Redis and a NATS that others use as well.
use super::folder::Folder;
use anyhow::Result;
use moesaic_transport::{ClusterConfig, RedisMetadata};

/// What this run leaves in a Redis that is not its own.
#[derive(Debug)]
pub struct Guest(RedisMetadata);

impl Guest {
    /// Where Redis or NATS were named, puts what this run writes there under a prefix of its own: processes of another run
    /// have the same names. A prefix that was set stays; whoever set it means it. Answers what is to be removed at the
    /// end.
    ///
    /// # Errors
    /// When the URL of Redis cannot be used.
    pub fn set_apart(cluster: &mut ClusterConfig, folder: &Folder) -> Result<Option<Self>> {
        let (redis, nats) = (cluster.redis_url.expose(), cluster.nats_url.expose());
        let is_named = !(redis.is_empty() && nats.is_empty());
        if !is_named || cluster.key_prefix != ClusterConfig::default().key_prefix {
            return Ok(None);
        }
        cluster.key_prefix = format!("{}-up-{}", cluster.key_prefix, folder.run());
        let own = !redis.is_empty();
        let metadata = own.then(|| RedisMetadata::connect(redis, &cluster.key_prefix)).transpose()?;
        Ok(metadata.map(Self))
    }

    /// Removes what has no expiry, for nobody comes back to it. The processes must have ended.
    pub async fn leave(self) {
        if let Err(error) = self.0.clear().await {
            tracing::warn!(%error, "remove this run's keys from redis");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_config::Secret;

    #[test]
    fn a_run_has_its_own_names_where_others_may_be_unless_its_prefix_is_set() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = || Folder::make_in(parent.path(), None).expect("made");
        let (one, two) = (folder(), folder());
        let named = |redis: &str, nats: &str| ClusterConfig {
            redis_url: Secret::new(redis),
            nats_url: Secret::new(nats),
            ..ClusterConfig::default()
        };
        let prefix = |mut cluster: ClusterConfig, folder: &Folder| {
            let guest = Guest::set_apart(&mut cluster, folder).expect("usable");
            cluster.validate().expect("a good prefix");
            (cluster.key_prefix, guest.is_some())
        };
        assert_eq!(prefix(ClusterConfig::default(), &one), ("moesaic".into(), false));
        for (redis, nats) in [("redis://r", ""), ("redis://r", "nats://n"), ("", "nats://n")] {
            let (first, second) = (prefix(named(redis, nats), &one), prefix(named(redis, nats), &two));
            assert_ne!(first.0, second.0);
            assert!(first.0.starts_with("moesaic-up-"), "{first:?}");
            assert_eq!((first.1, second.1), (!redis.is_empty(), !redis.is_empty()), "{redis:?}");
        }
        let set = ClusterConfig { key_prefix: "mine".into(), ..named("redis://r", "nats://n") };
        assert_eq!(prefix(set, &one), ("mine".into(), false));
    }
}
