//! The embedded store: a folder, with a folder for each collection and a file for each value.
//!
//! A value is written aside, synced and renamed into place, so that a reader or a crash sees the old one or the new
//! one. Whether a crash may bring the old one back depends on the collection: what nodes say while they are up needs not
//! outlive the machine. Writers hold a lock on the folder (flock), which makes comparison and change one step. A watch is inotify,
//! and a listing every two seconds, for on a network file system inotify does not see what other machines write. A lease
//! is the time of the file's last touch: machines that share a folder need clocks that agree to within a second or so.

use crate::{
    codec,
    store::{Answer, Change, Collection, Expect, Key, Store, StoreError, Versioned},
};
use futures::{FutureExt, StreamExt};
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};
use tokio::sync::mpsc;

/// A store in a folder.
#[derive(Clone, Debug)]
pub struct FileStore {
    folder: PathBuf,
}

/// Content of a file.
#[derive(Serialize, Deserialize)]
struct Entry {
    revision: u64,
    /// Time to live without a touch, in milliseconds.
    lease: Option<u64>,
    #[serde(with = "serde_bytes")]
    value: Vec<u8>,
}

/// Revisions: the next one, and up to which they are reserved.
#[derive(Clone, Copy)]
struct Counter {
    next: u64,
    reserved: u64,
}

impl Counter {
    /// As in the file: as long for all numbers.
    const fn bytes(self) -> [[u8; 8]; 2] {
        [self.next.to_le_bytes(), self.reserved.to_le_bytes()]
    }
}

impl From<[[u8; 8]; 2]> for Counter {
    fn from([next, reserved]: [[u8; 8]; 2]) -> Self {
        Self {
            next: u64::from_le_bytes(next),
            reserved: u64::from_le_bytes(reserved),
        }
    }
}

/// Revisions that are reserved at once.
const RESERVE: u64 = 1000;

/// What a crash of the machine may take back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing that was written.
    Disk,
    /// What was written last: then there is what was there before.
    Memory,
}

impl Durability {
    const fn of(collection: Collection) -> Self {
        match collection {
            Collection::Alive | Collection::Answers => Self::Memory,
            _ => Self::Disk,
        }
    }
}

const REVISION: &str = ".revisions";
const LOCK: &str = ".lock";
/// What is written aside begins with this.
const ASIDE: &str = ".new-";

/// Changes that wait for a slow reader of a watch; a writer does not wait for it.
const WATCH_QUEUE: usize = 1024;

/// How often a watch lists its folders anew: on a network file system inotify does not see what other machines write.
const RELIST: Duration = Duration::from_secs(2);

trait Context<T> {
    fn context(self, what: &str, path: &Path) -> Result<T, StoreError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: &str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            what: format!("{what} {}", path.display()),
            source,
        })
    }
}

impl FileStore {
    /// Opens a store, making its folders where they are missing.
    ///
    /// # Errors
    ///
    /// Where the folders can't be made.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        for collection in Collection::ALL {
            let path = folder.join(collection.name());
            fs::create_dir_all(&path).context("create", &path)?;
        }
        let store = Self {
            folder: folder.to_owned(),
        };
        let _lock = store.lock()?;
        let behind = match store.counter()? {
            Some(counter) => counter.reserved,
            None => store.last_revision()? + 1,
        };
        store.reserve(behind)?;
        Ok(store)
    }

    fn path(&self, key: &Key) -> Result<PathBuf, StoreError> {
        let problem = if key.name.is_empty() || key.name.len() > 200 {
            Some("a name has 1 to 200 bytes")
        } else if key.name.starts_with('.') || key.name.contains(['/', '\0']) {
            Some("a name neither begins with a dot nor has a slash in it")
        } else {
            None
        };
        match problem {
            Some(problem) => Err(StoreError::Name {
                key: key.clone(),
                problem,
            }),
            None => Ok(self.folder.join(key.collection.name()).join(&key.name)),
        }
    }

    /// Runs `work` on a thread where it may block.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Answer<'static, T> {
        let store = self.clone();
        async move {
            tokio::task::spawn_blocking(move || work(&store))
                .await
                .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
        }
        .boxed()
    }

    /// Waits for the lock; it is given back when the file is dropped, also by a crash.
    fn lock(&self) -> Result<File, StoreError> {
        let path = self.folder.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .context("open", &path)?;
        file.lock().context("lock", &path)?;
        Ok(file)
    }

    /// The revision of the next change. The file is written in place, and to the disk only once for many revisions, which
    /// are reserved by that: what a crash takes back of it are numbers that nobody gives again, since whoever opens the
    /// store goes on behind all that were reserved.
    fn next_revision(&self) -> Result<u64, StoreError> {
        let Some(Counter { next, reserved }) = self.counter()? else {
            return self.reserve(self.last_revision()? + 1);
        };
        if next == reserved {
            return self.reserve(next);
        }
        self.count(Counter {
            next: next + 1,
            reserved,
        })?;
        Ok(next)
    }

    /// Takes a revision, and reserves more behind it.
    fn reserve(&self, revision: u64) -> Result<u64, StoreError> {
        let path = self.folder.join(REVISION);
        let counter = Counter {
            next: revision + 1,
            reserved: revision + 1 + RESERVE,
        };
        replace(&path, &encode(&path, &counter.bytes())?, Durability::Disk)?;
        Ok(revision)
    }

    /// The highest revision that anything in the store has.
    fn last_revision(&self) -> Result<u64, StoreError> {
        let mut last = 0;
        for collection in Collection::ALL {
            for name in self.names(collection)? {
                let found = read(&self.path(&Key::new(collection, name))?)?;
                last = last.max(found.map_or(0, |found| found.revision));
            }
        }
        Ok(last)
    }

    /// None where nothing has been written yet.
    fn counter(&self) -> Result<Option<Counter>, StoreError> {
        let path = self.folder.join(REVISION);
        match fs::read(&path) {
            Ok(bytes) => {
                let bytes = codec::decode::<[[u8; 8]; 2]>(&bytes).map_err(|source| StoreError::Content {
                    file: path.display().to_string(),
                    source,
                })?;
                Ok(Some(Counter::from(bytes)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read", &path),
        }
    }

    fn count(&self, counter: Counter) -> Result<(), StoreError> {
        let path = self.folder.join(REVISION);
        let bytes = encode(&path, &counter.bytes())?;
        let written = File::options().write(true).open(&path);
        let written = written.and_then(|mut file| file.write_all(&bytes));
        written.context("write", &path)
    }

    fn write(&self, key: &Key, value: Vec<u8>, lease: Option<Duration>, expect: Expect) -> Result<u64, StoreError> {
        let path = self.path(key)?;
        let _lock = self.lock()?;
        check(key, read(&path)?, expect)?;
        let revision = self.next_revision()?;
        let lease = lease.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX));
        let entry = Entry { revision, lease, value };
        replace(&path, &encode(&path, &entry)?, Durability::of(key.collection))?;
        Ok(revision)
    }

    fn remove(&self, key: &Key, expect: Expect) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let _lock = self.lock()?;
        let found = read(&path)?;
        let there = found.is_some();
        check(key, found, expect)?;
        if there {
            fs::remove_file(&path).context("remove", &path)?;
        }
        Ok(())
    }

    fn names(&self, collection: Collection) -> Result<Vec<String>, StoreError> {
        let path = self.folder.join(collection.name());
        let mut names = Vec::new();
        for file in fs::read_dir(&path).context("list", &path)? {
            let name = file.context("list", &path)?.file_name();
            match name.into_string() {
                Ok(name) if !name.starts_with('.') => names.push(name),
                _ => {}
            }
        }
        names.sort();
        Ok(names)
    }

    /// Deletes the values whose lease has run out; the answer is when to look again.
    fn sweep(&self) -> Result<Duration, StoreError> {
        let mut again = Duration::from_secs(1);
        for name in self.names(Collection::Alive)? {
            let key = Key::new(Collection::Alive, name);
            let path = self.path(&key)?;
            let Some((entry, touched)) = read_entry(&path)? else {
                continue;
            };
            let Some(ttl) = entry.lease.map(Duration::from_millis) else {
                continue;
            };
            let age = touched.elapsed().unwrap_or_default();
            if age > ttl {
                // Only if nobody has renewed it since it was read.
                let _lock = self.lock()?;
                let still = read_entry(&path)?.filter(|(_, now)| *now == touched);
                if still.is_some() {
                    fs::remove_file(&path).context("remove", &path)?;
                }
            } else {
                again = again.min(ttl.checked_sub(age).unwrap_or_default());
            }
        }
        Ok(again.max(Duration::from_millis(50)))
    }
}

fn encode<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, StoreError> {
    codec::encode(value).map_err(|source| StoreError::Content {
        file: path.display().to_string(),
        source,
    })
}

fn check(key: &Key, found: Option<Versioned>, expect: Expect) -> Result<(), StoreError> {
    let holds = match (expect, &found) {
        (Expect::Any, _) | (Expect::Absent, None) => true,
        (Expect::Revision(revision), Some(found)) => found.revision == revision,
        (Expect::Absent, Some(_)) | (Expect::Revision(_), None) => false,
    };
    if holds {
        return Ok(());
    }
    Err(StoreError::Conflict {
        key: key.clone(),
        found,
    })
}

fn read(path: &Path) -> Result<Option<Versioned>, StoreError> {
    Ok(read_entry(path)?.map(|(entry, _)| Versioned {
        revision: entry.revision,
        value: entry.value,
    }))
}

fn read_entry(path: &Path) -> Result<Option<(Entry, SystemTime)>, StoreError> {
    let result = File::open(path).and_then(|mut file| {
        let touched = file.metadata()?.modified()?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut file, &mut bytes)?;
        Ok((bytes, touched))
    });
    match result {
        Ok((bytes, touched)) => match codec::decode(&bytes) {
            Ok(entry) => Ok(Some((entry, touched))),
            Err(source) => Err(StoreError::Content {
                file: path.display().to_string(),
                source,
            }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("read", path),
    }
}

/// Replaces a file, so that a reader or a crash sees the old content or the new one.
///
/// # Errors
///
/// Where it can't be written.
pub fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), StoreError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let folder = path.parent().unwrap_or(Path::new("/"));
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let aside = folder.join(format!("{ASIDE}{}-{number}", std::process::id()));
    let written = File::create(&aside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_data()
    });
    let renamed = written.and_then(|()| fs::rename(&aside, path));
    if renamed.is_err() {
        // The write has failed already, and that is what is reported.
        let _ = fs::remove_file(&aside);
    }
    renamed.context("write", path)?;
    if durability == Durability::Memory {
        return Ok(());
    }
    // Makes the rename itself survive a crash.
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .context("sync", folder)
}

impl Store for FileStore {
    fn get<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Versioned>> {
        let key = key.clone();
        self.blocking(move |store| read(&store.path(&key)?))
    }

    fn list(&self, collection: Collection) -> Answer<'_, Vec<(Key, Versioned)>> {
        self.blocking(move |store| {
            let mut values = Vec::new();
            for name in store.names(collection)? {
                let key = Key::new(collection, name);
                // Between listing and reading somebody may have deleted it.
                if let Some(found) = read(&store.path(&key)?)? {
                    values.push((key, found));
                }
            }
            Ok(values)
        })
    }

    fn put<'a>(&'a self, key: &'a Key, value: Vec<u8>, expect: Expect) -> Answer<'a, u64> {
        let key = key.clone();
        self.blocking(move |store| store.write(&key, value, None, expect))
    }

    fn put_leased<'a>(&'a self, key: &'a Key, value: Vec<u8>, ttl: Duration) -> Answer<'a, u64> {
        let key = key.clone();
        self.blocking(move |store| store.write(&key, value, Some(ttl), Expect::Any))
    }

    fn keep<'a>(&'a self, key: &'a Key) -> Answer<'a, bool> {
        let key = key.clone();
        self.blocking(move |store| {
            let path = store.path(&key)?;
            let touched = File::options()
                .write(true)
                .open(&path)
                .and_then(|file| file.set_modified(SystemTime::now()));
            match touched {
                Ok(()) => Ok(true),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error).context("touch", &path),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a Key, expect: Expect) -> Answer<'a, ()> {
        let key = key.clone();
        self.blocking(move |store| store.remove(&key, expect))
    }

    fn watch(&self, collections: &[Collection]) -> Answer<'_, mpsc::Receiver<Change>> {
        let collections = collections.to_vec();
        async move {
            let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
            let watcher = Watcher::new(self.clone(), &collections, sender)?;
            if collections.contains(&Collection::Alive) {
                tokio::spawn(sweep(self.clone(), watcher.sender.downgrade()));
            }
            tokio::spawn(watcher.run());
            Ok(receiver)
        }
        .boxed()
    }
}

/// Sweeps leases as long as somebody watches them.
async fn sweep(store: FileStore, watch: mpsc::WeakSender<Change>) {
    while watch.upgrade().is_some() {
        let again = store.blocking(FileStore::sweep).await.unwrap_or_else(|error| {
            tracing::warn!("sweeping leases: {error}");
            Duration::from_secs(1)
        });
        tokio::time::sleep(again).await;
    }
}

/// Follows the folders of some collections.
struct Watcher {
    store: FileStore,
    collections: HashMap<WatchDescriptor, Collection>,
    events: inotify::EventStream<Vec<u8>>,
    reported: HashMap<Key, u64>,
    sender: mpsc::Sender<Change>,
}

/// The reader of a watch is gone.
struct Ended;

impl Watcher {
    fn new(store: FileStore, collections: &[Collection], sender: mpsc::Sender<Change>) -> Result<Self, StoreError> {
        let inotify = Inotify::init().context("inotify for", &store.folder)?;
        let mut descriptors = HashMap::new();
        for collection in collections {
            let path = store.folder.join(collection.name());
            let mask = WatchMask::MOVED_TO | WatchMask::DELETE;
            let descriptor = inotify.watches().add(&path, mask).context("watch", &path)?;
            descriptors.insert(descriptor, *collection);
        }
        let events = inotify
            .into_event_stream(vec![0; 64 * 1024])
            .context("watch", &store.folder)?;
        Ok(Self {
            store,
            collections: descriptors,
            events,
            reported: HashMap::new(),
            sender,
        })
    }

    async fn run(mut self) {
        // Events that come in meanwhile wait in the queue: nothing falls between the listing and the watch.
        if self.list().await.is_err() || self.sender.send(Change::Synced).await.is_err() {
            return;
        }
        let mut relist = tokio::time::interval(RELIST);
        relist.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                event = self.events.next() => event,
                _ = relist.tick() => {
                    if self.list().await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            let done = match event {
                None => return,
                Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => self.list().await,
                Some(Ok(event)) => match (
                    self.collections.get(&event.wd),
                    event.name.as_ref().and_then(|n| n.to_str()),
                ) {
                    (Some(collection), Some(name)) if !name.starts_with('.') => {
                        self.look_at(Key::new(*collection, name)).await
                    }
                    _ => Ok(()),
                },
                Some(Err(error)) => {
                    tracing::warn!("watching the store: {error}; listing it anew");
                    self.list().await
                }
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// Reports everything that differs from what was reported last.
    async fn list(&mut self) -> Result<(), Ended> {
        let mut seen: HashSet<Key> = self.reported.keys().cloned().collect();
        let collections: Vec<_> = self.collections.values().copied().collect();
        for collection in collections {
            match self.store.blocking(move |store| store.names(collection)).await {
                Ok(names) => seen.extend(names.into_iter().map(|name| Key::new(collection, name))),
                Err(error) => tracing::warn!("listing the store: {error}"),
            }
        }
        // Collection by collection, each in the order in which it has changed: who has seen one change has seen those
        // before it.
        let mut changes = Vec::new();
        for key in seen {
            let collection = key.collection;
            if let Some(change) = self.change_of(key).await {
                let revision = match &change {
                    Change::Put(_, value) => value.revision,
                    Change::Delete(_) | Change::Synced => 0,
                };
                changes.push((collection, revision, change));
            }
        }
        changes.sort_by_key(|(collection, revision, _)| (*collection, *revision));
        for (_, _, change) in changes {
            self.sender.send(change).await.map_err(|_| Ended)?;
        }
        Ok(())
    }

    /// Reports the state of one value, unless that was reported already.
    async fn look_at(&mut self, key: Key) -> Result<(), Ended> {
        match self.change_of(key).await {
            Some(change) => self.sender.send(change).await.map_err(|_| Ended),
            None => Ok(()),
        }
    }

    /// How one value differs from what was reported last.
    async fn change_of(&mut self, key: Key) -> Option<Change> {
        match self.store.get(&key).await {
            Ok(Some(found)) if self.reported.get(&key) == Some(&found.revision) => None,
            Ok(Some(found)) => {
                self.reported.insert(key.clone(), found.revision);
                Some(Change::Put(key, found))
            }
            Ok(None) if self.reported.remove(&key).is_some() => Some(Change::Delete(key)),
            Ok(None) => None,
            Err(error) => {
                // A torn value is no news; the last good one stays.
                tracing::error!("{error}");
                None
            }
        }
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
