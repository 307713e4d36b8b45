//! Whose an address is: the ipcache, the endpoint map, and the nodes.

use super::{Datapath, DatapathError, full, gone};
use crate::plan::{self, Desired};
use abi::{AddressKey, Endpoint, IpcacheEntry, ipcache::IPCACHE_HOST, map};
use std::collections::BTreeMap;

impl Datapath {
    /// Makes the programs know the nodes' addresses, each with the underlay address that it is behind, where it is behind one. Flows
    /// that lead to an underlay address that is none any more, or come from there, are looked at anew.
    ///
    /// # Errors
    ///
    /// Where the map is full.
    pub fn place_nodes(&mut self, desired: &BTreeMap<AddressKey, Option<AddressKey>>) -> Result<(), DatapathError> {
        let known = self.placed_nodes.iter();
        let gone_ones = known.filter(|(address, _)| !desired.contains_key(*address));
        for (address, behind) in gone_ones
            .map(|(address, behind)| (*address, *behind))
            .collect::<Vec<_>>()
        {
            if behind == Some(address) {
                self.look_anew_behind(&address);
            }
            gone(self.nodes.remove(&address), map::NODES)?;
            self.placed_nodes.remove(&address);
        }
        // First those without which there is no tunnel, should there not be room for all.
        let is_underlay = |(address, behind): &(&AddressKey, &Option<AddressKey>)| **behind == Some(**address);
        for (address, behind) in desired.iter().filter(is_underlay) {
            self.place_node(address, *behind)?;
        }
        for (address, behind) in desired {
            self.place_node(address, *behind)?;
        }
        Ok(())
    }

    fn place_node(&mut self, address: &AddressKey, behind: Option<AddressKey>) -> Result<(), DatapathError> {
        if self.placed_nodes.get(address) == Some(&behind) {
            return Ok(());
        }
        self.node_writes = self.node_writes.wrapping_add(1);
        let entry = IpcacheEntry {
            first_stamp: self.node_writes,
            last_stamp: self.node_writes,
            ..plan::node_entry(address, behind.as_ref())
        };
        self.nodes
            .insert(*address, entry, 0)
            .map_err(DatapathError::map(map::NODES))?;
        if self.placed_nodes.insert(*address, behind) == Some(Some(*address)) {
            self.look_anew_behind(address);
        }
        Ok(())
    }

    fn look_anew_behind(&mut self, underlay: &AddressKey) {
        let is_behind = |desired: &Desired| {
            let entry = &desired.ipcache;
            (entry.tunnel_endpoint, entry.tunnel_family) == (underlay.address, underlay.family)
        };
        let its = self.placed.iter().filter(|(_, desired)| is_behind(desired));
        for address in its.map(|(address, _)| *address).collect::<Vec<_>>() {
            self.stamps.touch(address);
        }
    }

    /// Whether a node has the address, this one included.
    #[must_use]
    pub fn is_node(&self, address: &AddressKey) -> bool {
        self.placed_nodes.contains_key(address)
    }

    /// Whether the address is placed as one of this node's own.
    #[must_use]
    pub fn is_host(&self, address: &AddressKey) -> bool {
        let placed = self.placed.get(address);
        placed.is_some_and(|desired| desired.ipcache.flags & IPCACHE_HOST != 0)
    }

    /// Makes the maps hold this of an address: the ipcache first, then the endpoint map, so that a pod is never
    /// reachable before its identity is known.
    ///
    /// # Errors
    ///
    /// Where a map is full.
    pub fn place(&mut self, address: AddressKey, desired: Desired) -> Result<(), DatapathError> {
        let before = self.placed.get(&address);
        if before == Some(&desired) && self.stamps.is_settled(&address) {
            return Ok(());
        }
        let is_new = before.is_none();
        let before = before.and_then(|before| before.endpoint.clone());
        let was_here = before.is_some();
        if let Some(endpoint) = &desired.endpoint
            && before.as_ref().map(|known| known.owner) != Some(endpoint.owner)
        {
            self.open_account(endpoint.owner)?;
        }
        let (slot, stamp) = self.stamps.touch(address);
        let ipcache = IpcacheEntry {
            first_stamp: stamp,
            slot,
            last_stamp: stamp,
            ..desired.ipcache
        };
        if let Err(error) = self.ipcache.insert(address, ipcache, 0) {
            if is_new {
                self.stamps.release(&address);
            }
            return Err(full(error, map::IPCACHE, "maps.addresses"));
        }
        // What the maps hold by now, should the rest fail.
        let half = Desired {
            ipcache: desired.ipcache,
            endpoint: before,
        };
        self.placed.insert(address, half);
        match &desired.endpoint {
            Some(endpoint) => {
                let endpoint = Endpoint {
                    first_stamp: stamp,
                    slot,
                    last_stamp: stamp,
                    ..**endpoint
                };
                let inserted = self.endpoints.insert(address, endpoint, 0);
                if let Err(error) = inserted {
                    if is_new {
                        self.remove(&address)?;
                    }
                    return Err(full(error, map::ENDPOINTS, "maps.endpoints"));
                }
            }
            None if was_here => gone(self.endpoints.remove(&address), map::ENDPOINTS)?,
            None => {}
        }
        self.placed.insert(address, desired);
        self.stamps.settle(&address);
        Ok(())
    }

    /// Makes the maps hold nothing of an address: the endpoint map first, then the ipcache.
    ///
    /// # Errors
    ///
    /// Where a map can't be written.
    pub fn remove(&mut self, address: &AddressKey) -> Result<(), DatapathError> {
        if self.placed.contains_key(address) {
            self.stamps.touch(*address);
        }
        if let Some(before) = self.placed.get(address) {
            if before.endpoint.is_some() {
                gone(self.endpoints.remove(address), map::ENDPOINTS)?;
            }
            gone(self.ipcache.remove(address), map::IPCACHE)?;
            self.placed.remove(address);
            self.stamps.release(address);
        }
        Ok(())
    }

    /// What the maps hold, by address.
    pub fn placed(&self) -> impl Iterator<Item = (&AddressKey, &Desired)> {
        self.placed.iter()
    }
}
