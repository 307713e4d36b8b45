//! Collecting identities that nobody uses any more, and tenants without identities, so that their numbers can be given out
//! again.
//!
//! A number must not mean something else while any node may still hold it. So an identity is first marked as retiring:
//! whoever uses it, or wants to, takes the mark back. It is deleted when every node is alive and has said
//! that it has seen the mark, and the mark is still there. Both are changes by comparison, so one of them loses.

use super::{Daemon, DaemonError};
use crate::store::{
    Collection, Expect, Key, StoreError, Versioned,
    records::{self, IdentityRecord, SeenRecord, TenantRecord},
};
use abi::Identity;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// Records that are looked at in one round.
const AT_ONCE: usize = 256;

/// Keys of what this node has found unused, and since when.
#[derive(Debug, Default)]
pub struct Unused(BTreeMap<Key, Instant>);

fn key(identity: Identity) -> Key {
    Key::new(Collection::Identities, identity.0)
}

/// A record that can be marked.
trait Retire: Serialize + DeserializeOwned {
    fn retiring(&mut self) -> &mut bool;
    fn describe(&self) -> String;
}

impl Retire for IdentityRecord {
    fn retiring(&mut self) -> &mut bool {
        &mut self.retiring
    }

    fn describe(&self) -> String {
        format!("identity {}", self.key)
    }
}

impl Retire for TenantRecord {
    fn retiring(&mut self) -> &mut bool {
        &mut self.retiring
    }

    fn describe(&self) -> String {
        format!("tenant {}", self.name)
    }
}

impl Daemon {
    /// Whether either side still has an identity.
    pub(super) fn uses(&self, identity: Identity) -> bool {
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
        let other = self.registry.key(identity).is_some_and(|known| *known != record.key);
        if other && self.uses(identity) {
            return self.renumber(identity).await;
        }
        self.note_identity(identity, record);
        if retiring && self.uses(identity) {
            self.revive(identity).await?;
        }
        Ok(())
    }

    /// A number that is used here seems to mean something else. If it does, nothing passes to or from its pods until they have
    /// another one.
    async fn renumber(&mut self, identity: Identity) -> Result<(), DaemonError> {
        // What was heard may be of before this node has set it right.
        let found = records::get::<IdentityRecord>(&*self.store, &key(identity)).await?;
        let Some((record, _)) = found.filter(|(found, _)| self.registry.key(identity) != Some(&found.key)) else {
            return Ok(());
        };
        tracing::error!(
            "identity {} is {} for other nodes, but {} here: its pods get another number",
            identity.0,
            record.key,
            self.registry.name(identity)
        );
        let moved = self.close_identity(identity)?;
        self.note_identity(identity, record);
        self.audit.forget_rulings();
        if self.uses(identity) {
            // A network's: the policy as a whole has to be compiled anew.
            self.out_of_step = Some(format!("identity {} means something else by now", identity.0));
            self.recompile = true;
        }
        for pod in moved {
            let address = pod.address.into();
            match self.upsert_pod(pod).await {
                Ok(()) => {
                    self.unplaced.remove(&address);
                }
                Err(error) => error.complain("a pod that needs another identity, tried again"),
            }
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
        let identities = self.registry.iter().map(|(identity, _)| identity);
        let unused = identities.filter(|identity| !self.uses(*identity)).map(key);
        let tenants = self.registry.tenant_numbers();
        let empty = tenants.filter(|tenant| !self.registry.has_identities(*tenant));
        let unused: Vec<Key> = unused
            .chain(empty.map(|number| Key::new(Collection::Tenants, number)))
            .collect();
        let now = Instant::now();
        let known = std::mem::take(&mut self.unused.0);
        for key in unused {
            let since = known.get(&key).copied().unwrap_or(now);
            self.unused.0.insert(key, since);
        }
        let due = self.unused.0.iter().filter(|(_, since)| since.elapsed() >= idle);
        let due: Vec<Key> = due.map(|(key, _)| key.clone()).take(AT_ONCE).collect();
        if due.is_empty() {
            return Ok(());
        }
        let seen_by_all = self.seen_by_all().await?;
        for key in due {
            if key.collection == Collection::Tenants {
                let seen = seen_by_all.map(|seen| seen.tenants);
                self.collect_one::<TenantRecord>(&key, seen).await?;
            } else {
                let seen = seen_by_all.map(|seen| seen.identities);
                self.collect_one::<IdentityRecord>(&key, seen).await?;
            }
        }
        Ok(())
    }

    async fn collect_one<T: Retire>(&self, key: &Key, seen_by_all: Option<u64>) -> Result<(), DaemonError> {
        let Some((mut record, revision)) = records::get::<T>(&*self.store, key).await? else {
            // The watch will say so.
            return Ok(());
        };
        let result = if !*record.retiring() {
            *record.retiring() = true;
            records::put(&*self.store, key, &record, Expect::Revision(revision))
                .await
                .map(|_| ())
        } else if seen_by_all.is_some_and(|seen| seen >= revision) {
            tracing::info!("{key}, {}, is collected: nobody uses it", record.describe());
            self.store.delete(key, Expect::Revision(revision)).await
        } else {
            Ok(())
        };
        match result {
            // Somebody uses it after all.
            Ok(()) | Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes in a tenant's record. A mark on one that has identities is taken back.
    pub(super) async fn tenant_seen(&mut self, number: u32, record: TenantRecord) -> Result<(), DaemonError> {
        self.registry.insert_tenant(number, record.name);
        self.registry.set_tenant_retiring(number, record.retiring);
        if record.retiring && self.registry.has_identities(number) {
            self.revive_tenant(number).await?;
        }
        Ok(())
    }

    /// A tenant was deleted. Where it has identities it is entered again.
    pub(super) async fn tenant_gone(&mut self, number: u32) -> Result<(), DaemonError> {
        if self.registry.has_identities(number) {
            return self.revive_tenant(number).await;
        }
        self.registry.remove_tenant(number);
        Ok(())
    }

    /// Takes a mark on a tenant back.
    pub(super) async fn revive_tenant(&mut self, number: u32) -> Result<(), DaemonError> {
        let key = Key::new(Collection::Tenants, number);
        let found = records::get::<TenantRecord>(&*self.store, &key).await?;
        let name = self.registry.tenant(number).map(str::to_owned);
        let (record, expect) = match (found, name) {
            (Some((record, revision)), _) => (record, Expect::Revision(revision)),
            (None, Some(name)) if self.registry.has_identities(number) => {
                let retiring = true;
                (TenantRecord { name, retiring }, Expect::Absent)
            }
            (None, _) => {
                self.registry.remove_tenant(number);
                return Ok(());
            }
        };
        let mut record = record;
        if record.retiring {
            record.retiring = false;
            match records::put(&*self.store, &key, &record, expect).await {
                Ok(_) => {}
                // Somebody was faster: whoever asked looks again.
                Err(StoreError::Conflict { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        self.registry.insert_tenant(number, record.name);
        self.registry.set_tenant_retiring(number, false);
        Ok(())
    }

    /// Up to which revision every node has taken in the store's changes; none while a node is not alive, for its
    /// datapath may hold anything.
    async fn seen_by_all(&self) -> Result<Option<SeenRecord>, DaemonError> {
        let names = |listed: Vec<(Key, Versioned)>| -> BTreeSet<String> {
            listed.into_iter().map(|(key, _)| key.name).collect()
        };
        // From the store: this node may not have heard of one that has just joined.
        let nodes = names(self.store.list(Collection::Nodes).await?);
        let alive = names(self.store.list(Collection::Alive).await?);
        if !nodes.is_subset(&alive) {
            return Ok(None);
        }
        let mut all: Option<SeenRecord> = None;
        let mut said = 0;
        for (key, value) in self.store.list(Collection::Seen).await? {
            if !nodes.contains(&key.name) {
                continue;
            }
            said += 1;
            let seen: SeenRecord = records::decode(&key, &value.value)?;
            let before = all.unwrap_or(seen);
            all = Some(SeenRecord {
                identities: before.identities.min(seen.identities),
                tenants: before.tenants.min(seen.tenants),
            });
        }
        Ok(all.filter(|_| said == nodes.len()))
    }
}
