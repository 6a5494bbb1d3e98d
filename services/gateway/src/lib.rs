//! The gateway: the only door. HTTP as OpenAI's clients speak it, and gRPC.
//!
//! [`http`] and [`grpc`] decode and encode; [`core`] holds what both do: validation, templates, tokens to text, stop
//! texts, tool calls, and going on at another replica when one fails.
#![forbid(unsafe_code)]

pub mod actors;
pub mod app;
pub mod config;
mod connections;
pub mod core;
pub mod grpc;
pub mod http;
pub mod process;
mod replicas;
mod request_id;
mod salt;
pub mod served;

pub use app::Gateway;
pub use config::Config;
pub use process::GatewayProcess;
pub use served::ServedModel;
