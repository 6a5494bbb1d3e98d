//! Who is in the cluster: each process keeps a record of itself in the metadata under a lease, and watches others'.
//!
//! The metadata are the truth, and events make it known at once. Without events a change is seen a second later;
//! without metadata everyone goes on with what was known last, and says so.
mod clients;
mod directory;
mod peers;
mod record;
mod registration;
mod view;

pub use clients::Clients;
pub use directory::Directory;
pub use peers::{Followed, Peers};
pub use record::{Change, MembershipEvent, Record};
pub use registration::{Registration, Standing};
pub use view::View;
