//! What the machine can do, so that a kernel's speed can be said as a share of it. Every figure is the best of some runs
//! of a few milliseconds at most: what other programs take of the machine is no limit of it.
use crate::AlignedBytes;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Bytes that each thread reads: more than a cache holds.
const READ: usize = 256 << 20;
/// Bytes that each thread reads in one run: about as much as one token's layer of experts.
const WINDOW: usize = 8 << 20;
/// How often all of it is read.
const PASSES: usize = 5;
/// Rounds of the loop of products in one run, and runs.
#[cfg(target_arch = "x86_64")]
const PRODUCTS: (u64, usize) = (400_000, 20);

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
        handles.into_iter().map(|handle| handle.join().expect("the work does not panic")).collect::<Vec<_>>()
    });
    let first = ends.iter().map(|(start, _)| *start).min();
    let last = ends.iter().map(|(_, end)| *end).max();
    first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first)
}

/// Bytes a second that `threads` threads read together, each from memory of its own that no cache holds: sums of
/// windows of 8 MiB, of the one of 160 in which it was fastest. `threads` is 1 or more.
pub fn read_bandwidth(threads: usize) -> f64 {
    read(threads, READ, WINDOW)
}

fn read(threads: usize, bytes: usize, window: usize) -> f64 {
    // the memory that weights have too; written to, so that it has pages of its own
    let buffers: Vec<AlignedBytes> = (0..threads)
        .map(|_| {
            let mut buffer = AlignedBytes::from_zeroed(bytes);
            buffer.as_mut_slice().fill(1);
            buffer
        })
        .collect();
    let windows = bytes / window;
    let run = |turn: usize| {
        together(threads, |thread| {
            let from = turn % windows * window;
            black_box(sum(black_box(&buffers[thread].as_slice()[from..from + window])));
        })
    };
    let best = (0..PASSES * windows).map(run).min().unwrap_or(Duration::MAX);
    (threads * window) as f64 / best.as_secs_f64()
}

/// Words that are added up side by side, so that the processor waits for memory and not for a sum.
const LANES: usize = 32;

fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; LANES];
    for line in bytemuck::cast_slice::<u8, u64>(bytes).as_chunks::<LANES>().0 {
        sums.iter_mut().zip(line).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// Operations a second of `threads` threads together on 8-bit integers with sums of 32 bits, a multiplication and an
/// addition being two; `None` where the CPU has none of the instructions. They are those that the kernels use: `vpdpbusd`
/// of 512 bits with AVX-512 VNNI, else `vpmaddubsw`, `vpmaddwd` and `vpaddd` of 256 bits with AVX2. Operands stay in
/// registers, with enough independent sums that no product waits for another. `threads` is 1 or more.
pub fn int8_peak(threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    {
        let (rounds, runs) = PRODUCTS;
        let vnni = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        if !vnni && !is_x86_feature_detected!("avx2") {
            return None;
        }
        let run = |_| {
            together(threads, |_| {
                // SAFETY: the CPU was asked for these instructions above.
                black_box(unsafe { if vnni { x86::dot_512(rounds) } else { x86::dot_256(rounds) } });
            })
        };
        let best = (0..runs).map(run).min()?;
        let operations = rounds * if vnni { x86::OPERATIONS_512 } else { x86::OPERATIONS_256 };
        Some(threads as f64 * operations as f64 / best.as_secs_f64())
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = threads;
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16,
        _mm256_setzero_si256, _mm512_dpbusd_epi32, _mm512_reduce_add_epi32, _mm512_set1_epi8, _mm512_setzero_si512,
    };
    use std::hint::black_box;

    /// Independent sums: the latency of `vpdpbusd` times what is begun in a cycle, and more.
    const SUMS_512: usize = 16;
    /// Operations of a round of [`dot_512`]: 64 products and as many additions in each sum.
    pub const OPERATIONS_512: u64 = SUMS_512 as u64 * 128;
    /// Independent sums; all but the last addition of a product is independent anyway.
    const SUMS_256: usize = 8;
    /// Operations of a round of [`dot_256`]: 32 products and as many additions in each sum.
    pub const OPERATIONS_256: u64 = SUMS_256 as u64 * 64;

    /// Returns the sum of all products, each of which is 15.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn dot_512(rounds: u64) -> i64 {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
        // that all are the same is not for the compiler to know
        let mut sums = black_box([_mm512_setzero_si512(); SUMS_512]);
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.into_iter().map(|sum| i64::from(_mm512_reduce_add_epi32(sum))).sum()
    }

    /// Returns the sum of all products, each of which is 15.
    #[target_feature(enable = "avx2")]
    pub fn dot_256(rounds: u64) -> i64 {
        let (mut a, b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(5)));
        let ones = black_box(_mm256_set1_epi16(1));
        let mut sums = black_box([_mm256_setzero_si256(); SUMS_256]);
        for _ in 0..rounds {
            for sum in &mut sums {
                a = opaque(a);
                let pairs = _mm256_maddubs_epi16(a, b);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        let lanes = |sum: __m256i| bytemuck::cast::<__m256i, [i32; 8]>(sum);
        sums.into_iter().flat_map(lanes).map(i64::from).sum()
    }

    /// The same value, of which the compiler knows nothing: without this the products of one round would be those of all
    /// others, and not be computed again. It costs no instruction.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn opaque(mut value: __m256i) -> __m256i {
        // SAFETY: there is no instruction in it.
        unsafe { asm!("/* {0} */", inout(ymm_reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_s_windows_are_read() {
        let rate = read(2, 4 << 12, 1 << 12);
        assert!(rate.is_finite() && rate > 0.0, "{rate}");
        let mut bytes = AlignedBytes::from_zeroed(1 << 12);
        bytes.as_mut_slice().iter_mut().step_by(8).zip(0..).for_each(|(byte, at)| *byte = at as u8);
        // 512 words of 0 to 255, twice
        assert_eq!(sum(bytes.as_slice()), 255 * 256);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn as_many_operations_are_done_as_are_counted() {
        const ROUNDS: u64 = 7;
        // one product has a multiplication and an addition
        let expected = |operations: u64| (ROUNDS * operations / 2) as i64 * 15;
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU was asked for these instructions.
            assert_eq!(unsafe { x86::dot_256(ROUNDS) }, expected(x86::OPERATIONS_256));
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the CPU was asked for these instructions.
            assert_eq!(unsafe { x86::dot_512(ROUNDS) }, expected(x86::OPERATIONS_512));
        }
    }

    #[test]
    fn together_waits_for_the_last() {
        let long = Duration::from_millis(2);
        let work = |thread: usize| {
            let begun = Instant::now();
            while thread == 1 && begun.elapsed() < long {}
        };
        assert!(together(2, work) >= long);
    }
}
