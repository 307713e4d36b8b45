//! The map of services: frontends with their backends. Their addresses are in the ipcache like any other.

use super::{Datapath, DatapathError, full, gone};
use crate::plan::{Frontend, Full, Numbers};
use abi::{Hook, Service, ServiceKey, address::Address, map, service::MAX_BACKENDS};
use aya::maps::{Array, MapData};
use std::collections::BTreeMap;

/// What the maps hold of a frontend.
#[derive(Debug, Default)]
pub struct Placed {
    frontend: Frontend,
    numbers: Numbers,
    /// Backends that found no place.
    pub left_out: usize,
}

impl Datapath {
    /// Makes the map hold these frontends and no others; each change costs a grace period. The answer is what could not be
    /// done; the rest is.
    pub fn place_frontends(&mut self, desired: &BTreeMap<ServiceKey, &Frontend>) -> Vec<DatapathError> {
        let stale: Vec<ServiceKey> = self
            .placed_services
            .keys()
            .filter(|key| !desired.contains_key(key))
            .copied()
            .collect();
        let removed = stale.into_iter().map(|key| {
            gone(self.services.remove(&key), map::SERVICES)?;
            self.placed_services.remove(&key);
            Ok(())
        });
        let mut problems: Vec<DatapathError> = removed.filter_map(Result::err).collect();
        for (key, frontend) in desired {
            problems.extend(self.place_frontend(*key, frontend).err());
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
            None => self.earlier_numbers.get(&key).cloned().unwrap_or_default(),
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
        self.earlier_numbers.remove(&key);
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
        self.announce_node_ports()?;
        if !self.has_node_ports() {
            self.attacher.take_away(Hook::FromNetdev, interface)
        } else if self.attacher.is_attached(Hook::FromNetdev, interface) {
            Ok(())
        } else {
            self.attacher.attach(Hook::FromNetdev, interface)
        }
    }

    /// Tells the programs whether there are node ports: pods ask there, too.
    ///
    /// # Errors
    ///
    /// Where the map can't be written.
    pub fn announce_node_ports(&mut self) -> Result<(), DatapathError> {
        self.node_config.node_ports = u32::from(self.has_node_ports());
        self.write_config()
    }

    /// Frontends in the maps.
    #[must_use]
    pub fn placed_services(&self) -> &BTreeMap<ServiceKey, Placed> {
        &self.placed_services
    }
}
