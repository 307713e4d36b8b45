//! Whose an address is: the ipcache, the endpoint map, and the nodes.

use super::{Datapath, DatapathError, full, gone};
use crate::plan::Desired;
use abi::{AddressKey, Endpoint, IpcacheEntry, NodeEntry, map};
use std::net::IpAddr;

impl Datapath {
    /// Makes an underlay address one of a node.
    ///
    /// # Errors
    ///
    /// Where the map is full.
    pub fn add_node(&mut self, underlay: IpAddr, local: bool) -> Result<(), DatapathError> {
        let entry = NodeEntry {
            local: u32::from(local),
        };
        self.nodes
            .insert(AddressKey::from(underlay), entry, 0)
            .map_err(DatapathError::map(map::NODES))
    }

    /// Makes an underlay address no longer one of a node. Flows that lead there, or come from there, are looked at anew.
    ///
    /// # Errors
    ///
    /// Where the map can't be written.
    pub fn remove_node(&mut self, underlay: IpAddr) -> Result<(), DatapathError> {
        let key = AddressKey::from(underlay);
        let is_behind = |desired: &Desired| {
            let entry = &desired.ipcache;
            (entry.tunnel_endpoint, entry.tunnel_family) == (key.address, key.family)
        };
        let its = self.placed.iter().filter(|(_, desired)| is_behind(desired));
        for address in its.map(|(address, _)| *address).collect::<Vec<_>>() {
            self.stamps.touch(address);
        }
        gone(self.nodes.remove(&key), map::NODES)
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
