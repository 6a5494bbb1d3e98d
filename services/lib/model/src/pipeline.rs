//! The boundary between pipeline stages: a replica's layers in several processes or on several devices.
//!
//! The first stage is a [`Decoder`](crate::decoder::Decoder) that has the embedding, the first layers and the output
//! matrix; each later one is a [`Stage`](crate::decoder::Stage) of consecutive layers. All have the same number of KV
//! blocks, and a block's index means the same tokens in each. The rows that the last stage gives return to the first.
use crate::Result;
use crate::runner::{Advanced, BlockIndex, Waker};

/// One micro-batch between two stages.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageInput {
    /// The residual stream, `[rows, hidden]`.
    pub x: Vec<f32>,
    /// Whose rows these are, in order.
    pub sequences: Vec<StageSequence>,
    /// Rows that are wanted after the last layer, ascending.
    pub wanted: Vec<u32>,
}

/// One sequence's rows of a micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct StageSequence {
    /// Its blocks; they cover `start + rows` positions at least.
    pub blocks: Vec<BlockIndex>,
    /// Position of its first row.
    pub start: usize,
    /// How many rows.
    pub rows: usize,
}

/// All later stages, as the one before them sees them.
pub trait LaterStages: Send {
    /// How many there are; at least 1.
    fn stages(&self) -> usize;
    /// Rows that a micro-batch has at most; at least 1.
    fn max_rows(&self) -> usize {
        usize::MAX
    }
    /// Takes what is called when one is lost, in lives that begin later.
    fn wake_with(&mut self, waker: Waker);
    /// Whether all are there, as far as is known; does not wait. Call it between steps.
    ///
    /// # Errors
    /// `Stage` when one is lost.
    fn check(&mut self) -> Result<()>;
    /// Grows while one that is not lost is waited for.
    fn advanced(&self) -> Advanced;
    /// Makes their KV pools, and begins a new life: what was sent and not received is forgotten.
    ///
    /// # Errors
    /// `Stage` when one cannot be reached, or has no room.
    fn allocate_kv(&mut self, blocks: usize) -> Result<()>;
    /// Sends a micro-batch; does not wait for its computation.
    ///
    /// # Errors
    /// `Stage` when the next one is lost.
    fn send(&mut self, input: StageInput) -> Result<()>;
    /// The wanted rows `[wanted, hidden]` of the earliest micro-batch that was sent and not received.
    ///
    /// # Errors
    /// `Stage` when one is lost, or lost its keys and values.
    fn receive(&mut self) -> Result<Vec<f32>>;
    /// Forgets what was sent and not received: the step failed.
    fn forget(&mut self);
    /// A block's bytes in all of them, in order.
    ///
    /// # Errors
    /// As [`Self::receive`].
    fn export_block(&mut self, block: BlockIndex) -> Result<Vec<u8>>;
    /// Fills a block in all of them.
    ///
    /// # Errors
    /// As [`Self::receive`].
    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()>;
}

/// Consecutive layers that end no sooner than the model's; what [`Stage`](crate::decoder::Stage) is on any backend.
pub trait StageRunner: Send {
    /// Bytes of its part of a KV block.
    fn block_bytes(&self) -> usize;
    /// Columns of its rows.
    fn hidden(&self) -> usize;
    /// How far [`Self::run`] is.
    fn advanced(&self) -> Advanced;
    /// Makes its KV pool.
    ///
    /// # Errors
    /// The backend's, when there is no room.
    fn allocate_kv(&mut self, blocks: usize) -> Result<()>;
    /// Runs a micro-batch: all rows after its layers, or the wanted ones after the model's last layer.
    ///
    /// # Errors
    /// `Backend` when blocks or rows do not fit; `Experts` when experts cannot be reached now.
    fn run(&mut self, input: &StageInput) -> Result<Vec<f32>>;
    /// Its part of a block's bytes.
    ///
    /// # Errors
    /// `Backend` when the block is outside the pool.
    fn export_block(&self, block: BlockIndex) -> Result<Vec<u8>>;
    /// Fills its part of a block.
    ///
    /// # Errors
    /// `Backend` when the block is outside the pool, or the bytes have another length.
    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()>;
}

/// How many layers each of `stages` gets, as evenly as it goes; the first ones get those that are over, for the last
/// rows of the model leave through the first stage's output matrix anyway.
pub fn split_layers(layers: usize, stages: usize) -> Vec<std::ops::Range<usize>> {
    let (each, over) = (layers / stages.max(1), layers % stages.max(1));
    let mut start = 0;
    (0..stages.max(1))
        .map(|stage| {
            let end = start + each + usize::from(stage < over);
            std::mem::replace(&mut start, end)..end
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_split_evenly_and_completely() {
        assert_eq!(split_layers(7, 3), [0..3, 3..5, 5..7]);
        assert_eq!(split_layers(4, 2), [0..2, 2..4]);
        assert_eq!(split_layers(2, 3), [0..1, 1..2, 2..2]);
    }
}
