//! The maps of services: frontends with their backends, and the addresses that are theirs.

use super::{Datapath, DatapathError, full, gone};
use crate::plan::{Frontend, Full, Numbers};
use abi::{
    AddressKey, Hook, Identity, IpcacheEntry, Service, ServiceKey, address::Address, ipcache::IPCACHE_SERVICE, map,
    service::MAX_BACKENDS,
};
use aya::maps::{Array, MapData};
use std::collections::{BTreeMap, BTreeSet};

/// What the maps hold of a frontend.
#[derive(Debug, Default)]
pub struct Placed {
    frontend: Frontend,
    numbers: Numbers,
    /// Backends that found no place.
    pub left_out: usize,
}

impl Datapath {
    /// Makes the maps hold these frontends and no others. What is new is there before its address leads to it, and an
    /// address that is none any more leads nowhere before its frontends go. The answer is what could not be done; the rest
    /// is.
    pub fn place_services(&mut self, desired: &BTreeMap<ServiceKey, &Frontend>) -> Vec<DatapathError> {
        let mut problems = Vec::new();
        let mut note = |result: Result<(), DatapathError>| problems.extend(result.err());
        let address = |key: &ServiceKey| AddressKey {
            scope: key.scope,
            family: key.family,
            zero: 0,
            address: key.address,
        };
        let addresses: BTreeSet<AddressKey> = desired
            .keys()
            .map(address)
            .filter(|key| key.address != Address::NONE)
            .collect();
        let stale: Vec<AddressKey> = self.service_addresses.difference(&addresses).copied().collect();
        for stale in stale {
            note(gone(self.ipcache.remove(&stale), map::IPCACHE));
            self.service_addresses.remove(&stale);
        }
        let stale: Vec<ServiceKey> = self
            .placed_services
            .keys()
            .filter(|key| !desired.contains_key(key))
            .copied()
            .collect();
        for key in stale {
            note(gone(self.services.remove(&key), map::SERVICES));
            self.placed_services.remove(&key);
        }
        for (key, frontend) in desired {
            note(self.place_frontend(*key, frontend));
        }
        let new: Vec<AddressKey> = addresses.difference(&self.service_addresses).copied().collect();
        for new in new {
            note(self.place_service_address(new));
        }
        problems
    }

    fn place_frontend(&mut self, key: ServiceKey, frontend: &Frontend) -> Result<(), DatapathError> {
        let before = self.placed_services.get(&key);
        if before.is_some_and(|before| before.frontend == *frontend) {
            return Ok(());
        }
        let mut numbers = match before {
            Some(before) => before.numbers.clone(),
            // An earlier hostd's: what conntrack remembers has its numbers.
            None => self.earlier_numbers.remove(&key).unwrap_or_default(),
        };
        let left_out = numbers.follow(&frontend.backends);
        if left_out > 0 {
            tracing::error!(
                "{} port {} has {left_out} backends more than the {MAX_BACKENDS} that there is room for",
                abi::address::ip(key.family, key.address),
                u16::from_be(key.port)
            );
        }
        let entry = numbers.entry(key, frontend.affinity);
        let failed = DatapathError::map(map::SERVICES);
        let mut inner = Array::<MapData, Service>::create(1, 0).map_err(failed)?;
        inner.set(0, *entry, 0).map_err(DatapathError::map(map::SERVICES))?;
        self.services
            .insert(key, &inner, 0)
            .map_err(|error| full(error, map::SERVICES, "maps.services"))?;
        let placed = Placed {
            frontend: frontend.clone(),
            numbers,
            left_out,
        };
        self.placed_services.insert(key, placed);
        Ok(())
    }

    /// Makes an address a service's, where nobody has it.
    fn place_service_address(&mut self, address: AddressKey) -> Result<(), DatapathError> {
        if self.placed.contains_key(&address) {
            return Err(DatapathError::Taken(address.ip()));
        }
        self.stamp = self.stamp.wrapping_add(1);
        let entry = IpcacheEntry {
            first_stamp: self.stamp,
            address: address.address,
            identity: [Identity::NONE; 2],
            column: [0; 2],
            owner: 0,
            epoch: 0,
            tunnel_endpoint: Address::NONE,
            tunnel_family: 0,
            flags: IPCACHE_SERVICE,
            zero: [0; 6],
            last_stamp: self.stamp,
        };
        self.ipcache
            .insert(address, entry, 0)
            .map_err(|error| full(error, map::IPCACHE, "maps.addresses"))?;
        self.service_addresses.insert(address);
        Ok(())
    }

    /// Whether so many frontends fit.
    ///
    /// # Errors
    ///
    /// Where they do not.
    pub fn check_services(&self, needed: usize) -> Result<(), DatapathError> {
        let capacity = self.service_capacity as usize;
        if needed <= capacity {
            return Ok(());
        }
        Err(DatapathError::TooMany(Full {
            what: "frontends of services",
            setting: "maps.services",
            needed,
            capacity,
        }))
    }

    /// Whether there are node ports.
    #[must_use]
    pub fn has_node_ports(&self) -> bool {
        self.placed_services.keys().any(|key| key.address == Address::NONE)
    }

    /// Attaches the program for node ports to the underlay's interface while there are any: what comes in by it costs
    /// nothing otherwise.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn attach_node_ports(&mut self, interface: &str) -> Result<(), DatapathError> {
        let wanted = u32::from(self.has_node_ports());
        if self.node_config.node_ports != wanted {
            self.node_config.node_ports = wanted;
            self.write_config()?;
        } else if wanted != 0 && self.attacher.is_attached(Hook::FromNetdev, interface) {
            return Ok(());
        }
        if wanted == 0 {
            self.attacher.take_away(Hook::FromNetdev, interface)
        } else {
            self.attacher.attach(Hook::FromNetdev, interface)
        }
    }

    /// Frontends in the maps.
    #[must_use]
    pub fn placed_services(&self) -> &BTreeMap<ServiceKey, Placed> {
        &self.placed_services
    }
}
