//! The one word that a region is run by: how many tasks are left, who works on them, who may come in.
//!
//! To sign in and to take a task is one atomic step, so whoever is signed in has a task, and nobody comes in when none
//! is left. A region is over when no task is left and nobody is signed in; both are read at one look.
use super::Task;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tasks that are left: the low half of the word.
const LEFT: u64 = u32::MAX as u64;
/// Workers that are signed in: 15 bits above.
const ONE: u64 = 1 << 32;
const SIGNED_IN: u64 = 0x7fff << 32;
/// The caller sleeps until the last worker has signed out.
const AWAITED: u64 = 1 << 47;
/// The first threads may sign in, so many: the 16 bits at the top.
const INVITED_SHIFT: u32 = 48;
/// Workers go home. No region has this word, for want of threads.
const STOP: u64 = u64::MAX;

/// Threads of a pool, at most.
pub(super) const MAX_THREADS: usize = 0x7fff;
/// Tasks of a region, at most.
pub(super) const MAX_TASKS: usize = u32::MAX as usize;

#[derive(Clone, Copy)]
struct Job {
    /// Borrowed from `Pool::run`, with its lifetime left out.
    task: *const Task<'static>,
    tasks: usize,
}

/// What a worker finds at the gate.
pub(super) enum Call<'a> {
    /// It is signed in, and must run task `index` of `tasks` and then ask [`Gate::take_or_sign_out`].
    Work { task: &'a Task<'a>, tasks: usize, index: usize },
    /// The pool is dropped.
    Stop,
}

/// Aligned to two lines of the cache, since processors fetch lines in pairs.
#[repr(align(128))]
pub(super) struct Gate {
    word: AtomicU64,
    /// On the word's line, so that both travel at once.
    job: UnsafeCell<Job>,
}

// SAFETY: the job points to a `Sync` closure, and access to it is ordered by the word: it is written only while no
// task is left and nobody is signed in, and read only by who is signed in.
unsafe impl Send for Gate {}
// SAFETY: as above.
unsafe impl Sync for Gate {}

fn left(word: u64) -> usize {
    (word & LEFT) as usize
}

impl Gate {
    pub(super) fn new() -> Self {
        let nothing: &Task<'static> = &|_| {};
        Self { word: AtomicU64::new(0), job: UnsafeCell::new(Job { task: nothing, tasks: 0 }) }
    }

    /// Opens a region for the first `invited` threads; task 0 is the caller's.
    ///
    /// # Safety
    /// One thread at a time opens a region, and it neither returns to who lent it the closure nor opens another one
    /// before [`Gate::is_over`] has said so.
    pub(super) unsafe fn open(&self, tasks: usize, task: &Task<'_>, invited: usize) {
        debug_assert!(tasks <= MAX_TASKS && invited <= MAX_THREADS);
        // SAFETY: only the lifetime changes, see `sign_in` for why no call comes too late.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the last region is over, so nobody is signed in, and nobody can sign in before the store below: the
        // job is this thread's alone. What others read of the last job happened before `is_over` saw them sign out.
        unsafe { *self.job.get() = Job { task, tasks } };
        // SeqCst for the sleepers' sake, see `Sleepers::sleep`; release, so that who signs in sees the job. Nothing is
        // lost by overwriting: while no task is left nobody else changes the word.
        self.word.store((invited as u64) << INVITED_SHIFT | (tasks - 1) as u64, Ordering::SeqCst);
    }

    /// The next task of a region of `tasks`, for the caller.
    pub(super) fn take(&self, tasks: usize) -> Option<usize> {
        let mut word = self.word.load(Ordering::Relaxed);
        while left(word) > 0 {
            match self.word.compare_exchange_weak(word, word - 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(tasks - left(word)),
                Err(now) => word = now,
            }
        }
        None
    }

    /// Whether all tasks have ended, what they wrote being visible then. For the caller, when `take` gave none.
    pub(super) fn is_over(&self) -> bool {
        // acquire: every worker's signing out is a release, and all changes since are read-modify-writes
        self.word.load(Ordering::Acquire) & (SIGNED_IN | LEFT) == 0
    }

    /// Asks the last worker to wake the caller; false: the region is over already.
    pub(super) fn await_last(&self) -> bool {
        self.word.fetch_or(AWAITED, Ordering::AcqRel) & SIGNED_IN != 0
    }

    /// Whether there is something for worker `index` now.
    pub(super) fn calls(&self, index: usize, order: Ordering) -> bool {
        let word = self.word.load(order);
        left(word) > 0 && (word >> INVITED_SHIFT) as usize > index
    }

    /// Signs worker `index` in and takes a task, if there is one for it.
    pub(super) fn sign_in(&self, index: usize) -> Option<Call<'_>> {
        let mut word = self.word.load(Ordering::Relaxed);
        while left(word) > 0 && (word >> INVITED_SHIFT) as usize > index {
            if word == STOP {
                return Some(Call::Stop);
            }
            // Acquire, for the job. The word may have come and gone and come again since it was loaded: as long as it
            // is there now, there is a task now, and this worker has it.
            match self.word.compare_exchange_weak(word, word - 1 + ONE, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => {
                    // SAFETY: this thread is signed in, so the region is not over: the job is the one that was written
                    // before the word was opened, and is not written again until this thread has signed out.
                    let job = unsafe { *self.job.get() };
                    // SAFETY: `open`'s caller keeps the closure alive until the region is over.
                    let task = unsafe { &*job.task };
                    return Some(Call::Work { task, tasks: job.tasks, index: job.tasks - left(word) });
                }
                Err(now) => word = now,
            }
        }
        None
    }

    /// The next task of a region of `tasks`, for a worker that is signed in. When none is left it is signed out and
    /// must not touch the closure again; `Err(true)`: and the caller is to be woken.
    pub(super) fn take_or_sign_out(&self, tasks: usize) -> Result<usize, bool> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let next = if left(word) > 0 { word - 1 } else { word - ONE };
            // release what the tasks wrote; acquire, so that a caller who asked to be woken is found
            match self.word.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if left(word) > 0 => return Ok(tasks - left(word)),
                Ok(_) => return Err(next & (AWAITED | SIGNED_IN) == AWAITED),
                Err(now) => word = now,
            }
        }
    }

    #[cfg(test)]
    pub(super) fn is_awaited(&self) -> bool {
        self.word.load(Ordering::Relaxed) & AWAITED != 0
    }

    /// Sends the workers home. No region is open.
    pub(super) fn stop(&self) {
        self.word.store(STOP, Ordering::SeqCst);
    }
}
