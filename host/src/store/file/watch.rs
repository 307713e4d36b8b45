//! Watching a store in a folder.

use super::{Context, FileStore};
use crate::store::{Change, Collection, Key, Store, StoreError};
use futures::StreamExt;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};
use tokio::sync::mpsc;

/// How often a watch lists its folders anew: on a network file system inotify does not see what other machines write.
const RELIST: Duration = Duration::from_secs(2);

/// Follows the folders of some collections.
pub struct Watcher {
    store: FileStore,
    collections: HashMap<WatchDescriptor, Collection>,
    events: inotify::EventStream<Vec<u8>>,
    reported: HashMap<Key, u64>,
    pub sender: mpsc::Sender<Change>,
}

/// The reader of a watch is gone.
struct Ended;

impl Watcher {
    pub fn new(store: FileStore, collections: &[Collection], sender: mpsc::Sender<Change>) -> Result<Self, StoreError> {
        let inotify = Inotify::init().context("inotify for", &store.folder)?;
        let mut descriptors = HashMap::new();
        for collection in collections {
            let path = store.folder.join(collection.name());
            let mask = WatchMask::MOVED_TO | WatchMask::DELETE;
            let descriptor = inotify.watches().add(&path, mask).context("watch", &path)?;
            descriptors.insert(descriptor, *collection);
        }
        let events = inotify
            .into_event_stream(vec![0; 64 * 1024])
            .context("watch", &store.folder)?;
        Ok(Self {
            store,
            collections: descriptors,
            events,
            reported: HashMap::new(),
            sender,
        })
    }

    pub async fn run(mut self) {
        // Events that come in meanwhile wait in the queue: nothing falls between the listing and the watch.
        if self.list().await.is_err() || self.sender.send(Change::Synced).await.is_err() {
            return;
        }
        let mut relist = tokio::time::interval(RELIST);
        relist.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                event = self.events.next() => event,
                _ = relist.tick() => {
                    if self.list().await.is_err() {
                        return;
                    }
                    continue;
                }
            };
            let done = match event {
                None => return,
                Some(Ok(event)) if event.mask.contains(EventMask::Q_OVERFLOW) => self.list().await,
                Some(Ok(event)) => match (
                    self.collections.get(&event.wd),
                    event.name.as_ref().and_then(|n| n.to_str()),
                ) {
                    (Some(collection), Some(name)) if !name.starts_with('.') => {
                        self.look_at(Key::new(*collection, name)).await
                    }
                    _ => Ok(()),
                },
                Some(Err(error)) => {
                    tracing::warn!("watching the store: {error}; listing it anew");
                    self.list().await
                }
            };
            if done.is_err() {
                return;
            }
        }
    }

    /// Reports everything that differs from what was reported last.
    async fn list(&mut self) -> Result<(), Ended> {
        let mut seen = HashSet::new();
        let collections: Vec<_> = self.collections.values().copied().collect();
        for collection in collections {
            match self.store.blocking(move |store| store.names(collection)).await {
                Ok(names) => {
                    let reported = self.reported.keys().filter(|key| key.collection == collection);
                    seen.extend(reported.cloned());
                    seen.extend(names.into_iter().map(|name| Key::new(collection, name)));
                }
                // What it holds is not known: that is no news.
                Err(error @ StoreError::Unavailable { .. }) => tracing::debug!("{error}"),
                Err(error) => tracing::warn!("listing the store: {error}"),
            }
        }
        // Collection by collection, each in the order in which it has changed: who has seen one change has seen those
        // before it.
        let mut changes = Vec::new();
        for key in seen {
            let collection = key.collection;
            if let Some(change) = self.change_of(key).await {
                let revision = match &change {
                    Change::Put(_, value) => value.revision,
                    Change::Delete(_) | Change::Missing(_) | Change::Synced | Change::Anew => 0,
                };
                changes.push((collection, revision, change));
            }
        }
        changes.sort_by_key(|(collection, revision, _)| (*collection, *revision));
        for (_, _, change) in changes {
            self.sender.send(change).await.map_err(|_| Ended)?;
        }
        Ok(())
    }

    /// Reports the state of one value, unless that was reported already.
    async fn look_at(&mut self, key: Key) -> Result<(), Ended> {
        match self.change_of(key).await {
            Some(change) => self.sender.send(change).await.map_err(|_| Ended),
            None => Ok(()),
        }
    }

    /// How one value differs from what was reported last.
    async fn change_of(&mut self, key: Key) -> Option<Change> {
        match self.store.get(&key).await {
            Ok(Some(found)) if self.reported.get(&key) == Some(&found.revision) => None,
            Ok(Some(found)) => {
                self.reported.insert(key.clone(), found.revision);
                Some(Change::Put(key, found))
            }
            Ok(None) if self.reported.remove(&key).is_some() => Some(Change::Delete(key)),
            Ok(None) => None,
            Err(error @ StoreError::Unavailable { .. }) => {
                tracing::debug!("{error}");
                None
            }
            Err(error) => {
                // A torn value is no news; the last good one stays.
                tracing::error!("{error}");
                None
            }
        }
    }
}
