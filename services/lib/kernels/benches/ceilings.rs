//! What the machine can do: products of 8-bit integers, and reading memory. Every figure is the best of some runs.
use moesaic_kernels::AlignedBytes;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Bytes that each thread reads: more than a cache holds.
const READ: usize = 256 << 20;
/// Bytes that each thread reads in one run.
const WINDOW: usize = 8 << 20;

/// Runs `work` on each of `threads` threads at once and returns the time from the common start to the last end.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let barrier = std::sync::Barrier::new(threads);
    let ends = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    work(thread);
                    (start, Instant::now())
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic")).collect::<Vec<_>>()
    });
    let first = ends.iter().map(|(start, _)| *start).min().expect("a thread");
    let last = ends.iter().map(|(_, end)| *end).max().expect("a thread");
    last - first
}

/// Bytes per second that `threads` threads read.
pub fn read_bandwidth(threads: usize) -> f64 {
    // the memory that weights have too
    let buffers: Vec<AlignedBytes> = (0..threads)
        .map(|_| {
            let mut bytes = AlignedBytes::from_zeroed(READ);
            bytes.as_mut_slice().fill(1);
            bytes
        })
        .collect();
    // about as much as one token's layer of experts
    let windows = READ / WINDOW;
    let best = (0..5 * windows)
        .map(|turn| {
            together(threads, |thread| {
                let mut sums = [0u64; 32];
                let window = &buffers[thread].as_slice()[turn % windows * WINDOW..][..WINDOW];
                for line in bytemuck::cast_slice::<u8, u64>(window).as_chunks::<32>().0 {
                    sums.iter_mut().zip(line).for_each(|(sum, value)| *sum ^= value);
                }
                black_box(sums);
            })
        })
        .min()
        .expect("some runs");
    (threads * WINDOW) as f64 / best.as_secs_f64()
}

/// Multiplications and additions per second in vpdpbusd (else maddubs and madd), or none where the CPU has neither.
pub fn int8_peak(threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        const ROUNDS: u64 = 400_000;
        let vnni = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        if !vnni && !is_x86_feature_detected!("avx2") {
            return None;
        }
        let best = (0..20)
            .map(|_| {
                together(threads, |_| {
                    // SAFETY: the CPU was asked for these instructions above.
                    unsafe { if vnni { x86::dot_512(ROUNDS) } else { x86::dot_256(ROUNDS) } }
                })
            })
            .min()
            .expect("some runs");
        let operations = ROUNDS as f64 * if vnni { 16.0 * 128.0 } else { 8.0 * 64.0 };
        Some(threads as f64 * operations / best.as_secs_f64())
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = threads;
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _mm256_add_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16,
        _mm256_setzero_si256, _mm512_dpbusd_epi32, _mm512_set1_epi8, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn dot_512(rounds: u64) {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
        let mut sums = [_mm512_setzero_si512(); 16];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2")]
    pub fn dot_256(rounds: u64) {
        let (a, ones) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi16(1)));
        let mut sums = [_mm256_setzero_si256(); 8];
        for _ in 0..rounds {
            for sum in &mut sums {
                let pairs = _mm256_maddubs_epi16(a, black_box(a));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(sums);
    }
}
