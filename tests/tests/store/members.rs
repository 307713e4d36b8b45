//! An etcd of several members, answers that get lost on their way, and backups.

use super::{connect, key, next, put};
use harness::{Etcd, EtcdOptions};
use hostd::{
    identity::Layout,
    store::{
        Change, Collection, EtcdConfig, EtcdStore, Expect, Key, Store,
        records::{self, CLUSTER, ClusterRecord},
    },
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

#[tokio::test(flavor = "multi_thread")]
async fn one_member_of_three_may_die_or_hang() {
    let mut members = Etcd::members(3).unwrap();
    let urls: Vec<String> = members.iter().map(Etcd::url).collect();
    let store = EtcdStore::open(&format!("etcd:{}", urls.join(",")), &EtcdConfig::default()).unwrap();
    let mut watch = store.watch(&[Collection::Pods]).await.unwrap();
    assert_eq!(next(&mut watch).await, Change::Synced);
    let mut reported = 0;
    for member in &mut members {
        member.kill().unwrap();
        for value in 0..50 {
            // A new leader may have to be found first: until then nobody can answer.
            super::etcd::put_when_back(&store, &key("a"), &[value]).await;
        }
        for _ in 0..100 {
            store.get(&key("a")).await.unwrap();
        }
        assert_eq!(store.problem(), None);
        member.run().unwrap();
        reported += 50;
    }
    members[1].pause().unwrap();
    for value in 0..10 {
        super::etcd::put_when_back(&store, &key("a"), &[value]).await;
    }
    members[1].resume().unwrap();
    reported += 10;
    // Each change is heard once, whichever member the watch was at.
    let mut last = 0;
    for _ in 0..reported {
        let (_, value) = put(&mut watch).await;
        assert!(value.revision > last, "{} after {last}", value.revision);
        last = value.revision;
    }
}

/// A way to a server on which some answers get lost, with their connections.
struct Lossy {
    address: SocketAddr,
    /// Connections that are still to lose theirs.
    losses: Arc<AtomicU32>,
}

impl Lossy {
    async fn to(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let losses = Arc::new(AtomicU32::new(0));
        let left = Arc::clone(&losses);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&server).await.unwrap();
                tokio::spawn(pass(client, server, Arc::clone(&left)));
            }
        });
        Self { address, losses }
    }
}

/// Passes on what both say. A connection that loses its answers does so for long enough that what was asked for is done.
async fn pass(client: TcpStream, server: TcpStream, losses: Arc<AtomicU32>) {
    const DONE: Duration = Duration::from_millis(500);
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    tokio::spawn(async move {
        // Either end may go at any time.
        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
    });
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
        let lose = |left: u32| left.checked_sub(1);
        if losses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose).is_ok() {
            tokio::time::sleep(DONE).await;
            return;
        }
        if to_client.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_answer_was_lost_is_made_once_and_known_to_be_made() {
    let etcd = Etcd::local(EtcdOptions::default()).unwrap();
    let direct = connect(&etcd);
    let lossy = Lossy::to(etcd.url().replace("http://", "")).await;
    let store = EtcdStore::open(&format!("etcd:http://{}", lossy.address), &EtcdConfig::default()).unwrap();
    store.get(&key("a")).await.unwrap();
    let lose = || lossy.losses.store(1, Ordering::SeqCst);
    let all_lost = || lossy.losses.load(Ordering::SeqCst) == 0;

    lose();
    let revision = store.put(&key("a"), vec![1], Expect::Absent).await.unwrap();
    assert!(all_lost());
    let found = direct.get(&key("a")).await.unwrap().unwrap();
    assert_eq!((found.revision, found.value), (revision, vec![1]));

    lose();
    let revision = store.put(&key("a"), vec![2], Expect::Revision(revision)).await.unwrap();
    assert!(all_lost());
    let found = direct.get(&key("a")).await.unwrap().unwrap();
    assert_eq!((found.revision, found.value), (revision, vec![2]));

    lose();
    store.delete(&key("a"), Expect::Revision(revision)).await.unwrap();
    assert!(all_lost());
    assert_eq!(direct.get(&key("a")).await.unwrap(), None);

    // Another's value is no answer of ours.
    direct.put(&key("a"), vec![3], Expect::Any).await.unwrap();
    lose();
    let refused = store.put(&key("a"), vec![4], Expect::Absent).await.unwrap_err();
    assert!(all_lost());
    assert!(refused.to_string().contains("changed by somebody else"), "{refused}");
    assert_eq!(direct.get(&key("a")).await.unwrap().unwrap().value, [3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_noticed_also_when_it_has_as_many_revisions_again() {
    let mut etcd = Etcd::local(EtcdOptions::default()).unwrap();
    let early = connect(&etcd);
    let cluster = Key::new(Collection::Cluster, CLUSTER);
    let record = ClusterRecord::new(Layout { tenant_bits: 8 }).unwrap();
    records::put(&early, &cluster, &record, Expect::Absent).await.unwrap();
    early.put(&key("a"), vec![1], Expect::Any).await.unwrap();
    let backup = etcd.file("backup");
    etcd.ctl(&["snapshot", "save", backup.to_str().unwrap()]).unwrap();
    early.put(&key("a"), vec![2], Expect::Any).await.unwrap();
    let mut first = early.watch(&[Collection::Pods]).await.unwrap();
    let late = connect(&etcd);
    let mut second = late.watch(&[Collection::Pods]).await.unwrap();
    for watch in [&mut first, &mut second] {
        assert_eq!(put(watch).await.1.value, [2]);
        assert_eq!(next(watch).await, Change::Synced);
    }
    etcd.restore(&backup).unwrap();
    // The first that notices gives it another number, by which the others do.
    for watch in [&mut first, &mut second] {
        assert_eq!(next(watch).await, Change::Anew);
        assert_eq!(put(watch).await.1.value, [1]);
    }
    let (again, _) = records::get::<ClusterRecord>(&late, &cluster).await.unwrap().unwrap();
    assert_ne!(again.life, record.life);
    // And each does so once.
    etcd.kill().unwrap();
    etcd.run().unwrap();
    super::etcd::put_when_back(&late, &key("a"), &[3]).await;
    for watch in [&mut first, &mut second] {
        assert_eq!(put(watch).await.1.value, [3]);
    }
}
