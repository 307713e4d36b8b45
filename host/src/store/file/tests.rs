//! Tests of what is the embedded store's alone.

use super::{Durability, FileStore, replace};
use crate::codec;
use crate::store::{Collection, Expect, Key, Store, StoreError};

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
