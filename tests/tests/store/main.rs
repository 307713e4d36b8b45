//! The cluster's state: what every store has to do, asked of each of them, and what etcd can do to one.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod etcd;
mod members;
mod suite;

use harness::{Etcd, EtcdOptions};
use hostd::store::{Change, Collection, EtcdConfig, EtcdStore, Key, Store, Versioned};
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// News has to arrive within this time.
const SOON: Duration = Duration::from_secs(20);

fn key(name: &str) -> Key {
    Key::new(Collection::Pods, name)
}

/// The configuration by which a test's etcd is reached. How long an etcd that hangs is waited for is what some tests are about.
fn configuration(etcd: &Etcd) -> EtcdConfig {
    #[derive(serde::Deserialize)]
    struct Tables {
        etcd: EtcdConfig,
    }
    EtcdConfig {
        answer_seconds: EtcdConfig::default().answer_seconds,
        ..toml::from_str::<Tables>(&etcd.configuration().1).unwrap().etcd
    }
}

fn connect(etcd: &Etcd) -> EtcdStore {
    EtcdStore::open(&format!("etcd:{}", etcd.url()), &configuration(etcd)).unwrap()
}

fn plain_etcd() -> (Etcd, Arc<dyn Store>) {
    let etcd = Etcd::local(EtcdOptions::default()).unwrap();
    let store = connect(&etcd);
    (etcd, Arc::new(store))
}

/// The next change that a watch reports.
async fn next(watch: &mut mpsc::Receiver<Change>) -> Change {
    tokio::time::timeout(SOON, watch.recv())
        .await
        .expect("no news")
        .expect("the watch has ended")
}

/// The next one, which sets a value.
async fn put(watch: &mut mpsc::Receiver<Change>) -> (Key, Versioned) {
    match next(watch).await {
        Change::Put(key, value) => (key, value),
        other => panic!("{other:?}"),
    }
}
