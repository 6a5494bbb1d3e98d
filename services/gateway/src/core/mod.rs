//! What both doors do.
mod answer;
pub mod conversation;
mod input;
mod slow;
mod stop;
mod text;
pub mod tools;

pub use answer::{Core, Piece, PieceStream, ReplicaLookup};
pub(crate) use input::tokens;
pub use input::{Job, Limits, SamplingInput};
pub use slow::cut_off;
pub use stop::StopMatcher;
pub use text::TokenPiece;
