//! The policy in force and its modules, kept on the node's own disk: hostd starts without asking for them, and a store that was
//! made anew, or is of before, is given them again.

use super::{Daemon, DaemonError, coordinate::modules_of, load::policy_key};
use crate::{
    codec,
    store::{
        Collection, Durability, Expect, Key, StoreError,
        records::{self, ModuleRecord, Phase, PolicyRecord, Revision},
        replace_file,
    },
    wasm::sha256,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

/// A folder with a file for each module, named by its SHA-256, and the record of the policy in force beside it.
pub struct ModuleFolder {
    folder: PathBuf,
    policy: PathBuf,
    /// Where the cluster's store is.
    place: String,
    /// Which cluster this is, as its record has it.
    pub cluster: u64,
}

/// The policy that was in force last. It is the cluster's where the store is in the same place, if it was made anew, or has the same
/// number, if it is a backup somewhere else.
#[derive(Serialize, Deserialize)]
struct Kept {
    place: String,
    cluster: u64,
    record: PolicyRecord,
}

impl ModuleFolder {
    /// The folder among what a node keeps across restarts; it is made where it is missing.
    pub fn open(state_dir: &Path, place: String, cluster: u64) -> io::Result<Self> {
        let folder = state_dir.join("modules");
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
            policy: state_dir.join("policy"),
            place,
            cluster,
        })
    }

    /// The policy that was in force last, if it is of the same cluster and all of its modules are here.
    pub fn policy(&self) -> Option<PolicyRecord> {
        let file = self.policy.display();
        let bytes = match fs::read(&self.policy) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!("{file}: {error}: the policy is the store's");
                return None;
            }
        };
        match codec::decode::<Kept>(&bytes) {
            Ok(kept) if kept.place != self.place && kept.cluster != self.cluster => {
                tracing::warn!(
                    "{file} is of another cluster, whose store was {}: the policy is that of {}",
                    kept.place,
                    self.place
                );
                None
            }
            Ok(Kept { record, .. }) if self.has(&record.next) => Some(record),
            Ok(Kept { record, .. }) => {
                tracing::error!(
                    "{file}: not all modules of {} are here: the policy is the store's",
                    record.next.what
                );
                None
            }
            Err(error) => {
                tracing::error!("{file}: {error}: the policy is the store's");
                None
            }
        }
    }

    fn keep_policy(&self, record: &PolicyRecord) {
        let kept = Kept {
            place: self.place.clone(),
            cluster: self.cluster,
            record: record.clone(),
        };
        let kept = codec::encode(&kept)
            .map_err(|error| error.to_string())
            .and_then(|bytes| {
                if fs::read(&self.policy).is_ok_and(|there| there == bytes) {
                    return Ok(());
                }
                replace_file(&self.policy, &bytes, Durability::Disk).map_err(|error| error.to_string())
            });
        if let Err(error) = kept {
            tracing::warn!("keeping the policy: {error}");
        }
    }

    /// Whether all modules of a set are here.
    fn has(&self, revision: &Revision) -> bool {
        revision.modules.iter().all(|one| self.get(&one.sha256).is_some())
    }

    /// A module, unless it is missing or damaged.
    fn get(&self, name: &str) -> Option<Vec<u8>> {
        let module = fs::read(self.folder.join(name)).ok()?;
        (sha256(&module) == name).then_some(module)
    }

    /// Keeps a module. That it can't is no reason to do without it: the store has it.
    fn put(&self, name: &str, module: &[u8]) {
        if let Err(error) = replace_file(&self.folder.join(name), module, Durability::Memory) {
            tracing::warn!("keeping a module: {error}");
        }
    }

    /// Removes all others.
    fn retain(&self, needed: &BTreeSet<String>) -> io::Result<()> {
        for file in fs::read_dir(&self.folder)? {
            let file = file?;
            if !needed.iter().any(|name| file.file_name() == name.as_str()) {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }
}

impl Daemon {
    /// A module, from this node's disk or from the store.
    pub(super) async fn fetch(&self, record: &ModuleRecord) -> Result<Vec<u8>, DaemonError> {
        let name = &record.sha256;
        if let Some(module) = self.modules.get(name) {
            return Ok(module);
        }
        let key = Key::new(Collection::Modules, name);
        let found = self.store.get(&key).await?;
        let module = found
            .map(|found| found.value)
            .filter(|module| sha256(module) == *name)
            .ok_or_else(|| DaemonError::Request(format!("the store has no module {name}, or a damaged one")))?;
        self.modules.put(name, &module);
        Ok(module)
    }

    /// Keeps the modules in force, and forgets those that the cluster's policy record speaks of no more.
    pub(super) async fn keep_modules(&self) {
        let Some((record, _)) = &self.policy else { return };
        for module in &self.active.revision.modules {
            if let Err(error) = self.fetch(module).await {
                error.complain("keeping a module");
            }
        }
        if let Some(settled) = self.settled() {
            self.modules.keep_policy(&settled);
        }
        if let Err(error) = self.modules.retain(&modules_of(record)) {
            tracing::warn!("removing modules that are not needed: {error}");
        }
    }

    /// The policy that this node enforces, as it is when its change is done, if it is the one that was heard of last.
    fn settled(&self) -> Option<PolicyRecord> {
        let (record, _) = self.policy.as_ref()?;
        let next = record.in_force().clone();
        (self.active.revision == next).then(|| PolicyRecord {
            phase: Phase::Retired,
            next,
            ..record.clone()
        })
    }

    /// At a start: where the store has no policy, or one of before, the policy is the one that this node has enforced last. True
    /// where the store has to be told.
    pub(super) fn recall_policy(&mut self) -> bool {
        let Some(kept) = self.modules.policy() else {
            return false;
        };
        let goes_back = |(record, _): &(PolicyRecord, u64)| record.in_force().is_before(&kept.next);
        if !self.policy.as_ref().is_none_or(goes_back) {
            return false;
        }
        tracing::warn!(
            "the store has no policy, or one of before: going on with {}",
            kept.next.what
        );
        self.policy = Some((kept, 0));
        true
    }

    /// Enters the policy that this node enforces, where the store has none, or one of before: with its modules, and with what can be
    /// gone back to as far as they are here.
    pub(super) async fn enter_policy(&self) -> Result<(), DaemonError> {
        let Some(mut record) = self.settled() else {
            return Ok(());
        };
        let expect = match records::get::<PolicyRecord>(&*self.store, &policy_key()).await? {
            None => Expect::Absent,
            Some((theirs, revision)) if theirs.in_force().is_before(&record.next) => Expect::Revision(revision),
            Some(_) => return Ok(()),
        };
        record.history.retain(|revision| self.modules.has(revision));
        if !self.modules.has(&record.previous) {
            record.previous = Revision::none();
        }
        for name in modules_of(&record) {
            let key = Key::new(Collection::Modules, &name);
            if self.store.has(&key).await? {
                continue;
            }
            let Some(module) = self.modules.get(&name) else {
                return Err(DaemonError::Request(format!(
                    "module {name} is no longer on this node's disk"
                )));
            };
            match self.store.put(&key, module, Expect::Absent).await {
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match records::put(&*self.store, &policy_key(), &record, expect).await {
            Ok(_) => {
                tracing::warn!("entered the policy that is in force into a store that had none, or one of before");
                Ok(())
            }
            // Another node was faster.
            Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ModuleFolder;
    use crate::{
        store::records::{ModuleRecord, Phase, PolicyRecord, Revision},
        wasm::{Overrides, Placement, Tier, sha256},
    };
    use std::collections::BTreeSet;

    #[test]
    fn a_kept_policy_is_that_of_its_cluster_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let open_as = |place: &str, cluster| ModuleFolder::open(folder.path(), place.to_owned(), cluster).unwrap();
        let open = |place| open_as(place, 1);
        let one = sha256(b"one");
        let mut record = PolicyRecord {
            phase: Phase::Retired,
            next: Revision::none(),
            previous: Revision::none(),
            history: Vec::new(),
            coordinator: "node1".to_owned(),
            deadline_ms: 0,
        };
        record.next.serial = 7;
        assert!(open("a").policy().is_none());
        open("a").keep_policy(&record);
        assert_eq!(open("a").policy(), Some(record.clone()));
        assert_eq!(open_as("b", 1).policy(), Some(record.clone()), "its store has moved");
        assert_eq!(
            open_as("a", 2).policy(),
            Some(record.clone()),
            "its store was made anew"
        );
        assert!(open_as("b", 2).policy().is_none(), "another cluster's");
        record.next.modules.push(ModuleRecord {
            sha256: one.clone(),
            placement: Placement {
                name: "default".to_owned(),
                tier: Tier::Tenant,
                priority: 500,
                tenant: None,
            },
            file: String::new(),
            audit: false,
            overrides: Overrides::default(),
            config: String::new(),
        });
        open("a").keep_policy(&record);
        assert!(open("a").policy().is_none(), "a module is missing");
        open("a").put(&one, b"one");
        assert_eq!(open("a").policy(), Some(record));
        let file = folder.path().join("policy");
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        assert!(open("a").policy().is_none(), "torn");
    }

    #[test]
    fn a_damaged_module_is_none_and_what_is_not_needed_goes() {
        let folder = tempfile::tempdir().unwrap();
        let modules = ModuleFolder::open(folder.path(), String::new(), 1).unwrap();
        let (one, other) = (sha256(b"one"), sha256(b"other"));
        modules.put(&one, b"one");
        modules.put(&other, b"other");
        assert_eq!(modules.get(&one).as_deref(), Some(&b"one"[..]));
        std::fs::write(folder.path().join("modules").join(&one), b"on").unwrap();
        assert_eq!(modules.get(&one), None);
        modules.retain(&BTreeSet::from([one])).unwrap();
        assert_eq!(modules.get(&other), None);
        assert_eq!(std::fs::read_dir(folder.path().join("modules")).unwrap().count(), 1);
    }
}
