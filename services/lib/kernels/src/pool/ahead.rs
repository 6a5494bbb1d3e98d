//! What waiting threads read ahead: memory that the next region will most likely begin with.
//!
//! A decoder's products are as fast as memory is read, and between two of them the caller does small things alone.
//! Meanwhile the others need not leave the memory idle. Each reads into its own second-level cache, and the first task is
//! always the caller's: what is expected is best what the second one begins with.
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a line of the cache.
const LINE: usize = 64;
/// Lines that are asked for between two looks at the gate.
const LINES: usize = 8;
/// Bytes that are asked for at most: they and what a task reads beside them fit a second-level cache.
const MOST: usize = 384 << 10;

/// On two lines of the cache of its own, since processors fetch lines in pairs.
#[repr(align(128))]
pub(super) struct Ahead {
    /// The first address that nobody has asked for.
    next: AtomicUsize,
    end: AtomicUsize,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { next: AtomicUsize::new(0), end: AtomicUsize::new(0) }
    }

    /// Replaces what was expected.
    pub(super) fn expect(&self, bytes: &[u8]) {
        let start = bytes.as_ptr() as usize;
        // whoever sees one of the two only asks for a little of what is not needed: an address is all that it takes
        self.next.store(start, Ordering::Relaxed);
        self.end.store(start + bytes.len().min(MOST), Ordering::Relaxed);
    }

    /// Asks for a little of what is left.
    pub(super) fn fetch_some(&self) {
        let end = self.end.load(Ordering::Relaxed);
        if self.next.load(Ordering::Relaxed) >= end {
            return;
        }
        let from = self.next.fetch_add(LINES * LINE, Ordering::Relaxed);
        for address in (from..(from + LINES * LINE).min(end)).step_by(LINE) {
            prefetch(address);
        }
    }
}

/// Asks for the line of an address into the second-level cache.
pub(crate) fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that reads nothing into the program and does not fault, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_is_asked_for_once_and_no_more_than_fits() {
        let bytes = vec![0u8; 3 * MOST];
        let ahead = Ahead::new();
        let asked = |ahead: &Ahead| {
            let before = ahead.next.load(Ordering::Relaxed);
            ahead.fetch_some();
            ahead.next.load(Ordering::Relaxed) - before
        };
        assert_eq!(asked(&ahead), 0, "nothing is expected");
        ahead.expect(&bytes);
        let mut all = 0;
        while let some @ 1.. = asked(&ahead) {
            all += some;
        }
        assert_eq!(all, MOST);
        ahead.expect(&bytes[..LINE]);
        assert_eq!((asked(&ahead), asked(&ahead)), (LINES * LINE, 0));
    }
}
