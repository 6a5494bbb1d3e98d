//! Threads that are dispatched to in a fraction of a microsecond: the caller is worker 0, tasks are taken from one
//! atomic cursor, and whoever waits spins for a short, bounded time and then sleeps, so that the pool is a good
//! neighbour on shared cores.
//!
//! A region (one call of [`Pool::run`]) costs no allocation, and no system call unless somebody sleeps. The caller
//! opens the gate; workers that see it open sign in, take tasks, and sign out. When no task is left the caller waits
//! for those that are signed in, and for nobody else: a worker that the system has taken off its core holds up a region
//! only while it is inside one of its tasks.
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

pub(crate) mod ahead;
mod gate;
pub mod numa;
mod sleep;
mod spin;
#[cfg(test)]
mod tests;

use ahead::Ahead;
use gate::{Call, Gate, MAX_TASKS, MAX_THREADS};
use sleep::Sleepers;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Tasks that ended on one thread, on two lines of the cache of their own, since processors fetch lines in pairs.
#[repr(align(128))]
struct Ended(AtomicU64);

struct Shared {
    gate: Gate,
    ahead: Ahead,
    sleepers: Sleepers,
    panicked: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// By thread; the callers share the first.
    ended: Box<[Ended]>,
}

thread_local! {
    /// The pool whose task this thread is in.
    static INSIDE: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// Marks this thread as inside a pool's tasks until it is dropped.
struct Inside {
    outer: *const Shared,
}

impl Inside {
    fn enter(shared: &Shared) -> Self {
        let outer = INSIDE.replace(shared);
        if std::ptr::eq(outer, shared) {
            panic!("Pool::run is called from inside a task of the same pool");
        }
        Self { outer }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.outer);
    }
}

/// Leaks the others: to drop a panic's payload may panic again, and nothing may unwind while a region is open.
fn keep_first(kept: &mut Option<Box<dyn Any + Send>>, panic: Box<dyn Any + Send>) {
    match kept {
        None => *kept = Some(panic),
        Some(_) => std::mem::forget(panic),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            gate: Gate::new(),
            ahead: Ahead::new(),
            sleepers: Sleepers::new(threads),
            panicked: AtomicBool::new(false),
            panic: Mutex::new(None),
            ended: (0..threads).map(|_| Ended(AtomicU64::new(0))).collect(),
        }
    }

    /// Calls `task` with `first` and then with what `next` gives; a task's panic is kept for the caller.
    fn work(&self, thread: usize, task: &Task<'_>, first: usize, mut next: impl FnMut() -> Option<usize>) {
        let ended = &self.ended[thread].0;
        let mut index = Some(first);
        while index.is_some() {
            let through = catch_unwind(AssertUnwindSafe(|| {
                while let Some(now) = index {
                    task(now);
                    ended.fetch_add(1, Ordering::Relaxed);
                    index = next();
                }
            }));
            if let Err(panic) = through {
                keep_first(&mut lock(&self.panic), panic);
                self.panicked.store(true, Ordering::Relaxed);
                ended.fetch_add(1, Ordering::Relaxed);
                index = next();
            }
        }
    }

    /// The life of worker `index`.
    fn serve(&self, index: usize) {
        INSIDE.set(self);
        self.sleepers.introduce(index);
        let mut waiting = spin::Waiting::new();
        loop {
            let called = || {
                let calls = self.gate.calls(index, Ordering::Relaxed);
                if !calls {
                    self.ahead.fetch_some();
                }
                calls
            };
            if !waiting.until(called) {
                self.sleepers.sleep(index, |order| self.gate.calls(index, order));
            }
            match self.gate.sign_in(index) {
                None => {}
                Some(Call::Stop) => return,
                Some(Call::Work { task, tasks, index: first }) => {
                    self.work(index, task, first, || match self.gate.take_or_sign_out(tasks) {
                        Ok(index) => Some(index),
                        Err(wake) => {
                            if wake {
                                self.sleepers.wake_caller();
                            }
                            None
                        }
                    });
                }
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn wait(&self) {
        if !spin::until(spin::CALLER, || self.gate.is_over()) {
            self.sleepers.sleep_as_caller(|| self.gate.await_last(), || self.gate.is_over());
        }
    }
}

/// A pool of threads for one engine.
///
/// On a machine with several NUMA nodes the workers (never the caller's thread) are bound to the nodes in contiguous
/// runs, see [`numa`]; otherwise no thread is bound to anything.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads in all, the caller of `run` among them; 0 counts as 1, and there are at most 32,767.
    pub fn new(threads: usize) -> Arc<Self> {
        let threads = threads.clamp(1, MAX_THREADS);
        let shared = Arc::new(Shared::new(threads));
        // the first place is the caller's
        let mut places = numa::plan(threads, &numa::nodes()).into_iter().skip(1);
        let workers = (1..threads)
            .map(|index| {
                let shared = shared.clone();
                let place = places.next();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || {
                        if let Some(cpus) = place {
                            numa::bind(&cpus);
                        }
                        shared.serve(index);
                    })
                    .expect("the system starts a thread")
            })
            .collect();
        Arc::new(Self { shared, workers, turn: Mutex::new(()) })
    }

    /// Threads in all.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Tasks that ended so far: any thread sees by it whether a long computation gets on.
    pub fn advanced(&self) -> u64 {
        self.shared.ended.iter().map(|ended| ended.0.load(Ordering::Relaxed)).sum()
    }

    /// Says what the next region will read first, most likely: threads that wait for it ask for a part of that memory.
    /// A hint; it changes no result.
    pub fn expect(&self, bytes: &[u8]) {
        if !self.workers.is_empty() {
            self.shared.ahead.expect(bytes);
        }
    }

    /// Calls `task` with 0..tasks, each once, on all threads. Several callers take turns.
    ///
    /// # Panics
    /// When a task panicked: with the first such panic, after all tasks have ended. When it is called from inside a
    /// task of the same pool, which could never end. When there are more than 2³²-1 tasks.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let inside = Inside::enter(shared);
        if self.workers.is_empty() || tasks <= 1 {
            // no turn is taken, so a panic must not meet another caller's
            let mut panic = None;
            for index in 0..tasks {
                if let Err(cause) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                    keep_first(&mut panic, cause);
                }
                shared.ended[0].0.fetch_add(1, Ordering::Relaxed);
            }
            drop(inside);
            return panic.map_or((), |cause| resume_unwind(cause));
        }
        assert!(tasks <= MAX_TASKS, "a region has less than 2^32 tasks");
        let turn = lock(&self.turn);
        let invited = tasks.min(self.threads());
        // SAFETY: this thread holds the turn, and keeps it and the closure until the region is over: nothing from here
        // to there unwinds, since `work` catches the tasks' panics.
        unsafe { shared.gate.open(tasks, task, invited) };
        shared.sleepers.wake_invited(invited);
        shared.work(0, task, 0, || shared.gate.take(tasks));
        if !shared.gate.is_over() {
            shared.wait();
        }
        let mut panic = None;
        if shared.panicked.load(Ordering::Relaxed) {
            shared.panicked.store(false, Ordering::Relaxed);
            panic = lock(&shared.panic).take();
        }
        drop(turn);
        drop(inside);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.gate.stop();
        self.shared.sleepers.wake_invited(self.threads());
        for worker in self.workers.drain(..) {
            // a worker catches its tasks' panics, so it cannot have panicked
            let _ = worker.join();
        }
    }
}
