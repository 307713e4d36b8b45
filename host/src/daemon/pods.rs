//! Pods of the cluster: from a record in the store to the entries in the maps.
//!
//! What is added goes in the order policy, ipcache, endpoint; what is removed goes the other way round.

use super::{Daemon, DaemonError, Pod};
use crate::{
    plan::{self, Facts, Stance},
    store::records::PodRecord,
};
use abi::AddressKey;
use std::sync::{PoisonError, RwLockWriteGuard};

impl Daemon {
    pub(super) fn names_mut(&self) -> RwLockWriteGuard<'_, super::Names> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where an address is, as far as this node knows; `None` while its node is unknown.
    fn stance(&self, record: &PodRecord) -> Option<Stance> {
        if record.node == self.config.node {
            let local = self
                .locals
                .values()
                .find(|local| local.endpoint.pod.address == record.address)?;
            return Some(Stance::Local {
                ifindex: local.veth.ifindex,
                mac: local.veth.pod_mac,
                gateway_mac: local.veth.host_mac,
            });
        }
        let node = self.nodes.get(&record.node)?;
        Some(Stance::Remote(AddressKey::v4(node.record.underlay.octets())))
    }

    /// Takes in a pod that is new, or whose labels or place have changed. On an error the address is as it was.
    pub(super) async fn upsert_pod(&mut self, record: PodRecord) -> Result<(), DaemonError> {
        let address = AddressKey::from(record.address);
        let local = record.node == self.config.node;
        self.active.asked.begin();
        let key = self.active.asked.identify(&record)?;
        let identity = self.number(key.as_ref()).await?;
        let change = self.active.assign(address, identity, key, local)?;
        let parity = self.datapath.parity();
        self.datapath.write(parity, &change)?;
        self.assign_aside(&record, address, local).await;

        let epoch = self.pods.get(&address).map_or(1, |pod| pod.epoch + 1);
        self.names_mut().set_address(address, record.full_name());
        let before = self.pods.insert(address, Pod { record, epoch });
        if let Err(error) = self.place(&address) {
            self.undo(address, before);
            return Err(error);
        }
        self.release()
    }

    /// The policy that is being loaded, or was replaced, is asked too. Where it can't answer, the address has no
    /// place in its generation: after the flip nothing reaches it, and hostd says so.
    async fn assign_aside(&mut self, record: &PodRecord, address: AddressKey, local: bool) {
        // Out of `self`, since finding the identity's number may change the registry.
        let Some(mut aside) = self.aside.take() else { return };
        aside.asked.begin();
        let assigned = match aside.asked.identify(record) {
            Ok(key) => match self.number(key.as_ref()).await {
                Ok(identity) => aside.assign(address, identity, key, local).map_err(DaemonError::from),
                Err(error) => Err(error),
            },
            Err(error) => Err(error.into()),
        };
        let written = assigned.and_then(|change| Ok(self.datapath.write(1 - self.datapath.parity(), &change)?));
        if let Err(error) = written {
            tracing::error!("{}: {error}; the policy aside has no place for it", record.full_name());
            aside.generation.remove(&address);
        }
        self.aside = Some(aside);
    }

    fn undo(&mut self, address: AddressKey, before: Option<Pod>) {
        match before {
            Some(pod) => {
                self.pods.insert(address, pod);
            }
            None => {
                if let Err(error) = self.remove_pod(&address) {
                    tracing::error!("undoing: {error}");
                }
            }
        }
    }

    /// Makes the maps say of an address what both sides make of it.
    pub(super) fn place(&mut self, address: &AddressKey) -> Result<(), DaemonError> {
        let Some(pod) = self.pods.get(address) else {
            return Ok(());
        };
        let Some(stance) = self.stance(&pod.record) else {
            // It has moved to a node that is not known yet.
            return Ok(self.datapath.remove(address)?);
        };
        let facts = Facts {
            owner: pod.record.incarnation,
            epoch: pod.epoch,
            stance,
        };
        let aside = self.aside.as_ref().map(|side| &side.generation);
        let parity = self.datapath.parity();
        match plan::entry(address, &facts, parity, &self.active.generation, aside) {
            Some(desired) => Ok(self.datapath.place(*address, desired)?),
            None => Ok(self.datapath.remove(address)?),
        }
    }

    /// The same for all addresses.
    pub(super) fn place_all(&mut self) -> Result<(), DaemonError> {
        let addresses: Vec<AddressKey> = self.pods.keys().copied().collect();
        for address in addresses {
            self.place(&address)?;
        }
        Ok(())
    }

    /// Makes an address unknown.
    pub(super) fn remove_pod(&mut self, address: &AddressKey) -> Result<(), DaemonError> {
        self.datapath.remove(address)?;
        self.names_mut().remove_address(address);
        self.pods.remove(address);
        self.active.generation.remove(address);
        if let Some(aside) = &mut self.aside {
            aside.generation.remove(address);
        }
        self.release()
    }

    /// Gives back the rows and columns that nobody uses any more. No program reads an old map entry by then.
    fn release(&mut self) -> Result<(), DaemonError> {
        let parity = self.datapath.parity();
        let mut changes = vec![(parity, self.active.generation.release())];
        if let Some(aside) = &mut self.aside {
            changes.push((1 - parity, aside.generation.release()));
        }
        changes.retain(|(_, change)| !change.cells.is_empty());
        if changes.is_empty() {
            return Ok(());
        }
        self.datapath.grace()?;
        for (parity, change) in changes {
            self.datapath.write(parity, &change)?;
        }
        Ok(())
    }
}
