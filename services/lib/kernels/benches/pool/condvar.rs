//! The peer: the pool that this one came after. A region is an `Arc` behind a mutex, and a condition variable is told
//! of it.
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Looks at the door this many times before parking.
const SPINS: usize = 2_000;

type Task = dyn Fn(usize) + Sync;

/// One parallel region. Workers hold it by `Arc`, so a late worker finds an exhausted cursor, never another region.
struct Region {
    /// Borrowed from `Pool::run`, which does not return before all tasks are finished.
    task: *const Task,
    tasks: usize,
    cursor: AtomicUsize,
    finished: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `task` points to a `Sync` closure, and it is only called for a task index that was taken from the cursor
// below `tasks`; `Pool::run` keeps the closure alive until all those have finished.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn work(&self, advanced: &AtomicU64) {
        loop {
            let index = self.cursor.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                return;
            }
            // SAFETY: `index` was taken from the cursor, so `run` still waits for it and the closure lives.
            let task = unsafe { &*self.task };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                lock(&self.panic).get_or_insert(panic);
            }
            advanced.fetch_add(1, Ordering::Relaxed);
            self.finished.fetch_add(1, Ordering::Release);
        }
    }

    fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire) == self.tasks
    }
}

#[derive(Default)]
struct Shared {
    epoch: AtomicUsize,
    region: Mutex<Option<Arc<Region>>>,
    wake: Condvar,
    stop: AtomicBool,
    /// Tasks that ended.
    advanced: AtomicU64,
}

/// A pool of threads for one engine.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time.
    turn: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads in all, the caller of `run` among them; 0 counts as 1.
    pub fn new(threads: usize) -> Arc<Self> {
        let shared = Arc::new(Shared::default());
        let workers = (1..threads.max(1))
            .map(|index| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("kernel-{index}"))
                    .spawn(move || serve(&shared))
                    .expect("the system starts a thread")
            })
            .collect();
        Arc::new(Self { shared, workers, turn: Mutex::new(()) })
    }

    /// Calls `task` with 0..tasks, each once, on all threads. A panic in a task is raised again here, after the others
    /// have finished. Must not be called from inside a task.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 {
            return (0..tasks).for_each(|index| {
                task(index);
                self.shared.advanced.fetch_add(1, Ordering::Relaxed);
            });
        }
        let turn = lock(&self.turn);
        // SAFETY: only the lifetime changes; the pointer is not used after this function returns (see `Region`).
        let task: *const Task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const Task>(task) };
        let region = Arc::new(Region {
            task,
            tasks,
            cursor: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            panic: Mutex::new(None),
        });
        {
            // under the lock, so that no worker goes to sleep between looking and waiting
            let mut current = lock(&self.shared.region);
            *current = Some(region.clone());
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        region.work(&self.shared.advanced);
        let mut spins = 0;
        while !region.is_finished() {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        drop(turn);
        let panic = lock(&region.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

fn serve(shared: &Shared) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            std::hint::spin_loop();
            spins += 1;
        }
        let mut region = lock(&shared.region);
        while shared.epoch.load(Ordering::Acquire) == seen && !shared.stop.load(Ordering::Acquire) {
            region = shared.wake.wait(region).unwrap_or_else(PoisonError::into_inner);
        }
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        seen = shared.epoch.load(Ordering::Acquire);
        let current = region.clone();
        drop(region);
        if let Some(region) = current {
            region.work(&shared.advanced);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _region = lock(&self.shared.region);
            self.shared.stop.store(true, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // a worker catches its tasks' panics, so it cannot have panicked
            let _ = worker.join();
        }
    }
}
