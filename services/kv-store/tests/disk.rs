//! Blocks on disk: they come back, also in another life; what is broken is never served; a full disk costs no request.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test fails there")]
use bytes::Bytes;
use moesaic_config::{ByteSize, HumanDuration};
use moesaic_kv_store::disk::{Files, Folder, Found};
use moesaic_kv_store::{Config, KvStore};
use moesaic_testkit::conformance::{block, chain, fetched};
use moesaic_testkit::until;
use moesaic_types::boundary::PrefixStore;
use moesaic_types::{BlockHash, Link};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// So many blocks are never offered.
const ALL: usize = usize::MAX / 2;

fn len() -> u64 {
    block(0).1.len() as u64
}

/// Room for some blocks in RAM and many on disk.
fn config(in_ram: u64) -> Config {
    Config { capacity: ByteSize(in_ram * len()), disk_retry: HumanDuration::from_millis(10), ..Config::default() }
}

fn in_folder(in_ram: u64, folder: &Path) -> Config {
    Config { disk_folder: Some(folder.to_owned()), ..config(in_ram) }
}

async fn offer(store: &KvStore, chain: &[BlockHash], numbers: impl IntoIterator<Item = u32>) {
    for (position, number) in numbers.into_iter().enumerate() {
        store.offer(Link::of(chain, position), block(number).1).await.unwrap();
    }
}

/// The blocks' files. One is there before the store knows that it is written, and keeps no copy in RAM.
fn files(folder: &Path) -> Vec<PathBuf> {
    let folders = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let blocks = folders.filter(|path| path.is_dir() && path.file_name().unwrap().len() == 2);
    blocks.flat_map(|folder| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())).collect()
}

fn expected(numbers: std::ops::Range<u32>) -> Vec<Bytes> {
    numbers.map(|number| block(number).1).collect()
}

#[tokio::test]
async fn what_ram_has_no_room_for_is_on_disk_and_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = KvStore::start(&in_folder(4, folder.path())).unwrap();
    let chain = chain(0..12);
    offer(&store, &chain, 0..12).await;
    until("its end is on disk alone, and did not push out its start", || async {
        store.longest_by_tier(chain.clone()).await == Ok((12, 4)) && files(folder.path()).len() == 8
    })
    .await;
    let others = moesaic_testkit::conformance::chain(100..104);
    offer(&store, &others, 100..104).await;
    until("its start is on disk alone", || async {
        store.longest_by_tier(chain.clone()).await == Ok((12, 0)) && files(folder.path()).len() == 12
    })
    .await;
    assert_eq!(fetched(&*store, &chain, 0).await, Ok(expected(0..12)));
    until("its start is back in RAM", || async { store.longest_by_tier(chain.clone()).await == Ok((12, 4)) }).await;
    assert_eq!(fetched(&*store, &others, 0).await, Ok(expected(100..104)), "the others went to disk in turn");
}

#[tokio::test]
async fn what_is_in_ram_alone_is_saved_for_another_life() {
    let folder = tempfile::tempdir().unwrap();
    let chain = chain(0..12);
    {
        let store = KvStore::start(&in_folder(8, folder.path())).unwrap();
        offer(&store, &chain, 0..12).await;
        assert_eq!(store.save().await, Ok(8), "four had no room in RAM, and are written already or on their way");
        assert_eq!(files(folder.path()).len(), 12);
        assert_eq!(store.longest_by_tier(chain.clone()).await, Ok((12, 8)), "it is still in RAM");
        assert_eq!(store.save().await, Ok(0));
    }
    until("its folder is let go", || async { Folder::open(folder.path()).is_ok() }).await;
    let store = KvStore::start(&in_folder(8, folder.path())).unwrap();
    until("the folder is read", || async { store.longest(&chain, 0).await == Ok(12) }).await;
    assert_eq!(fetched(&*store, &chain, 0).await, Ok(expected(0..12)));
}

#[tokio::test]
async fn saving_ends_where_the_disk_takes_nothing() {
    let store = KvStore::start(&config(8)).unwrap();
    offer(&store, &chain(0..4), 0..4).await;
    assert_eq!(store.save().await, Ok(0), "there is no disk");
    let folder = tempfile::tempdir().unwrap();
    let small = Config { disk_capacity: ByteSize(2 * len()), ..in_folder(8, folder.path()) };
    let store = KvStore::start(&small).unwrap();
    offer(&store, &chain(0..4), 0..4).await;
    assert_eq!(store.save().await, Ok(4));
    assert!(files(folder.path()).len() <= 2);
}

#[tokio::test]
async fn another_life_finds_the_blocks_and_drops_what_a_crash_broke() {
    let folder = tempfile::tempdir().unwrap();
    let chain = chain(0..20);
    {
        let files = Folder::open(folder.path()).unwrap();
        for (position, number) in (0..20).enumerate() {
            files.write(&Link::of(&chain, position), &block(number).1).unwrap();
        }
    }
    let cut = files(folder.path()).into_iter().find(|path| path.ends_with(format!("{:?}", chain[10]))).unwrap();
    fs::File::options().write(true).open(&cut).unwrap().set_len(50).unwrap();
    let config = in_folder(40, folder.path());
    let store = KvStore::start(&config).unwrap();
    until("the folder is read", || async { store.longest(&chain, 0).await == Ok(10) }).await;
    assert_eq!(store.longest(&chain, 11).await, Ok(9));
    until("the broken one is removed", || async { !cut.exists() }).await;

    // one that changed on disk has its length: it is found when it is read
    let broken = files(folder.path()).into_iter().find(|path| path.ends_with(format!("{:?}", chain[5]))).unwrap();
    let mut bytes = fs::read(&broken).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&broken, bytes).unwrap();
    assert_eq!(fetched(&*store, &chain, 0).await, Ok(expected(0..5)), "it ends before the broken one");
    until("it is forgotten", || async { store.longest(&chain, 0).await == Ok(5) }).await;
    until("and removed", || async { !broken.exists() }).await;

    // computed again, it is taken again
    assert_eq!(store.offer(Link::of(&chain, 5), block(5).1).await, Ok(true));
    assert_eq!(fetched(&*store, &chain, 0).await, Ok(expected(0..10)));
    // one that somebody removed
    fs::remove_file(files(folder.path()).into_iter().find(|p| p.ends_with(format!("{:?}", chain[12]))).unwrap())
        .unwrap();
    assert_eq!(fetched(&*store, &chain, 11).await, Ok(expected(11..12)));
    drop(store);
    until("the folder is free", || async { Folder::open(folder.path()).is_ok() }).await;
}

#[tokio::test]
async fn the_disk_has_its_own_capacity_and_chains_go_from_their_ends() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config { disk_capacity: ByteSize(5 * len()), ..in_folder(1, folder.path()) };
    let store = KvStore::start(&config).unwrap();
    let chains: Vec<_> = (0..8).map(|n| chain([n, 100 + n])).collect();
    for (n, chain) in (0u32..).zip(&chains) {
        offer(&store, chain, [n, 100 + n]).await;
    }
    until("the oldest are gone", || async {
        let sizes = store.size().await.unwrap();
        (sizes.disk_blocks, sizes.disk_bytes) == (5, 5 * len()) && files(folder.path()).len() == 5
    })
    .await;
    for (n, chain) in (0u32..).zip(&chains) {
        let stored = store.longest(chain, 0).await.unwrap();
        assert!(stored == 0 || store.longest(chain, 1).await.unwrap() < 2, "chain {n}");
    }
}

/// A disk that refuses some removals.
struct Stubborn {
    folder: Folder,
    refusals: AtomicUsize,
}

impl Files for Stubborn {
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()> {
        self.folder.write(link, block)
    }

    fn read(&self, hash: &BlockHash) -> io::Result<Option<Vec<u8>>> {
        self.folder.read(hash)
    }

    fn remove(&self, hash: &BlockHash) -> io::Result<()> {
        let refused = self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if refused.is_ok() { Err(io::Error::other("not now")) } else { self.folder.remove(hash) }
    }

    fn scan(&self, found: &mut dyn FnMut(Found)) -> io::Result<()> {
        self.folder.scan(found)
    }
}

#[tokio::test]
async fn a_file_that_could_not_be_removed_is_found_and_removed_later() {
    let place = tempfile::tempdir().unwrap();
    let stubborn = Arc::new(Stubborn { folder: Folder::open(place.path()).unwrap(), refusals: 0.into() });
    let config = Config { disk_capacity: ByteSize(4 * len()), ..config(1) };
    let store = KvStore::start_on(&config, Some(stubborn.clone())).unwrap();
    let push = async |n: u32| assert_eq!(store.offer(Link::of(&chain([n]), 0), block(n).1).await, Ok(true));
    for n in 0..5 {
        push(n).await;
    }
    until("the disk is full", || async { files(place.path()).len() == 4 }).await;
    stubborn.refusals.store(2, Ordering::SeqCst);
    // a disk that failed is left alone for a while, and takes nothing then
    let next = AtomicU32::new(5);
    until("two removals were refused", || async {
        push(next.fetch_add(1, Ordering::SeqCst)).await;
        stubborn.refusals.load(Ordering::SeqCst) == 0
    })
    .await;
    until("nothing is left that is not counted", || async {
        let sizes = store.size().await.unwrap();
        let on_disk = files(place.path()).len();
        on_disk <= 4 && sizes.disk_blocks == on_disk
    })
    .await;
}

/// A disk with room for some blocks, which can be held up.
struct Small {
    folder: Folder,
    room: AtomicUsize,
    kept: AtomicUsize,
    refused: AtomicUsize,
    /// How many blocks were offered; a write waits for some more, so that there is always work.
    offered: Option<Arc<(Mutex<usize>, Condvar)>>,
}

impl Files for Small {
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()> {
        if let Some(offered) = &self.offered {
            let (count, changed) = &**offered;
            let next = *count.lock().unwrap() + 2;
            let waited = changed.wait_timeout_while(count.lock().unwrap(), PATIENCE, |count| *count < next.min(ALL));
            assert!(!waited.unwrap().1.timed_out());
        }
        if self.kept.load(Ordering::SeqCst) >= self.room.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(ErrorKind::StorageFull.into());
        }
        self.kept.fetch_add(1, Ordering::SeqCst);
        self.folder.write(link, block)
    }

    fn read(&self, hash: &BlockHash) -> io::Result<Option<Vec<u8>>> {
        self.folder.read(hash)
    }

    fn remove(&self, hash: &BlockHash) -> io::Result<()> {
        self.kept.fetch_sub(1, Ordering::SeqCst);
        self.folder.remove(hash)
    }

    fn scan(&self, found: &mut dyn FnMut(Found)) -> io::Result<()> {
        self.folder.scan(found)
    }
}

#[tokio::test]
async fn a_full_disk_costs_no_request_and_is_used_again_when_there_is_room() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    let small = Small { folder, room: 0.into(), kept: 0.into(), refused: 0.into(), offered: None };
    let small = Arc::new(small);
    let store = KvStore::start_on(&config(2), Some(small.clone())).unwrap();
    let single = |n: u32| chain([n]);
    let pushed = AtomicU32::new(0);
    // RAM alone serves: the newest blocks are there, whatever the disk does
    let push = async || {
        let next = pushed.fetch_add(1, Ordering::SeqCst);
        assert_eq!(store.offer(Link::of(&single(next), 0), block(next).1).await, Ok(true));
        assert_eq!(fetched(&*store, &single(next), 0).await, Ok(expected(next..next + 1)));
    };
    while small.refused.load(Ordering::SeqCst) < 3 {
        push().await;
    }
    assert_eq!(files(place.path()).len(), 0);
    small.room.store(3, Ordering::SeqCst);
    until("the disk is used as far as it goes", || async {
        push().await;
        files(place.path()).len() == 3
    })
    .await;
    // blocks replace others on it, though its capacity is not reached
    let before = files(place.path());
    until("blocks are replaced", || async {
        push().await;
        let now = files(place.path());
        now.iter().all(|path| !before.contains(path))
    })
    .await;
    let stored = store.size().await.unwrap();
    assert!(stored.disk_blocks <= 4, "{stored:?}");
}

#[tokio::test]
async fn a_disk_that_was_full_is_used_again_also_when_it_never_rests() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    let offered = Arc::new((Mutex::new(0), Condvar::new()));
    let small =
        Small { folder, room: 3.into(), kept: 0.into(), refused: 0.into(), offered: Some(Arc::clone(&offered)) };
    let small = Arc::new(small);
    let store = KvStore::start_on(&config(1), Some(small.clone())).unwrap();
    let mut next = 0;
    let push = async |n: u32| {
        assert_eq!(store.offer(Link::of(&chain([n]), 0), block(n).1).await, Ok(true));
        *offered.0.lock().unwrap() += 1;
        offered.1.notify_all();
    };
    while small.refused.load(Ordering::SeqCst) == 0 {
        next += 1;
        push(next).await;
    }
    small.room.store(usize::MAX, Ordering::SeqCst);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while files(place.path()).len() < 20 {
        assert!(tokio::time::Instant::now() < deadline, "{} files", files(place.path()).len());
        next += 1;
        push(next).await;
    }
    *offered.0.lock().unwrap() = ALL;
    offered.1.notify_all();
}

/// A disk that can be made to answer nothing.
struct Hanging {
    folder: Folder,
    hangs: Mutex<bool>,
    changed: Condvar,
    waiting: AtomicUsize,
}

impl Hanging {
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let hangs = self.hangs.lock().unwrap();
        let (hangs, _) = self.changed.wait_timeout_while(hangs, PATIENCE, |hangs| *hangs).unwrap();
        assert!(!*hangs);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.changed.notify_all();
    }
}

impl Files for Hanging {
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()> {
        self.pass();
        self.folder.write(link, block)
    }

    fn read(&self, hash: &BlockHash) -> io::Result<Option<Vec<u8>>> {
        self.pass();
        self.folder.read(hash)
    }

    fn remove(&self, hash: &BlockHash) -> io::Result<()> {
        self.pass();
        self.folder.remove(hash)
    }

    fn scan(&self, found: &mut dyn FnMut(Found)) -> io::Result<()> {
        self.pass();
        self.folder.scan(found)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_does_not_answer_is_left_alone_until_it_does() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    let hanging = Hanging { folder, hangs: false.into(), changed: Condvar::new(), waiting: 0.into() };
    let hanging = Arc::new(hanging);
    let config = Config { disk_timeout: HumanDuration::from_millis(100), ..config(4) };
    let store = KvStore::start_on(&config, Some(hanging.clone())).unwrap();
    let chain = chain(0..12);
    offer(&store, &chain, 0..12).await;
    until("its end is on disk alone", || async { store.longest_by_tier(chain.clone()).await == Ok((12, 4)) }).await;
    hanging.hang(true);
    assert_eq!(fetched(&*store, &chain, 0).await, Ok(expected(0..4)), "what RAM has");
    until("what is on disk counts as gone", || async { store.longest(&chain, 0).await == Ok(4) }).await;
    let fetch = || fetched(&*store, &chain, 0);
    for _ in 0..20 {
        assert_eq!(fetch().await, Ok(expected(0..4)));
    }
    let others = moesaic_testkit::conformance::chain(100..104);
    offer(&store, &others, 100..104).await;
    assert_eq!(fetched(&*store, &others, 0).await, Ok(expected(100..104)), "RAM takes blocks");
    assert!(hanging.waiting.load(Ordering::SeqCst) <= 2, "one reads, and one looks at the disk again");
    hanging.hang(false);
    until("what is on disk is back", || async { store.longest(&chain, 4).await == Ok(8) }).await;
    assert_eq!(fetched(&*store, &chain, 4).await, Ok(expected(4..12)));
}

/// A disk that can be read only as long as there are files to open.
struct OutOfFiles {
    folder: Folder,
    is_out: AtomicBool,
    removed: AtomicUsize,
}

impl Files for OutOfFiles {
    fn write(&self, link: &Link, block: &[u8]) -> io::Result<()> {
        self.folder.write(link, block)
    }

    fn read(&self, hash: &BlockHash) -> io::Result<Option<Vec<u8>>> {
        const EMFILE: i32 = 24;
        if self.is_out.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(EMFILE));
        }
        self.folder.read(hash)
    }

    fn remove(&self, hash: &BlockHash) -> io::Result<()> {
        self.removed.fetch_add(1, Ordering::SeqCst);
        self.folder.remove(hash)
    }

    fn scan(&self, found: &mut dyn FnMut(Found)) -> io::Result<()> {
        self.folder.scan(found)
    }
}

#[tokio::test]
async fn a_process_that_has_no_more_files_to_open_loses_no_block() {
    let place = tempfile::tempdir().unwrap();
    let folder = Folder::open(place.path()).unwrap();
    let disk = Arc::new(OutOfFiles { folder, is_out: false.into(), removed: 0.into() });
    let store = KvStore::start_on(&config(1), Some(disk.clone())).unwrap();
    let chain = chain(0..3);
    offer(&store, &chain, 0..3).await;
    until("its end is on disk alone", || async { store.longest_by_tier(chain.clone()).await == Ok((3, 1)) }).await;
    disk.is_out.store(true, Ordering::SeqCst);
    assert_eq!(fetched(&*store, &chain, 1).await, Ok(vec![]));
    // what the pool was told before this, it did
    assert_eq!(store.longest(&chain, 0).await, Ok(3), "nothing is forgotten");
    disk.is_out.store(false, Ordering::SeqCst);
    assert_eq!(fetched(&*store, &chain, 1).await, Ok(expected(1..3)));
    assert_eq!(disk.removed.load(Ordering::SeqCst), 0);
}
