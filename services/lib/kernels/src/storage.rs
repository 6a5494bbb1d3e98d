//! Bytes of packed weights: owned and aligned, or a part of a mapped file.
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Alignment of owned bytes: a cache line and the widest vector.
pub const ALIGNMENT: usize = 64;

/// Owned bytes on a 64-byte bound.
pub struct AlignedBytes {
    pointer: NonNull<u8>,
    len: usize,
}

// SAFETY: the bytes are owned by this value alone; shared access is read-only through &self.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGNMENT).expect("a length that fits the address space")
    }

    /// `len` zero bytes.
    pub fn from_zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is at least 1.
        let pointer = unsafe { alloc_zeroed(layout) };
        let pointer = NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout));
        Self { pointer, len }
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
        // SAFETY: allocated with the same layout.
        unsafe { dealloc(self.pointer.as_ptr(), Self::layout(self.len)) }
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
