//! How fast attention is, beside what the machine reads and multiplies in the same run. Prints tables; nothing is
//! asserted.
//!
//!     cargo bench -p moesaic-kernels --bench attention [-- --threads N] [--seconds S] [--depth N] [--queries N]
//!         [--case NAME]
//!
//! Decode is given in GB/s of keys and values as they are stored, and in fractions of the read bandwidth; prefill in
//! GFLOP/s of the visible scores and weighted values, and in fractions of the bf16 peak (of the f32 peak for f32). Each
//! number is the best of many short runs, and the ceilings are measured between them: other processes want the cores
//! too. One thread (`--threads 1`) is measured by its own time, so that what others take of it does not count.
#![allow(clippy::print_stdout, reason = "a bench prints")]
#![allow(clippy::unwrap_used, reason = "a bench fails there")]
#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/common/mod.rs"]
mod common;

use common::noise;
use moesaic_kernels::{AttentionCall, AttentionSequence, Isa, Kernels, KvFormat, KvLayer, KvShape, Pool};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes that are read for the bandwidth: more than the caches hold.
const READ: usize = 256 << 20;

struct Case {
    name: &'static str,
    heads: usize,
    kv_heads: usize,
    k_dim: usize,
    v_dim: usize,
    v_in_k: bool,
}

const CASES: [Case; 3] = [
    Case { name: "16/4/D64", heads: 16, kv_heads: 4, k_dim: 64, v_dim: 64, v_in_k: false },
    Case { name: "32/4/D128", heads: 32, kv_heads: 4, k_dim: 128, v_dim: 128, v_in_k: false },
    Case { name: "MLA 16", heads: 16, kv_heads: 1, k_dim: 576, v_dim: 512, v_in_k: true },
];
const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8];

/// Time that this thread has had its core.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The best of many runs.
fn best(threads: usize, seconds: f64, mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let now = || {
        if threads == 1 {
            return thread_time();
        }
        begin.elapsed()
    };
    run();
    let end = begin.elapsed() + Duration::from_secs_f64(seconds);
    let mut least = f64::MAX;
    loop {
        let start = now();
        run();
        least = least.min((now() - start).as_secs_f64());
        if begin.elapsed() > end {
            return least;
        }
    }
}

/// GB/s of all threads reading.
fn read_bandwidth(pool: &Pool, words: &[u64], seconds: f64) -> f64 {
    let sum = AtomicU64::new(0);
    let chunks: Vec<_> = words.chunks(1 << 15).collect();
    // a run reads a part, so that it fits in a slice of time
    let part = chunks.len() / 16;
    let mut turn = 0;
    let least = best(pool.threads(), seconds, || {
        turn = (turn + 1) % 16;
        let chunks = &chunks[turn * part..][..part];
        pool.run(chunks.len(), &|chunk| {
            let mut lanes = [0u64; 32];
            for words in chunks[chunk].as_chunks::<32>().0 {
                lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane ^= word);
            }
            sum.fetch_xor(lanes.iter().fold(0, |a, b| a ^ b), Ordering::Relaxed);
        });
    });
    std::hint::black_box(sum);
    size_of_val(words) as f64 / 16.0 / least / 1e9
}

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::x86_64::{__m512bh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_ps, _mm512_storeu_ps};

    pub const ROUNDS: usize = 20_000;

    /// 24 chains of products of pairs of bf16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16(out: &mut [f32; 16]) {
        let mut sums = [_mm512_set1_ps(0.0); 24];
        // SAFETY: both types are 64 plain bytes.
        let pair = unsafe { std::mem::transmute::<[f32; 16], __m512bh>(std::hint::black_box([1e-3; 16])) };
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, pair, pair));
        }
        let sum = sums.into_iter().fold(_mm512_set1_ps(0.0), |a, b| _mm512_fmadd_ps(a, b, b));
        // SAFETY: `out` takes 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }

    /// 24 chains of fused multiply-adds.
    #[target_feature(enable = "avx512f")]
    pub fn f32(out: &mut [f32; 16]) {
        let mut sums = [_mm512_set1_ps(0.0); 24];
        let number = _mm512_set1_ps(std::hint::black_box(1e-3));
        for _ in 0..ROUNDS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(number, number, *sum));
        }
        let sum = sums.into_iter().fold(_mm512_set1_ps(0.0), |a, b| _mm512_fmadd_ps(a, b, b));
        // SAFETY: `out` takes 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
}

/// GFLOP/s of bf16 pairs and of f32 on all threads; 0 where the instructions are missing.
fn peaks(pool: &Pool, seconds: f64) -> (f64, f64) {
    #[cfg(target_arch = "x86_64")]
    {
        let tasks = pool.threads() * 4;
        let rate = |flops: f64, run: fn(&mut [f32; 16])| {
            let least = best(pool.threads(), seconds, || {
                pool.run(tasks, &|_| {
                    let mut out = [0.0; 16];
                    run(&mut out);
                    std::hint::black_box(out);
                });
            });
            (tasks * 24 * peak::ROUNDS) as f64 * flops / least / 1e9
        };
        // SAFETY: called where the CPU has the instructions only.
        let bf16: fn(&mut [f32; 16]) = |out| unsafe { peak::bf16(out) };
        // SAFETY: as above.
        let f32: fn(&mut [f32; 16]) = |out| unsafe { peak::f32(out) };
        let has = std::arch::is_x86_feature_detected!("avx512f");
        let pairs = if std::arch::is_x86_feature_detected!("avx512bf16") { rate(64.0, bf16) } else { 0.0 };
        (pairs, if has { rate(32.0, f32) } else { 0.0 })
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (pool, seconds);
        (0.0, 0.0)
    }
}

/// A layer with `tokens` tokens in each of `sequences` sequences, whose blocks are scattered.
fn layer(case: &Case, format: KvFormat, tokens: usize, sequences: usize) -> (KvLayer, Vec<Vec<u32>>) {
    let &Case { kv_heads, k_dim, v_dim, v_in_k, .. } = case;
    let shape = KvShape { kv_heads, k_dim, v_dim, v_in_k, format };
    let each = tokens.div_ceil(64);
    let count = each * sequences;
    let mut kv = KvLayer::new(shape, count).unwrap();
    let (k, v) = (noise(1, 64 * kv_heads * k_dim), noise(2, 64 * kv_heads * v_dim));
    for slot in 0..64 {
        let v = if v_in_k { &[][..] } else { &v[slot * kv_heads * v_dim..][..kv_heads * v_dim] };
        kv.write(0, slot, &k[slot * kv_heads * k_dim..][..kv_heads * k_dim], v);
    }
    let mut bytes = Vec::new();
    kv.export(0, &mut bytes);
    (0..count as u32).for_each(|block| kv.import(block, &bytes).unwrap());
    let scattered = |n: usize| ((n * 7919) % count) as u32;
    let step = if count.is_multiple_of(7919) { 1 } else { 7919 };
    let blocks = (0..sequences)
        .map(|s| (0..each).map(|b| if step == 1 { (s * each + b) as u32 } else { scattered(s * each + b) }).collect())
        .collect();
    (kv, blocks)
}

struct Ceilings {
    read: f64,
    bf16: f64,
    f32: f64,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1));
    let threads = value("--threads").map_or(2, |n| n.parse().unwrap());
    let seconds = value("--seconds").map_or(0.7, |n| n.parse().unwrap());
    let queries = value("--queries").map_or(512, |n| n.parse().unwrap());
    let depths = value("--depth").map_or(vec![1024, 4096, 32_768], |n| vec![n.parse().unwrap()]);
    let only = value("--case").map_or("", |name| name);
    let pool: Arc<Pool> = Pool::new(threads);
    let kernels = Kernels::new(threads);
    let with = (&kernels, threads);
    let memory = vec![1u64; READ / 8];
    let measure = || {
        let (bf16, f32) = peaks(&pool, seconds);
        Ceilings { read: read_bandwidth(&pool, &memory, seconds), bf16, f32 }
    };
    println!("{threads} threads, {}", Isa::best());
    println!(
        "{:<10} {:<5} {:>6}  decode GB/s (of read)   16 sequences      prefill GFLOP/s (of peak)",
        "", "", "depth"
    );
    for case in CASES.iter().filter(|case| case.name.contains(only)) {
        for format in FORMATS {
            let ceilings = measure();
            let Ceilings { read, bf16, f32 } = ceilings;
            println!("ceilings: read {read:.1} GB/s, bf16 {bf16:.0} GFLOP/s, f32 {f32:.0} GFLOP/s");
            for &depth in &depths {
                let one = decode(with, case, format, depth, 1, seconds);
                let many = decode(with, case, format, depth.min(4096), 16, seconds);
                let pre = prefill(with, case, format, depth, queries, seconds);
                let peak = if format == KvFormat::F32 { f32 } else { bf16 };
                println!(
                    "{:<10} {:<5} {depth:>6}  {one:>11.1} ({:>4.2})  {many:>10.1} ({:>4.2})  {pre:>12.0} ({:>4.2})",
                    case.name,
                    format!("{format:?}").to_lowercase(),
                    one / read,
                    many / read,
                    pre / peak,
                );
            }
        }
    }
}

/// GB/s of one new token for each sequence.
fn decode(
    (kernels, threads): (&Kernels, usize),
    case: &Case,
    format: KvFormat,
    depth: usize,
    sequences: usize,
    seconds: f64,
) -> f64 {
    // a layer's cache is read again only after all the others': so many copies that the caches hold none of them
    let shape = layer(case, format, 64, 1).0;
    let bytes = shape.block_len() * depth / 64 * sequences;
    let copies = ((128 << 20) / bytes).clamp(1, 64);
    let (kv, blocks) = layer(case, format, depth, sequences * copies);
    let q = noise(3, sequences * case.heads * case.k_dim);
    let mut out = vec![0.0; sequences * case.heads * case.v_dim];
    let call = AttentionCall { heads: case.heads, scale: 0.1, window: None, sinks: None, alibi: None };
    let mut turn = 0;
    let least = best(threads, seconds, || {
        let batch: Vec<_> = blocks[turn * sequences..][..sequences]
            .iter()
            .map(|blocks| AttentionSequence { blocks, start: depth - 1, queries: 1 })
            .collect();
        kernels.attention(&kv, &call, &batch, &q, &mut out);
        turn = (turn + 1) % copies;
    });
    bytes as f64 / least / 1e9
}

/// GFLOP/s of the last queries.
fn prefill(
    (kernels, threads): (&Kernels, usize),
    case: &Case,
    format: KvFormat,
    depth: usize,
    queries: usize,
    seconds: f64,
) -> f64 {
    let (kv, blocks) = layer(case, format, depth, 1);
    let q = noise(3, queries * case.heads * case.k_dim);
    let mut out = vec![0.0; queries * case.heads * case.v_dim];
    let call = AttentionCall { heads: case.heads, scale: 0.1, window: None, sinks: None, alibi: None };
    let batch = [AttentionSequence { blocks: &blocks[0], start: depth - queries, queries }];
    let least = best(threads, seconds, || kernels.attention(&kv, &call, &batch, &q, &mut out));
    let seen: usize = (depth - queries + 1..=depth).sum();
    (2 * seen * case.heads * (case.k_dim + case.v_dim)) as f64 / least / 1e9
}
