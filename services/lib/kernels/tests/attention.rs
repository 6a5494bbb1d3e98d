//! Attention: what its bits may depend on, what stale memory may do, and how near it is to the definition.
//!
//! Contexts are longer than a chunk, and cases take odd dimensions, windows, sinks, ALiBi and the latent form.
use moesaic_kernels::{AttentionCall, AttentionSequence, Error, Isa, Kernels, KvFormat, KvLayer, KvShape};

#[allow(dead_code, reason = "the other tests need the matrices")]
mod common;
use common::noise;

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8];
const SCALE: f32 = 0.3;
const LEN: usize = 560;

/// KV heads, heads, k_dim, v_dim, v_in_k.
const SHAPES: [(usize, usize, usize, usize, bool); 4] =
    [(2, 4, 32, 32, false), (1, 13, 9, 17, false), (1, 8, 40, 32, true), (1, 3, 261, 35, true)];

/// A layer with one sequence of `LEN` tokens, and what was written.
struct Cache {
    kv: KvLayer,
    blocks: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
    heads: usize,
}

impl Cache {
    /// Every byte of the blocks is `stale` before the tokens are written.
    fn new(
        (kv_heads, heads, k_dim, v_dim, v_in_k): (usize, usize, usize, usize, bool),
        format: KvFormat,
        stale: u8,
    ) -> Self {
        let shape = KvShape { kv_heads, k_dim, v_dim, v_in_k, format };
        let count = LEN.div_ceil(64) as u32;
        let mut kv = KvLayer::new(shape, count as usize).expect("a few blocks fit in memory");
        let blocks: Vec<u32> = (0..count).map(|b| b * 7 % count).collect();
        (0..count).for_each(|block| kv.import(block, &vec![stale; shape.block_len()]).expect("a block's length"));
        let (k, v) = (noise(1, LEN * kv_heads * k_dim), noise(2, LEN * kv_heads * v_dim));
        let mut cache = Self { kv, blocks, k, v, q: noise(3, LEN * heads * k_dim), heads };
        cache.write(0, LEN);
        cache
    }

    fn write(&mut self, start: usize, end: usize) {
        let KvShape { kv_heads, k_dim, v_dim, v_in_k, .. } = *self.kv.shape();
        for t in start..end {
            let v = if v_in_k { &[][..] } else { &self.v[t * kv_heads * v_dim..][..kv_heads * v_dim] };
            self.kv.write(self.blocks[t / 64], t % 64, &self.k[t * kv_heads * k_dim..][..kv_heads * k_dim], v);
        }
    }

    /// Outputs of pieces (start, queries) in one call.
    fn run(&self, kernels: &Kernels, call: &AttentionCall<'_>, pieces: &[(usize, usize)]) -> Vec<f32> {
        let width = self.heads * self.kv.shape().k_dim;
        let q: Vec<f32> = pieces.iter().flat_map(|(start, n)| &self.q[start * width..][..n * width]).copied().collect();
        let rows: usize = pieces.iter().map(|(_, n)| n).sum();
        let sequences: Vec<_> =
            pieces.iter().map(|&(start, queries)| AttentionSequence { blocks: &self.blocks, start, queries }).collect();
        let mut out = vec![f32::NAN; rows * self.heads * self.kv.shape().v_dim];
        kernels.attention(&self.kv, call, &sequences, &q, &mut out);
        out
    }
}

/// Window, sinks, ALiBi.
fn variants(heads: usize, check: &mut dyn FnMut(&AttentionCall<'_>)) {
    let (sinks, alibi) = (noise(4, heads), noise(5, heads).iter().map(|slope| slope.abs() * 0.1).collect::<Vec<_>>());
    for (window, sinks, alibi) in
        [(None, None, None), (Some(77), Some(&sinks[..]), None), (Some(530), Some(&sinks[..]), Some(&alibi[..]))]
    {
        check(&AttentionCall { heads, scale: SCALE, window, sinks, alibi });
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_query_has_the_same_bits_in_the_prompt_in_pieces_alone_in_a_batch_and_on_any_threads() {
    for shape in SHAPES {
        for format in FORMATS {
            let cache = Cache::new(shape, format, 0);
            for isa in [Isa::best(), *Isa::available().iter().rev().nth(2).unwrap_or(&Isa::best())] {
                let threads: Vec<_> = [1, 3].into_iter().map(|n| Kernels::with_isa(n, isa)).collect();
                variants(shape.1, &mut |call| {
                    let row = shape.1 * shape.3;
                    let whole = bits(&cache.run(&threads[0], call, &[(0, LEN)]));
                    let what = |how: &str| format!("{shape:?} {format:?} {isa} {call:?}: {how}");
                    for kernels in &threads[1..] {
                        assert!(whole == bits(&cache.run(kernels, call, &[(0, LEN)])), "{}", what("threads"));
                    }
                    let cuts = [0, 1, 2, 65, 512, 513, LEN];
                    let pieces: Vec<_> = cuts.windows(2).map(|cut| (cut[0], cut[1] - cut[0])).collect();
                    for kernels in &threads {
                        assert!(whole == bits(&cache.run(kernels, call, &pieces)), "{}", what("pieces in one call"));
                        for &(start, n) in &pieces {
                            let part = bits(&cache.run(kernels, call, &[(start, n)]));
                            assert!(part[..] == whole[start * row..][..n * row], "{}", what("pieces"));
                        }
                        let alone = [0, 1, 14, 63, 64, 511, 512, LEN - 1];
                        for position in alone {
                            let part = bits(&cache.run(kernels, call, &[(position, 1)]));
                            assert!(part[..] == whole[position * row..][..row], "{}", what(&format!("at {position}")));
                        }
                        let batch: Vec<_> = alone.iter().map(|position| (*position, 1)).collect();
                        let together = bits(&cache.run(kernels, call, &batch));
                        for (part, position) in together.chunks_exact(row).zip(alone) {
                            assert!(part == &whole[position * row..][..row], "{}", what("decoded in a batch"));
                        }
                    }
                });
            }
        }
    }
}

#[test]
fn slots_that_are_not_written_do_not_matter_even_as_nan() {
    for shape in SHAPES {
        for format in FORMATS {
            let clean = Cache::new(shape, format, 0);
            // each length ends a block's slots, a run, or a pair elsewhere
            for len in [1, 16, 63, 525] {
                let mut stale = Cache::new(shape, format, 0xff);
                let block_len = stale.kv.block_len();
                (0..stale.blocks.len() as u32)
                    .for_each(|b| stale.kv.import(b, &vec![0xff; block_len]).expect("a block's length"));
                stale.write(0, len);
                for isa in Isa::available() {
                    let kernels = Kernels::with_isa(2, isa);
                    variants(shape.1, &mut |call| {
                        let queries = len.min(3);
                        let piece = [(len - queries, queries)];
                        let (want, got) = (clean.run(&kernels, call, &piece), stale.run(&kernels, call, &piece));
                        assert!(want.iter().all(|v| v.is_finite()));
                        assert!(bits(&want) == bits(&got), "{shape:?} {format:?} {isa} {len} {call:?}");
                    });
                }
            }
        }
    }
}

#[test]
fn long_contexts_equal_the_definition_on_every_instruction_set() {
    for shape in SHAPES {
        let (kv_heads, heads, k_dim, v_dim, v_in_k) = shape;
        for format in FORMATS {
            let cache = Cache::new(shape, format, 0);
            let tolerance = match format {
                KvFormat::F32 => 5e-6,
                KvFormat::Bf16 => 8e-3,
                KvFormat::Int8 => 2e-2,
            };
            variants(heads, &mut |call| {
                let positions = [0, 64, LEN - 1];
                let pieces = positions.map(|position| (position, 1));
                let outs: Vec<_> =
                    Isa::available().iter().map(|isa| cache.run(&Kernels::with_isa(2, *isa), call, &pieces)).collect();
                for (index, position) in positions.into_iter().enumerate() {
                    for head in 0..heads {
                        let kv_head = head / (heads / kv_heads);
                        let q = &cache.q[(position * heads + head) * k_dim..][..k_dim];
                        let from = call.window.map_or(0, |w| (position + 1).saturating_sub(w));
                        let (mut total, mut want) =
                            (call.sinks.map_or(0.0, |s| f64::from(s[head]).exp()), vec![0.0; v_dim]);
                        for t in from..=position {
                            let k = &cache.k[(t * kv_heads + kv_head) * k_dim..][..k_dim];
                            let dot: f64 = k.iter().zip(q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                            let slope = call.alibi.map_or(0.0, |a| f64::from(a[head]));
                            let p = (dot * f64::from(SCALE) + slope * (t as f64 - position as f64)).exp();
                            let v = if v_in_k { k } else { &cache.v[(t * kv_heads + kv_head) * v_dim..][..v_dim] };
                            want.iter_mut().zip(v).for_each(|(want, v)| *want += p * f64::from(*v));
                            total += p;
                        }
                        for (isa, out) in Isa::available().iter().zip(&outs) {
                            let got = &out[(index * heads + head) * v_dim..][..v_dim];
                            for (got, want) in got.iter().zip(&want) {
                                let error = (f64::from(*got) - want / total).abs();
                                assert!(error < tolerance, "{shape:?} {format:?} {isa} {position} {call:?}: {error}");
                            }
                        }
                    }
                }
            });
        }
    }
}

/// A value of one token's first KV head, or of its key, is no number.
fn poisoned(shape: (usize, usize, usize, usize, bool), in_key: bool, value: f32, token: usize) -> Cache {
    let (kv_heads, _, k_dim, v_dim, _) = shape;
    let mut cache = Cache::new(shape, KvFormat::Int8, 0);
    let (rows, dim) = if in_key { (&mut cache.k, k_dim) } else { (&mut cache.v, v_dim) };
    rows[token * kv_heads * dim + dim / 2] = value;
    cache.write(token, token + 1);
    cache
}

#[test]
fn int8_tokens_that_are_no_numbers_give_nan_where_they_are_seen_and_nothing_elsewhere() {
    const TOKEN: usize = 100;
    for shape in SHAPES {
        let (kv_heads, heads, _, v_dim, v_in_k) = shape;
        let clean = Cache::new(shape, KvFormat::Int8, 0);
        let steep = vec![5.0; heads];
        let calls = [
            AttentionCall { heads, scale: SCALE, window: None, sinks: None, alibi: None },
            AttentionCall { heads, scale: SCALE, window: Some(77), sinks: None, alibi: None },
            // older tokens have a weight of 0, and are seen all the same
            AttentionCall { heads, scale: SCALE, window: None, sinks: None, alibi: Some(&steep) },
        ];
        for (in_key, value) in [(true, f32::NAN), (true, f32::INFINITY), (false, f32::NAN), (false, f32::NEG_INFINITY)]
        {
            if !in_key && v_in_k {
                continue;
            }
            let cache = poisoned(shape, in_key, value, TOKEN);
            for isa in Isa::available() {
                let kernels = Kernels::with_isa(2, isa);
                for call in &calls {
                    // queries before and after the token share a tile
                    let pieces = [(TOKEN - 5, 12), (TOKEN + 60, 30), (LEN - 1, 1)];
                    let (want, got) = (clean.run(&kernels, call, &pieces), cache.run(&kernels, call, &pieces));
                    let positions = pieces.iter().flat_map(|(start, n)| *start..start + n);
                    let lines = positions.flat_map(|position| (0..heads).map(move |head| (position, head)));
                    let outs = want.chunks_exact(v_dim).zip(got.chunks_exact(v_dim));
                    for ((position, head), (want, got)) in lines.zip(outs) {
                        let what = format!("{shape:?} {in_key} {value} {isa} {call:?} {position}/{head}: {got:?}");
                        let from = call.window.map_or(0, |w| (position + 1).saturating_sub(w));
                        if (from..=position).contains(&TOKEN) && head < heads / kv_heads {
                            assert!(got.iter().all(|v| v.is_nan()), "{what}");
                        } else {
                            assert!(want.iter().all(|v| v.is_finite()) && bits(want) == bits(got), "{what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_block_with_a_code_that_instruction_sets_disagree_on_is_refused() {
    for v_in_k in [false, true] {
        let shape = KvShape { kv_heads: 2, k_dim: 5, v_dim: 5, v_in_k, format: KvFormat::Int8 };
        let mut kv = KvLayer::new(shape, 1).expect("a block fits in memory");
        let len = shape.block_len();
        // keys' and values' heads are 256 bytes of scales, which may have any bits, and their codes
        let (key, value) = (256 + 64 * 6, 256 + 64 * 16);
        let heads = if v_in_k { vec![0, key] } else { vec![0, key, 2 * key, 2 * key + value] };
        for (index, start) in heads.iter().enumerate() {
            let end = heads.get(index + 1).copied().unwrap_or(len);
            for (at, refused) in [(*start, false), (start + 255, false), (start + 256, true), (end - 1, true)] {
                let mut bytes = vec![0; len];
                bytes[at] = 0x80;
                let error = kv.import(0, &bytes).err();
                assert_eq!(error, refused.then_some(Error::Code), "{v_in_k} byte {at} of {len}");
            }
        }
    }
    // other formats have no codes
    let shape = KvShape { kv_heads: 1, k_dim: 4, v_dim: 4, v_in_k: false, format: KvFormat::Bf16 };
    let mut kv = KvLayer::new(shape, 1).expect("a block fits in memory");
    assert_eq!(kv.import(0, &vec![0x80; shape.block_len()]), Ok(()));
}
