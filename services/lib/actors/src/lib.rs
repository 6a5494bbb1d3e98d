//! The only crate that wraps actix's life cycle: bounded mailboxes and supervision by a factory.
//!
//! An actor owns long-lived state on a thread of its own (an actix arbiter). Callers hold a cheap-clone [`Handle`]
//! and either [`Handle::ask`] with a deadline or [`Handle::try_tell`], which hands the payload back when the mailbox
//! is full. actix's own supervisor restarts the same object and catches no panic; here a panic in a handler drops
//! the actor with its mailbox, so that asks in flight fail at once with [`AskError::Restarting`], and the factory
//! builds fresh state after a pause that doubles while the failures go on. Messages sent during the pause wait in the
//! new mailbox, under its bound.
//!
//! ```
//! use actix::{Actor, Context, Handler, Message};
//! use moesaic_actors::Supervised;
//! use std::time::Duration;
//!
//! #[derive(Default)]
//! struct Counter(u64);
//! impl Actor for Counter {
//!     type Context = Context<Self>;
//! }
//!
//! #[derive(Message)]
//! #[rtype(result = "u64")]
//! struct Add(u64);
//! impl Handler<Add> for Counter {
//!     type Result = u64;
//!     fn handle(&mut self, add: Add, _: &mut Context<Self>) -> u64 {
//!         self.0 += add.0;
//!         self.0
//!     }
//! }
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let counter = Supervised::spawn("counter", 16, Counter::default);
//! assert_eq!(counter.ask(Add(2), Duration::from_secs(1)).await, Ok(2));
//! # });
//! ```
#![forbid(unsafe_code)]

mod arbiter;
mod backoff;
mod error;
mod handle;
mod supervise;

pub use backoff::Backoff;
pub use error::AskError;
pub use handle::{Handle, WeakHandle};
pub use supervise::Supervised;
