//! The cluster's private folder: settings, sockets, what Redis and NATS store, and logs.
use anyhow::{Context, Result};
use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What such folders' names begin with.
const PREFIX: &str = "moesaic-up-";

/// Held locked as long as the folder is somebody's.
const LOCK: &str = "lock";

/// Removed when it is dropped, unless it is kept.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    logs: PathBuf,
    /// Of logs that are kept whatever happens.
    logs_are_apart: bool,
    _lock: File,
}

impl Folder {
    /// Makes one under the system's folder for temporary files, which nobody else may read, and removes those that were
    /// left there by processes that were killed.
    ///
    /// # Errors
    /// When it, or the folder for logs, cannot be made.
    pub fn make(logs: Option<&Path>) -> Result<Self> {
        Self::make_in(&std::env::temp_dir(), logs)
    }

    pub(super) fn make_in(parent: &Path, logs: Option<&Path>) -> Result<Self> {
        sweep(parent);
        // short: the paths of Unix sockets are
        let name = uuid::Uuid::new_v4().simple().to_string();
        let path = parent.join(format!("{PREFIX}{}", &name[..8]));
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("make the folder {}", path.display()))?;
        // locked before it has its name, so that nobody takes the folder for left behind
        let unnamed = path.join("unnamed");
        let lock = File::create(&unnamed).context("make the folder's lock")?;
        lock.try_lock().context("lock the folder")?;
        std::fs::rename(&unnamed, path.join(LOCK)).context("name the folder's lock")?;
        let own = path.join("logs");
        let folder = Self { logs: logs.map_or(own, Path::to_owned), logs_are_apart: logs.is_some(), path, _lock: lock };
        let made = std::fs::create_dir_all(&folder.logs);
        made.with_context(|| format!("make the folder for logs {}", folder.logs.display()))?;
        Ok(folder)
    }

    /// What tells this run from others.
    pub fn run(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        name.trim_start_matches(PREFIX).to_owned()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where logs are written.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Removes everything but the logs, where there are any.
    pub fn keep_logs(self) {
        let is_empty = std::fs::read_dir(&self.logs).is_ok_and(|mut logs| logs.next().is_none());
        if self.logs_are_apart || is_empty {
            return; // all of it goes, as always
        }
        for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry.path() != self.logs {
                remove(&entry.path());
            }
        }
        std::mem::forget(self);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes folders whose process is gone. What cannot be read or removed is left alone.
fn sweep(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours = |path: &Path| {
            let own = path.symlink_metadata().ok().filter(|meta| meta.is_dir()).map(|meta| meta.uid());
            own == Some(rustix::process::getuid().as_raw())
        };
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) || !is_ours(&path) {
            continue;
        }
        // one without a lock has logs that were kept, or is being made
        let Ok(lock) = File::open(path.join(LOCK)) else { continue };
        match lock.try_lock() {
            Ok(()) => remove(&path),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

fn remove(path: &Path) {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "remove a temporary file");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(parent: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(parent).expect("it is there").map(|entry| entry.expect("a name").path()).collect()
    }

    #[test]
    fn a_folder_is_private_and_goes_with_its_process() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = Folder::make_in(parent.path(), None).expect("made");
        let path = folder.path().to_owned();
        assert_eq!(path.metadata().expect("it is there").mode() & 0o777, 0o700);
        assert!(folder.logs().starts_with(&path) && folder.logs().is_dir());

        // one that is in use stays, one whose process was killed goes, and others' folders are no concern of ours
        let killed = parent.path().join("moesaic-up-killed");
        std::fs::create_dir_all(killed.join("redis")).expect("made");
        File::create(killed.join(LOCK)).expect("made");
        std::fs::create_dir(parent.path().join("other")).expect("made");
        let later = Folder::make_in(parent.path(), None).expect("made");
        assert!(path.is_dir() && !killed.exists() && parent.path().join("other").is_dir());
        drop((folder, later));
        assert_eq!(names(parent.path()), [parent.path().join("other")]);
    }

    #[test]
    fn logs_are_kept_where_that_is_asked_for() {
        let parent = tempfile::tempdir().expect("a folder");
        let folder = Folder::make_in(parent.path(), None).expect("made");
        let logs = folder.logs().to_owned();
        std::fs::write(logs.join("x.log"), "x").expect("written");
        std::fs::write(folder.path().join("secret"), "x").expect("written");
        folder.keep_logs();
        let path = logs.parent().expect("it has one").to_owned();
        assert_eq!(names(&path), std::slice::from_ref(&logs));
        drop(Folder::make_in(parent.path(), None).expect("made"));
        assert!(logs.join("x.log").is_file(), "the next run leaves them alone");

        let folder = Folder::make_in(parent.path(), None).expect("made");
        let own = folder.path().to_owned();
        folder.keep_logs();
        assert!(!own.exists(), "there were none");

        let apart = parent.path().join("apart");
        let folder = Folder::make_in(parent.path(), Some(&apart)).expect("made");
        assert_eq!(folder.logs(), apart);
        let own = folder.path().to_owned();
        folder.keep_logs();
        assert!(apart.is_dir() && !own.exists());
    }
}
