//! The tier on disk: one file a block, in a folder that is this process's alone.
//!
//! A file is written beside and renamed, so that it is there as a whole or not at all when the process dies. Nothing is
//! synced: blocks are a cache, and what a power loss leaves half written is found by its checksum when it is read. A file
//! that is not intact is dropped and never served.
mod file;
mod keeper;

pub use keeper::{Patience, keep};

use moesaic_types::{BlockHash, Error, Link, Result};
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
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
    /// The system's first; everything else was told of even so.
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
        make_folder(&path.join(UNFINISHED)).map_err(|error| refused(&error))?;
        let lock = create(&path.join("lock")).map_err(|error| refused(&error))?;
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

/// Makes a folder that is this user's alone, and those above it; one that is there stays as it is.
fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a file that is this user's alone: blocks tell what was asked.
fn create(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(true).mode(0o600).open(path)
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

/// Whether the process or the system has no more files to open: that says nothing of the file.
pub(crate) fn is_out_of_files(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

/// Keeps the first error, so that one does not end what goes on with others.
#[derive(Default)]
struct First(Option<io::Error>);

impl First {
    fn note<T>(&mut self, outcome: io::Result<T>) -> Option<T> {
        outcome.map_err(|error| self.0.get_or_insert(error)).ok()
    }

    fn end(self) -> io::Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}

/// Calls for each, and gives the first error when all are done.
fn each<T>(items: impl IntoIterator<Item = T>, mut call: impl FnMut(T) -> io::Result<()>) -> io::Result<()> {
    let mut first = First::default();
    for item in items {
        first.note(call(item));
    }
    first.end()
}

impl Files for Folder {
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()> {
        let (place, beside) = (self.place(&link.hash), self.path.join(UNFINISHED).join(format!("{:?}", link.hash)));
        let write = || {
            let mut opened = create(&beside)?;
            opened.write_all(&file::header(link, block))?;
            opened.write_all(block)?;
            drop(opened);
            if let Some(folder) = place.parent() {
                make_folder(folder)?;
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
        let mut first = First::default();
        let left = first.note(fs::read_dir(self.path.join(UNFINISHED)));
        first.note(each(left.into_iter().flatten(), |left| fs::remove_file(left?.path())));
        for folder in fs::read_dir(&self.path)? {
            let Some(folder) = first.note(folder) else { continue };
            let is_blocks = folder.file_name().len() == 2 && folder.file_type().is_ok_and(|kind| kind.is_dir());
            let Some(entries) = is_blocks.then(|| first.note(fs::read_dir(folder.path()))).flatten() else { continue };
            for entry in entries {
                let Some(path) = first.note(entry).map(|entry| entry.path()) else { continue };
                // what is not ours stays
                let Some(hash) = named(&path) else { continue };
                match found(&path, hash) {
                    Ok(found) => tell(found),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) if is_out_of_files(&error) => drop(first.note::<()>(Err(error))),
                    Err(error) => {
                        tracing::warn!(%error, path = %path.display(), "read a block's header; the block is dropped");
                        tell(Err(hash));
                    }
                }
            }
        }
        first.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

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
    fn what_cannot_be_read_does_not_hide_the_rest() {
        let place = tempfile::tempdir().unwrap();
        let folder = Folder::open(place.path()).unwrap();
        let chain = chain(40);
        let odd = |n: usize| n % 2 == 1;
        for (n, hash) in chain.iter().enumerate() {
            match odd(n) {
                // its header cannot be read, whoever reads it
                true => fs::create_dir_all(folder.place(hash)).unwrap(),
                false => folder.write(&Link::of(&chain, n), &block(n)).unwrap(),
            }
        }
        fs::create_dir(place.path().join(UNFINISHED).join("cannot be removed")).unwrap();
        let mut all = Vec::new();
        let told = folder.scan(&mut |found| all.push(found));
        assert!(told.is_err(), "what is left half written stays");
        let (mut good, mut bad): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
        all.into_iter().for_each(|found| match found {
            Ok((link, _)) => good.push(link.hash),
            Err(hash) => bad.push(hash),
        });
        let expected = |wanted: bool| {
            let named = chain.iter().enumerate().filter(|(n, _)| odd(*n) == wanted);
            let mut hashes: Vec<_> = named.map(|(_, hash)| *hash).collect();
            hashes.sort_unstable();
            hashes
        };
        good.sort_unstable();
        bad.sort_unstable();
        assert_eq!((good, bad), (expected(false), expected(true)));
    }

    #[test]
    fn nobody_else_may_read_blocks() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("made");
        let folder = Folder::open(&path).unwrap();
        let chain = chain(1);
        folder.write(&Link::of(&chain, 0), &block(0)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let file = folder.place(&chain[0]);
        assert_eq!((mode(&path), mode(file.parent().unwrap()), mode(&file)), (0o700, 0o700, 0o600));
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
