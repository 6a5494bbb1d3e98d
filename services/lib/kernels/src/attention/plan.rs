//! How a call is cut into tasks: tiles of queries and heads, and a long tile's chunks of the context on several threads.
//!
//! How it is cut changes no bits: a line is computed alone, chunk by chunk on a grid that starts at position 0, and the
//! chunks are joined in order.
use super::layout::{BLOCK, KvLayer, LANES};
use super::{AttentionCall, AttentionSequence, chunk_tokens};
use std::ops::Range;
use std::sync::atomic::AtomicUsize;

/// Lines of a tile where it has several queries.
const LINES: usize = 48;
/// Heads of a tile at most.
const HEADS: usize = 64;
/// Lines times tokens that are worth a task.
const WORTH: usize = 2048;
/// Tasks for each thread where there is enough work.
const PER_THREAD: usize = 4;

/// Consecutive queries of one sequence with heads of one KV head.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Its place in the call.
    pub(super) sequence: usize,
    /// Position of the first query.
    pub(super) position: usize,
    /// The first query's place in the call.
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) kv_head: usize,
    pub(super) first_head: usize,
    pub(super) heads: usize,
}

impl Tile {
    /// Queries and heads: line `row · heads + head`.
    pub(super) fn lines(&self) -> usize {
        self.rows * self.heads
    }

    /// Positions that any of its queries sees.
    pub(super) fn visible(&self, window: Option<usize>) -> Range<usize> {
        oldest(self.position, window)..self.position + self.rows
    }
}

/// The first position that a query sees.
pub(super) fn oldest(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// Chunks of a tile.
#[derive(Clone, Copy)]
pub(super) struct Task {
    pub(super) tile: Tile,
    pub(super) first_chunk: usize,
    pub(super) chunks: usize,
    /// Where the tile is cut: which of the cuts it is.
    pub(super) split: Option<usize>,
    work: usize,
}

/// A tile whose chunks are several tasks. The task that ends last joins them.
pub(super) struct Split {
    /// Tasks that have not ended.
    pub(super) open: AtomicUsize,
    /// All its chunks.
    pub(super) first_chunk: usize,
    pub(super) chunks: usize,
    /// Where its chunks' outputs start among the partial results.
    pub(super) at: usize,
}

/// Tasks of a call; kept between calls, so that a plan takes no memory anew.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) tasks: Vec<Task>,
    /// Where each dispatch's tasks end.
    pub(super) ends: Vec<usize>,
    pub(super) splits: Vec<Split>,
    /// Numbers of all partial results.
    pub(super) partial: usize,
}

/// Numbers of one chunk's partial result: the outputs and the statistics of its lines.
pub(super) fn partial_len(lines: usize, tiles: usize) -> usize {
    lines * (tiles * LANES + 2)
}

impl Plan {
    /// # Panics
    /// When a sequence's blocks do not cover its positions or do not exist.
    pub(super) fn make(
        &mut self,
        kv: &KvLayer,
        call: &AttentionCall<'_>,
        sequences: &[AttentionSequence<'_>],
        threads: usize,
    ) {
        let shape = kv.shape();
        self.tasks.clear();
        self.ends.clear();
        self.splits.clear();
        self.partial = 0;
        let chunk = chunk_tokens(shape);
        let group = call.heads / shape.kv_heads;
        let parts = group.div_ceil(HEADS);
        let rows = (LINES * parts / group).max(1);
        let mut first_row = 0;
        let mut total = 0;
        for (index, sequence) in sequences.iter().enumerate() {
            assert!(sequence.blocks.len() * BLOCK >= sequence.start + sequence.queries, "blocks cover the positions");
            assert!(sequence.blocks.iter().all(|b| (*b as usize) < kv.blocks()), "blocks exist");
            for query in (0..sequence.queries).step_by(rows) {
                for kv_head in 0..shape.kv_heads {
                    for part in 0..parts {
                        let heads = group * part / parts..group * (part + 1) / parts;
                        let tile = Tile {
                            sequence: index,
                            position: sequence.start + query,
                            first_row: first_row + query,
                            rows: rows.min(sequence.queries - query),
                            kv_head,
                            first_head: kv_head * group + heads.start,
                            heads: heads.len(),
                        };
                        let visible = tile.visible(call.window);
                        let first_chunk = visible.start / chunk;
                        let chunks = visible.end.div_ceil(chunk) - first_chunk;
                        let work = tile.lines() * visible.len();
                        total += work;
                        self.tasks.push(Task { tile, first_chunk, chunks, split: None, work });
                    }
                }
            }
            first_row += sequence.queries;
        }
        let fair = (total / (threads * PER_THREAD)).max(WORTH);
        if threads > 1 {
            self.split(fair, shape.tiles());
        }
        // the long ones first, so that no thread is left alone with one at the end
        self.tasks.sort_unstable_by_key(|task| std::cmp::Reverse(task.work));
        let mut work = 0;
        for (index, task) in self.tasks.iter().enumerate() {
            work += task.work;
            if work >= fair.min(4 * WORTH) || index + 1 == self.tasks.len() {
                self.ends.push(index + 1);
                work = 0;
            }
        }
    }

    /// Cuts the tiles that are more than a fair share.
    fn split(&mut self, fair: usize, tiles: usize) {
        for index in 0..self.tasks.len() {
            let whole = self.tasks[index];
            let pieces = whole.work.div_ceil(fair).min(whole.chunks);
            if pieces < 2 {
                continue;
            }
            let split = Some(self.splits.len());
            self.splits.push(Split {
                open: AtomicUsize::new(pieces),
                first_chunk: whole.first_chunk,
                chunks: whole.chunks,
                at: self.partial,
            });
            self.partial += whole.chunks * partial_len(whole.tile.lines(), tiles);
            for piece in 0..pieces {
                let chunks = whole.chunks * piece / pieces..whole.chunks * (piece + 1) / pieces;
                let task = Task {
                    first_chunk: whole.first_chunk + chunks.start,
                    chunks: chunks.len(),
                    split,
                    work: whole.work / pieces,
                    ..whole
                };
                if piece == 0 { self.tasks[index] = task } else { self.tasks.push(task) }
            }
        }
    }
}
