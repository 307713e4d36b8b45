//! Tests of the embedded store.

use super::{Durability, FileStore, replace};
use crate::codec;
use crate::store::{Change, Collection, Expect, Key, Store, StoreError};
use std::time::Duration;

fn store() -> (tempfile::TempDir, FileStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = FileStore::open(folder.path()).unwrap();
    (folder, store)
}

fn key(name: &str) -> Key {
    Key::new(Collection::Pods, name)
}

#[tokio::test]
async fn a_value_is_set_changed_by_comparison_and_deleted() {
    let (_folder, store) = store();
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    let first = store.put(&key("a"), b"1".to_vec(), Expect::Absent).await.unwrap();
    let second = store
        .put(&key("a"), b"2".to_vec(), Expect::Revision(first))
        .await
        .unwrap();
    assert!(second > first);
    for expect in [Expect::Absent, Expect::Revision(first)] {
        let error = store.put(&key("a"), b"3".to_vec(), expect).await.unwrap_err();
        let StoreError::Conflict { found: Some(found), .. } = error else {
            panic!("{error}")
        };
        assert_eq!(found.value, b"2");
    }
    store.delete(&key("a"), Expect::Any).await.unwrap();
    store.delete(&key("a"), Expect::Any).await.unwrap();
    assert_eq!(store.list(Collection::Pods).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_create_the_same_key_one_wins() {
    let (_folder, store) = store();
    let tasks: Vec<_> = (0..16_u8)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.put(&key("a"), vec![n], Expect::Absent).await.is_ok() })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        won += usize::from(task.await.unwrap());
    }
    assert_eq!(won, 1);
}

#[tokio::test]
async fn a_watch_reports_what_is_there_and_what_comes() {
    let (_folder, store) = store();
    store.put(&key("old"), b"1".to_vec(), Expect::Any).await.unwrap();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    let Some(Change::Put(found, _)) = watch.recv().await else {
        panic!()
    };
    assert_eq!(found, key("old"));
    assert_eq!(watch.recv().await, Some(Change::Synced));
    store.put(&key("new"), b"2".to_vec(), Expect::Any).await.unwrap();
    store
        .put(&Key::new(Collection::Nodes, "n"), vec![], Expect::Any)
        .await
        .unwrap();
    let Some(Change::Put(found, value)) = watch.recv().await else {
        panic!()
    };
    assert_eq!((found, value.value), (key("new"), b"2".to_vec()));
    store.delete(&key("old"), Expect::Any).await.unwrap();
    assert_eq!(watch.recv().await, Some(Change::Delete(key("old"))));
}

#[tokio::test]
async fn a_lease_ends_unless_it_is_kept() {
    let (_folder, store) = store();
    let alive = Key::new(Collection::Alive, "node");
    let mut watch = store.watch(&[Collection::Alive]).await.unwrap();
    assert_eq!(watch.recv().await, Some(Change::Synced));
    store
        .put_leased(&alive, vec![], Duration::from_millis(400))
        .await
        .unwrap();
    assert!(matches!(watch.recv().await, Some(Change::Put(..))));
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(store.keep(&alive).await.unwrap(), "kept, but gone");
    }
    assert_eq!(watch.recv().await, Some(Change::Delete(alive.clone())));
    assert!(!store.keep(&alive).await.unwrap());
}

#[tokio::test]
async fn a_torn_value_is_an_error_and_half_a_write_is_invisible() {
    let (folder, store) = store();
    store.put(&key("a"), b"1".to_vec(), Expect::Any).await.unwrap();
    let path = folder.path().join("pods/a");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(folder.path().join("pods/.new-1-1"), b"half").unwrap();
    assert_eq!(store.list(Collection::Pods).await.unwrap().len(), 1);
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

#[tokio::test]
async fn names_stay_in_their_folder() {
    let (_folder, store) = store();
    for name in ["", "../x", ".lock", "a/b", &"x".repeat(201)] {
        let error = store.put(&key(name), vec![], Expect::Any).await.unwrap_err();
        assert!(matches!(error, StoreError::Name { .. }), "{name}");
    }
}
