//! The cluster's state in etcd, version 3.
//!
//! A value's key is `PREFIX/COLLECTION/NAME`; its revision is etcd's `mod_revision` (etcd documentation, "Data model").
//! A change with an expectation is a transaction. Etcd being away is an ordinary thing: whoever asks then has an error at
//! once, and watches go on from where they were when it is back.

mod config;
mod connection;
mod lease;
mod parts;
mod watch;

pub use config::{EtcdConfig, SCHEME};

use crate::store::{Answer, Change, Collection, Expect, Key, Store, StoreError, Versioned};
use connection::{Connection, get};
use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp, TxnOpResponse, TxnResponse};
use futures::FutureExt;
use lease::Leases;
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// Values on one page of a list.
const PAGE: i64 = 1000;
/// Changes that wait for a slow reader of a watch; etcd waits for it then.
const WATCH_QUEUE: usize = 1024;

/// A store in etcd.
#[derive(Clone)]
pub struct EtcdStore(Arc<Inner>);

struct Inner {
    connection: Arc<Connection>,
    prefix: String,
    leases: Leases,
    /// What is missing after etcd was made anew is believed to be gone after this time, or up to a half less: all nodes that
    /// are there have entered what is theirs long before.
    hold: Duration,
}

/// All values of a collection at one moment.
struct Listing {
    values: Vec<(Key, Versioned)>,
    /// The store's revision then.
    revision: i64,
}

impl EtcdStore {
    /// A store of this name. Nothing is asked of etcd yet.
    ///
    /// # Errors
    ///
    /// Where a file of the configuration can't be read.
    pub fn open(store: &str, config: &EtcdConfig) -> Result<Self, StoreError> {
        Ok(Self(Arc::new(Inner {
            connection: Connection::new(store, config)?,
            prefix: config.prefix.clone(),
            leases: Leases::default(),
            hold: Duration::from_secs(u64::from(config.hold_seconds)),
        })))
    }

    fn folder(&self, collection: Collection) -> String {
        format!("{}/{}/", self.0.prefix, collection.name())
    }

    fn place(&self, key: &Key) -> Result<String, StoreError> {
        key.check()?;
        Ok(self.folder(key.collection) + &key.name)
    }

    async fn read(&self, key: &Key) -> Result<Option<Versioned>, StoreError> {
        let place = &self.place(key)?;
        let asked = self.0.connection.ask(0, |client, _| async move {
            let mut answer = get(&client, place.as_bytes(), GetOptions::new()).await?;
            Ok(answer.take_kvs().into_iter().next())
        });
        match asked.await? {
            Some(found) => self.unpack(key, found).await,
            None => Ok(None),
        }
    }

    async fn list_collection(&self, collection: Collection) -> Result<Listing, StoreError> {
        let folder = self.folder(collection);
        let end = parts::after(&folder);
        let mut from = folder.clone().into_bytes();
        let mut listing = Listing {
            values: Vec::new(),
            revision: 0,
        };
        loop {
            let (first, last, at) = (&from, &end, listing.revision);
            let mut page = self
                .0
                .connection
                .ask(1, |client, _| async move {
                    let options = GetOptions::new().with_range(last.as_bytes());
                    get(&client, first, options.with_limit(PAGE).with_revision(at)).await
                })
                .await?;
            if let Some(header) = page.header().filter(|_| at == 0) {
                listing.revision = header.revision();
            }
            let more = page.more();
            for found in page.take_kvs() {
                from = [found.key(), &[0]].concat();
                let Some(name) = name_in(&folder, &found) else { continue };
                let key = Key::new(collection, name);
                match self.unpack(&key, found).await {
                    Ok(Some(value)) => listing.values.push((key, value)),
                    Ok(None) => {}
                    Err(error) if error.is_unavailable() => return Err(error),
                    // Somebody else's; it must not keep all others from being read.
                    Err(error) => tracing::error!("{error}"),
                }
            }
            if !more {
                return Ok(listing);
            }
        }
    }

    /// A transaction that holds if `expect` does; else its answer has what is there.
    fn change(place: &str, expect: Expect, more: Vec<Compare>, then: Vec<TxnOp>) -> Txn {
        let mut conditions = more;
        match expect {
            Expect::Any => {}
            Expect::Absent => conditions.push(Compare::create_revision(place, CompareOp::Equal, 0)),
            Expect::Revision(revision) => {
                let revision = i64::try_from(revision).unwrap_or(i64::MAX);
                conditions.push(Compare::mod_revision(place, CompareOp::Equal, revision));
            }
        }
        Txn::new()
            .when(conditions)
            .and_then(then)
            .or_else([TxnOp::get(place, None)])
    }

    async fn write(&self, key: &Key, value: Vec<u8>, expect: Expect) -> Result<u64, StoreError> {
        let place = &self.place(key)?;
        let packed = &self.pack(key, value).await?;
        let mebibytes = packed.mebibytes();
        let asked = self.0.connection.ask(mebibytes, |mut client, tries| async move {
            let then = packed.then(place, None);
            let txn = Self::change(place, expect, packed.conditions(), then);
            Ok((client.txn(txn).await?, tries))
        });
        let (answer, tries) = asked.await?;
        if answer.succeeded() {
            return Ok(revision_of(&answer));
        }
        let found = match found_by(&answer) {
            // An earlier try had no answer, but it was carried out.
            Some(found) if tries > 0 && expect != Expect::Any && found.value() == packed.value => {
                return Ok(unsigned(found.mod_revision()));
            }
            Some(found) => self.unpack(key, found).await?,
            None => None,
        };
        Err(conflict(key, found))
    }

    async fn remove(&self, key: &Key, expect: Expect) -> Result<(), StoreError> {
        let place = &self.place(key)?;
        let asked = self.0.connection.ask(0, |mut client, tries| async move {
            let then = vec![TxnOp::delete(place.as_str(), None), self.0.delete_parts(place)];
            let txn = Self::change(place, expect, Vec::new(), then);
            Ok((client.txn(txn).await?, tries))
        });
        let (answer, tries) = asked.await?;
        if answer.succeeded() {
            return Ok(());
        }
        match found_by(&answer) {
            // As above.
            None if tries > 0 => Ok(()),
            None => Err(conflict(key, None)),
            Some(found) => Err(conflict(key, self.unpack(key, found).await?)),
        }
    }
}

fn conflict(key: &Key, found: Option<Versioned>) -> StoreError {
    StoreError::Conflict {
        key: key.clone(),
        found,
    }
}

/// Etcd's revisions are signed, and never below zero.
fn unsigned(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn revision_of(answer: &TxnResponse) -> u64 {
    unsigned(answer.header().map_or(0, etcd_client::ResponseHeader::revision))
}

fn found_by(answer: &TxnResponse) -> Option<KeyValue> {
    answer.op_responses().into_iter().find_map(|op| match op {
        TxnOpResponse::Get(mut found) => found.take_kvs().into_iter().next(),
        _ => None,
    })
}

/// The name of a value, by its key.
fn name_in(folder: &str, found: &KeyValue) -> Option<String> {
    let key = std::str::from_utf8(found.key()).ok()?;
    key.strip_prefix(folder).map(str::to_owned)
}

impl Store for EtcdStore {
    fn get<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Versioned>> {
        self.read(key).boxed()
    }

    fn has<'a>(&'a self, key: &'a Key) -> Answer<'a, bool> {
        async move {
            let place = &self.place(key)?;
            let asked = self.0.connection.ask(0, |client, _| async move {
                get(&client, place.as_bytes(), GetOptions::new().with_count_only()).await
            });
            Ok(asked.await?.count() > 0)
        }
        .boxed()
    }

    fn list(&self, collection: Collection) -> Answer<'_, Vec<(Key, Versioned)>> {
        self.list_collection(collection)
            .map(|listed| Ok(listed?.values))
            .boxed()
    }

    fn keys(&self, collection: Collection) -> Answer<'_, Vec<Key>> {
        async move {
            let folder = &self.folder(collection);
            let asked = self.0.connection.ask(1, |client, _| async move {
                let options = GetOptions::new().with_range(parts::after(folder)).with_keys_only();
                get(&client, folder.as_bytes(), options).await
            });
            let found = asked.await?.take_kvs();
            let names = found.iter().filter_map(|found| name_in(folder, found));
            Ok(names.map(|name| Key::new(collection, name)).collect())
        }
        .boxed()
    }

    fn put<'a>(&'a self, key: &'a Key, value: Vec<u8>, expect: Expect) -> Answer<'a, u64> {
        self.write(key, value, expect).boxed()
    }

    fn put_leased<'a>(&'a self, key: &'a Key, value: Vec<u8>, ttl: Duration) -> Answer<'a, u64> {
        self.write_leased(key, value, ttl).boxed()
    }

    fn keep<'a>(&'a self, key: &'a Key) -> Answer<'a, bool> {
        self.keep_lease(key).boxed()
    }

    fn delete<'a>(&'a self, key: &'a Key, expect: Expect) -> Answer<'a, ()> {
        self.remove(key, expect).boxed()
    }

    fn watch(&self, collections: &[Collection]) -> Answer<'_, mpsc::Receiver<Change>> {
        let (sender, receiver) = mpsc::channel(WATCH_QUEUE);
        tokio::spawn(watch::Watcher::new(self.clone(), collections, sender).run());
        async move { Ok(receiver) }.boxed()
    }

    fn problem(&self) -> Option<String> {
        self.0.connection.problem()
    }
}
