//! Configuration: defaults < file (`moesaic.toml`) < environment (`MOESAIC__SECTION__KEY`) < flags.
//!
//! One documented struct with `Default` describes everything; [`load`] lays the sources over its defaults. A key that
//! the struct does not have is an error that names the nearest one, from whatever source, and a wrong value names its
//! key and source. [`dump`] prints the effective configuration as a file that [`load`] reads.
#![forbid(unsafe_code)]

mod dump;
mod error;
mod keys;
mod load;
mod secret;
mod text;
mod units;

pub use dump::dump;
pub use error::Error;
pub use load::{Sources, load};
pub use secret::Secret;
pub use units::{ByteSize, HumanDuration};

/// Prefix of environment variables; sections and keys are separated by two underscores as well.
pub const ENV_PREFIX: &str = "MOESAIC__";

/// Variables that other software sets by convention, and the keys that they set. They yield to the file's and the
/// environment's own keys, and are ignored where the configuration has no such key.
pub const STANDARD_VARIABLES: &[(&str, &str)] = &[
    ("NATS_URL", "cluster.nats_url"),
    ("REDIS_URL", "cluster.redis_url"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "telemetry.otlp_endpoint"),
    ("OTEL_SERVICE_NAME", "telemetry.service_name"),
];
