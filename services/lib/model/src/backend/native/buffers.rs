//! Memory of rows that were dropped, kept by each thread for its next ones: a decoder makes the same few shapes in every
//! layer, and fresh memory would be cleared twice, by the system and by us.
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers that a thread keeps at most: a layer has fewer at once.
const KEPT: usize = 32;
/// Values that a thread keeps at most, over all buffers: 64 MiB.
const KEPT_VALUES: usize = 16 << 20;
/// Values more than are asked for that a buffer may have: it is not there for what is far smaller.
const SPARE: usize = 4096;

thread_local! {
    /// The longest unused one first.
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Values whose memory goes back to the thread that drops them.
#[derive(Debug)]
pub(super) struct Values {
    /// All of it has a value.
    buffer: Vec<f32>,
    len: usize,
}

impl Values {
    /// `len` values of any content.
    pub(super) fn new(len: usize) -> Self {
        let fits = |buffer: &Vec<f32>| (len..=2 * len + SPARE).contains(&buffer.len());
        let kept = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            free.iter().position(fits).map(|index| free.remove(index))
        });
        // a thread that ends has none
        let buffer = kept.ok().flatten().unwrap_or_else(|| vec![0.0; len]);
        Self { buffer, len }
    }
}

impl From<Vec<f32>> for Values {
    fn from(buffer: Vec<f32>) -> Self {
        Self { len: buffer.len(), buffer }
    }
}

impl From<&[f32]> for Values {
    fn from(values: &[f32]) -> Self {
        let mut copy = Self::new(values.len());
        copy.copy_from_slice(values);
        copy
    }
}

impl Deref for Values {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Values {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        if buffer.capacity() > KEPT_VALUES {
            return;
        }
        // a thread that ends keeps nothing
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            free.push(buffer);
            let mut values: usize = free.iter().map(Vec::capacity).sum();
            while free.len() > KEPT || values > KEPT_VALUES {
                values -= free.remove(0).capacity();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_for_as_much_and_not_for_far_less() {
        let first = Values::new(100_000);
        let address = first.as_ptr();
        drop(first);
        assert_ne!(Values::new(10).as_ptr(), address);
        assert_eq!((Values::new(90_000).as_ptr(), Values::new(90_000).len()), (address, 90_000));
        for _ in 0..2 * KEPT {
            drop((0..2).map(|_| Values::new(100_000)).collect::<Vec<_>>());
        }
        let many: Vec<_> = (0..2 * KEPT).map(|len| Values::from(vec![1.0; len])).collect();
        assert!(many.iter().enumerate().all(|(len, values)| values.len() == len));
        drop(many);
        assert_eq!(FREE.with_borrow(Vec::len), KEPT);
    }

    #[test]
    fn no_more_memory_is_kept_than_the_bound() {
        let kept = || FREE.with_borrow(|free| free.iter().map(Vec::capacity).sum::<usize>());
        let small = Values::new(1000);
        let address = small.as_ptr();
        drop((0..8).map(|_| Values::new(KEPT_VALUES / 4)).collect::<Vec<_>>());
        assert_eq!(kept(), KEPT_VALUES);
        drop(small);
        assert!((1000..=KEPT_VALUES).contains(&kept()));
        drop(Values::new(KEPT_VALUES + 1));
        assert_eq!(Values::new(1000).as_ptr(), address, "what is too large to be kept pushes nothing out");
    }
}
