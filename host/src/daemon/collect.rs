//! Collecting identities that nobody uses any more, so that their numbers can be given out again.
//!
//! A number must not mean something else while any node may still hold it. So an identity is first marked as retiring:
//! whoever uses it, or wants to, takes the mark back. It is deleted when every node is alive and has said, with its
//! lease, that it has seen the mark, and the mark is still there. Both are changes by comparison, so one of them loses.

use super::{Daemon, DaemonError};
use crate::store::{
    Collection, Expect, Key, StoreError,
    records::{self, AliveRecord, IdentityRecord},
};
use abi::Identity;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Identities that are looked at in one round.
const AT_ONCE: usize = 256;

/// Identities that this node has found unused, and since when.
#[derive(Debug, Default)]
pub struct Unused(BTreeMap<Identity, Instant>);

fn key(identity: Identity) -> Key {
    Key::new(Collection::Identities, identity.0)
}

impl Daemon {
    /// Whether either side still has an identity.
    fn uses(&self, identity: Identity) -> bool {
        let aside = self.aside.as_ref();
        self.active.generation.holds(identity) || aside.is_some_and(|side| side.generation.holds(identity))
    }

    /// Takes a mark back.
    pub(super) async fn revive(&mut self, identity: Identity) -> Result<(), DaemonError> {
        let key = key(identity);
        let found = records::get::<IdentityRecord>(&*self.store, &key).await?;
        let Some((mut record, revision)) = found else {
            // Gone. What is used here all the same is entered again, so that nothing else gets its number.
            let key_here = self.registry.key(identity).cloned();
            match key_here {
                Some(kept) if self.uses(identity) => {
                    let record = IdentityRecord {
                        key: kept,
                        retiring: false,
                    };
                    match records::put(&*self.store, &key, &record, Expect::Absent).await {
                        Ok(_) | Err(StoreError::Conflict { .. }) => {}
                        Err(error) => return Err(error.into()),
                    }
                    self.registry.set_retiring(identity, false);
                }
                _ => self.registry.remove(identity),
            }
            return Ok(());
        };
        if record.retiring {
            record.retiring = false;
            match records::put(&*self.store, &key, &record, Expect::Revision(revision)).await {
                Ok(_) => {}
                // Somebody was faster: whoever asked looks again.
                Err(StoreError::Conflict { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.note_identity(identity, record);
        Ok(())
    }

    /// Takes in an identity's record. A mark on one that is used here is taken back.
    pub(super) async fn identity_seen(
        &mut self,
        identity: Identity,
        record: IdentityRecord,
    ) -> Result<(), DaemonError> {
        let retiring = record.retiring;
        self.note_identity(identity, record);
        if retiring && self.uses(identity) {
            self.revive(identity).await?;
        }
        Ok(())
    }

    /// An identity was deleted. Where it is used here it is entered again.
    pub(super) async fn identity_gone(&mut self, identity: Identity) -> Result<(), DaemonError> {
        if self.uses(identity) {
            tracing::error!("identity {} was deleted while it is used here", identity.0);
            return self.revive(identity).await;
        }
        self.registry.remove(identity);
        Ok(())
    }

    /// One round. Only the first of the nodes that are alive collects.
    pub(super) async fn collect(&mut self) -> Result<(), DaemonError> {
        let idle = Duration::from_secs(self.config.vni.collect_seconds);
        let first = self.nodes.iter().find(|(_, node)| node.stale_since.is_none());
        if idle.is_zero() || first.is_none_or(|(name, _)| *name != self.config.node) {
            self.unused.0.clear();
            return Ok(());
        }
        let unused: Vec<Identity> = self
            .registry
            .iter()
            .map(|(identity, _)| identity)
            .filter(|identity| !self.uses(*identity))
            .collect();
        let now = Instant::now();
        let known = std::mem::take(&mut self.unused.0);
        for identity in &unused {
            let since = known.get(identity).copied().unwrap_or(now);
            self.unused.0.insert(*identity, since);
        }
        let due: Vec<Identity> = self
            .unused
            .0
            .iter()
            .filter(|(_, since)| since.elapsed() >= idle)
            .map(|(identity, _)| *identity)
            .take(AT_ONCE)
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let seen_by_all = self.seen_by_all().await?;
        for identity in due {
            self.collect_one(identity, seen_by_all).await?;
        }
        Ok(())
    }

    async fn collect_one(&mut self, identity: Identity, seen_by_all: Option<u64>) -> Result<(), DaemonError> {
        let key = key(identity);
        let Some((mut record, revision)) = records::get::<IdentityRecord>(&*self.store, &key).await? else {
            self.registry.remove(identity);
            return Ok(());
        };
        let result = if !record.retiring {
            record.retiring = true;
            records::put(&*self.store, &key, &record, Expect::Revision(revision))
                .await
                .map(|_| ())
        } else if seen_by_all.is_some_and(|seen| seen >= revision) {
            tracing::info!("identity {} ({}) is collected: nobody uses it", identity.0, record.key);
            self.store.delete(&key, Expect::Revision(revision)).await
        } else {
            Ok(())
        };
        match result {
            // Somebody uses it after all.
            Ok(()) | Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Up to which revision every node has taken in the store's changes; none while a node is not alive, for its
    /// datapath may hold anything.
    async fn seen_by_all(&self) -> Result<Option<u64>, DaemonError> {
        let mut seen = None;
        // From the store: this node may not have heard of one that has just joined.
        for (node, _) in self.store.list(Collection::Nodes).await? {
            let key = Key::new(Collection::Alive, &node.name);
            match records::get::<AliveRecord>(&*self.store, &key).await? {
                Some((alive, _)) => seen = Some(seen.map_or(alive.seen, |seen: u64| seen.min(alive.seen))),
                None => return Ok(None),
            }
        }
        Ok(seen)
    }
}
