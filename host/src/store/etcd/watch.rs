//! Following collections in etcd: a list, then a watch from the list's revision on (etcd documentation, "Watch streams").
//!
//! Where the stream ends the next one goes on from the last revision seen. Where etcd has compacted that away, the collection
//! is listed anew, and what differs from what was reported is reported. An etcd that was made anew or restored from a backup
//! may not know yet what it will: what is missing there counts as deleted only if nobody has entered it for a while.

use super::{
    EtcdStore, Listing,
    connection::{get, jitter, watch},
    name_in, parts,
};
use crate::store::{
    Change, Collection, Expect, Key, Store as _, StoreError, Versioned,
    records::{self, CLUSTER, ClusterRecord},
};
use etcd_client::{EventType, GetOptions, KeyValue, WatchOptions, WatchResponse, WatchStream};
use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Pause before a stream is begun anew, which doubles up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// So long nodes wait, or up to a half less, before they enter all that they know: not all do so at the same time.
const ANEW: Duration = Duration::from_secs(2);

/// Follows some collections.
pub struct Watcher {
    store: EtcdStore,
    followed: Vec<Followed>,
    origin: Origin,
    synced: bool,
    /// When what is missing since etcd was made anew counts as deleted.
    missing: Option<Instant>,
    /// A value has a lower revision than it had: etcd is one of an earlier time, though its own revision is as high as before (`etcdutl
    /// snapshot restore --bump-revision`).
    went_back: bool,
    sender: mpsc::Sender<Change>,
}

/// What tells an etcd from one that was made anew, or that was restored from a backup.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Origin {
    /// Its number, which it has from its members' URLs.
    cluster: u64,
    /// The number that nodes have given it; `None` before that.
    life: Option<u64>,
}

struct Followed {
    collection: Collection,
    folder: String,
    /// Everything before this revision was reported; zero before the first list.
    next: i64,
    /// Revision of each value that was reported; zero for one that is missing.
    reported: HashMap<String, u64>,
}

/// Why a stream is not read on.
enum Stop {
    /// The reader of the watch is gone.
    Ended,
    /// Another stream is needed.
    Again(Option<StoreError>),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Again(Some(error))
    }
}

impl Watcher {
    pub fn new(store: EtcdStore, collections: &[Collection], sender: mpsc::Sender<Change>) -> Self {
        let followed = |collection: &Collection| Followed {
            collection: *collection,
            folder: store.folder(*collection),
            next: 0,
            reported: HashMap::new(),
        };
        Self {
            followed: collections.iter().map(followed).collect(),
            store,
            origin: Origin::default(),
            synced: false,
            missing: None,
            went_back: false,
            sender,
        }
    }

    /// Reports until nobody reads any more.
    pub async fn run(mut self) {
        let mut pause = PAUSE.0;
        let mut said = None;
        loop {
            let began = Instant::now();
            match self.follow().await {
                Stop::Ended => return,
                Stop::Again(error) => {
                    let problem = error.as_ref().map(ToString::to_string);
                    match &error {
                        // It is said once, where it was noticed.
                        None | Some(StoreError::Unavailable { .. }) => {}
                        Some(error) if problem != said => tracing::warn!("watching the store: {error}; trying again"),
                        Some(_) => {}
                    }
                    said = problem;
                }
            }
            // One that has held for a while is no failure to begin one.
            pause = if began.elapsed() > PAUSE.1 { PAUSE.0 } else { pause };
            let closed = self.sender.clone();
            tokio::select! {
                () = tokio::time::sleep(jitter(pause)) => {}
                () = closed.closed() => return,
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    async fn follow(&mut self) -> Stop {
        match self.try_follow().await {
            Ok(stop) | Err(stop) => stop,
        }
    }

    async fn try_follow(&mut self) -> Result<Stop, Stop> {
        self.check_origin().await?;
        for index in 0..self.followed.len() {
            if self.followed[index].next == 0 {
                let listing = self.store.list_collection(self.followed[index].collection).await?;
                self.take(index, listing).await?;
            }
        }
        if !self.synced {
            self.send(Change::Synced).await?;
            self.synced = true;
        }
        let mut stream = self.open().await?;
        // While it was away again nobody could enter anything.
        if self.missing.is_some() {
            self.missing = Some(Instant::now() + jitter(self.store.0.hold));
        }
        loop {
            let hold = self.missing.unwrap_or_else(|| Instant::now() + self.store.0.hold);
            tokio::select! {
                response = stream.message() => match response {
                    Ok(Some(response)) => self.heard(&response).await?,
                    Ok(None) => return Ok(Stop::Again(None)),
                    Err(error) => return Err(self.store.0.connection.error(&error).into()),
                },
                () = self.sender.closed() => return Ok(Stop::Ended),
                () = tokio::time::sleep_until(hold.into()), if self.missing.is_some() => self.give_up().await?,
            }
        }
    }

    /// Whether it is still the same etcd. Also renews what a user needs to begin a watch.
    async fn check_origin(&mut self) -> Result<(), Stop> {
        let key = Key::new(Collection::Cluster, CLUSTER);
        let place = &self.store.place(&key)?;
        let asked = self.store.0.connection.ask(0, |client, _| async move {
            get(&client, place.as_bytes(), GetOptions::new()).await
        });
        let mut answer = asked.await?;
        let (cluster, revision) = answer
            .header()
            .map_or((0, 0), |header| (header.cluster_id(), header.revision()));
        let record = match answer.take_kvs().into_iter().next() {
            Some(found) => self.store.unpack(&key, found).await?,
            None => None,
        };
        let record = match record {
            Some(found) => Some((records::decode::<ClusterRecord>(&key, &found.value)?, found.revision)),
            None => None,
        };
        let mut origin = Origin {
            cluster,
            life: record.as_ref().map(|(record, _)| record.life),
        };
        let known = self.origin;
        self.check_newest().await?;
        let went_back = self.went_back
            || known.cluster != cluster
            || self.followed.iter().any(|followed| followed.next > revision + 1);
        let another_life = known.life.is_some() && known.life != origin.life;
        if known.cluster != 0 && (went_back || another_life) {
            tracing::error!("the store is not what it was: etcd was made anew, or restored from a backup");
            if let Some((record, revision)) = record.filter(|_| !another_life) {
                origin.life = Some(self.begin_life(&key, record, revision).await?);
            }
            for followed in &mut self.followed {
                followed.next = 0;
                // Its revisions say nothing of those before.
                followed.reported.values_mut().for_each(|revision| *revision = 0);
            }
            self.missing = Some(Instant::now() + jitter(self.store.0.hold));
            self.went_back = false;
            self.origin = origin;
            tokio::time::sleep(ANEW.saturating_sub(jitter(ANEW))).await;
            self.send(Change::Anew).await?;
        }
        self.origin = origin;
        Ok(())
    }

    /// Of each collection the value that was changed last: a backup has that of before, if it has one. What was made since a backup whose own
    /// revision was raised is not told from what was deleted.
    async fn check_newest(&mut self) -> Result<(), Stop> {
        for followed in &self.followed {
            let Some((name, known)) = followed.reported.iter().max_by_key(|(_, revision)| **revision) else {
                continue;
            };
            let found = self.store.get(&Key::new(followed.collection, name)).await?;
            // One that is gone tells nothing: it may have been deleted.
            if found.is_some_and(|found| found.revision < *known) {
                self.went_back = true;
                return Ok(());
            }
        }
        Ok(())
    }

    /// Tells all others, who may look at a restored etcd only when it has as many revisions again as they know of.
    async fn begin_life(&self, key: &Key, record: ClusterRecord, revision: u64) -> Result<u64, Stop> {
        let failed = |error: std::io::Error| self.store.0.connection.refused(error.to_string());
        let next = record.begin_life().map_err(failed)?;
        match records::put(&self.store, key, &next, Expect::Revision(revision)).await {
            Ok(_) => Ok(next.life),
            // Another node has; it is looked at again.
            Err(StoreError::Conflict { .. }) => Err(Stop::Again(None)),
            Err(error) => Err(error.into()),
        }
    }

    /// Reports how a collection differs from what was reported, in the order in which it was changed: who has seen one change
    /// has seen those before it.
    async fn take(&mut self, index: usize, listing: Listing) -> Result<(), Stop> {
        let mut values = listing.values;
        values.sort_by_key(|(_, value)| value.revision);
        let there: HashSet<String> = values.iter().map(|(key, _)| key.name.clone()).collect();
        for (key, value) in &values {
            self.check_order(index, &key.name, value.revision)?;
        }
        // First what is gone: what is new may have its place, such as an address.
        let reported = self.followed[index].reported.keys();
        let gone: Vec<String> = reported.filter(|name| !there.contains(*name)).cloned().collect();
        for name in gone {
            if self.missing.is_some() {
                self.followed[index].reported.insert(name, 0);
            } else {
                self.delete(index, name).await?;
            }
        }
        for (key, value) in values {
            self.put(index, key.name, value).await?;
        }
        self.followed[index].next = listing.revision + 1;
        Ok(())
    }

    /// A value's revision only rises, also where it was deleted in between.
    fn check_order(&mut self, index: usize, name: &str, revision: u64) -> Result<(), Stop> {
        if self.followed[index]
            .reported
            .get(name)
            .is_some_and(|known| *known > revision)
        {
            self.went_back = true;
            return Err(Stop::Again(None));
        }
        Ok(())
    }

    async fn put(&mut self, index: usize, name: String, value: Versioned) -> Result<(), Stop> {
        self.check_order(index, &name, value.revision)?;
        let followed = &mut self.followed[index];
        if followed.reported.insert(name.clone(), value.revision) == Some(value.revision) {
            return Ok(());
        }
        let key = Key::new(followed.collection, name);
        self.send(Change::Put(key, value)).await
    }

    async fn delete(&mut self, index: usize, name: String) -> Result<(), Stop> {
        let followed = &mut self.followed[index];
        if followed.reported.remove(&name).is_none() {
            return Ok(());
        }
        let key = Key::new(followed.collection, name);
        self.send(Change::Delete(key)).await
    }

    async fn send(&self, change: Change) -> Result<(), Stop> {
        self.sender.send(change).await.map_err(|_| Stop::Ended)
    }

    /// Nobody has entered anew what is missing.
    async fn give_up(&mut self) -> Result<(), Stop> {
        self.missing = None;
        for index in 0..self.followed.len() {
            let reported = self.followed[index].reported.iter();
            let missing: Vec<String> = reported
                .filter(|(_, revision)| **revision == 0)
                .map(|(name, _)| name.clone())
                .collect();
            for name in missing {
                self.followed[index].reported.remove(&name);
                let key = Key::new(self.followed[index].collection, name);
                self.send(Change::Missing(key)).await?;
            }
        }
        Ok(())
    }

    /// One stream with a watch for each collection, under the collection's index and one.
    async fn open(&self) -> Result<WatchStream, Stop> {
        let options = |index: usize| {
            let end = parts::after(&self.followed[index].folder);
            WatchOptions::new()
                .with_range(end)
                .with_start_revision(self.followed[index].next)
                .with_watch_id(id_of(index))
                .with_progress_notify()
        };
        let options = &options;
        let asked = self.store.0.connection.ask(0, |client, _| async move {
            let mut stream = watch(&client, self.followed[0].folder.as_bytes(), options(0)).await?;
            for (index, followed) in self.followed.iter().enumerate().skip(1) {
                stream.watch(followed.folder.as_str(), Some(options(index))).await?;
            }
            Ok(stream)
        });
        Ok(asked.await?)
    }

    async fn heard(&mut self, response: &WatchResponse) -> Result<(), Stop> {
        let Some(index) = (0..self.followed.len()).find(|index| id_of(*index) == response.watch_id()) else {
            return Err(self.cancelled(response));
        };
        if response.canceled() {
            if response.compact_revision() != 0 {
                tracing::info!("the store has compacted {}: listing", self.followed[index].folder);
                self.followed[index].next = 0;
                return Err(Stop::Again(None));
            }
            return Err(self.cancelled(response));
        }
        let mut next = self.followed[index].next;
        // Made anew since it was looked at.
        if response.header().is_some_and(|header| header.revision() + 1 < next) {
            return Err(Stop::Again(None));
        }
        for event in response.events() {
            let Some(found) = event.kv() else { continue };
            next = next.max(found.mod_revision() + 1);
            if let Some(name) = name_in(&self.followed[index].folder, found) {
                self.event(index, name, event.event_type(), found).await?;
            }
        }
        // Nothing has happened up to here.
        if response.events().is_empty()
            && !response.created()
            && let Some(header) = response.header()
        {
            next = next.max(header.revision() + 1);
        }
        self.followed[index].next = next;
        Ok(())
    }

    async fn event(&mut self, index: usize, name: String, kind: EventType, found: &KeyValue) -> Result<(), Stop> {
        if kind == EventType::Delete {
            return self.delete(index, name).await;
        }
        let key = Key::new(self.followed[index].collection, &name);
        match self.store.unpack(&key, found.clone()).await {
            Ok(Some(value)) => self.put(index, name, value).await,
            // The next event about it says more.
            Ok(None) => Ok(()),
            Err(error @ StoreError::Unavailable { .. }) => Err(error.into()),
            Err(error) => {
                // A value that can't be read is no news; the last good one stays.
                tracing::error!("{error}");
                Ok(())
            }
        }
    }

    fn cancelled(&self, response: &WatchResponse) -> Stop {
        let why = response.cancel_reason();
        let why = if why.is_empty() { "the watch was refused" } else { why };
        self.store.0.connection.refused(why.to_owned()).into()
    }
}

fn id_of(index: usize) -> i64 {
    i64::try_from(index).unwrap_or(i64::MAX).saturating_add(1)
}
