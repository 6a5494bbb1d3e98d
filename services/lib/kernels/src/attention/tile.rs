//! One task: the lines of a tile over chunks of the context.
//!
//! A chunk is three passes: the scores of all lines, block by block; each line's softmax over the chunk; the weighted
//! values, some tiles of 16 dimensions at a time over the whole chunk, so that a sum stays in its register. In each
//! pass groups of lines share what they read.
use super::dots::{Numbers, Segment, group_limit, score, score_codes, takes_codes, weigh, weigh_codes};
use super::expand::{turn_bytes, turn_floats, turn_pairs, widen};
use super::layout::{BLOCK, KvFormat, KvLayer, LANES, Line};
use super::plan::{Plan, Task, Tile, oldest, partial_len};
use super::softmax::{self, NONE, Stats, finish, join, prepare, soften};
use super::{AttentionCall, AttentionSequence, CHUNK, ROW, chunk_tokens};
use crate::gemm::Shared;
use crate::isa::Isa;
use crate::pool::ahead::prefetch;
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Memory that is kept between tasks; grows to what the largest needs.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    fn lines(&mut self, len: usize) -> &mut [Line] {
        if self.0.len() < len {
            self.0.resize(len, Line::ZERO);
        }
        &mut self.0[..len]
    }

    pub(super) fn floats(&mut self, len: usize) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(self.lines(len.div_ceil(LANES)))[..len]
    }

    fn words(&mut self, len: usize) -> &mut [u32] {
        &mut bytemuck::cast_slice_mut(self.lines(len.div_ceil(LANES)))[..len]
    }
}

/// A thread's working space.
#[derive(Default)]
pub(super) struct Workspace {
    /// For each group of lines `[steps][group]`.
    q: Buffer,
    /// `[lines][ROW]`.
    scores: Buffer,
    /// `[lines][weights_row]`.
    weights: Buffer,
    /// A block's keys, widened.
    keys: Buffer,
    /// Tiles of a chunk's values, widened or turned.
    values: Buffer,
    /// Scales of a chunk's keys, and of its values, in int8.
    scales: [Buffer; 2],
    /// A chunk's outputs and statistics, as [`partial_len`] says.
    part: Buffer,
    /// The same of all chunks.
    total: Buffer,
}

/// What all tasks of a call share.
pub(super) struct Context<'a> {
    pub(super) isa: Isa,
    pub(super) kv: &'a KvLayer,
    pub(super) call: &'a AttentionCall<'a>,
    pub(super) sequences: &'a [AttentionSequence<'a>],
    pub(super) q: &'a [f32],
    pub(super) out: Shared<'a>,
    /// Partial results of the tiles that are split.
    pub(super) partial: Shared<'a>,
    pub(super) plan: &'a Plan,
}

/// Outputs `[lines][tiles · 16]` and statistics of a part.
fn parts(part: &mut [f32], lines: usize) -> (&mut [f32], &mut [Stats]) {
    let (out, stats) = part.split_at_mut(part.len() - 2 * lines);
    (out, bytemuck::cast_slice_mut(stats))
}

/// The groups of so many lines, as even as can be.
fn groups(lines: usize, limit: usize) -> impl Iterator<Item = Range<usize>> {
    let count = lines.div_ceil(limit);
    (0..count).map(move |group| lines * group / count..lines * (group + 1) / count)
}

impl Context<'_> {
    fn numbers(&self) -> Numbers {
        if self.kv.shape().format == KvFormat::F32 { Numbers::F32 } else { Numbers::Pairs }
    }

    fn groups(&self, tile: &Tile) -> impl Iterator<Item = Range<usize>> + use<> {
        groups(tile.lines(), group_limit(self.isa, self.numbers()))
    }

    /// Works a task off.
    pub(super) fn work(&self, task: &Task, space: &mut Workspace) {
        let Task { tile, first_chunk, chunks, split, .. } = task;
        let len = partial_len(tile.lines(), self.kv.shape().tiles());
        self.prepare(tile, space);
        let Some(split) = split.map(|split| &self.plan.splits[split]) else {
            let mut part = std::mem::take(&mut space.part);
            let mut total = std::mem::take(&mut space.total);
            self.start(tile, total.floats(len));
            for chunk in *first_chunk..first_chunk + chunks {
                let part = part.floats(len);
                self.chunk(tile, chunk, chunk + 1 < first_chunk + chunks, space, part);
                self.join(tile, total.floats(len), part);
            }
            self.finish(tile, total.floats(len));
            (space.part, space.total) = (part, total);
            return;
        };
        let part_of = |chunk: usize| {
            // SAFETY: each chunk of a split is one task's until that is counted off below; then all are the last task's.
            unsafe { self.partial.slice(split.at + (chunk - split.first_chunk) * len, len) }
        };
        for chunk in *first_chunk..first_chunk + chunks {
            self.chunk(tile, chunk, chunk + 1 < first_chunk + chunks, space, part_of(chunk));
        }
        if split.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            let total = space.total.floats(len);
            self.start(tile, total);
            for chunk in split.first_chunk..split.first_chunk + split.chunks {
                self.join(tile, total, part_of(chunk));
            }
            self.finish(tile, total);
        }
    }

    /// Queries as the products take them.
    fn prepare(&self, tile: &Tile, space: &mut Workspace) {
        let shape = self.kv.shape();
        let steps = shape.key_lines();
        let q = space.q.words(tile.lines() * steps);
        for group in self.groups(tile) {
            let q = &mut q[group.start * steps..group.end * steps];
            for line in group.clone() {
                let row = (tile.first_row + line / tile.heads) * self.call.heads + tile.first_head + line % tile.heads;
                let from = &self.q[row * shape.k_dim..][..shape.k_dim];
                prepare(self.isa, from, self.numbers() == Numbers::Pairs, group.len(), &mut q[line - group.start..]);
            }
        }
    }

    /// Nothing seen so far but the sinks: a sink is a key without a value that is there from the start.
    fn start(&self, tile: &Tile, total: &mut [f32]) {
        let (out, stats) = parts(total, tile.lines());
        out.fill(0.0);
        for (line, stats) in stats.iter_mut().enumerate() {
            *stats = match self.call.sinks {
                Some(sinks) => {
                    let logit = sinks[tile.first_head + line % tile.heads] * LOG2_E;
                    Stats { max: logit.clamp(f32::MIN, f32::MAX), sum: 1.0 }
                }
                None => Stats { max: NONE, sum: 0.0 },
            };
        }
    }

    fn join(&self, tile: &Tile, total: &mut [f32], part: &mut [f32]) {
        let row = self.kv.shape().tiles() * LANES;
        let ((total, stats), (part, part_stats)) = (parts(total, tile.lines()), parts(part, tile.lines()));
        let lines = total.chunks_exact_mut(row).zip(stats).zip(part.chunks_exact(row).zip(part_stats));
        for ((total, stats), (part, part_stats)) in lines {
            join(self.isa, total, stats, part, part_stats);
        }
    }

    fn finish(&self, tile: &Tile, total: &mut [f32]) {
        let shape = self.kv.shape();
        let row = shape.tiles() * LANES;
        let (total, stats) = parts(total, tile.lines());
        let lines = total.chunks_exact(tile.heads * row).zip(stats.chunks_exact(tile.heads));
        for (index, (total, stats)) in lines.enumerate() {
            let to = ((tile.first_row + index) * self.call.heads + tile.first_head) * shape.v_dim;
            // SAFETY: each (row, head) is in one tile, which is finished once; these are its heads' outputs.
            let out = unsafe { self.out.slice(to, tile.heads * shape.v_dim) };
            for ((total, stats), out) in total.chunks_exact(row).zip(stats).zip(out.chunks_exact_mut(shape.v_dim)) {
                finish(self.isa, &total[..shape.v_dim], stats, out);
            }
        }
    }

    /// One chunk of all lines, on its own; `more` if the next one follows.
    fn chunk(&self, tile: &Tile, chunk: usize, more: bool, space: &mut Workspace, part: &mut [f32]) {
        let tokens = chunk_tokens(self.kv.shape());
        let base = chunk * tokens;
        let visible = tile.visible(self.call.window);
        let seen = visible.start.saturating_sub(base)..visible.end.min(base + tokens) - base;
        let blocks = &self.sequences[tile.sequence].blocks[base / BLOCK..];
        let following = more.then(|| self.numbers_of(self.kv.keys(blocks[tokens / BLOCK], tile.kv_head)));
        let (out, stats) = parts(part, tile.lines());
        self.score(tile, blocks, &seen, following, space);
        self.soften(tile, base, &seen, space, stats);
        self.weigh(tile, blocks, &seen, following, space, out);
    }

    /// A head's bytes without its scales.
    fn numbers_of<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        if self.kv.shape().format == KvFormat::Int8 { &bytes[BLOCK * 4..] } else { bytes }
    }

    /// Asks for the scales that will be read: those of a block's values and of the next block's keys.
    fn fetch_scales(&self, kv_head: usize, block: u32, next: Option<&u32>) {
        let values = (!self.kv.shape().v_in_k).then(|| self.kv.values(block, kv_head));
        for bytes in values.into_iter().chain(next.map(|next| self.kv.keys(*next, kv_head))) {
            bytes[..BLOCK * 4].chunks(size_of::<Line>()).for_each(|line| prefetch(line.as_ptr().addr()));
        }
    }

    /// Whether int8 goes into the products as it is stored: where the tile's lines are one group, nobody shares what is
    /// widened.
    fn takes_codes(&self, tile: &Tile) -> bool {
        let shape = self.kv.shape();
        let one_group = tile.lines() <= group_limit(self.isa, self.numbers());
        shape.format == KvFormat::Int8 && !shape.v_in_k && one_group && takes_codes(self.isa, shape.key_lines())
    }

    /// Scores of all lines with the tokens that the tile sees. `following` is read after the chunk.
    fn score(&self, tile: &Tile, blocks: &[u32], seen: &Range<usize>, following: Option<&[u8]>, space: &mut Workspace) {
        let shape = self.kv.shape();
        let steps = shape.key_lines();
        let q = space.q.words(tile.lines() * steps);
        let scores = space.scores.floats(tile.lines() * ROW);
        let all_runs = seen.start / LANES..seen.end.div_ceil(LANES);
        // the values come after the keys
        let values = if shape.v_in_k {
            following
        } else {
            Some(self.numbers_of(self.kv.values(blocks[seen.start / BLOCK], tile.kv_head)))
        };
        let takes_codes = self.takes_codes(tile);
        for (block, runs) in pieces(&all_runs, BLOCK / LANES) {
            let bytes = self.kv.keys(blocks[block], tile.kv_head);
            let more = (block + 1) * BLOCK < seen.end;
            let next = if more { Some(self.numbers_of(self.kv.keys(blocks[block + 1], tile.kv_head))) } else { values };
            if shape.format == KvFormat::Int8 {
                let scales = bytemuck::cast_slice(&bytes[..BLOCK * 4]);
                space.scales[0].floats(CHUNK)[block * BLOCK..][..BLOCK].copy_from_slice(scales);
                self.fetch_scales(tile.kv_head, blocks[block], blocks.get(block + 1).filter(|_| more));
            }
            let numbers = self.numbers_of(bytes);
            let from = block * BLOCK + runs.start * LANES;
            if takes_codes {
                let keys = bytemuck::cast_slice(numbers);
                score_codes(self.isa, q, tile.lines(), keys, steps, runs, next, &mut scores[from..]);
                continue;
            }
            // what is widened is fetched ahead on its way
            let (keys, next): (&[Line], _) = if shape.format == KvFormat::Int8 {
                let keys = space.keys.lines(BLOCK / LANES * steps);
                let lines = runs.start * steps..runs.end * steps;
                let ahead = next.unwrap_or(numbers);
                widen(self.isa, &numbers[lines.start * 2 * LANES..], ahead, &mut keys[lines]);
                (keys, None)
            } else {
                (bytemuck::cast_slice(numbers), next)
            };
            for group in self.groups(tile) {
                // the first group fetches ahead for all
                let next = next.filter(|_| group.start == 0);
                let out = &mut scores[group.start * ROW + from..];
                let q = &q[group.start * steps..group.end * steps];
                score(self.isa, self.numbers(), q, group.len(), keys, steps, runs.clone(), next, out);
            }
        }
    }

    /// Weights and statistics of all lines.
    fn soften(&self, tile: &Tile, base: usize, seen: &Range<usize>, space: &mut Workspace, stats: &mut [Stats]) {
        let shape = self.kv.shape();
        let [key_scales, value_scales] = &mut space.scales;
        let (keys, values) = (key_scales.floats(CHUNK), value_scales.floats(CHUNK));
        let scales: Option<(&[f32], &[f32])> = (shape.format == KvFormat::Int8).then(|| {
            if shape.v_in_k {
                return (&*keys, &*keys);
            }
            let sequence = &self.sequences[tile.sequence];
            for (block, _) in pieces(seen, BLOCK) {
                let bytes = &self.kv.values(sequence.blocks[base / BLOCK + block], tile.kv_head)[..BLOCK * 4];
                values[block * BLOCK..][..BLOCK].copy_from_slice(bytemuck::cast_slice(bytes));
            }
            (&*keys, &*values)
        });
        let pairs = self.numbers() == Numbers::Pairs;
        let row = self.numbers().weights_row();
        let scores = space.scores.floats(tile.lines() * ROW).chunks_exact_mut(ROW);
        let weights = space.weights.words(tile.lines() * row).chunks_exact_mut(row);
        for (index, ((scores, weights), stats)) in scores.zip(weights).zip(stats).enumerate() {
            let position = tile.position + index / tile.heads;
            let end = (position + 1).saturating_sub(base).min(seen.end);
            let line = softmax::Line {
                runs: seen.start / LANES..seen.end.div_ceil(LANES),
                visible: oldest(position, self.call.window).saturating_sub(base).min(end)..end,
                factor: self.call.scale * LOG2_E,
                slope: self.call.alibi.map_or(0.0, |alibi| alibi[tile.first_head + index % tile.heads] * LOG2_E),
                distance: base as f32 - position as f32,
            };
            soften(self.isa, &line, scores, scales, pairs, weights, stats);
        }
    }

    /// Weighted values of all lines. `following` is read after the chunk.
    fn weigh(
        &self,
        tile: &Tile,
        blocks: &[u32],
        seen: &Range<usize>,
        following: Option<&[u8]>,
        space: &mut Workspace,
        out: &mut [f32],
    ) {
        let shape = self.kv.shape();
        let numbers = self.numbers();
        let per_step = if numbers == Numbers::Pairs { 2 } else { 1 };
        let steps = seen.start / per_step..seen.end.div_ceil(per_step);
        let half = !seen.end.is_multiple_of(per_step);
        let weights = &*space.weights.words(tile.lines() * numbers.weights_row());
        let row = shape.tiles() * LANES;
        if self.takes_codes(tile) {
            let (segments, count) = self.segments(tile, blocks, &steps);
            let (tiles, lines) = (0..shape.tiles(), tile.lines());
            return weigh_codes(self.isa, weights, lines, &segments[..count], tiles, following, out, row);
        }
        let stored = shape.format != KvFormat::Int8 && !shape.v_in_k;
        // a wide group takes two tiles at a time: what it reads stays near for the next group
        let wide = stored && self.groups(tile).next().is_some_and(|group| group.len() > 6);
        let at_once = if wide || numbers == Numbers::F32 { 2 } else { 4 };
        let (segments, count) = if stored { self.segments(tile, blocks, &steps) } else { ([Segment::NONE; _], 0) };
        let stride = chunk_tokens(shape) / per_step;
        for first in (0..shape.tiles()).step_by(at_once) {
            let tiles = first..(first + at_once).min(shape.tiles());
            let made;
            let (segments, read) = if stored {
                (&segments[..count], tiles.clone())
            } else {
                let values = space.values.lines(at_once * stride);
                for (tile_values, of_head) in values.chunks_exact_mut(stride).zip(tiles.clone()) {
                    self.make_values(tile.kv_head, blocks, seen, of_head, tile_values);
                }
                let (from, weight) = (steps.start, steps.start);
                made = [Segment { lines: values, stride, from, weight, steps: steps.len() }];
                (&made[..], 0..tiles.len())
            };
            // after the last segment come the next tiles of the first one
            let next = match segments.first() {
                Some(segment) if stored && tiles.end < shape.tiles() => {
                    Some(bytemuck::cast_slice(&segment.lines[tiles.end * segment.stride..]))
                }
                _ => following,
            };
            for group in self.groups(tile) {
                let weights = &weights[group.start * numbers.weights_row()..];
                let out = &mut out[group.start * row + first * LANES..];
                let next = next.filter(|_| group.start == 0);
                weigh(self.isa, numbers, weights, group.len(), segments, read.clone(), half, next, out, row);
            }
        }
    }

    /// The values of a chunk's steps as they are stored: a segment for each block, and how many there are.
    fn segments<T: bytemuck::AnyBitPattern>(
        &self,
        tile: &Tile,
        blocks: &[u32],
        steps: &Range<usize>,
    ) -> ([Segment<'_, T>; CHUNK / BLOCK], usize) {
        let stride = self.kv.shape().tile_lines();
        let mut segments = [Segment::NONE; _];
        let mut count = 0;
        for (block, part) in pieces(steps, stride) {
            segments[count] = Segment {
                lines: bytemuck::cast_slice(self.numbers_of(self.kv.values(blocks[block], tile.kv_head))),
                stride,
                from: part.start,
                weight: block * stride + part.start,
                steps: part.len(),
            };
            count += 1;
        }
        (segments, count)
    }

    /// One tile of a chunk's values that are not stored as the products take them.
    fn make_values(&self, kv_head: usize, blocks: &[u32], seen: &Range<usize>, tile: usize, out: &mut [Line]) {
        let shape = self.kv.shape();
        let steps = shape.key_lines();
        // lines of a run of tokens in the result
        let width = shape.tile_lines() * LANES / BLOCK;
        for (block, runs) in pieces(&(seen.start / LANES..seen.end.div_ceil(LANES)), BLOCK / LANES) {
            let out = &mut out[block * shape.tile_lines()..][..shape.tile_lines()];
            if !shape.v_in_k {
                let bytes = &self.kv.values(blocks[block], kv_head)[BLOCK * 4..];
                let first = (tile * shape.tile_lines() + runs.start * width) * 2 * LANES;
                let more = (block + 1) * BLOCK < seen.end;
                let next = if more { &self.kv.values(blocks[block + 1], kv_head)[BLOCK * 4..] } else { bytes };
                let out = &mut out[runs.start * width..runs.end * width];
                widen(self.isa, &bytes[first..], &next[first..], out);
                continue;
            }
            let keys = self.kv.keys(blocks[block], kv_head);
            for run in runs {
                let out = &mut out[run * width..][..width];
                match shape.format {
                    KvFormat::F32 => {
                        turn_floats(self.isa, &bytemuck::cast_slice(keys)[run * steps..][..steps], tile, out);
                    }
                    KvFormat::Bf16 => {
                        turn_pairs(self.isa, &bytemuck::cast_slice(keys)[run * steps..][..steps], tile, out);
                    }
                    KvFormat::Int8 => {
                        let bytes = &keys[BLOCK * 4 + run * steps * 2 * LANES..][..steps * 2 * LANES];
                        turn_bytes(self.isa, bytes, tile, out);
                    }
                }
            }
        }
    }
}

/// The parts of a range in blocks of `size`, each with its block and counted from that block's start.
fn pieces(range: &Range<usize>, size: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
    let (start, end) = (range.start, range.end);
    (start / size..end.div_ceil(size))
        .map(move |block| (block, start.saturating_sub(block * size)..(end - block * size).min(size)))
}
