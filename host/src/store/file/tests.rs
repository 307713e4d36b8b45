//! Tests of what is the embedded store's alone.

use super::{Durability, FileStore, replace};
use crate::codec;
use crate::store::{Change, Collection, Expect, Key, Store, StoreError};
use std::{os::unix::fs::PermissionsExt, time::Duration};

fn store() -> (tempfile::TempDir, FileStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = FileStore::open(folder.path()).unwrap();
    (folder, store)
}

fn key(name: &str) -> Key {
    Key::new(Collection::Pods, name)
}

#[tokio::test]
async fn a_torn_value_is_an_error_and_half_a_write_is_invisible() {
    let (folder, store) = store();
    store.put(&key("a"), b"1".to_vec(), Expect::Any).await.unwrap();
    let path = folder.path().join("pods/a");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(folder.path().join("pods/.new-1-1"), b"half").unwrap();
    assert_eq!(store.list(Collection::Pods).await.unwrap().len(), 1);
    FileStore::open(folder.path()).unwrap();
    assert!(!folder.path().join("pods/.new-1-1").exists(), "its writer has died");
    replace(&path, &bytes[..bytes.len() - 3], Durability::Disk).unwrap();
    let error = store.get(&key("a")).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Content { .. }) && error.to_string().contains("pods/a"),
        "{error}"
    );
}

#[tokio::test]
async fn no_revision_is_given_twice_whatever_a_crash_takes_back() {
    let (folder, store) = store();
    let counter = folder.path().join(".revision");
    let early = std::fs::read(&counter).unwrap();
    let mut last = 0;
    for number in 0..2010_u32 {
        // Neither is the disk's work done for each of them.
        let name = format!("n{}", number % 3);
        let key = Key::new(Collection::Answers, name);
        let revision = store.put(&key, Vec::new(), Expect::Any).await.unwrap();
        assert!(revision > last, "{revision} after {last}");
        last = revision;
        if number == 500 {
            // The disk has what was there at first: all of these were reserved by that.
            std::fs::write(&counter, &early).unwrap();
            FileStore::open(folder.path()).unwrap();
        }
    }
    // Nothing is left of it at all: whatever is in the store was given before.
    let kept = store.put(&key("a"), Vec::new(), Expect::Any).await.unwrap();
    std::fs::remove_file(&counter).unwrap();
    let store = FileStore::open(folder.path()).unwrap();
    let next = store.put(&key("b"), Vec::new(), Expect::Any).await.unwrap();
    assert!(next > kept, "{next} after {kept}");
    // An earlier version's file has the last revision alone.
    std::fs::write(&counter, codec::encode(&1_000_000_u64).unwrap()).unwrap();
    let store = FileStore::open(folder.path()).unwrap();
    let next = store.put(&key("b"), Vec::new(), Expect::Any).await.unwrap();
    assert!(next > 1_000_000, "{next}");
}

/// As a share that is not mounted looks, and another one in its place.
#[tokio::test]
async fn a_folder_that_is_not_there_says_nothing_of_what_the_store_holds() {
    let parent = tempfile::tempdir().unwrap();
    let (folder, elsewhere) = (parent.path().join("store"), parent.path().join("elsewhere"));
    let store = FileStore::open(&folder).unwrap();
    store.put(&key("a"), b"1".to_vec(), Expect::Any).await.unwrap();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert!(matches!(watch.recv().await, Some(Change::Put(..))));
    assert_eq!(watch.recv().await, Some(Change::Synced));
    assert_eq!(store.problem(), None);

    std::fs::rename(&folder, &elsewhere).unwrap();
    for other in ["nothing", "an empty folder", "another store"] {
        match other {
            "an empty folder" => std::fs::create_dir(&folder).unwrap(),
            "another store" => drop(FileStore::open(&folder).unwrap()),
            _ => {}
        }
        let there = std::fs::read_dir(&folder).map_or(0, Iterator::count);
        for error in [
            store.get(&key("a")).await.unwrap_err(),
            store.get(&key("b")).await.unwrap_err(),
            store.list(Collection::Pods).await.unwrap_err(),
            store.put(&key("b"), Vec::new(), Expect::Any).await.unwrap_err(),
            store.delete(&key("a"), Expect::Any).await.unwrap_err(),
            store.keep(&key("a")).await.unwrap_err(),
        ] {
            assert!(error.is_unavailable(), "{other}: {error}");
        }
        assert!(store.problem().is_some());
        assert_eq!(std::fs::read_dir(&folder).map_or(0, Iterator::count), there, "{other}");
        // Longer than the watch waits before it lists anew.
        let news = tokio::time::timeout(Duration::from_secs(3), watch.recv()).await;
        assert!(news.is_err(), "{other}: {news:?}");
    }

    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::rename(&elsewhere, &folder).unwrap();
    store.put(&key("c"), Vec::new(), Expect::Absent).await.unwrap();
    assert!(matches!(watch.recv().await, Some(Change::Put(found, _)) if found == key("c")));
    assert_eq!(store.problem(), None);
}

#[tokio::test]
async fn nobody_else_may_hold_the_lock() {
    let folder = tempfile::tempdir().unwrap();
    let lock = folder.path().join(".lock");
    // As earlier versions have left it.
    std::fs::write(&lock, b"").unwrap();
    std::fs::set_permissions(&lock, std::fs::Permissions::from_mode(0o644)).unwrap();
    let store = FileStore::open(folder.path()).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&lock), mode(&folder.path().join("pods"))), (0o600, 0o700));
    store.put(&key("a"), Vec::new(), Expect::Any).await.unwrap();
    // Whoever opens it next knows the same store.
    let again = FileStore::open(folder.path()).unwrap();
    assert!(store.get(&key("a")).await.unwrap().is_some() && again.get(&key("a")).await.unwrap().is_some());
}
