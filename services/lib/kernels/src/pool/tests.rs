use super::*;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// Waits for what another thread does; a test that waits in vain fails.
fn await_that(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "in vain: {what}");
        std::thread::yield_now();
    }
}

fn await_sleep(pool: &Pool) {
    await_that("all workers sleep", || pool.shared.sleepers.asleep() == pool.threads() - 1);
}

/// Regions are rarer under a thread sanitizer or Miri, which are slow.
fn regions(count: usize) -> usize {
    if cfg!(miri) { count / 100 } else { count }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn every_task_runs_once() {
    for threads in [0, 1, 2, 3, 5, 16] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads.max(1));
        for tasks in (0..40).chain([63, 64, 65, 1000, 4097]) {
            let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            let before = pool.advanced();
            pool.run(tasks, &|i| {
                counts[i].fetch_add(1, Relaxed);
            });
            assert_eq!(pool.advanced() - before, tasks as u64);
            assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{threads} threads, {tasks} tasks");
        }
    }
}

/// Plain memory that tasks write and the caller reads, thousands of regions in a row from several callers, with gaps
/// in which the workers go on looking, are about to sleep, or sleep.
#[test]
fn callers_take_turns_through_thousands_of_regions() {
    for threads in [2, 3, 4] {
        let pool = Pool::new(threads);
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for caller in 0..3 {
                let (pool, total) = (&pool, &total);
                scope.spawn(move || {
                    let mut random = Random(threads as u64 * 10 + caller);
                    for region in 0..regions(3000) {
                        let tasks = random.below(9) as usize;
                        // the region's own memory, gone after it: a task that came late would be seen by its number
                        let mut out = vec![[usize::MAX; 2]; tasks];
                        let cells = out.as_mut_ptr() as usize;
                        pool.run(tasks, &|i| {
                            // SAFETY: task `i` alone writes element `i`, and `out` is not used until `run` returns.
                            unsafe { *(cells as *mut [usize; 2]).add(i) = [region, i] };
                        });
                        assert!(out.iter().enumerate().all(|(i, got)| *got == [region, i]));
                        total.fetch_add(tasks as u64, Relaxed);
                        match random.below(64) {
                            0 => std::thread::sleep(Duration::from_micros(random.below(400))),
                            gap => (0..gap * gap).for_each(|_| std::hint::spin_loop()),
                        }
                    }
                });
            }
        });
        assert_eq!(pool.advanced(), total.load(Relaxed));
    }
}

#[test]
fn a_panic_reaches_the_caller_after_all_other_tasks_and_the_pool_lives_on() {
    for threads in [1, 2, 4] {
        let pool = Pool::new(threads);
        for tasks in [1, 2, 64] {
            for broken in [0, tasks / 2, tasks - 1] {
                let ran = AtomicUsize::new(0);
                let before = pool.advanced();
                let caught = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(tasks, &|i| {
                        assert!(i != broken, "task {i} breaks");
                        ran.fetch_add(1, Relaxed);
                    });
                }));
                let panic = caught.expect_err("the panic reaches the caller");
                assert_eq!(panic.downcast_ref::<String>(), Some(&format!("task {broken} breaks")));
                assert_eq!(ran.load(Relaxed), tasks - 1);
                assert_eq!(pool.advanced() - before, tasks as u64);
            }
        }
        // all of them at once, and then none
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(64, &|i| panic!("task {i} breaks")))).is_err());
        let sum = AtomicUsize::new(0);
        pool.run(100, &|i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 4950);
    }
}

#[test]
fn a_pool_is_dropped_while_its_workers_look_and_while_they_sleep() {
    for round in 0..regions(300) {
        let pool = Pool::new(1 + round % 5);
        if round % 3 > 0 {
            pool.run(8, &|_| {});
        }
        if round % 2 > 0 {
            await_sleep(&pool);
        }
        let shared = Arc::downgrade(&pool.shared);
        drop(pool);
        assert!(shared.upgrade().is_none(), "all workers have gone");
    }
}

#[test]
fn a_region_wakes_all_whom_it_invites_and_nobody_else() {
    let pool = Pool::new(9);
    for _ in 0..20 {
        await_sleep(&pool);
        pool.run(2, &|_| {});
        assert!(pool.shared.sleepers.asleep() >= 7, "two tasks are for the caller and one worker");
        await_sleep(&pool);
        // each waits for all, so all nine threads have come
        let here = AtomicUsize::new(0);
        pool.run(9, &|_| {
            here.fetch_add(1, Relaxed);
            await_that("nine threads in one region", || here.load(Relaxed) == 9);
        });
    }
}

#[test]
fn who_is_not_invited_takes_no_task_though_it_looks() {
    let pool = Pool::new(4);
    let strangers = AtomicUsize::new(0);
    let caller = std::thread::current().id();
    for _ in 0..regions(3000) {
        // all look now
        pool.run(64, &|_| std::hint::spin_loop());
        pool.run(2, &|_| {
            let thread = std::thread::current();
            if thread.id() != caller && thread.name() != Some("kernel-1") {
                strangers.fetch_add(1, Relaxed);
            }
            // long enough for others to come
            (0..200).for_each(|_| std::hint::spin_loop());
        });
    }
    assert_eq!(strangers.load(Relaxed), 0);
}

#[test]
fn a_caller_that_sleeps_is_woken_by_the_last_worker() {
    let pool = Pool::new(2);
    for _ in 0..50 {
        let caller: ThreadId = std::thread::current().id();
        let begun = AtomicBool::new(false);
        pool.run(2, &|_| {
            if std::thread::current().id() == caller {
                await_that("a worker takes the other task", || begun.load(Relaxed));
            } else {
                begun.store(true, Relaxed);
                await_that("the caller goes to sleep", || pool.shared.gate.is_awaited());
            }
        });
    }
}

/// A worker that is not in a task, wherever else it is, holds up nobody.
#[test]
fn a_worker_that_is_not_signed_in_is_not_waited_for() {
    let shared = Arc::new(Shared::new(2));
    // the worker has gone, as if it never got its core again: the region must end without it
    let pool = Pool { shared: shared.clone(), workers: vec![std::thread::spawn(|| {})], turn: Mutex::new(()) };
    for _ in 0..100 {
        pool.run(10, &|_| {});
    }
    assert_eq!(shared.ended[0].0.load(Relaxed), 1000);
}

#[test]
fn a_region_inside_a_task_of_the_same_pool_panics_instead_of_waiting_for_itself() {
    for threads in [1, 2] {
        let (pool, other) = (Pool::new(threads), Pool::new(2));
        for tasks in [1, 8] {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|_| pool.run(tasks, &|_| {}))));
            let panic = caught.expect_err("it panics");
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"Pool::run is called from inside a task of the same pool"));
        }
        // of another pool is fine
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            other.run(4, &|i| {
                sum.fetch_add(i, Relaxed);
            });
        });
        assert_eq!(sum.load(Relaxed), 24);
    }
}

#[test]
fn any_thread_sees_the_tasks_advance_while_a_region_runs() {
    let pool = Pool::new(2);
    let (seen, before) = (AtomicU64::new(0), pool.advanced());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            await_that("five tasks have ended", || {
                let now = pool.advanced() - before;
                assert!(now >= seen.swap(now, Relaxed), "it never goes back");
                now >= 5
            });
        });
        pool.run(10, &|i| {
            if i >= 6 {
                await_that("the other thread has seen five", || seen.load(Relaxed) >= 5);
            }
        });
    });
}
