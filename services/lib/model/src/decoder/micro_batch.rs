//! A step in parts: while one part's experts compute elsewhere, another is at its attention.
use super::laps::Laps;
use super::layer::Begun;
use crate::Result;
use crate::backend::{AttentionSequence, Backend};
use crate::runner::{LogitsWanted, SequenceChunk};
use moesaic_types::Routing;

/// Consecutive rows of a step on their way through the layers.
pub(super) struct MicroBatch<'a, B: Backend> {
    pub(super) rows: usize,
    pub(super) sequences: Vec<AttentionSequence<'a>>,
    pub(super) rotations: Vec<B::Rotation>,
    /// Rows whose logits are wanted.
    pub(super) wanted: Vec<u32>,
    /// Of the last MoE layer that was begun.
    pub(super) routing: Routing,
    pub(super) stream: Stream<B>,
}

/// Where the residual stream is.
pub(super) enum Stream<B: Backend> {
    /// Between two layers.
    Between(B::Tensor),
    /// In this MoE layer, counted among all layers.
    Begun(usize, Begun<B>),
    /// Taken by the layer that runs.
    Taken,
}

impl<B: Backend> MicroBatch<'_, B> {
    /// No rows.
    pub(super) fn empty() -> Self {
        let (sequences, rotations, wanted) = (Vec::new(), Vec::new(), Vec::new());
        Self { rows: 0, sequences, rotations, wanted, routing: Routing::new(), stream: Stream::Taken }
    }

    /// Its memory, for the rows of a later step.
    pub(super) fn emptied(mut self) -> MicroBatch<'static, B> {
        self.sequences.clear();
        self.rotations.clear();
        self.wanted.clear();
        // std collects in place where layouts agree; `tests/allocations.rs` holds it to that
        let sequences = self.sequences.into_iter().map(|_| unreachable!("it is empty")).collect();
        let (rotations, wanted, routing) = (self.rotations, self.wanted, self.routing);
        MicroBatch { rows: 0, sequences, rotations, wanted, routing, stream: Stream::Taken }
    }

    /// Ends the layer that was begun, if one was; the residual stream. Routing goes to `recorder`, a list for each MoE
    /// layer, which all micro-batches extend.
    pub(super) fn end(&mut self, backend: &B, recorder: Option<&mut Recorder>, laps: &mut Laps) -> Result<B::Tensor> {
        match std::mem::replace(&mut self.stream, Stream::Taken) {
            Stream::Between(x) => Ok(x),
            Stream::Begun(layer, begun) => {
                let (x, is_routed) = begun.end(backend, laps)?;
                if let Some(recorder) = recorder.filter(|_| is_routed) {
                    recorder.add(layer, &self.routing);
                }
                Ok(x)
            }
            Stream::Taken => unreachable!("a layer puts back what it takes, or the step fails"),
        }
    }
}

/// The experts that a step chose, by MoE layer and token.
#[derive(Default)]
pub(super) struct Recorder {
    layers: Vec<usize>,
    pub(super) chosen: Vec<Vec<Vec<u32>>>,
}

impl Recorder {
    /// Forgets the last step.
    pub(super) fn clear(&mut self) {
        self.layers.clear();
        self.chosen.clear();
    }

    fn add(&mut self, layer: usize, routing: &Routing) {
        let at = self.layers.iter().position(|known| *known == layer).unwrap_or_else(|| {
            self.layers.push(layer);
            self.chosen.push(Vec::new());
            self.layers.len() - 1
        });
        let sorted = |ends: &[u32]| {
            let mut experts = routing.experts[ends[0] as usize..ends[1] as usize].to_vec();
            experts.sort_unstable();
            experts
        };
        self.chosen[at].extend(routing.offsets.windows(2).map(sorted));
    }
}

/// Cuts a batch into at most `count` parts of about as many rows; the parts' rows in order are the batch's.
pub(super) fn cut<'a>(batch: &[SequenceChunk<'a>], count: usize) -> Vec<Vec<SequenceChunk<'a>>> {
    let rows: usize = batch.iter().map(|chunk| chunk.tokens.len()).sum();
    let size = rows.div_ceil(count.max(1)).max(1);
    let mut parts = vec![Vec::new()];
    let mut room = size;
    for chunk in batch {
        let mut rest = chunk.clone();
        while !rest.tokens.is_empty() {
            if room == 0 {
                parts.push(Vec::new());
                room = size;
            }
            let taken = rest.tokens.len().min(room);
            let last = taken == rest.tokens.len();
            let logits = if rest.logits == LogitsWanted::Last && !last { LogitsWanted::None } else { rest.logits };
            let part = SequenceChunk { tokens: &rest.tokens[..taken], logits, ..rest.clone() };
            parts.last_mut().expect("there is always a part").push(part);
            rest = SequenceChunk { tokens: &rest.tokens[taken..], start: rest.start + taken, ..rest };
            room -= taken;
        }
    }
    parts
}

/// The same for sequences' rows of a micro-batch that is under way.
pub(super) fn cut_rows<'a>(sequences: &[AttentionSequence<'a>], count: usize) -> Vec<Vec<AttentionSequence<'a>>> {
    let rows: usize = sequences.iter().map(|sequence| sequence.queries).sum();
    let size = rows.div_ceil(count.max(1)).max(1);
    let (mut parts, mut room) = (vec![Vec::new()], size);
    for sequence in sequences {
        let mut rest = *sequence;
        while rest.queries > 0 {
            if room == 0 {
                parts.push(Vec::new());
                room = size;
            }
            let taken = AttentionSequence { queries: rest.queries.min(room), ..rest };
            parts.last_mut().expect("there is always a part").push(taken);
            rest =
                AttentionSequence { start: rest.start + taken.queries, queries: rest.queries - taken.queries, ..rest };
            room -= taken.queries;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_in_order_are_the_batch(lengths in prop::collection::vec(1usize..9, 1..9), count in 1usize..5) {
            let tokens: Vec<u32> = (0..100).collect();
            let batch: Vec<SequenceChunk<'_>> = lengths
                .iter()
                .map(|&len| SequenceChunk { tokens: &tokens[len..2 * len], start: len, blocks: &[0], logits: LogitsWanted::Last })
                .collect();
            let parts = cut(&batch, count);
            prop_assert!(parts.len() <= count);
            prop_assert!(parts.iter().all(|part| !part.is_empty()));
            let rows = |part: &Vec<SequenceChunk<'_>>| part.iter().map(|chunk| chunk.tokens.len()).sum::<usize>();
            let (most, least) = (parts.iter().map(rows).max(), parts.iter().rev().skip(1).map(rows).min());
            prop_assert!(least.is_none_or(|least| Some(least) == most), "all but the last are as long");
            let flat = |chunk: &SequenceChunk<'_>| {
                let start = chunk.start;
                chunk.tokens.iter().enumerate().map(move |(i, token)| (start + i, *token)).collect::<Vec<_>>()
            };
            let all: Vec<_> = parts.iter().flatten().flat_map(flat).collect();
            prop_assert_eq!(all, batch.iter().flat_map(flat).collect::<Vec<_>>());
            let wanted = parts.iter().flatten().filter(|chunk| chunk.logits == LogitsWanted::Last).count();
            prop_assert_eq!(wanted, batch.len());
        }
    }
}
