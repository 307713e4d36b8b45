//! The embedded store: a folder, with a folder for each collection and a file for each value.
//!
//! A value is written aside, synced and renamed into place, so that a reader or a crash sees the old one or the new
//! one. Whether a crash may bring the old one back depends on the collection: what nodes say while they are up needs not
//! outlive the machine. Writers hold a lock on the folder (flock), which makes comparison and change one step. A watch is inotify,
//! and a listing every two seconds, for on a network file system inotify does not see what other machines write. A lease
//! is the time of the file's last touch: machines that share a folder need clocks that agree to within a second or so.

mod revisions;
mod watch;

use crate::{
    codec, random,
    store::{Answer, Change, Collection, Expect, Key, Store, StoreError, Versioned},
};
use futures::FutureExt;
use revisions::Revisions;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::mpsc;
use watch::Watcher;

/// A store in a folder.
#[derive(Clone, Debug)]
pub struct FileStore {
    folder: PathBuf,
    /// What the lock file says: it tells this store from another one, or from none, in the same place.
    life: [u8; LIFE],
    /// Since when the folder is not there.
    away: Arc<Mutex<Option<Instant>>>,
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

/// What a crash of the machine may take back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Nothing that was written or deleted.
    Disk,
    /// What was written last: then there is what was there before.
    Memory,
}

impl Durability {
    const fn of(collection: Collection) -> Self {
        match collection {
            Collection::Alive | Collection::Seen | Collection::Answers => Self::Memory,
            _ => Self::Disk,
        }
    }
}

const LOCK: &str = ".lock";
/// Random bytes in it.
const LIFE: usize = 16;
/// What is written aside begins with this.
const ASIDE: &str = ".new-";

/// Changes that wait for a slow reader of a watch; a writer does not wait for it.
const WATCH_QUEUE: usize = 1024;

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
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.context("create", &path)?;
        }
        let (_lock, life) = begin(&folder.join(LOCK))?;
        let store = Self {
            folder: folder.to_owned(),
            life,
            away: Arc::default(),
        };
        for collection in Collection::ALL {
            remove_asides(&folder.join(collection.name()))?;
        }
        remove_asides(folder)?;
        store.revisions().open(|| store.last_revision())?;
        Ok(store)
    }

    /// Whether there is a store in a folder.
    #[must_use]
    pub fn is_there(folder: &Path) -> bool {
        folder.join(LOCK).exists()
    }

    fn path(&self, key: &Key) -> Result<PathBuf, StoreError> {
        key.check()?;
        Ok(self.folder.join(key.collection.name()).join(&key.name))
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
        self.check_there()?;
        let path = self.folder.join(LOCK);
        let file = File::options().write(true).open(&path).context("open", &path)?;
        file.lock().context("lock", &path)?;
        Ok(file)
    }

    /// A folder that is not mounted, or another one in its place, says nothing of what the store holds.
    fn check_there(&self) -> Result<(), StoreError> {
        let problem = match fs::read(self.folder.join(LOCK)) {
            Ok(life) if life == self.life => {
                if let Some(since) = self.away().take() {
                    tracing::info!("the store is back after {} s", since.elapsed().as_secs());
                }
                return Ok(());
            }
            Ok(_) => "it is another store by now; a hostd that is started anew joins it".to_owned(),
            Err(error) => format!("{LOCK}: {error}"),
        };
        let mut away = self.away();
        if away.is_none() {
            let folder = self.folder.display();
            tracing::warn!("file:{folder}: {problem}; pods keep talking, and changes wait");
        }
        Err(StoreError::Unavailable {
            store: format!("file:{}", self.folder.display()),
            seconds: away.get_or_insert_with(Instant::now).elapsed().as_secs(),
            problem,
        })
    }

    fn away(&self) -> MutexGuard<'_, Option<Instant>> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn revisions(&self) -> Revisions {
        Revisions::of(&self.folder)
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

    fn write(&self, key: &Key, value: Vec<u8>, lease: Option<Duration>, expect: Expect) -> Result<u64, StoreError> {
        let path = self.path(key)?;
        let _lock = self.lock()?;
        check(key, read(&path)?, expect)?;
        let revision = self.revisions().next()?;
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
            if Durability::of(key.collection) == Durability::Disk {
                sync_folder(&path)?;
            }
        }
        Ok(())
    }

    fn names(&self, collection: Collection) -> Result<Vec<String>, StoreError> {
        self.check_there()?;
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

/// Takes the lock of a folder that may be no store yet, and says which one it is. Whoever may open the file could hold the lock for
/// ever, which is nobody but its owner.
fn begin(path: &Path) -> Result<(File, [u8; LIFE]), StoreError> {
    let mut options = File::options();
    options.create(true).truncate(false).read(true).write(true).mode(0o600);
    let mut file = options.open(path).context("open", path)?;
    if file.metadata().context("look at", path)?.mode() & 0o077 != 0 {
        file.set_permissions(fs::Permissions::from_mode(0o600))
            .context("close to others", path)?;
    }
    file.lock().context("lock", path)?;
    let mut known = Vec::new();
    file.read_to_end(&mut known).context("read", path)?;
    if let Ok(life) = known.try_into() {
        return Ok((file, life));
    }
    if let Some(folder) = path.parent() {
        let folder = folder.display();
        tracing::info!("{folder} is a new store (if there should be one already: is it mounted?)");
    }
    let life = random::bytes().context("a number for", path)?;
    file.set_len(0)
        .and_then(|()| file.write_all_at(&life, 0))
        .and_then(|()| file.sync_all())
        .context("write", path)?;
    Ok((file, life))
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
        file.read_to_end(&mut bytes)?;
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
    sync_folder(path)
}

/// Removes what writers that died had written aside in a folder, in which nobody writes meanwhile.
///
/// # Errors
///
/// Where it can't be listed, or a file not be removed.
pub fn remove_asides(folder: &Path) -> Result<(), StoreError> {
    for file in fs::read_dir(folder).context("list", folder)? {
        let file = file.context("list", folder)?;
        if file.file_name().to_string_lossy().starts_with(ASIDE) {
            fs::remove_file(file.path()).context("remove", &file.path())?;
        }
    }
    Ok(())
}

/// Makes the disk have what files there are in a file's folder.
fn sync_folder(path: &Path) -> Result<(), StoreError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .context("sync", folder)
}

impl Store for FileStore {
    fn get<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Versioned>> {
        let key = key.clone();
        self.blocking(move |store| {
            let found = read(&store.path(&key)?)?;
            if found.is_none() {
                store.check_there()?;
            }
            Ok(found)
        })
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

    fn keys(&self, collection: Collection) -> Answer<'_, Vec<Key>> {
        self.blocking(move |store| {
            let names = store.names(collection)?;
            Ok(names.into_iter().map(|name| Key::new(collection, name)).collect())
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
                Err(error) if error.kind() == io::ErrorKind::NotFound => store.check_there().map(|()| false),
                Err(error) => Err(error).context("touch", &path),
            }
        })
    }

    fn delete<'a>(&'a self, key: &'a Key, expect: Expect) -> Answer<'a, ()> {
        let key = key.clone();
        self.blocking(move |store| store.remove(&key, expect))
    }

    fn problem(&self) -> Option<String> {
        self.check_there().err().map(|error| error.to_string())
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
            if !error.is_unavailable() {
                tracing::warn!("sweeping leases: {error}");
            }
            Duration::from_secs(1)
        });
        tokio::time::sleep(again).await;
    }
}

#[cfg(test)]
mod tests;
