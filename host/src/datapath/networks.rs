//! The trie of networks.

use super::{Datapath, DatapathError, full, gone};
use crate::plan::Full;
use abi::{AddressKey, NetworkEntry, map, network::NETWORK_KEY_BITS};
use aya::maps::lpm_trie::Key;
use ipnet::IpNet;
use std::{collections::BTreeMap, net::IpAddr};

impl Datapath {
    /// Makes the trie hold these prefixes and no others: what is new or changed first. The trie has room for twice as many
    /// as are allowed, so that both fit meanwhile, and one more: a full one takes no changes before Linux 6.13.
    ///
    /// # Errors
    ///
    /// Where they do not fit; nothing is changed then. Or where the map can't be written.
    pub fn place_networks(&mut self, desired: BTreeMap<IpNet, NetworkEntry>) -> Result<(), DatapathError> {
        self.check_networks(desired.len())?;
        let stale: Vec<IpNet> = self
            .placed_networks
            .keys()
            .filter(|prefix| !desired.contains_key(prefix))
            .copied()
            .collect();
        for (prefix, entry) in desired {
            if self.placed_networks.get(&prefix) != Some(&entry) {
                self.networks
                    .insert(&network_key(prefix), entry, 0)
                    .map_err(|error| full(error, map::NETWORKS, "maps.networks"))?;
                self.placed_networks.insert(prefix, entry);
            }
        }
        for prefix in stale {
            gone(self.networks.remove(&network_key(prefix)), map::NETWORKS)?;
            self.placed_networks.remove(&prefix);
        }
        Ok(())
    }

    /// Whether so many prefixes fit.
    ///
    /// # Errors
    ///
    /// Where they do not.
    pub fn check_networks(&self, needed: usize) -> Result<(), DatapathError> {
        let capacity = self.network_capacity as usize;
        if needed <= capacity {
            return Ok(());
        }
        Err(DatapathError::TooMany(Full {
            what: "prefixes of networks and pod CIDRs",
            setting: "maps.networks",
            needed,
            capacity,
        }))
    }

    /// What the trie says of an address: its longest prefix, with its entry.
    #[must_use]
    pub fn network_of(&self, address: IpAddr) -> Option<(IpNet, NetworkEntry)> {
        let mut prefix = Some(IpNet::from(address));
        while let Some(candidate) = prefix {
            if let Some(entry) = self.placed_networks.get(&candidate) {
                return Some((candidate, *entry));
            }
            prefix = candidate.supernet();
        }
        None
    }

    /// Prefixes that the trie holds.
    #[must_use]
    pub fn placed_networks(&self) -> impl ExactSizeIterator<Item = (&IpNet, &NetworkEntry)> {
        self.placed_networks.iter()
    }
}

fn network_key(prefix: IpNet) -> Key<AddressKey> {
    let bits = NETWORK_KEY_BITS + u32::from(prefix.prefix_len());
    Key::new(bits, AddressKey::from(prefix.network()))
}
