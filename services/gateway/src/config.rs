//! The `[gateway]` section.
use moesaic_config::{ByteSize, HumanDuration, Secret};
use moesaic_types::{Error, Result};
use serde::{Deserialize, Serialize};

/// Settings of a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the HTTP door.
    pub http: String,
    /// Address of the gRPC door.
    pub grpc: String,
    /// Longest body of a request.
    pub body_limit: ByteSize,
    /// Memory for the bodies of all requests that are being sent or wait to be read; more are refused with 429. At least
    /// `body_limit`.
    pub body_memory: ByteSize,
    /// Requests that are answered at a time; more are refused with 429. 1..=1000000.
    pub max_in_flight: usize,
    /// Threads that read long requests and write long answers; 0: as many as cores.
    pub text_threads: usize,
    /// Answers to one request (`n`) at most; 1..=128.
    pub max_n: usize,
    /// Stop texts of one request at most.
    pub max_stop: usize,
    /// A client that sends nothing of a request for so long is cut off; idle connections are closed.
    pub read_timeout: HumanDuration,
    /// A client that takes nothing of its answer for so long is cut off.
    pub write_timeout: HumanDuration,
    /// Deadline of a request that does not set its own; 0s is none, 24h the longest.
    pub default_deadline: HumanDuration,
    /// How long running requests may go on after the signal to stop.
    pub drain_timeout: HumanDuration,
    /// Replicas that a request is tried on, the first one included, before one gives it a token; 1..=16.
    pub attempts: usize,
    /// How long an answer that lost its replica waits for another while none takes it; 0s..=24h. Its deadline ends it too.
    pub migration_patience: HumanDuration,
    /// How long a request that comes before a model is served waits for it, as when the gateway has just started;
    /// 0s..=24h.
    pub loading_patience: HumanDuration,
    /// Origins whose pages may call the API from a browser (CORS); `*` is any, an empty list none.
    pub allowed_origins: Vec<String>,
    /// Tenants share prefix blocks; without it each API key has blocks of its own.
    pub share_prefixes: bool,
    /// Keeps tenants' salts from being guessed. Where it is empty a random one is made: the gateways of a cluster keep one
    /// in Redis, `moesaic up --cluster` beside the blocks in `kv_store.disk_folder`, and `moesaic up` makes another at each
    /// start, after which blocks are not found again.
    pub salt_secret: Secret,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: "127.0.0.1:8000".into(),
            grpc: "127.0.0.1:9000".into(),
            body_limit: ByteSize::mib(10),
            body_memory: ByteSize::mib(256),
            max_in_flight: 1024,
            text_threads: 0,
            max_n: 16,
            max_stop: 16,
            read_timeout: HumanDuration::from_secs(60),
            write_timeout: HumanDuration::from_secs(30),
            default_deadline: HumanDuration::from_secs(0),
            drain_timeout: HumanDuration::from_secs(30),
            attempts: 3,
            migration_patience: HumanDuration::from_secs(30),
            loading_patience: HumanDuration::from_secs(10),
            allowed_origins: vec!["*".into()],
            share_prefixes: false,
            salt_secret: Secret::default(),
        }
    }
}

impl Config {
    /// Checks the bounds.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its limits.
    pub fn validate(&self) -> Result<()> {
        let within = |field: &str, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            let name = format!("gateway.{field}");
            Err(Error::invalid(name.clone(), format!("{name} is {value}; use {low} to {high}")))
        };
        within("max_in_flight", self.max_in_flight, 1, 1_000_000)?;
        within("text_threads", self.text_threads, 0, 1024)?;
        within("max_n", self.max_n, 1, 128)?;
        within("max_stop", self.max_stop, 0, 1024)?;
        within("attempts", self.attempts, 1, 16)?;
        let longest = HumanDuration::from_secs(24 * 60 * 60);
        let times = [
            ("default_deadline", self.default_deadline, HumanDuration::from_secs(0)),
            ("read_timeout", self.read_timeout, HumanDuration::from_millis(1)),
            ("write_timeout", self.write_timeout, HumanDuration::from_millis(1)),
            ("drain_timeout", self.drain_timeout, HumanDuration::from_secs(0)),
            ("migration_patience", self.migration_patience, HumanDuration::from_secs(0)),
            ("loading_patience", self.loading_patience, HumanDuration::from_secs(0)),
        ];
        for (field, value, low) in times {
            if value.get() < low.get() || value.get() > longest.get() {
                let name = format!("gateway.{field}");
                return Err(Error::invalid(name.clone(), format!("{name} is {value}; use {low} to {longest}")));
            }
        }
        within("body_limit", self.body_limit.as_usize(), 1024, 1 << 30)?;
        within("body_memory", self.body_memory.as_usize(), self.body_limit.as_usize(), 1 << 40)
    }
}
