//! What a region costs, with and without a foreign process that wants the cores, against the pool before this one.
//!
//! `cargo bench -p moesaic-kernels --bench pool -- [--threads N] [--tokens N] [--foreign N]`. Both pools take turns in
//! one run. The load is a decoder's: per token 160 regions of 16 chunks that come to 20 us on two threads, 50 us of
//! serial work after every eighth, then 0-5 ms of nothing.
#![allow(clippy::print_stdout)]
#[path = "pool/condvar.rs"]
mod condvar;

use moesaic_kernels::Pool;
use std::hint::black_box;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const REGIONS: usize = 160;
const CHUNKS: usize = 16;
const CHUNK: Duration = Duration::from_nanos(2_500);
const SERIAL: Duration = Duration::from_micros(50);

trait Run {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

impl Run for Arc<Pool> {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        Pool::run(self, tasks, task);
    }
}

impl Run for Arc<condvar::Pool> {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        condvar::Pool::run(self, tasks, task);
    }
}

/// Arithmetic that takes the same number of cycles whoever else runs.
fn burn(rounds: u64) {
    let mut x = black_box(1_u64);
    for _ in 0..rounds {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    }
    black_box(x);
}

/// Rounds of `burn` in a second, at best.
fn rounds_per_second() -> f64 {
    let rounds = 1_000_000;
    let best = (0..50).map(|_| {
        let begin = Instant::now();
        burn(rounds);
        begin.elapsed()
    });
    rounds as f64 / best.min().unwrap_or_default().as_secs_f64()
}

/// CPU time of this process, in seconds.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Processes that burn until this is dropped, or for a minute.
struct Foreign(Vec<Child>);

impl Foreign {
    fn start(processes: usize) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        Self((0..processes).map(|_| Command::new(&program).arg("burn").spawn().expect("it starts")).collect())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A small generator of the idle gaps, the same for both pools.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn token(pool: &dyn Run, chunk: u64, serial: u64) {
    for region in 0..REGIONS {
        pool.run(CHUNKS, &|_| burn(chunk));
        if region % 8 == 7 {
            burn(serial);
        }
    }
}

#[derive(Default)]
struct Times {
    tokens: Vec<f64>,
    cpu: f64,
}

/// Of sorted values.
fn at(sorted: &[f64], quantile: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * quantile) as usize]
}

fn decode(name: &str, pools: &[(&str, &dyn Run)], tokens: usize, rate: f64) {
    let chunk = (CHUNK.as_secs_f64() * rate) as u64;
    let serial = (SERIAL.as_secs_f64() * rate) as u64;
    let alone = {
        let mut best = f64::MAX;
        for _ in 0..10 {
            let begin = Instant::now();
            for _ in 0..REGIONS * CHUNKS {
                burn(chunk);
            }
            best = best.min(begin.elapsed().as_secs_f64());
        }
        best * 1e3
    };
    let mut times: Vec<Times> = pools.iter().map(|_| Times::default()).collect();
    let mut random = Random(7);
    for _ in 0..tokens.div_ceil(10) {
        for ((_, pool), times) in pools.iter().zip(&mut times) {
            let cpu = cpu_seconds();
            for _ in 0..10 {
                let begin = Instant::now();
                token(*pool, chunk, serial);
                times.tokens.push(begin.elapsed().as_secs_f64() * 1e3);
                std::thread::sleep(Duration::from_micros(random.below(5_000)));
            }
            times.cpu += cpu_seconds() - cpu;
        }
    }
    for ((pool, _), times) in pools.iter().zip(&mut times) {
        times.tokens.sort_by(f64::total_cmp);
        println!(
            "{name:<24} {pool:<8} ms/token min {:6.2} p50 {:6.2} p90 {:6.2} p99 {:6.2} mean {:6.2} | CPU ms/token {:5.2} | chunks alone {alone:.2}, serial 1.00",
            at(&times.tokens, 0.0),
            at(&times.tokens, 0.5),
            at(&times.tokens, 0.9),
            at(&times.tokens, 0.99),
            times.tokens.iter().sum::<f64>() / times.tokens.len() as f64,
            times.cpu * 1e3 / times.tokens.len() as f64,
        );
    }
}

/// A region whose tasks all wait for each other, so that every thread has come.
fn meet(pool: &dyn Run, threads: usize) {
    let here = AtomicUsize::new(0);
    pool.run(threads, &|_| {
        here.fetch_add(1, Ordering::Relaxed);
        while here.load(Ordering::Relaxed) < threads {
            std::hint::spin_loop();
        }
    });
}

/// Batches of 50 regions, each after a meeting, when all threads look for work. Where the cores are wanted by others a
/// meeting takes many time slices, so the number of batches is what the time allows.
fn dispatch(name: &str, pools: &[(&str, &dyn Run)], threads: usize, region: &dyn Fn(&dyn Run)) {
    let mut nanos: Vec<Vec<f64>> = pools.iter().map(|_| Vec::new()).collect();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        for ((_, pool), nanos) in pools.iter().zip(&mut nanos) {
            meet(*pool, threads);
            let begin = Instant::now();
            for _ in 0..50 {
                region(*pool);
            }
            nanos.push(begin.elapsed().as_secs_f64() * 1e9 / 50.0);
        }
    }
    for ((pool, _), nanos) in pools.iter().zip(&mut nanos) {
        nanos.sort_by(f64::total_cmp);
        println!(
            "{name:<24} {pool:<8} ns min {:6.0} p25 {:6.0} p50 {:6.0} p75 {:6.0} p90 {:6.0}",
            at(nanos, 0.0),
            at(nanos, 0.25),
            at(nanos, 0.5),
            at(nanos, 0.75),
            at(nanos, 0.9),
        );
    }
}

/// CPU time of the second after a region.
fn idle(pools: &[(&str, &dyn Run)]) {
    for (name, pool) in pools {
        pool.run(64, &|_| {});
        let cpu = cpu_seconds();
        std::thread::sleep(Duration::from_secs(1));
        println!("a second of idling       {name:<8} CPU us {:.0}", (cpu_seconds() - cpu) * 1e6);
    }
}

fn number(args: &[String], name: &str, default: usize) -> usize {
    let at = args.iter().position(|arg| arg == name);
    at.and_then(|at| args.get(at + 1)?.parse().ok()).unwrap_or(default)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|arg| arg == "burn") {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(60) {
            burn(100_000_000);
        }
        return;
    }
    let threads = number(&args, "--threads", 2);
    let tokens = number(&args, "--tokens", 300);
    let foreign = number(&args, "--foreign", 1);
    let (new, old) = (Pool::new(threads), condvar::Pool::new(threads));
    let pools: [(&str, &dyn Run); 2] = [("condvar", &old), ("gate", &new)];
    let rate = rounds_per_second();
    dispatch("empty region", &pools, threads, &|pool| pool.run(threads, &|_| {}));
    dispatch("meeting", &pools, threads, &|pool| meet(pool, threads));
    idle(&pools);
    decode("decoder", &pools, tokens, rate);
    let running = Foreign::start(foreign);
    decode(&format!("decoder + {foreign} foreign"), &pools, tokens, rate);
    drop(running);
}
