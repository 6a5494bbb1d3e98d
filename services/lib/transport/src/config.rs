//! The `[cluster]` section: what a service must know to find the others.
use crate::host;
use crate::kv::Patience;
use moesaic_config::{ByteSize, HumanDuration, Secret};
use moesaic_types::cluster::{Service, Socket};
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where the cluster's servers are, and how this process takes part in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// Redis: `redis://[user:password@]host[:port][/database]`; empty: `redis://127.0.0.1:6379`. Also set by
    /// `REDIS_URL`.
    pub redis_url: Secret,
    /// NATS: `nats://[user:password@]host[:port]`, several separated by commas; empty: `nats://127.0.0.1:4222`. Also
    /// set by `NATS_URL`.
    pub nats_url: Secret,
    /// What all keys in Redis and all subjects in NATS start with, so that clusters can share them; 1 to 64 letters, digits,
    /// `-`, `_` and `.`.
    pub key_prefix: String,
    /// A member that was not heard of for so long is gone; 1s..=1m.
    pub lease: HumanDuration,
    /// This process's name among those of its service, the same over restarts; empty: the host's name and the port.
    pub id: String,
    /// Where peers reach this process's gRPC, `http://host:port`; empty: the address that it listens on, with the host's
    /// name where it listens on all.
    pub advertise: String,
    /// A folder for this process's Unix socket, by which peers on the same host reach it; without one they use TCP.
    pub socket_folder: Option<PathBuf>,
    /// How long a kv-store may take to answer; 10ms..=1m.
    pub kv_patience: HumanDuration,
    /// Blocks are shared with kv-stores over links that move so many bytes in a second, or more; 1KiB..=1TiB. On slower
    /// ones they come too late, and are computed.
    pub kv_rate: ByteSize,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        let kv = Patience::default();
        Self {
            redis_url: Secret::default(),
            nats_url: Secret::default(),
            key_prefix: "moesaic".into(),
            lease: HumanDuration::from_secs(3),
            id: String::new(),
            advertise: String::new(),
            socket_folder: None,
            kv_patience: HumanDuration(kv.answer),
            kv_rate: ByteSize(kv.rate),
        }
    }
}

/// The longest name of a Unix socket that every Unix takes.
const LONGEST_SOCKET: usize = 100;

impl ClusterConfig {
    /// Checks the bounds. The URLs of Redis and NATS are checked where they are used.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &str, value: &dyn std::fmt::Display, use_: &str| {
            let name = format!("cluster.{field}");
            Err(Error::invalid(name.clone(), format!("{name} is {value}; use {use_}")))
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if !(1..=64).contains(&self.key_prefix.len()) || !self.key_prefix.chars().all(is_name) {
            let prefix = format!("{:?}", self.key_prefix);
            return refuse("key_prefix", &prefix, "1 to 64 letters, digits, '-', '_' and '.'");
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(60)).contains(&self.lease.get()) {
            return refuse("lease", &self.lease, "1s to 1m");
        }
        if self.id.len() > 128 || self.id.contains(char::is_control) {
            return refuse("id", &format!("{:?}", self.id), "128 bytes at most, without control characters");
        }
        if !self.advertise.is_empty() && !is_address(&self.advertise) {
            return refuse("advertise", &format!("{:?}", self.advertise), "http://host:port");
        }
        if let Some(folder) = &self.socket_folder
            && folder.as_os_str().len() > LONGEST_SOCKET / 2
        {
            return refuse("socket_folder", &folder.display(), "a path of 50 bytes at most");
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&self.kv_patience.get()) {
            return refuse("kv_patience", &self.kv_patience, "10ms to 1m");
        }
        if !(ByteSize::kib(1)..=ByteSize::gib(1024)).contains(&self.kv_rate) {
            return refuse("kv_rate", &self.kv_rate, "1KiB to 1TiB");
        }
        Ok(())
    }

    /// How long kv-stores may take.
    pub fn kv_patience(&self) -> Patience {
        Patience { answer: self.kv_patience.get(), rate: self.kv_rate.bytes() }
    }

    /// The URL of Redis that is in force.
    pub fn redis(&self) -> &str {
        or(self.redis_url.expose(), "redis://127.0.0.1:6379")
    }

    /// The URL of NATS that is in force.
    pub fn nats(&self) -> &str {
        or(self.nats_url.expose(), "nats://127.0.0.1:4222")
    }

    /// The name that is in force for a process that listens on `port`.
    pub fn id_of(&self, port: u16) -> String {
        if self.id.is_empty() { format!("{}-{port}", host::name()) } else { self.id.clone() }
    }

    /// The address that is in force for a process that listens on `listening`.
    pub fn address_of(&self, listening: SocketAddr) -> String {
        if !self.advertise.is_empty() {
            self.advertise.clone()
        } else if listening.ip().is_unspecified() {
            format!("http://{}:{}", host::name(), listening.port())
        } else {
            format!("http://{listening}")
        }
    }

    /// Where a process that listens on `port` makes its Unix socket; `None` where it has none, or no host to name.
    pub fn socket_of(&self, service: Service, port: u16) -> Option<Socket> {
        let path = self.socket_folder.as_ref()?.join(format!("moesaic-{service}-{port}.sock"));
        Some(Socket { host: host::id()?, path })
    }
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

/// Whether a text is `http://host:port`.
pub fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.strip_prefix("http://").and_then(|rest| rest.rsplit_once(':')) else { return false };
    let is_ipv6 = host.starts_with('[') && host.ends_with(']');
    let is_host = |c: char| c.is_alphanumeric() || "-._".contains(c) || (is_ipv6 && "[]:%".contains(c));
    !host.is_empty() && host.chars().all(is_host) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moesaic_config::{Sources, load};

    #[derive(Default, Serialize, Deserialize)]
    #[serde(default)]
    struct Whole {
        cluster: ClusterConfig,
    }

    #[test]
    fn settings_out_of_bounds_name_the_field() {
        assert_eq!(ClusterConfig::default().validate(), Ok(()));
        let folder = Some(PathBuf::from("/".repeat(51)));
        let wrong = [
            ClusterConfig { key_prefix: String::new(), ..ClusterConfig::default() },
            ClusterConfig { key_prefix: "a:b".into(), ..ClusterConfig::default() },
            ClusterConfig { lease: HumanDuration::from_millis(999), ..ClusterConfig::default() },
            ClusterConfig { id: "a\nb".into(), ..ClusterConfig::default() },
            ClusterConfig { advertise: "host:9020".into(), ..ClusterConfig::default() },
            ClusterConfig { socket_folder: folder, ..ClusterConfig::default() },
            ClusterConfig { kv_patience: HumanDuration::from_millis(9), ..ClusterConfig::default() },
            ClusterConfig { kv_rate: ByteSize(1023), ..ClusterConfig::default() },
        ];
        let fields = wrong.map(|config| config.validate().unwrap_err().field.unwrap());
        let names = ["key_prefix", "key_prefix", "lease", "id", "advertise", "socket_folder", "kv_patience", "kv_rate"];
        assert_eq!(fields, names.map(|name| format!("cluster.{name}")));
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for address in ["http://h:1", "http://10.0.0.1:9020", "http://[::1]:9020", "http://a-b.svc:65535"] {
            assert!(is_address(address), "{address}");
        }
        for wrong in ["", "h:1", "http://h", "http://:1", "http://h:0", "http://h:70000", "http://h/x:1", "https://h:1"]
        {
            assert!(!is_address(wrong), "{wrong}");
        }
    }

    #[test]
    fn standard_variables_set_the_servers_and_secrets_are_not_shown() {
        let variables = [("REDIS_URL", "redis://:hunter2@r"), ("NATS_URL", "nats://u:hunter2@n")];
        let env = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let cluster = load::<Whole>(&Sources { env, ..Sources::default() }).unwrap().cluster;
        assert_eq!((cluster.redis(), cluster.nats()), ("redis://:hunter2@r", "nats://u:hunter2@n"));
        assert!(!format!("{cluster:?}{}", moesaic_config::dump(&cluster, &[]).unwrap()).contains("hunter2"));
        let cluster = load::<Whole>(&Sources::default()).unwrap().cluster;
        assert_eq!((cluster.redis(), cluster.nats()), ("redis://127.0.0.1:6379", "nats://127.0.0.1:4222"));
    }

    #[test]
    fn names_that_are_not_set_are_made_from_the_host_and_the_port() {
        let config = ClusterConfig::default();
        assert!(config.id_of(9020).ends_with("-9020"));
        let on = |listening: &str| config.address_of(listening.parse().unwrap());
        assert_eq!(on("127.0.0.1:9020"), "http://127.0.0.1:9020");
        for (listening, end) in [("0.0.0.0:9020", ":9020"), ("[::1]:9020", "[::1]:9020"), ("[::]:9020", ":9020")] {
            assert!(is_address(&on(listening)) && on(listening).ends_with(end), "{}", on(listening));
        }
        assert_eq!(config.socket_of(Service::Scheduler, 9020), None);
        let set = ClusterConfig {
            id: "s0".into(),
            advertise: "http://10.0.0.1:9".into(),
            socket_folder: Some("/run/moesaic".into()),
            ..config
        };
        assert_eq!(
            (set.id_of(1).as_str(), set.address_of(([0, 0, 0, 0], 1).into()).as_str()),
            ("s0", "http://10.0.0.1:9")
        );
        let socket = set.socket_of(Service::Scheduler, 9020).unwrap();
        assert_eq!(socket.path, PathBuf::from("/run/moesaic/moesaic-scheduler-9020.sock"));
    }
}
