//! The doors as clients meet them: real servers on loopback ports, over replicas that play a script.
#![allow(clippy::unwrap_used, reason = "a test fails there")]

mod bad_input;
mod client;
mod life;
mod migration;
mod reach;
mod scripted;
mod server;
mod slow_clients;
mod tenants;
mod tool_calls;
