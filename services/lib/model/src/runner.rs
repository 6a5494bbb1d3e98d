//! What the engine needs of a model: run one step over a batch, and move KV blocks.
use crate::{Result, spec::ModelSpec};
use bytes::Bytes;
use moesaic_types::{KvFormat, TokenId};
use std::sync::Arc;
use std::time::Duration;

/// Index of a KV block in the replica's pool.
pub type BlockIndex = u32;

/// Which rows of logits a chunk wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted {
    /// None: a prefill chunk that does not reach the prompt's end.
    None,
    /// The last token's.
    Last,
    /// Every token's (prompt log-probabilities, `check`).
    All,
}

/// One sequence's part of a step: consecutive tokens at positions `start..start + tokens.len()`.
#[derive(Clone, Debug)]
pub struct SequenceChunk<'a> {
    /// The tokens; at least one.
    pub tokens: &'a [TokenId],
    /// Position of the first token; keys and values of all earlier positions are in `blocks`.
    pub start: usize,
    /// The sequence's KV blocks in order; covers `start + tokens.len()` positions at least. Blocks that lie wholly
    /// before `start` may be shared with other sequences and are only read.
    pub blocks: &'a [BlockIndex],
    /// Which logits to return.
    pub logits: LogitsWanted,
}

/// Wakes the thread that drives a model; called on any thread.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Grows while a computation gets on; read on any thread.
pub type Advanced = Box<dyn Fn() -> u64 + Send + Sync>;

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepPart {
    /// Rows of the embedding and the positions' rotations.
    Embed,
    /// Norms, rotations and sums of the residual stream.
    Elementwise,
    /// Matrix products before attention: queries, keys and values.
    Projections,
    /// Writing keys and values, and attention over them.
    Attention,
    /// The matrix product after attention.
    Output,
    /// Choosing experts.
    Router,
    /// Experts, shared ones too, and dense feed-forward networks.
    Experts,
    /// The output matrix: logits.
    Head,
}

impl StepPart {
    /// All of them, in the order in which a step runs them.
    pub const ALL: [Self; 8] = [
        Self::Embed,
        Self::Elementwise,
        Self::Projections,
        Self::Attention,
        Self::Output,
        Self::Router,
        Self::Experts,
        Self::Head,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Elementwise => "elementwise",
            Self::Projections => "projections",
            Self::Attention => "attention",
            Self::Output => "output",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::Head => "head",
        }
    }
}

/// How long the parts of some steps took, on the thread that drives the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Profile([Duration; StepPart::ALL.len()]);

impl Profile {
    /// Adds to a part.
    pub fn add(&mut self, part: StepPart, time: Duration) {
        self.0[part as usize] += time;
    }

    /// The time of a part.
    pub fn of(&self, part: StepPart) -> Duration {
        self.0[part as usize]
    }

    /// What came after an earlier profile of the same model.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|part| self.0[part] - earlier.0[part]))
    }
}

/// A loaded model with its KV pool on one device. One thread drives it.
pub trait Runner: Send {
    /// The model's architecture.
    fn spec(&self) -> &ModelSpec;
    /// Bytes of one KV block (64 tokens, all layers).
    fn kv_block_bytes(&self) -> usize;
    /// How keys and values are stored.
    fn kv_format(&self) -> KvFormat;
    /// Takes what is called when [`Self::check_parts`] may fail from now on, though nothing runs. Call it before
    /// `allocate_kv`.
    fn wake_with(&mut self, waker: Waker) {
        drop(waker);
    }
    /// How far [`Self::forward`] is, or a wait for other processes that has an end; `None`: it does not tell.
    fn advanced(&self) -> Option<Advanced> {
        None
    }
    /// The time of all steps so far by their parts; `None`: it is not measured.
    fn profile(&self) -> Option<Profile> {
        None
    }
    /// Whether all parts of the model are there, as far as is known; does not wait. Call it between steps.
    ///
    /// # Errors
    /// `Stage` when a pipeline stage is lost.
    fn check_parts(&mut self) -> Result<()> {
        Ok(())
    }
    /// Makes the KV pool of `blocks` blocks; their contents are unspecified. Call once before `forward`.
    fn allocate_kv(&mut self, blocks: usize) -> Result<()>;
    /// Runs one step. Appends to `logits` the wanted rows (`[rows, vocab]` f32, in the order of the chunks and
    /// positions). On error the KV of the chunks' new positions is unspecified and nothing else changed.
    fn forward(&mut self, batch: &[SequenceChunk<'_>], logits: &mut Vec<f32>) -> Result<()>;
    /// The experts that the last `forward` chose: `[moe layer][token of the batch] -> expert ids, ascending`.
    /// Recorded only after `record_routing(true)`.
    fn routing(&self) -> &[Vec<Vec<u32>>];
    /// Turns the recording of routing on or off.
    fn record_routing(&mut self, on: bool);
    /// The bytes of a KV block, in a form that `import_block` of any replica of this model and format reads.
    fn export_block(&mut self, block: BlockIndex) -> Result<Bytes>;
    /// Fills a KV block; an error when `bytes` has another length than `kv_block_bytes`.
    fn import_block(&mut self, block: BlockIndex, bytes: &[u8]) -> Result<()>;
}
