//! `Metadata` in Redis: each change is one Lua script, so that it happens as a whole or not at all.
//!
//! A value is a hash with its version; a sorted set holds the names of all values, so that listing some costs nothing
//! for the others. One counter makes the versions of all keys: a version never comes back. Needs Redis 6.2 or newer,
//! with `maxmemory-policy noeviction`; Redis Cluster is not supported, for the scripts touch several keys.
mod connection;

use bytes::Bytes;
use connection::Connection;
use futures::future::{BoxFuture, FutureExt};
use moesaic_types::boundary::{Metadata, Versioned};
use moesaic_types::{Error, Result};
use redis::{Script, ScriptInvocation, cmd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

static COMPARE_AND_SET: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("compare_and_set.lua")));
static REMOVE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("remove.lua")));
static ADD: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("add.lua")));
static KEYS: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("keys.lua")));

/// Names that one script looks at: it holds up everyone else meanwhile.
const PAGE: usize = 1000;

/// An expiry further away is none that anyone will see, and Redis refuses numbers that are too large.
const LONGEST_EXPIRY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Metadata in Redis; cheap to clone. Each call answers within a second: `Unavailable` when Redis did not, and then a
/// change may have been made or not. It connects again by itself.
#[derive(Clone, Debug)]
pub struct RedisMetadata {
    connection: Arc<Connection>,
    prefix: Arc<str>,
    /// The last write was refused: leases run out unrenewed, and what is still there says little.
    takes_no_writes: Arc<AtomicBool>,
}

impl RedisMetadata {
    /// Metadata under keys that start with `prefix`. Connects at the first call, so that a service can start before
    /// Redis does.
    ///
    /// # Errors
    /// `InvalidArgument` when the URL cannot be used.
    pub fn connect(url: &str, prefix: &str) -> Result<Self> {
        Ok(Self { connection: Arc::new(Connection::new(url)?), prefix: prefix.into(), takes_no_writes: Arc::default() })
    }

    /// What stands before a name in the key of its value.
    fn values(&self) -> String {
        format!("{}:value:", self.prefix)
    }

    fn value(&self, key: &str) -> String {
        format!("{}:value:{key}", self.prefix)
    }

    fn index(&self) -> String {
        format!("{}:values", self.prefix)
    }

    /// Removes all that stands under the prefix: values, counters and the counter of versions. Nobody may use them any
    /// longer.
    ///
    /// # Errors
    /// `Unavailable` when Redis does not answer; then some of it may be left.
    pub async fn clear(&self) -> Result<()> {
        let special = |c: char| "*?[]\\^-".contains(c);
        let escaped: String =
            self.prefix.chars().flat_map(|c| special(c).then_some('\\').into_iter().chain([c])).collect();
        let mut cursor = 0_u64;
        loop {
            let mut scan = cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(format!("{escaped}:*")).arg("COUNT").arg(PAGE);
            let (next, keys): (u64, Vec<String>) =
                self.connection.call(async |mut connection| scan.query_async(&mut connection).await).await?;
            if !keys.is_empty() {
                let unlink = cmd("UNLINK").arg(keys).to_owned();
                let _: u64 =
                    self.connection.call(async |mut connection| unlink.query_async(&mut connection).await).await?;
            }
            if next == 0 {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>> {
        if self.takes_no_writes.load(Ordering::Acquire) {
            let message = format!("redis at {} takes no writes; what it lists is not all", self.connection.address());
            return Err(Error::unavailable(message));
        }
        // no byte of UTF-8 is 0xff
        let end = [b"(", prefix.as_bytes(), b"\xff"].concat();
        let (mut from, mut keys) = (format!("[{prefix}"), Vec::new());
        loop {
            let mut script = KEYS.key(self.index());
            script.arg(&from).arg(&end).arg(PAGE).arg(self.values());
            let (next, mut page): (String, Vec<String>) = self.invoke(&script).await?;
            keys.append(&mut page);
            if next.is_empty() {
                return Ok(keys);
            }
            from = next;
        }
    }

    async fn invoke<T: redis::FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T> {
        self.connection.call(async |mut connection| script.invoke_async(&mut connection).await).await
    }
}

/// Milliseconds as a script takes them: '' for none, and at least 1, for 0 would remove the key at once.
fn millis(expires_after: Option<Duration>) -> String {
    let whole = |after: Duration| after.min(LONGEST_EXPIRY).as_millis().max(1).to_string();
    expires_after.map(whole).unwrap_or_default()
}

fn version(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::internal(format!("metadata: redis holds {text:?} for a version")))
}

/// The fields of a value's hash.
type Found = (Option<Vec<u8>>, Option<String>);

fn value_and_version(found: Found) -> Result<Option<Versioned>> {
    let (Some(value), Some(text)) = found else { return Ok(None) };
    Ok(Some((value.into(), version(&text)?)))
}

impl Metadata for RedisMetadata {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<(Bytes, u64)>>> {
        let command = cmd("HMGET").arg(self.value(key)).arg("value").arg("version").to_owned();
        async move {
            let found = self.connection.call(async |mut connection| command.query_async(&mut connection).await).await?;
            value_and_version(found)
        }
        .boxed()
    }

    fn get_many(&self, keys: &[String]) -> BoxFuture<'_, Result<Vec<Option<Versioned>>>> {
        let mut commands = redis::pipe();
        for key in keys {
            commands.cmd("HMGET").arg(self.value(key)).arg("value").arg("version");
        }
        let is_empty = keys.is_empty();
        async move {
            if is_empty {
                return Ok(Vec::new());
            }
            let found: Vec<Found> =
                self.connection.call(async |mut connection| commands.query_async(&mut connection).await).await?;
            found.into_iter().map(value_and_version).collect()
        }
        .boxed()
    }

    fn compare_and_set(
        &self,
        key: &str,
        expected: Option<u64>,
        value: Bytes,
        expires_after: Option<Duration>,
    ) -> BoxFuture<'_, Result<Option<u64>>> {
        let mut script = COMPARE_AND_SET.key(self.value(key));
        script.key(format!("{}:version", self.prefix)).key(self.index());
        let expected = expected.map(|version| version.to_string()).unwrap_or_default();
        script.arg(key).arg(expected).arg(&*value).arg(millis(expires_after)).arg(self.values());
        async move {
            let written = self.connection.call(async |mut connection| {
                let written: redis::RedisResult<Option<String>> = script.invoke_async(&mut connection).await;
                // where there is no answer, lists do not come either
                if !written.as_ref().is_err_and(|error| error.is_io_error() || error.is_unrecoverable_error()) {
                    self.takes_no_writes.store(written.is_err(), Ordering::Release);
                }
                written
            });
            written.await?.as_deref().map(version).transpose()
        }
        .boxed()
    }

    fn remove(&self, key: &str, expected: u64) -> BoxFuture<'_, Result<bool>> {
        let mut script = REMOVE.key(self.value(key));
        script.key(self.index()).arg(key).arg(expected);
        async move { self.invoke(&script).await }.boxed()
    }

    fn add(&self, key: &str, amount: i64, expires_after: Option<Duration>) -> BoxFuture<'_, Result<i64>> {
        let mut script = ADD.key(format!("{}:counter:{key}", self.prefix));
        script.arg(amount).arg(millis(expires_after));
        async move { self.invoke(&script).await }.boxed()
    }

    fn keys(&self, prefix: &str) -> BoxFuture<'_, Result<Vec<String>>> {
        let prefix = prefix.to_owned();
        async move { self.list(&prefix).await }.boxed()
    }
}
