//! The tier on disk: one file a block, in a folder that is this process's alone.
//!
//! A file is written beside and renamed, so that it is there as a whole or not at all when the process dies. Nothing is
//! synced: blocks are a cache, and what a power loss leaves half written is found by its checksum when it is read. A file
//! that is not intact is dropped and never served.
mod file;
mod keeper;

pub use keeper::keep;

use moesaic_types::{BlockHash, Error, Link, Result};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// What [`Files::scan`] finds: a block and its bytes' length, or a file that is none.
pub type Found = std::result::Result<(Link, u64), BlockHash>;

/// Where the files are. All calls block.
pub trait Files: Send + Sync + 'static {
    /// Writes a block as a whole or not at all.
    ///
    /// # Errors
    /// The system's.
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()>;
    /// A block's bytes; `None` when its file is not intact.
    ///
    /// # Errors
    /// The system's; `NotFound` when there is no file.
    fn read(&self, hash: &BlockHash) -> io::Result<Option<Vec<u8>>>;
    /// Removes a block; one that is not there is no error.
    ///
    /// # Errors
    /// The system's.
    fn remove(&self, hash: &BlockHash) -> io::Result<()>;
    /// Tells of every file, and removes what an earlier life left half written. Blocks are not read.
    ///
    /// # Errors
    /// The system's.
    fn scan(&self, found: &mut dyn FnMut(Found)) -> io::Result<()>;
}

/// A folder.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
}

const UNFINISHED: &str = "unfinished";

impl Folder {
    /// Makes the folder where it is not there, and takes it for this process.
    ///
    /// # Errors
    /// `InvalidArgument` naming `kv_store.disk_folder` when it cannot be made, or another process has it.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |reason: &dyn std::fmt::Display| {
            let message = format!("kv_store.disk_folder: {} cannot be used: {reason}", path.display());
            Error::invalid("kv_store.disk_folder", message)
        };
        fs::create_dir_all(path.join(UNFINISHED)).map_err(|error| refused(&error))?;
        let lock = File::create(path.join("lock")).map_err(|error| refused(&error))?;
        lock.try_lock().map_err(|error| match error {
            fs::TryLockError::WouldBlock => refused(&"another process has it"),
            fs::TryLockError::Error(error) => refused(&error),
        })?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    fn place(&self, hash: &BlockHash) -> PathBuf {
        let name = format!("{hash:?}");
        self.path.join(&name[..2]).join(name)
    }
}

/// The name that a file's name says.
fn named(path: &Path) -> Option<BlockHash> {
    let digits = path.file_name()?.to_str().filter(|name| name.len() == 32 && name.is_ascii())?;
    let mut hash = [0; 16];
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(BlockHash(hash))
}

fn found(path: &Path, hash: BlockHash) -> io::Result<Found> {
    let mut opened = File::open(path)?;
    let len = opened.metadata()?.len();
    let mut header = [0; file::HEADER];
    match opened.read_exact(&mut header) {
        Ok(()) => {
            let block = file::read_header(&header, len).filter(|(link, _)| link.hash == hash);
            Ok(block.ok_or(hash))
        }
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(Err(hash)),
        Err(error) => Err(error),
    }
}

impl Files for Folder {
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()> {
        let (place, beside) = (self.place(&link.hash), self.path.join(UNFINISHED).join(format!("{:?}", link.hash)));
        let write = || {
            let mut opened = File::create(&beside)?;
            opened.write_all(&file::header(link, block))?;
            opened.write_all(block)?;
            drop(opened);
            if let Some(folder) = place.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::rename(&beside, &place)
        };
        write().inspect_err(|_| {
            // what is left takes room; if it cannot be removed either, the next start does
            let _ = fs::remove_file(&beside);
        })
    }

    fn read(&self, hash: &BlockHash) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = fs::read(self.place(hash))?;
        if !file::is_intact(&bytes, hash) {
            return Ok(None);
        }
        bytes.drain(..file::HEADER);
        Ok(Some(bytes))
    }

    fn remove(&self, hash: &BlockHash) -> io::Result<()> {
        match fs::remove_file(self.place(hash)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn scan(&self, tell: &mut dyn FnMut(Found)) -> io::Result<()> {
        for left in fs::read_dir(self.path.join(UNFINISHED))? {
            fs::remove_file(left?.path())?;
        }
        for folder in fs::read_dir(&self.path)? {
            let folder = folder?;
            let is_blocks = folder.file_name().len() == 2 && folder.file_type()?.is_dir();
            if !is_blocks {
                continue;
            }
            for entry in fs::read_dir(folder.path())? {
                let path = entry?.path();
                // what is not ours stays
                if let Some(hash) = named(&path) {
                    tell(found(&path, hash)?);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chain(len: u8) -> Vec<BlockHash> {
        (0..len).map(|n| BlockHash([n.wrapping_mul(37).wrapping_add(1); 16])).collect()
    }

    fn block(n: usize) -> Vec<u8> {
        (0..100 + 7 * n).map(|at| (at * 31 + n) as u8).collect()
    }

    fn scanned(folder: &Folder) -> Vec<Found> {
        let mut all = Vec::new();
        folder.scan(&mut |found| all.push(found)).unwrap();
        all.sort_by_key(|found| found.as_ref().map_or(u32::MAX, |(link, _)| link.position));
        all
    }

    #[test]
    fn blocks_are_there_after_a_restart_and_what_was_half_written_is_not() {
        let place = tempfile::tempdir().unwrap();
        let chain = chain(5);
        let links: Vec<_> = (0..5).map(|n| Link::of(&chain, n)).collect();
        {
            let folder = Folder::open(place.path()).unwrap();
            assert_eq!(Folder::open(place.path()).unwrap_err().field.as_deref(), Some("kv_store.disk_folder"));
            links.iter().enumerate().for_each(|(n, link)| folder.write(link, &block(n)).unwrap());
            folder.remove(&chain[4]).unwrap();
            folder.remove(&chain[4]).unwrap();
        }
        fs::write(place.path().join(UNFINISHED).join("leftover"), "half a block").unwrap();
        fs::write(place.path().join("01/not ours"), "precious").unwrap();
        let folder = Folder::open(place.path()).unwrap();
        let expected: Vec<Found> = (0..4).map(|n| Ok((links[n], block(n).len() as u64))).collect();
        assert_eq!(scanned(&folder), expected);
        assert_eq!(folder.read(&chain[3]).unwrap(), Some(block(3)));
        assert_eq!(folder.read(&chain[4]).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(fs::read_dir(place.path().join(UNFINISHED)).unwrap().count(), 0);
        assert!(place.path().join("01/not ours").exists());
    }

    #[test]
    fn a_folder_that_cannot_be_names_its_field() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("file"), "").unwrap();
        let error = Folder::open(&place.path().join("file")).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("kv_store.disk_folder"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        /// A crash cuts files anywhere: each file's block is served to the last bit, or not at all.
        #[test]
        fn what_survives_a_crash_is_intact(
            cuts in prop::collection::vec((0usize..8, any::<prop::sample::Index>()), 0..8),
        ) {
            let place = tempfile::tempdir().unwrap();
            let chain = chain(8);
            let folder = Folder::open(place.path()).unwrap();
            for (n, hash) in chain.iter().enumerate() {
                folder.write(&Link::of(&chain, n), &block(n)).unwrap();
                prop_assert!(folder.place(hash).exists());
            }
            let mut is_cut = [false; 8];
            for (n, at) in cuts {
                let opened = File::options().write(true).open(folder.place(&chain[n])).unwrap();
                let len = opened.metadata().unwrap().len() as usize;
                if len > 0 {
                    opened.set_len(at.index(len) as u64).unwrap();
                    is_cut[n] = true;
                }
            }
            drop(folder);
            let folder = Folder::open(place.path()).unwrap();
            for found in scanned(&folder) {
                let hash = found.as_ref().map_or_else(|hash| *hash, |(link, _)| link.hash);
                let n = chain.iter().position(|known| *known == hash).unwrap();
                prop_assert_eq!(found.is_err(), is_cut[n]);
                prop_assert_eq!(folder.read(&hash).unwrap(), (!is_cut[n]).then(|| block(n)));
            }
        }
    }
}
