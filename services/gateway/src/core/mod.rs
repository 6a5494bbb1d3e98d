//! What both doors do.
mod answer;
mod budget;
mod check;
mod choice;
pub mod conversation;
mod deadline;
mod input;
mod job;
mod names;
mod place;
mod prompt;
mod slow;
mod stop;
mod text;
pub mod tools;
mod workers;

pub use answer::{Core, Life, Piece, PieceStream, ReplicaLookup};
pub(crate) use budget::Held;
pub(crate) use check::tokens;
pub use input::SamplingInput;
pub use job::{Job, Limits};
pub use names::Names;
pub(crate) use prompt::{Refusal, encode, listed};
pub use slow::cut_off;
pub use stop::StopMatcher;
pub use text::TokenPiece;
