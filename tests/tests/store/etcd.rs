//! What can happen to etcd: away, slow, compacted, made anew, full, and closed to whoever has no right.

use super::{configuration, connect, key, next, plain_etcd, put};
use harness::{Etcd, EtcdOptions};
use hostd::store::{Change, Collection, EtcdConfig, EtcdStore, Expect, Key, Store, StoreError};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// What an error says, of a store that should have refused.
async fn refusal(store: &dyn Store) -> String {
    let error = store.put(&key("a"), vec![], Expect::Any).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    error.to_string()
}

/// Puts a value as soon as etcd is back.
pub async fn put_when_back(store: &dyn Store, key: &Key, value: &[u8]) -> u64 {
    let began = Instant::now();
    loop {
        match store.put(key, value.to_vec(), Expect::Any).await {
            Ok(revision) => return revision,
            Err(StoreError::Unavailable { .. }) if began.elapsed() < super::SOON => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_is_away_whoever_asks_hears_so_at_once_and_then_all_goes_on() {
    let (mut etcd, store) = plain_etcd();
    store.put(&key("a"), vec![1], Expect::Any).await.unwrap();
    store.put(&key("b"), vec![1], Expect::Any).await.unwrap();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert_eq!(put(&mut watch).await.0, key("a"));
    assert_eq!(put(&mut watch).await.0, key("b"));
    assert_eq!(next(&mut watch).await, Change::Synced);

    etcd.kill().unwrap();
    let error = store.put(&key("a"), vec![2], Expect::Any).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains(&etcd.url()), "{error}");
    let began = Instant::now();
    for _ in 0..100 {
        assert!(store.get(&key("a")).await.is_err());
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // Nothing is said to be gone, for lack of news.
    assert!(watch.try_recv().is_err());

    etcd.run().unwrap();
    put_when_back(&*store, &key("a"), &[3]).await;
    let (changed, value) = put(&mut watch).await;
    assert_eq!((changed, value.value), (key("a"), vec![3]));
    store.delete(&key("b"), Expect::Any).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Delete(key("b")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_opened_and_watched_before_there_is_any_etcd() {
    let (mut etcd, _) = plain_etcd();
    etcd.kill().unwrap();
    let store = connect(&etcd);
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert!(store.get(&key("a")).await.is_err());
    etcd.run().unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_hangs_is_given_up_after_a_while_and_heard_again() {
    let (etcd, store) = plain_etcd();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
    etcd.pause().unwrap();
    let began = Instant::now();
    let error = store.put(&key("a"), vec![1], Expect::Absent).await.unwrap_err();
    let took = began.elapsed();
    assert!(error.to_string().contains("no answer within"), "{error}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    etcd.resume().unwrap();
    put_when_back(&*store, &key("b"), &[2]).await;
    // What was asked for meanwhile may have been done after all, once.
    let mut names = vec![put(&mut watch).await.0.name];
    if names[0] == "a" {
        names.push(put(&mut watch).await.0.name);
    }
    assert_eq!(names.last().unwrap(), "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_slow_loses_nothing_and_does_nothing_twice() {
    let (etcd, store) = plain_etcd();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
    let writer = tokio::spawn(async move {
        let counter = key("counter");
        let mut last = store.put(&counter, vec![0], Expect::Absent).await.unwrap();
        for value in 1..=20 {
            // Each by comparison with the one before: one that was done twice or not at all breaks the chain.
            last = store.put(&counter, vec![value], Expect::Revision(last)).await.unwrap();
        }
        last
    });
    while !writer.is_finished() {
        etcd.pause().unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        etcd.resume().unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let last = writer.await.unwrap();
    for expected in 0..=20 {
        let (_, value) = put(&mut watch).await;
        assert_eq!(value.value, [expected]);
        assert_eq!(expected == 20, value.revision == last);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compacted_away_while_a_watch_was_cut_off_is_made_up_for() {
    let (mut etcd, store) = plain_etcd();
    for name in ["kept", "changed", "deleted"] {
        store.put(&key(name), vec![1], Expect::Any).await.unwrap();
    }
    let mut watch = store.watch(&[Collection::Pods, Collection::Services]).await.unwrap();
    for _ in 0..3 {
        put(&mut watch).await;
    }
    assert_eq!(next(&mut watch).await, Change::Synced);
    let url = format!("etcd:{}", etcd.url());

    // The watch's connection is broken, and not made again before all of that is done and compacted.
    etcd.pause().unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    etcd.kill().unwrap();
    etcd.run().unwrap();
    let other = EtcdStore::open(&url, &EtcdConfig::default()).unwrap();
    other.put(&key("changed"), vec![2], Expect::Any).await.unwrap();
    other.delete(&key("deleted"), Expect::Any).await.unwrap();
    other.put(&key("new"), vec![3], Expect::Any).await.unwrap();
    etcd.compact().unwrap();

    let mut news = Vec::new();
    for _ in 0..3 {
        news.push(match next(&mut watch).await {
            Change::Put(key, value) => (key.name, Some(value.value)),
            Change::Delete(key) => (key.name, None),
            other => panic!("{other:?}"),
        });
    }
    // First what is gone: what is new may have its place.
    let expected = [("deleted", None), ("changed", Some(vec![2])), ("new", Some(vec![3]))];
    assert_eq!(news, expected.map(|(name, value)| (name.to_owned(), value)));
    store.put(&key("kept"), vec![4], Expect::Any).await.unwrap();
    assert_eq!(put(&mut watch).await.0, key("kept"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_made_anew_does_not_make_everything_disappear_at_once() {
    let mut etcd = Etcd::local(EtcdOptions::default()).unwrap();
    let held = EtcdConfig {
        hold_seconds: 20,
        ..configuration(&etcd)
    };
    let store: Arc<dyn Store> = Arc::new(EtcdStore::open(&format!("etcd:{}", etcd.url()), &held).unwrap());
    store.put(&key("a"), vec![1], Expect::Any).await.unwrap();
    store.put(&key("b"), vec![1], Expect::Any).await.unwrap();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    put(&mut watch).await;
    put(&mut watch).await;
    assert_eq!(next(&mut watch).await, Change::Synced);
    etcd.wipe().unwrap();
    etcd.run().unwrap();
    // Its node enters it anew, others it.
    put_when_back(&*store, &key("a"), &[2]).await;
    assert_eq!(next(&mut watch).await, Change::Anew);
    let (found, value) = put(&mut watch).await;
    assert_eq!((found, value.value), (key("a"), vec![2]));
    let silence = tokio::time::timeout(Duration::from_secs(3), watch.recv()).await;
    assert!(silence.is_err(), "{silence:?}");
    // What nobody enters is missing after a while.
    let gone = tokio::time::timeout(Duration::from_mins(2), watch.recv()).await;
    assert_eq!(gone.unwrap(), Some(Change::Missing(key("b"))));
}

/// As `etcdutl snapshot restore --bump-revision` leaves it: the store's own revision is as high as ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_value_of_before_gives_a_restored_backup_away() {
    let (mut etcd, store) = plain_etcd();
    store.put(&key("b"), vec![1], Expect::Any).await.unwrap();
    for value in 0..3 {
        store.put(&key("a"), vec![value], Expect::Any).await.unwrap();
    }
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    put(&mut watch).await;
    put(&mut watch).await;
    assert_eq!(next(&mut watch).await, Change::Synced);
    etcd.wipe().unwrap();
    // Until the watch makes long pauses.
    tokio::time::sleep(Duration::from_secs(12)).await;
    etcd.run().unwrap();
    let other = connect(&etcd);
    other.put(&key("a"), vec![0], Expect::Any).await.unwrap();
    for _ in 0..20 {
        other
            .put(&Key::new(Collection::Services, "x"), vec![], Expect::Any)
            .await
            .unwrap();
    }
    assert_eq!(next(&mut watch).await, Change::Anew);
    let (found, value) = put(&mut watch).await;
    assert_eq!((found, value.value), (key("a"), vec![0]));
    let silence = tokio::time::timeout(Duration::from_secs(3), watch.recv()).await;
    assert!(silence.is_err(), "nothing is deleted for lack of news: {silence:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_a_large_value() {
    let (etcd, store) = plain_etcd();
    let module = Key::new(Collection::Modules, "0123abcd");
    for _ in 0..2 {
        store.put(&module, vec![7; 3 << 20], Expect::Any).await.unwrap();
    }
    let keys = || etcd.ctl(&["get", "--prefix", "/", "--keys-only"]).unwrap();
    assert_eq!(
        keys().matches("/wasmgate/parts/modules/0123abcd/").count(),
        3,
        "{}",
        keys()
    );
    // A whole one in its place.
    store.put(&module, vec![7], Expect::Any).await.unwrap();
    assert_eq!(keys().trim(), "/wasmgate/modules/0123abcd");
    store.put(&module, vec![7; 3 << 20], Expect::Any).await.unwrap();
    store.delete(&module, Expect::Any).await.unwrap();
    assert_eq!(keys().trim(), "");
    // Parts of a value that lost go with their lease.
    store.put(&module, vec![1], Expect::Any).await.unwrap();
    store.put(&module, vec![7; 2 << 20], Expect::Absent).await.unwrap_err();
    let leases = etcd.ctl(&["lease", "list"]).unwrap();
    for lease in leases.lines().skip(1) {
        etcd.ctl(&["lease", "revoke", lease.trim()]).unwrap();
    }
    assert_eq!(keys().trim(), "/wasmgate/modules/0123abcd");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_right_is_told_so() {
    let etcd = Etcd::local(EtcdOptions {
        tls: true,
        users: true,
        ..EtcdOptions::default()
    })
    .unwrap();
    let good = configuration(&etcd);
    let open = |config: &EtcdConfig| EtcdStore::open(&format!("etcd:{}", etcd.url()), config).unwrap();
    open(&good).put(&key("a"), vec![], Expect::Any).await.unwrap();

    let elsewhere = EtcdConfig {
        prefix: "/other".to_owned(),
        ..good.clone()
    };
    let said = refusal(&open(&elsewhere)).await;
    assert!(
        said.contains("permission denied") && said.contains("etcd.prefix"),
        "{said}"
    );

    let password = etcd.file("wrong");
    std::fs::write(&password, "wrong").unwrap();
    let wrong = EtcdConfig {
        password_file: Some(password),
        ..good.clone()
    };
    let said = refusal(&open(&wrong)).await;
    assert!(said.contains("invalid user ID or password"), "{said}");

    // Without a certificate of its own: etcd ends the connection.
    let bare = EtcdConfig {
        certificate: None,
        key: None,
        ..good.clone()
    };
    let error = open(&bare).get(&key("a")).await.unwrap_err();
    assert!(error.to_string().contains("`etcd.certificate`"), "{error}");

    // One that somebody else has signed.
    let stranger = Etcd::local(EtcdOptions {
        tls: true,
        ..EtcdOptions::default()
    })
    .unwrap();
    let fooled = EtcdConfig {
        ca: configuration(&stranger).ca,
        ..good.clone()
    };
    let error = open(&fooled).get(&key("a")).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");

    let missing = EtcdConfig {
        ca: Some("/nowhere/ca.pem".into()),
        ..good
    };
    let error = EtcdStore::open(&format!("etcd:{}", etcd.url()), &missing)
        .err()
        .unwrap();
    assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_stays_one_when_its_token_has_run_out() {
    let etcd = Etcd::local(EtcdOptions {
        users: true,
        token_seconds: Some(1),
        ..EtcdOptions::default()
    })
    .unwrap();
    let store = connect(&etcd);
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
    for round in 0..3 {
        tokio::time::sleep(Duration::from_millis(2500)).await;
        store.put(&key("a"), vec![round], Expect::Any).await.unwrap();
        assert_eq!(put(&mut watch).await.1.value, [round]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_one_is_told_from_one_that_is_away() {
    let etcd = Etcd::local(EtcdOptions {
        arguments: vec!["--quota-backend-bytes".to_owned(), "16777216".to_owned()],
        ..EtcdOptions::default()
    })
    .unwrap();
    let store = connect(&etcd);
    let mut error = None;
    for number in 0..200_u8 {
        let module = Key::new(Collection::Modules, number);
        error = store.put(&module, vec![number; 1 << 19], Expect::Any).await.err();
        if error.is_some() {
            break;
        }
    }
    let error = error.expect("etcd takes more than its quota");
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains("--quota-backend-bytes"), "{error}");
    assert!(store.get(&key("a")).await.is_ok());
}
