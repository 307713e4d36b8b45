//! What every store has to do.

use super::{configuration, key, next, put};
use harness::{Etcd, EtcdOptions};
use hostd::store::{Change, Collection, EtcdConfig, EtcdStore, Expect, FileStore, Key, Store, StoreError};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// A store, with what it is kept in.
type Kept = (Box<dyn std::any::Any>, Arc<dyn Store>);

fn file() -> Kept {
    let folder = tempfile::tempdir().unwrap();
    let store = FileStore::open(folder.path()).unwrap();
    (Box::new(folder), Arc::new(store))
}

fn etcd(options: EtcdOptions) -> Kept {
    let etcd = Etcd::local(options).unwrap();
    // Also on a busy machine: it is not what this is about.
    let patient = EtcdConfig {
        answer_seconds: 30,
        ..configuration(&etcd)
    };
    let store = EtcdStore::open(&format!("etcd:{}", etcd.url()), &patient).unwrap();
    (Box::new(etcd), Arc::new(store))
}

/// The same tests over every store.
macro_rules! over_every_store {
    ($($test:ident),+ $(,)?) => {
        over_every_store!(@one in_files, file(), $($test),+);
        over_every_store!(@one in_etcd, etcd(EtcdOptions::default()), $($test),+);
        over_every_store!(@one in_etcd_with_tls_and_users, etcd(EtcdOptions {
            tls: true,
            users: true,
            ..EtcdOptions::default()
        }), $($test),+);
    };
    (@one $name:ident, $make:expr, $($test:ident),+) => {
        mod $name {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    let (_kept, store) = $make;
                    super::$test(&*store).await;
                }
            )+
        }
    };
}

over_every_store!(
    a_value_is_set_changed_by_comparison_and_deleted,
    of_many_who_create_the_same_key_one_wins,
    of_many_who_change_a_value_by_comparison_nobody_is_overruled,
    a_watch_reports_what_is_there_and_what_comes,
    a_watch_reports_each_collection_in_the_order_of_its_changes,
    a_reader_that_is_slow_hears_of_everything_in_the_end,
    a_lease_ends_unless_it_is_kept,
    a_leased_value_that_is_deleted_or_set_anew_is_noticed,
    a_large_value_comes_back_as_it_was,
    a_list_is_complete,
    names_stay_in_their_collection,
);

async fn a_value_is_set_changed_by_comparison_and_deleted(store: &dyn Store) {
    assert_eq!(store.get(&key("a")).await.unwrap(), None);
    let first = store.put(&key("a"), b"1".to_vec(), Expect::Absent).await.unwrap();
    let second = store
        .put(&key("a"), b"2".to_vec(), Expect::Revision(first))
        .await
        .unwrap();
    assert!(second > first);
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().revision, second);
    for expect in [Expect::Absent, Expect::Revision(first)] {
        let error = store.put(&key("a"), b"3".to_vec(), expect).await.unwrap_err();
        let StoreError::Conflict { found: Some(found), .. } = error else {
            panic!("{error}")
        };
        assert_eq!((found.value, found.revision), (b"2".to_vec(), second));
    }
    let error = store.delete(&key("a"), Expect::Revision(first)).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { found: Some(_), .. }), "{error}");
    store.delete(&key("a"), Expect::Revision(second)).await.unwrap();
    store.delete(&key("a"), Expect::Any).await.unwrap();
    let error = store.delete(&key("a"), Expect::Revision(second)).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { found: None, .. }), "{error}");
    assert_eq!(store.list(Collection::Pods).await.unwrap(), []);
    // A value may be empty.
    store.put(&key("a"), Vec::new(), Expect::Absent).await.unwrap();
    assert_eq!(store.get(&key("a")).await.unwrap().unwrap().value, b"");
}

async fn of_many_who_create_the_same_key_one_wins(store: &dyn Store) {
    let (one, number) = (key("a"), 16_u8);
    let tries = (0..number).map(|n| store.put(&one, vec![n], Expect::Absent));
    let won = futures::future::join_all(tries).await;
    assert_eq!(won.iter().filter(|result| result.is_ok()).count(), 1);
    let lost = won
        .iter()
        .filter(|result| matches!(result, Err(StoreError::Conflict { .. })));
    assert_eq!(lost.count(), usize::from(number) - 1);
}

async fn of_many_who_change_a_value_by_comparison_nobody_is_overruled(store: &dyn Store) {
    let counter = &key("counter");
    store.put(counter, vec![0], Expect::Absent).await.unwrap();
    let count = |_| async {
        for _ in 0..10 {
            loop {
                let found = store.get(counter).await.unwrap().unwrap();
                let expect = Expect::Revision(found.revision);
                match store.put(counter, vec![found.value[0] + 1], expect).await {
                    Ok(_) => break,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    futures::future::join_all((0..8).map(count)).await;
    assert_eq!(store.get(counter).await.unwrap().unwrap().value, [80]);
}

async fn a_watch_reports_what_is_there_and_what_comes(store: &dyn Store) {
    store.put(&key("old"), b"1".to_vec(), Expect::Any).await.unwrap();
    let mut watch = store.watch(&[Collection::Pods, Collection::Services]).await.unwrap();
    assert_eq!(put(&mut watch).await.0, key("old"));
    assert_eq!(next(&mut watch).await, Change::Synced);
    let revision = store.put(&key("new"), b"2".to_vec(), Expect::Any).await.unwrap();
    store
        .put(&Key::new(Collection::Nodes, "n"), vec![], Expect::Any)
        .await
        .unwrap();
    let (found, value) = put(&mut watch).await;
    assert_eq!(
        (found, value.value, value.revision),
        (key("new"), b"2".to_vec(), revision)
    );
    store.delete(&key("old"), Expect::Any).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Delete(key("old")));
    let service = Key::new(Collection::Services, "s");
    store.put(&service, vec![3], Expect::Any).await.unwrap();
    assert_eq!(put(&mut watch).await.0, service);
}

async fn a_watch_reports_each_collection_in_the_order_of_its_changes(store: &dyn Store) {
    // Not in the order of their names.
    for name in ["9", "5", "7"] {
        store.put(&key(name), vec![], Expect::Any).await.unwrap();
    }
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    let mut seen = Vec::new();
    loop {
        match next(&mut watch).await {
            Change::Put(key, _) => seen.push(key.name),
            Change::Synced => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, ["9", "5", "7"]);
}

async fn a_reader_that_is_slow_hears_of_everything_in_the_end(store: &dyn Store) {
    let mut watch = store.watch(&[Collection::Answers]).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
    let names: Vec<String> = (0..3000).map(|n| format!("answer-{n}")).collect();
    let mut expected = BTreeMap::new();
    for (number, name) in names.iter().enumerate() {
        let answer = Key::new(Collection::Answers, name);
        let revision = store
            .put(&answer, number.to_string().into_bytes(), Expect::Any)
            .await
            .unwrap();
        expected.insert(name.clone(), revision);
    }
    for name in names.iter().take(1000) {
        store
            .delete(&Key::new(Collection::Answers, name), Expect::Any)
            .await
            .unwrap();
        expected.remove(name);
    }
    let mut seen = BTreeMap::new();
    while seen != expected {
        match next(&mut watch).await {
            Change::Put(key, value) => seen.insert(key.name, value.revision),
            Change::Delete(key) => seen.remove(&key.name),
            other => panic!("{other:?}"),
        };
    }
}

async fn a_lease_ends_unless_it_is_kept(store: &dyn Store) {
    let alive = Key::new(Collection::Alive, "node");
    // Etcd gives no lease for less than two seconds.
    let ttl = Duration::from_secs(2);
    let mut watch = store.watch(&[Collection::Alive]).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
    assert!(!store.keep(&alive).await.unwrap());
    store.put_leased(&alive, vec![1], ttl).await.unwrap();
    put(&mut watch).await;
    for _ in 0..6 {
        tokio::time::sleep(ttl / 4).await;
        assert!(store.keep(&alive).await.unwrap(), "kept, but gone");
    }
    // Another value by the same lease.
    store.put_leased(&alive, vec![2], ttl).await.unwrap();
    assert_eq!(put(&mut watch).await.1.value, [2]);
    assert!(store.keep(&alive).await.unwrap());
    assert_eq!(next(&mut watch).await, Change::Delete(alive.clone()));
    assert!(!store.keep(&alive).await.unwrap());
    store.put_leased(&alive, vec![3], ttl).await.unwrap();
    assert_eq!(put(&mut watch).await.1.value, [3]);
}

async fn a_leased_value_that_is_deleted_or_set_anew_is_noticed(store: &dyn Store) {
    let alive = Key::new(Collection::Alive, "node");
    let ttl = Duration::from_mins(1);
    store.put_leased(&alive, vec![], ttl).await.unwrap();
    store.delete(&alive, Expect::Any).await.unwrap();
    assert!(!store.keep(&alive).await.unwrap());
    assert_eq!(store.get(&alive).await.unwrap(), None);
    store.put_leased(&alive, vec![], ttl).await.unwrap();
    assert!(store.keep(&alive).await.unwrap());
}

async fn a_large_value_comes_back_as_it_was(store: &dyn Store) {
    let module = Key::new(Collection::Modules, "0123abcd");
    let bytes = |length: usize, seed: usize| (0..251_u8).cycle().step_by(seed).take(length).collect::<Vec<_>>();
    // Twelve mebibytes and a bit, and exactly three.
    for (length, seed) in [((12 << 20) + 17, 7), (3 << 20, 11), (100, 13), ((1 << 20) - 1, 3)] {
        let value = bytes(length, seed);
        let revision = store.put(&module, value.clone(), Expect::Any).await.unwrap();
        let found = store.get(&module).await.unwrap().unwrap();
        assert!(found.value == value, "{length} bytes");
        assert_eq!(found.revision, revision);
    }
    let error = store.put(&module, bytes(5 << 20, 3), Expect::Absent).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    let listed = store.list(Collection::Modules).await.unwrap();
    assert!(listed.len() == 1 && listed[0].1.value == bytes((1 << 20) - 1, 3));
    store.delete(&module, Expect::Any).await.unwrap();
    assert_eq!(store.get(&module).await.unwrap(), None);
}

async fn a_list_is_complete(store: &dyn Store) {
    // More than one page of any store has.
    let mut expected = Vec::new();
    for number in 0..2345 {
        let answer = Key::new(Collection::Answers, format!("{number:04}"));
        let revision = store.put(&answer, vec![1], Expect::Any).await.unwrap();
        expected.push((answer, revision));
    }
    let listed = store.list(Collection::Answers).await.unwrap();
    let listed: Vec<_> = listed.into_iter().map(|(key, value)| (key, value.revision)).collect();
    assert!(listed == expected, "{} of {}", listed.len(), expected.len());
    let keys = store.keys(Collection::Answers).await.unwrap();
    assert!(
        keys.iter().eq(expected.iter().map(|(key, _)| key)),
        "{} keys",
        keys.len()
    );
    assert_eq!(store.keys(Collection::Alive).await.unwrap(), []);
    // Its namesakes are none of it.
    assert_eq!(store.list(Collection::Alive).await.unwrap(), []);
}

async fn names_stay_in_their_collection(store: &dyn Store) {
    for name in ["", "../x", ".lock", "a/b", &"x".repeat(201)] {
        let error = store.put(&key(name), vec![], Expect::Any).await.unwrap_err();
        assert!(matches!(error, StoreError::Name { .. }), "{name}");
    }
}
