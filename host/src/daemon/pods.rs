//! Pods of the cluster: from a record in the store to the entries in the maps.
//!
//! What is added goes in the order policy, ipcache, endpoint; what is removed goes the other way round.

use super::{Daemon, DaemonError, Pod};
use crate::{
    identity::Labels,
    plan::{self, Facts, PlanError, Stance},
    store::records::PodRecord,
};
use abi::{AddressKey, Identity};
use ipnet::IpNet;
use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{PoisonError, RwLockWriteGuard},
};

/// Which of the two generations.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Active,
    Aside,
}

impl Daemon {
    pub(super) fn names_mut(&self) -> RwLockWriteGuard<'_, super::Names> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes whose addresses these are.
    pub(super) fn name(&self, record: &PodRecord) {
        let mut names = self.names_mut();
        for address in record.addresses() {
            names.set_address(address.into(), record.full_name());
        }
    }

    fn forget_address(&mut self, address: AddressKey) -> Result<(), DaemonError> {
        self.datapath.remove(&address)?;
        self.names_mut().remove_address(&address);
        Ok(())
    }

    /// Where a pod's addresses are, as far as this node knows.
    fn stance(&self, record: &PodRecord) -> Stance {
        if record.is_on(&self.config.node) {
            let its = |local: &&super::Local| local.endpoint.pod.address == record.address;
            return self
                .locals
                .values()
                .find(its)
                .map_or(Stance::Nowhere, |local| Stance::Local {
                    ifindex: local.veth.ifindex,
                    macs: abi::Macs {
                        pod: local.veth.pod_mac,
                        gateway: local.veth.host_mac,
                    },
                });
        }
        let node = self.nodes.get(&*record.node);
        node.map_or(Stance::Nowhere, |node| {
            Stance::Remote(AddressKey::from(node.record.underlay))
        })
    }

    /// Takes in a pod that is new, or of which something has changed. On an error the address is as it was.
    pub(super) async fn upsert_pod(&mut self, record: PodRecord) -> Result<(), DaemonError> {
        let address = AddressKey::from(record.address);
        let local = record.is_on(&self.config.node);
        let facts = self.facts(&record);
        let key = self.active.identify(facts)?;
        let identity = self.number(key.as_ref()).await?;
        let before = self.active.generation.place(&address).map(|place| place.identity);
        let aside_before = self.aside_identity(&address);
        self.assign(Half::Active, address, identity, local)?;
        self.assign_aside(&record, address, local).await;

        // What the address means has changed, and with it what its flows were judged by.
        let same = before == Some(identity) && aside_before == self.aside_identity(&address);
        let epoch = match self.pods.get(&address) {
            None => 1,
            Some(pod) if same && pod.record.incarnation == record.incarnation && pod.record.node == record.node => {
                pod.epoch
            }
            Some(pod) => pod.epoch + 1,
        };
        self.name(&record);
        let followed = record.clone();
        let before = self.pods.insert(address, Pod { record, epoch });
        let left = before.as_ref().map(|pod| pod.record.clone());
        if let Err(error) = self.replace(&address, left.as_ref().and_then(|left| left.second)) {
            self.undo(address, before);
            self.close(&address);
            return Err(error);
        }
        // Nobody may have said that the address was given up between one pod and the next.
        if let Some(left) = left.filter(|left| left.namespace != followed.namespace) {
            self.services_follow(&left);
        }
        self.services_follow(&followed);
        self.release()
    }

    fn aside_identity(&self, address: &AddressKey) -> Option<Identity> {
        let aside = self.aside.as_ref()?;
        aside.generation.place(address).map(|place| place.identity)
    }

    /// Gives an address its identity in one half, and writes what that adds. Where port sets do not fit, those that no
    /// cell names any more are given back first.
    fn assign(&mut self, half: Half, address: AddressKey, identity: Identity, local: bool) -> Result<(), DaemonError> {
        let key = self.registry.shared(identity);
        let parity = match half {
            Half::Active => self.datapath.parity(),
            Half::Aside => 1 - self.datapath.parity(),
        };
        let side = match (half, &mut self.aside) {
            (Half::Active, _) => &mut self.active,
            (Half::Aside, Some(aside)) => aside,
            (Half::Aside, None) => return Ok(()),
        };
        let mut change = side.assign(address, identity, key.clone(), local);
        if matches!(change, Err(PlanError::Full(_))) {
            let datapath = &self.datapath;
            if side.generation.sweep(|index| datapath.cell(parity, index)) > 0 {
                // No program may still read a set that is about to be written.
                self.datapath.grace()?;
                change = side.assign(address, identity, key, local);
            }
        }
        Ok(self.datapath.write(parity, &change?)?)
    }

    /// The policy that is being loaded, or was replaced, is asked too. Where it can't answer, the address has no
    /// place in its generation: after the flip nothing reaches it, and hostd says so.
    async fn assign_aside(&mut self, record: &PodRecord, address: AddressKey, local: bool) {
        let facts = self.facts(record);
        let Some(aside) = &mut self.aside else { return };
        let assigned = match aside.identify(facts) {
            Ok(key) => match self.number(key.as_ref()).await {
                Ok(identity) => self.assign(Half::Aside, address, identity, local),
                Err(error) => Err(error),
            },
            Err(error) => Err(error.into()),
        };
        if let Err(error) = assigned {
            tracing::error!("{}: {error}; the policy aside has no place for it", record.full_name());
            if let Some(aside) = &mut self.aside {
                aside.generation.remove(&address);
            }
        }
    }

    fn pods_in(&self, namespace: &str) -> Vec<PodRecord> {
        let its = self.pods.values().filter(|pod| pod.record.namespace == namespace);
        its.map(|pod| pod.record.clone()).collect()
    }

    /// The cluster says that a namespace has these labels now: its pods are identified anew. One that can't be is out of
    /// reach until it can: what it was is no longer true.
    pub(super) async fn namespace_seen(&mut self, name: &str, labels: Labels) -> Result<(), DaemonError> {
        if self.namespaces.get(name) == Some(&labels) {
            return Ok(());
        }
        self.namespaces.insert(name.to_owned(), labels);
        for record in self.pods_in(name) {
            let address = AddressKey::from(record.address);
            if let Err(error) = self.upsert_pod(record.clone()).await {
                tracing::error!("{}: {error}", record.full_name());
                for address in record.addresses() {
                    self.datapath.remove(&address.into())?;
                }
                self.unplaced.insert(address);
            }
        }
        Ok(())
    }

    /// Tries labels of a namespace on this node. On an error its pods are as they were.
    pub(super) async fn try_namespace(&mut self, name: &str, labels: Labels) -> Result<(), DaemonError> {
        let before = self.namespaces.insert(name.to_owned(), labels);
        let its = self.pods_in(name);
        for (done, record) in its.iter().enumerate() {
            if let Err(error) = self.upsert_pod(record.clone()).await {
                match before {
                    Some(before) => self.namespaces.insert(name.to_owned(), before),
                    None => self.namespaces.remove(name),
                };
                for record in &its[..done] {
                    if let Err(error) = self.upsert_pod(record.clone()).await {
                        tracing::error!("{}: undoing a change of its namespace: {error}", record.full_name());
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Nothing passes to or from a pod whose addresses may not say the same, until it is placed again.
    fn close(&mut self, first: &AddressKey) {
        let Some(pod) = self.pods.get(first) else { return };
        for address in pod.record.addresses() {
            if let Err(error) = self.datapath.remove(&address.into()) {
                tracing::error!("closing {address}: {error}");
            }
        }
        self.unplaced.insert(*first);
    }

    /// Takes an identity from all pods that have it on either side, and gives its rows and columns back; those pods, which
    /// nothing reaches any more.
    pub(super) fn close_identity(&mut self, identity: Identity) -> Result<Vec<PodRecord>, DaemonError> {
        let has_it = |address: &AddressKey| {
            let active = self.active.generation.place(address).map(|place| place.identity);
            active == Some(identity) || self.aside_identity(address) == Some(identity)
        };
        let its: Vec<AddressKey> = self.pods.keys().copied().filter(has_it).collect();
        for address in &its {
            self.close(address);
            self.active.generation.remove(address);
            if let Some(aside) = &mut self.aside {
                aside.generation.remove(address);
            }
        }
        self.release()?;
        let records = its.iter().filter_map(|address| self.pods.get(address));
        Ok(records.map(|pod| pod.record.clone()).collect())
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

    /// The same for a pod that had another second address, perhaps.
    fn replace(&mut self, first: &AddressKey, second: Option<IpAddr>) -> Result<(), DaemonError> {
        let kept = self.pods.get(first).and_then(|pod| pod.record.second);
        if let Some(gone) = second.filter(|gone| kept != Some(*gone)) {
            self.forget_second(gone)?;
        }
        self.place(first)
    }

    /// A pod has a second address no longer; another one may have been heard of that has it by now.
    fn forget_second(&mut self, second: IpAddr) -> Result<(), DaemonError> {
        let address = AddressKey::from(second);
        match self.pods.find(&address) {
            Some(_) => Ok(()),
            None => self.forget_address(address),
        }
    }

    /// Makes the maps say of a pod's addresses what both sides make of it.
    pub(super) fn place(&mut self, first: &AddressKey) -> Result<(), DaemonError> {
        let Some(pod) = self.pods.get(first) else {
            return Ok(());
        };
        let stance = self.stance(&pod.record);
        let facts = Facts {
            owner: pod.record.incarnation,
            epoch: pod.epoch,
            stance,
        };
        let aside = self.aside.as_ref().map(|side| &side.generation);
        let parity = self.datapath.parity();
        for address in pod.record.addresses().map(AddressKey::from) {
            match plan::entry(first, &address, &facts, parity, &self.active.generation, aside) {
                Some(desired) => self.datapath.place(address, desired)?,
                None => self.datapath.remove(&address)?,
            }
        }
        Ok(())
    }

    /// The same for all addresses.
    pub(super) fn place_all(&mut self) -> Result<(), DaemonError> {
        let addresses: Vec<AddressKey> = self.pods.keys().copied().collect();
        for address in addresses {
            self.place(&address)?;
        }
        Ok(())
    }

    /// Prefixes that nothing is routed to or from: the cluster's pod CIDRs, in which only pods count, the pods' gateway,
    /// and what is no unicast address of its own (IANA's special-purpose registries: "this network", loopback,
    /// multicast and what is reserved behind it; for IPv6 unspecified, loopback, IPv4 in its form, link-local, and multicast).
    pub(super) fn unrouted(&self) -> BTreeSet<IpNet> {
        let special = [
            "0.0.0.0/8",
            "127.0.0.0/8",
            "169.254.1.1/32",
            "224.0.0.0/3",
            "::/96",
            "::ffff:0:0/96",
            "fe80::/10",
            "ff00::/8",
        ];
        let special = special.iter().filter_map(|text| text.parse().ok());
        let cidrs = self.nodes.values().flat_map(|node| &node.record.pod_cidrs);
        cidrs.map(IpNet::trunc).chain(special).collect()
    }

    /// Makes the trie of networks say what both sides make of them.
    pub(super) fn place_networks(&mut self) -> Result<(), DaemonError> {
        let aside = self.aside.as_ref().map(super::Side::network_side);
        let active = self.active.network_side();
        let desired = plan::network_entries(self.datapath.parity(), active, aside, &self.unrouted());
        Ok(self.datapath.place_networks(desired)?)
    }

    /// Makes a pod unknown, by its first address.
    pub(super) fn remove_pod(&mut self, address: &AddressKey) -> Result<(), DaemonError> {
        let pod = self.pods.remove(address);
        // First what leads to it.
        if let Some(pod) = &pod {
            self.services_follow(&pod.record);
        }
        self.forget_address(*address)?;
        if let Some(second) = pod.as_ref().and_then(|pod| pod.record.second) {
            self.forget_second(second)?;
        }
        if pod.is_some_and(|pod| pod.record.addresses().any(|address| self.is_a_services(address))) {
            self.place_services();
        }
        self.active.generation.remove(address);
        if let Some(aside) = &mut self.aside {
            aside.generation.remove(address);
        }
        self.release()
    }

    /// Gives back the rows and columns that nobody uses any more. No program reads an old map entry by then.
    fn release(&mut self) -> Result<(), DaemonError> {
        let parity = self.datapath.parity();
        let mut changes = vec![(parity, self.active.release())];
        if let Some(aside) = &mut self.aside {
            changes.push((1 - parity, aside.release()));
        }
        changes.retain(|(_, change)| !change.is_empty());
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
