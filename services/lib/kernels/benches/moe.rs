//! Products with packed weights and whole layers of experts, as fractions of what the machine can do. Prints three
//! tables; nothing is asserted. The share of the peak is that of int8, also for bf16, of whose products a processor does
//! half as many.
//!
//!     cargo bench -p moesaic-kernels --bench moe [-- THREADS [ceilings|products|layers ...]]
#![allow(clippy::print_stdout, reason = "a bench prints")]
use half::f16;
use moesaic_kernels::{
    Activation, ActivationFormat, AlignedBytes, ExpertWeights, Format, Isa, Kernels, PackedMatrix, Storage, ceilings,
};
use std::convert::Infallible;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

const FORMATS: [(&str, Format); 4] = [
    ("q4 of 32", Format::Q4 { group: 32 }),
    ("q4 of 128", Format::Q4 { group: 128 }),
    ("q8", Format::Q8),
    ("bf16", Format::Bf16),
];
const ROWS: [usize; 6] = [1, 4, 6, 16, 64, 512];

/// What the machine can do with these threads.
struct Ceilings {
    threads: usize,
    int8: Option<f64>,
    read: f64,
}

impl Ceilings {
    fn new(threads: usize) -> Self {
        let ceilings = Self { threads, int8: ceilings::int8_peak(threads), read: ceilings::read_bandwidth(threads) };
        let int8 = ceilings.int8.map_or_else(|| "none".into(), |peak| format!("{:.0} GOP/s", peak / 1e9));
        println!("\n{threads} threads, {}: int8 {int8}, memory read {:.1} GB/s", Isa::best(), ceilings.read / 1e9);
        ceilings
    }

    /// `GOP/s (% of peak)`, `GB/s (% of reading)` for some work in some time.
    fn columns(&self, operations: f64, bytes: f64, time: f64) -> String {
        let share = self.int8.map_or(f64::NAN, |peak| operations / time / peak * 100.0);
        let (rate, read) = (operations / time / 1e9, bytes / time / 1e9);
        format!("{rate:8.1} {share:7.1}% {read:8.2} {:7.1}%", read * 1e9 / self.read * 100.0)
    }
}

fn main() {
    // cargo passes flags of its own harness
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let number = arguments.first().and_then(|argument| argument.parse().ok());
    let threads = number.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let parts = &arguments[usize::from(number.is_some())..];
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    if cfg!(debug_assertions) {
        return println!("a build without optimization says nothing about speed");
    }
    if wanted("ceilings") && !wanted("products") && !wanted("layers") {
        Ceilings::new(threads);
    }
    if wanted("products") {
        products(&Ceilings::new(threads));
    }
    if wanted("layers") {
        for (hidden, inter) in [(2048, 768), (1024, 384)] {
            for (name, format) in &FORMATS[..2] {
                layers(&Ceilings::new(threads), hidden, inter, name, *format);
            }
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    fn matrix(&mut self, format: Format, rows: usize, cols: usize) -> PackedMatrix {
        if format == Format::Bf16 {
            return PackedMatrix::pack(format, rows, cols, &mut |_, row| row.copy_from_slice(&self.floats(cols)));
        }
        let Ok(matrix) = PackedMatrix::pack_codes(format, rows, cols, |_, scales, codes| {
            scales.fill(f16::from_f32(0.01));
            for eight in codes.chunks_mut(8) {
                let bytes = self.next().to_le_bytes();
                eight.iter_mut().zip(bytes).for_each(|(code, byte)| *code = (byte % 16) as i8 - 8);
            }
            Ok::<_, Infallible>(())
        });
        matrix
    }
}

/// The same matrix in memory of its own.
fn copy(matrix: &PackedMatrix) -> PackedMatrix {
    let mut bytes = AlignedBytes::from_zeroed(matrix.storage().bytes().len());
    bytes.as_mut_slice().copy_from_slice(matrix.storage().bytes());
    let storage = Storage::Owned(Arc::new(bytes));
    PackedMatrix::from_storage(matrix.format(), matrix.rows(), matrix.cols(), storage).expect("as long as before")
}

/// Seconds that a call takes.
struct Times {
    /// The shortest by the clock.
    best: f64,
    /// The median by the clock.
    median: f64,
    /// The least processor time of all threads, over their number: what the clock would say on a machine of its own,
    /// were the work divided evenly.
    processor: f64,
}

fn processor_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Times a call, over about `total`.
fn time(threads: usize, total: Duration, mut call: impl FnMut()) -> Times {
    call();
    let start = Instant::now();
    let mut times = Vec::new();
    let mut processor = f64::INFINITY;
    while start.elapsed() < total || times.len() < 5 {
        let (start, start_processor) = (Instant::now(), processor_time());
        call();
        times.push(start.elapsed().as_secs_f64());
        processor = processor.min((processor_time() - start_processor) / threads as f64);
    }
    times.sort_by(f64::total_cmp);
    Times { best: times[0], median: times[times.len() / 2], processor }
}

fn products(ceilings: &Ceilings) {
    let (rows, cols) = (2048, 2048);
    println!("products with [{rows}, {cols}]; 'memory': a matrix is not in a cache; rates by the processor's time");
    let head = ["best ms", "cpu ms", "GOP/s", "peak", "GB/s", "read"].map(|word| format!("{word:>8}")).join(" ");
    println!("{:10} {:>8} {:>4} {head}", "weights", "from", "m");
    let kernels = Kernels::new(ceilings.threads);
    let mut random = Random(7);
    for (name, format) in FORMATS {
        let matrix = random.matrix(format, rows, cols);
        let matrices: Vec<_> = (0..64).map(|_| copy(&matrix)).collect();
        let bytes = PackedMatrix::packed_len(format, rows, cols) as f64;
        for (from, count) in [("cache", 1), ("memory", matrices.len())] {
            for m in ROWS {
                let (x, mut out) = (random.floats(m * cols), vec![0.0; m * rows]);
                let mut turn = 0;
                let times = time(ceilings.threads, Duration::from_millis(300), || {
                    turn = (turn + 1) % count;
                    kernels.linear(&matrices[turn], black_box(&x), m, None, &mut out);
                });
                let operations = 2.0 * (m * rows * cols) as f64;
                let columns = ceilings.columns(operations, bytes, times.processor);
                println!("{name:10} {from:>8} {m:>4} {:8.3} {:8.3} {columns}", times.best * 1e3, times.processor * 1e3);
            }
        }
    }
}

fn layers(ceilings: &Ceilings, hidden: usize, inter: usize, name: &str, format: Format) {
    const EXPERTS: usize = 128;
    const CHOICES: usize = 8;
    println!("experts {hidden} x {inter}, {CHOICES} of {EXPERTS}, {name}; ms a layer, rates by the best");
    let head = ["B", "best", "median", "GOP/s", "peak", "GB/s", "read"];
    println!(
        "{:>4} {:>8} {:>8} {:>8} {:>7} {:>8} {:>7}",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6]
    );
    let mut random = Random(11);
    let (up, down) = (random.matrix(format, inter, hidden), random.matrix(format, hidden, inter));
    let experts: Vec<_> = (0..EXPERTS)
        .map(|_| {
            let (gate, up, down) = (copy(&up), copy(&up), copy(&down));
            Some(Arc::new(ExpertWeights { gate, up, down, gate_bias: None, up_bias: None, down_bias: None }))
        })
        .collect();
    let kernels = Kernels::new(ceilings.threads).with_activations(ActivationFormat::Int8);
    let expert_bytes = 3.0 * PackedMatrix::packed_len(format, inter, hidden) as f64;
    for tokens in [1, 4, 16, 64, 512] {
        // turns go through all experts, so that no weights are left in a cache from the turn before
        let turns: Vec<Vec<u32>> = (0..16)
            .map(|turn| {
                let first = (0..CHOICES).map(|i| ((turn * CHOICES + i) % EXPERTS) as u32);
                let rest = (1..tokens).flat_map(|_| choices(&mut random, EXPERTS, CHOICES));
                first.chain(rest).collect()
            })
            .collect();
        let used = |ids: &[u32]| (0..EXPERTS as u32).filter(|expert| ids.contains(expert)).count();
        let used = turns.iter().map(|ids| used(ids)).sum::<usize>() as f64 / turns.len() as f64;
        let offsets: Vec<u32> = (0..=tokens).map(|token| (token * CHOICES) as u32).collect();
        let weights = vec![1.0 / CHOICES as f32; tokens * CHOICES];
        let (x, mut out) = (random.floats(tokens * hidden), vec![0.0; tokens * hidden]);
        let mut turn = 0;
        let total = Duration::from_millis(if tokens > 64 { 2000 } else { 1000 });
        let times = time(ceilings.threads, total, || {
            turn = (turn + 1) % turns.len();
            let ids = &turns[turn];
            let x = black_box(&x);
            let result = kernels.moe(&experts, Activation::Silu, x, hidden, &offsets, ids, &weights, &mut out);
            result.expect("all experts are held");
        });
        let operations = 2.0 * (tokens * CHOICES * 3 * hidden * inter) as f64;
        let columns = ceilings.columns(operations, used * expert_bytes, times.processor);
        let Times { best, median, processor } = times;
        println!("{tokens:>4} {:8.3} {:8.3} {:8.3} {columns}", best * 1e3, median * 1e3, processor * 1e3);
    }
}

/// Different experts for one token.
fn choices(random: &mut Random, experts: usize, count: usize) -> Vec<u32> {
    let mut chosen: Vec<u32> = Vec::with_capacity(count);
    while chosen.len() < count {
        let expert = (random.next() % experts as u64) as u32;
        if !chosen.contains(&expert) {
            chosen.push(expert);
        }
    }
    chosen
}
