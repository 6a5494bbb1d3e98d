//! A kv-store's disk that is full, and files on it that are not what was written.
use crate::cluster::{Cluster, Kind};
use crate::suite::{Fault, Suite, stores_are_used};
use anyhow::{Context, Result, bail};
use moesaic_tests::until;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// RAM for a few blocks: the others go to disk, of which a moment later is tried again what failed.
pub const STORES: &[&str] = &["kv_store.disk_folder={data}", "kv_store.capacity=400KiB", "kv_store.disk_retry=500ms"];

const DISK_FAILURES: &str = "moesaic_kv_store_disk_failures_total";
const DISK_BYTES: &str = "moesaic_kv_store_disk_bytes";
const CORRUPT: &str = "moesaic_kv_store_corrupt_total";

pub fn disks(suite: &mut Suite) {
    corrupt(suite);
    full(suite);
}

fn corrupt(suite: &mut Suite) {
    let fault = Fault::new("corrupt files in both kv-stores", "none is served: their blocks are computed");
    let grows = |c: &Cluster| {
        let count = || c.names(Kind::Store).into_iter().map(|name| c.member(name).metric(CORRUPT)).sum::<Result<f64>>();
        until("a corrupt file is found", || Ok(count()? > 0.0))
    };
    let begin = |c: &mut Cluster| {
        let mut flipped = 0;
        for name in c.names(Kind::Store) {
            flipped += flip_all(&c.data(name))?;
        }
        if flipped == 0 { bail!("there is no block on disk") } else { Ok(()) }
    };
    suite.fault(fault.lasting(Duration::ZERO), begin, |c| {
        let stores = c.names(Kind::Store);
        stores_are_used(c, "s0", &stores)?;
        grows(c)
    });
}

/// Changes a bit in the middle of each block's file; how many there were.
fn flip_all(folder: &Path) -> Result<usize> {
    let mut flipped = 0;
    for group in fs::read_dir(folder)? {
        let group = group?;
        if group.file_name().len() != 2 {
            continue;
        }
        for file in fs::read_dir(group.path())? {
            let path = file?.path();
            // it may be evicted meanwhile
            let Ok(mut bytes) = fs::read(&path) else { continue };
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&path, bytes)?;
            flipped += 1;
        }
    }
    Ok(flipped)
}

fn full(suite: &mut Suite) {
    let what = "full disk of a kv-store";
    let disk = match SmallDisk::mount(&suite.cluster.data("k0")) {
        Ok(disk) => disk,
        Err(error) => return suite.skip(what, &format!("{error:#}")),
    };
    let fault = Fault::new(what, "it goes on with RAM; blocks are written again when there is room");
    let begin = |c: &mut Cluster| {
        // anew, for it has the folder open that the disk now hides
        c.kill("k0")?;
        disk.fill()?;
        c.start("k0")?;
        until("k0 fails to write", || Ok(c.member("k0").metric(DISK_FAILURES).is_ok_and(|count| count > 0.0)))
    };
    let end = |c: &mut Cluster| {
        disk.make_room()?;
        until("k0 writes again", || Ok(c.member("k0").metric(DISK_BYTES)? > 0.0))
    };
    suite.fault(fault.lasting_shortly(), begin, end);
    // the process must be gone before the disk can be
    let again = Fault::new("kill -9 a kv-store, its disk is lost", "its blocks are computed or come from the other");
    let begin = |c: &mut Cluster| c.kill("k0");
    suite.fault(again.lasting(Duration::ZERO), begin, move |c| {
        drop(disk);
        c.start("k0")
    });
}

/// A file system of its own over a folder, that has room for some blocks.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: &Path) -> Result<Self> {
        let size = "size=1m";
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", size, "none"]).arg(folder).output();
        let output = output.context("mount a small disk")?;
        if !output.status.success() {
            bail!("mount a small disk: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(Self(folder.to_owned()))
    }

    /// Takes all room there is.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.0.join("filler"))?;
        match io::copy(&mut io::repeat(7), &mut file).and_then(|_| file.flush()) {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(()),
            outcome => bail!("the small disk does not get full: {outcome:?}"),
        }
    }

    fn make_room(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("filler"))?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // lazily: a process may still have a file open
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
