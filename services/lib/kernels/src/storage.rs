//! Bytes of packed weights: owned and aligned, or a part of a mapped file.
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Alignment of owned bytes: a cache line and the widest vector.
pub const ALIGNMENT: usize = 64;

/// Bytes of a large page, which spares the processor most of its address look-ups while weights stream by.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes that are mapped at once: matrices are smaller than a large page, so many share one mapping.
const CHUNK: usize = 64 << 20;
/// Fewer bytes are allocated the usual way.
const LARGE: usize = 64 << 10;
/// No system's page is larger; what is given back is cut to this.
const PAGE_AT_MOST: usize = 64 << 10;

/// Owned bytes on a 64-byte bound. Large ones lie in large pages where the system has them.
///
/// The memory of a dropped part goes back to the system, its addresses when all parts of the mapping are dropped.
pub struct AlignedBytes {
    pointer: NonNull<u8>,
    len: usize,
    /// The mapping that the bytes are a part of.
    chunk: Option<Arc<memmap2::MmapMut>>,
}

// SAFETY: the bytes are owned by this value alone; shared access is read-only through &self.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

/// The mapping that parts are being cut from, and where its rest starts.
static OPEN: Mutex<Option<(Arc<memmap2::MmapMut>, usize)>> = Mutex::new(None);

/// `len` zero bytes from a page's bound on, in large pages where the system has them; a page is taken when it is first
/// written.
pub(crate) fn map_zeroed(len: usize) -> io::Result<memmap2::MmapMut> {
    let map = memmap2::MmapMut::map_anon(len)?;
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        // a system without large pages does without
        drop(error);
    }
    Ok(map)
}

/// A new mapping with room for `len` bytes behind its first large page's bound, and that bound.
fn map_chunk(len: usize) -> io::Result<(Arc<memmap2::MmapMut>, usize)> {
    let map = map_zeroed(len.next_multiple_of(HUGE_PAGE) + HUGE_PAGE)?;
    let start = map.as_ptr().align_offset(HUGE_PAGE);
    Ok((Arc::new(map), start))
}

/// `len` zero bytes of a mapping: one of their own, or a part of the open one.
fn cut(len: usize) -> io::Result<AlignedBytes> {
    let (chunk, start) = if len > CHUNK / 2 {
        map_chunk(len)?
    } else {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(chunk, start): &(Arc<memmap2::MmapMut>, usize)| start + len <= chunk.len();
        let (chunk, start) = match open.take().filter(fits) {
            Some(open) => open,
            None => map_chunk(CHUNK)?,
        };
        *open = Some((Arc::clone(&chunk), (start + len).next_multiple_of(ALIGNMENT)));
        (chunk, start)
    };
    // the start lies inside the mapping, so the pointer is not null
    let pointer = NonNull::new(chunk.as_ptr().wrapping_add(start).cast_mut());
    Ok(AlignedBytes { pointer: pointer.expect("a mapping does not start at 0"), len, chunk: Some(chunk) })
}

impl AlignedBytes {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGNMENT).expect("a length that fits the address space")
    }

    /// `len` zero bytes.
    pub fn from_zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        if len >= LARGE {
            return cut(len).unwrap_or_else(|_| handle_alloc_error(layout));
        }
        // SAFETY: the layout's size is at least 1.
        let pointer = unsafe { alloc_zeroed(layout) };
        let pointer = NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout));
        Self { pointer, len, chunk: None }
    }

    /// All bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes were allocated and initialized.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }

    /// All bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes were allocated and initialized, and &mut self is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        let Some(chunk) = &self.chunk else {
            // SAFETY: allocated with the same layout.
            return unsafe { dealloc(self.pointer.as_ptr(), Self::layout(self.len)) };
        };
        #[cfg(unix)]
        if Arc::strong_count(chunk) > 1 {
            let start = self.pointer.as_ptr() as usize - chunk.as_ptr() as usize;
            // whole pages of our own, counted from the system's bounds
            let base = chunk.as_ptr() as usize;
            let first = (base + start).next_multiple_of(PAGE_AT_MOST) - base;
            let end = ((base + start + self.len) / PAGE_AT_MOST * PAGE_AT_MOST).saturating_sub(base);
            if first < end {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                // SAFETY: the pages are private and anonymous, and no byte of them is another part's or used again.
                let released = unsafe { chunk.unchecked_advise_range(advice, first, end - first) };
                // only memory is at stake
                drop(released);
            }
        }
    }
}

impl Clone for AlignedBytes {
    fn clone(&self) -> Self {
        let mut copy = Self::from_zeroed(self.len);
        copy.as_mut_slice().copy_from_slice(self.as_slice());
        copy
    }
}

/// Bytes of a file that are passed over before their pages are given back.
const RELEASE_AFTER: usize = 64 << 20;

/// A file mapped into memory, read-only.
///
/// The file must not be cut short while it is mapped: the system would end the process at the first read beyond.
pub struct MappedFile {
    map: Option<memmap2::Mmap>,
    passed: AtomicUsize,
}

impl MappedFile {
    /// Maps a file.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let file = std::fs::File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Arc::new(Self { map: None, passed: AtomicUsize::new(0) }));
        }
        // SAFETY: read-only and private; that nobody truncates a model's file while it is served is documented above.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Arc::new(Self { map: Some(map), passed: AtomicUsize::new(0) }))
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// Says that so many bytes were read once and are not needed again soon: now and then the pages are given back, so
    /// that a pass over a large file does not hold it in memory. They stay in the system's cache.
    pub fn passed(&self, bytes: usize) {
        if self.passed.fetch_add(bytes, Ordering::Relaxed) + bytes < RELEASE_AFTER {
            return;
        }
        self.passed.store(0, Ordering::Relaxed);
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // SAFETY: the map is read-only and backed by its file, so a page that is dropped is read again, the same.
            let released = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            // only memory is at stake
            drop(released);
        }
    }
}

/// Where packed bytes are.
#[derive(Clone)]
pub enum Storage {
    /// In memory of our own.
    Owned(Arc<AlignedBytes>),
    /// In a mapped file.
    Mapped {
        /// The file.
        file: Arc<MappedFile>,
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
    },
}

impl Storage {
    /// A part of the bytes, inside them; that of a mapped file stays there.
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Self {
        match self {
            Self::Owned(bytes) if offset == 0 && len == bytes.as_slice().len() => self.clone(),
            Self::Owned(bytes) => {
                let mut part = AlignedBytes::from_zeroed(len);
                part.as_mut_slice().copy_from_slice(&bytes.as_slice()[offset..][..len]);
                Self::Owned(Arc::new(part))
            }
            Self::Mapped { file, offset: start, .. } => {
                Self::Mapped { file: Arc::clone(file), offset: start + offset, len }
            }
        }
    }

    /// The bytes; empty where a mapped part lies outside its file.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes.as_slice(),
            Self::Mapped { file, offset, len } => {
                offset.checked_add(*len).and_then(|end| file.bytes().get(*offset..end)).unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zero_aligned_and_live_on_without_their_neighbours() {
        let lens = [1, 100, LARGE - 1, LARGE, LARGE + 1, 1 << 20, (1 << 20) + 7, CHUNK / 2, CHUNK / 2 + 1, 3 << 20];
        let mut parts: Vec<_> = (0..40).map(|i| AlignedBytes::from_zeroed(lens[i % lens.len()])).collect();
        for (i, part) in parts.iter_mut().enumerate() {
            assert!((part.as_slice().as_ptr() as usize).is_multiple_of(ALIGNMENT));
            let (len, bytes) = (part.len, part.as_mut_slice());
            let places = [0, len / 2, len - 1];
            assert_eq!(places.map(|at| bytes[at]), [0; 3], "part {i}");
            places.into_iter().for_each(|at| bytes[at] = i as u8 + 1);
        }
        // every other one goes; new ones come
        let mut i = 0;
        parts.retain(|_| {
            i += 1;
            i % 2 == 0
        });
        let new: Vec<_> = (0..20).map(|i| AlignedBytes::from_zeroed(lens[i % lens.len()])).collect();
        assert!(new.iter().all(|part| part.as_slice().iter().all(|b| *b == 0)));
        for (i, part) in parts.iter().enumerate() {
            for at in [0, part.len / 2, part.len - 1] {
                assert_eq!(part.as_slice()[at], 2 * i as u8 + 2, "part {}", 2 * i + 1);
            }
        }
    }

    #[test]
    fn a_copy_is_its_own() {
        let mut bytes = AlignedBytes::from_zeroed(LARGE * 2);
        let copy = bytes.clone();
        bytes.as_mut_slice().fill(7);
        assert!(copy.as_slice().iter().all(|b| *b == 0));
    }
}
