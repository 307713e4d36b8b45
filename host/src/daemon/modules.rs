//! Policy modules of the cluster, kept on the node's own disk: hostd starts without asking for them, and a store that was
//! made anew is given them again.

use super::{Daemon, DaemonError, coordinate::modules_of, load::policy_key};
use crate::{
    store::{
        Collection, Durability, Expect, Key, StoreError,
        records::{self, ModuleRecord, Phase, Revision},
        replace_file,
    },
    wasm::sha256,
};
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

/// A folder with a file for each module, named by its SHA-256.
pub struct ModuleFolder(PathBuf);

impl ModuleFolder {
    /// The folder among what a node keeps across restarts; it is made where it is missing.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let folder = state_dir.join("modules");
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    /// A module, unless it is missing or damaged.
    fn get(&self, name: &str) -> Option<Vec<u8>> {
        let module = fs::read(self.0.join(name)).ok()?;
        (sha256(&module) == name).then_some(module)
    }

    /// Keeps a module. That it can't is no reason to do without it: the store has it.
    fn put(&self, name: &str, module: &[u8]) {
        if let Err(error) = replace_file(&self.0.join(name), module, Durability::Memory) {
            tracing::warn!("keeping a module: {error}");
        }
    }

    /// Removes all others.
    fn retain(&self, needed: &BTreeSet<String>) -> io::Result<()> {
        for file in fs::read_dir(&self.0)? {
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
        if let Err(error) = self.modules.retain(&modules_of(record)) {
            tracing::warn!("removing modules that are not needed: {error}");
        }
    }

    /// Enters the policy that this node enforces, where the store has none: with its modules, and with what can be gone back
    /// to as far as they are here.
    pub(super) async fn enter_policy(&self) -> Result<(), DaemonError> {
        let Some((mut record, _)) = self.policy.clone() else {
            return Ok(());
        };
        if self.active.revision != *record.in_force() || self.store.get(&policy_key()).await?.is_some() {
            return Ok(());
        }
        record.next = record.in_force().clone();
        record.phase = Phase::Retired;
        let here = |revision: &Revision| {
            revision
                .modules
                .iter()
                .all(|one| self.modules.get(&one.sha256).is_some())
        };
        record.history.retain(here);
        if !here(&record.previous) {
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
        match records::put(&*self.store, &policy_key(), &record, Expect::Absent).await {
            Ok(_) => {
                tracing::warn!("entered the policy that is in force into a store that had none");
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
    use crate::wasm::sha256;
    use std::collections::BTreeSet;

    #[test]
    fn a_damaged_module_is_none_and_what_is_not_needed_goes() {
        let folder = tempfile::tempdir().unwrap();
        let modules = ModuleFolder::open(folder.path()).unwrap();
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
