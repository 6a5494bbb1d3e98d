//! Who sleeps, and how it is woken.
//!
//! Nobody's wake is lost: a worker says that it sleeps and then looks at the gate once more; a caller opens the gate
//! and then looks who sleeps. All four are SeqCst, so they have one order, and at least one of the two sees the other.
use super::lock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::Thread;

const AWAKE: u64 = 0;
const ASLEEP: u64 = 1;
/// Woken, and has to wake others: a range of threads stands in the bits above.
const WOKEN: u64 = 2;
const FROM_SHIFT: u32 = 16;
const TO_SHIFT: u32 = 32;

struct Bed {
    state: AtomicU64,
    thread: OnceLock<Thread>,
}

pub(super) struct Sleepers {
    /// Workers that sleep or are about to; while it is 0 nobody's bed is looked at.
    asleep: AtomicUsize,
    /// By thread; the first one, the caller's, is never used.
    beds: Box<[Bed]>,
    /// The caller that sleeps until its region is over.
    caller: Mutex<Option<Thread>>,
}

impl Sleepers {
    pub(super) fn new(threads: usize) -> Self {
        let bed = |_| Bed { state: AtomicU64::new(AWAKE), thread: OnceLock::new() };
        Self { asleep: AtomicUsize::new(0), beds: (0..threads).map(bed).collect(), caller: Mutex::new(None) }
    }

    /// Worker `index` says that it is this thread, before it sleeps for the first time.
    pub(super) fn introduce(&self, index: usize) {
        self.beds[index].thread.get_or_init(std::thread::current);
    }

    /// Worker `index` sleeps until somebody wakes it, unless there is `work` already. Then it wakes those whom it was
    /// told to wake.
    pub(super) fn sleep(&self, index: usize, work: impl Fn(Ordering) -> bool) {
        let state = &self.beds[index].state;
        self.asleep.fetch_add(1, Ordering::SeqCst);
        state.store(ASLEEP, Ordering::SeqCst);
        if work(Ordering::SeqCst) && state.compare_exchange(ASLEEP, AWAKE, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.asleep.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let mut now = state.load(Ordering::Relaxed);
        while now == ASLEEP {
            std::thread::park();
            now = state.load(Ordering::Relaxed);
        }
        state.store(AWAKE, Ordering::Relaxed);
        self.wake((now >> FROM_SHIFT) as usize & 0xffff, (now >> TO_SHIFT) as usize);
    }

    /// After the gate was opened: wakes those of the first `invited` threads that sleep.
    pub(super) fn wake_invited(&self, invited: usize) {
        if self.asleep.load(Ordering::SeqCst) > 0 {
            self.wake(1, invited);
        }
    }

    /// Wakes who sleeps among the threads `from..to`: half of them by whom it wakes first, and so on, so that it takes
    /// the time of a few system calls however many sleep.
    #[cold]
    fn wake(&self, mut from: usize, mut to: usize) {
        while from < to {
            let bed = &self.beds[from];
            from += 1;
            if bed.state.load(Ordering::SeqCst) != ASLEEP {
                continue;
            }
            let half = from + (to - from) / 2;
            let woken = WOKEN | (half as u64) << FROM_SHIFT | (to as u64) << TO_SHIFT;
            if bed.state.compare_exchange(ASLEEP, woken, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                self.asleep.fetch_sub(1, Ordering::Relaxed);
                if let Some(thread) = bed.thread.get() {
                    thread.unpark();
                }
                to = half;
            }
        }
    }

    /// The caller sleeps until its region is `over`, unless it was so when it `asked` to be woken.
    pub(super) fn sleep_as_caller(&self, asked: impl FnOnce() -> bool, over: impl Fn() -> bool) {
        *lock(&self.caller) = Some(std::thread::current());
        if asked() {
            while !over() {
                std::thread::park();
            }
        }
    }

    /// The last worker of a region whose caller asked to be woken.
    pub(super) fn wake_caller(&self) {
        // Left in its place: the caller may have seen the end by now and the next one may be there, whose wake this
        // thread must not take away. To be woken once too often does no harm.
        if let Some(caller) = &*lock(&self.caller) {
            caller.unpark();
        }
    }

    #[cfg(test)]
    pub(super) fn asleep(&self) -> usize {
        self.beds.iter().filter(|bed| bed.state.load(Ordering::Relaxed) == ASLEEP).count()
    }
}
