//! All that `tests/doors` says of the doors, with the router and the replicas behind gRPC: clients see no difference.
#![allow(clippy::unwrap_used, reason = "a test fails there")]

#[path = "../doors/bad_input.rs"]
mod bad_input;
#[path = "../doors/client.rs"]
mod client;
#[path = "../doors/life.rs"]
mod life;
#[path = "../doors/migration.rs"]
mod migration;
mod reach;
#[path = "../doors/scripted.rs"]
mod scripted;
#[path = "../doors/server.rs"]
mod server;
#[path = "../doors/tenants.rs"]
mod tenants;
#[path = "../doors/tool_calls.rs"]
mod tool_calls;
