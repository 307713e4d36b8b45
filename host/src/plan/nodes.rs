//! Addresses of nodes: whose each is, as the programs have it.

use abi::{AddressKey, Identity, IpcacheEntry, address::Address, ipcache::IPCACHE_NODE};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// What a node says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Announced<'a> {
    /// Whether it is this node.
    pub is_own: bool,
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its other addresses.
    pub others: &'a BTreeSet<IpAddr>,
}

/// Every node's addresses, each with the underlay address of the node that it is reached behind. This node's own, and those that
/// several nodes have, are reached behind none; what is a node's underlay address is no other's.
#[must_use]
pub fn node_addresses<'a>(nodes: impl IntoIterator<Item = Announced<'a>>) -> BTreeMap<AddressKey, Option<AddressKey>> {
    let nodes: Vec<Announced<'_>> = nodes.into_iter().collect();
    let mut found: BTreeMap<AddressKey, Option<AddressKey>> = BTreeMap::new();
    for node in &nodes {
        let behind = (!node.is_own).then(|| AddressKey::from(node.underlay));
        for address in node.others {
            found
                .entry(AddressKey::from(*address))
                .and_modify(|known| *known = None)
                .or_insert(behind);
        }
    }
    for node in &nodes {
        let underlay = AddressKey::from(node.underlay);
        found.insert(underlay, (!node.is_own).then_some(underlay));
    }
    found
}

/// The entry of a node's address, but for its stamps.
#[must_use]
pub fn node_entry(address: &AddressKey, behind: Option<&AddressKey>) -> IpcacheEntry {
    IpcacheEntry {
        first_stamp: 0,
        address: address.address,
        identity: [Identity::REMOTE_NODE; 2],
        column: [Identity::REMOTE_NODE.0; 2],
        owner: 0,
        epoch: Identity::REMOTE_NODE.0,
        tunnel_endpoint: behind.map_or(Address::NONE, |node| node.address),
        tunnel_family: behind.map_or(0, |node| node.family),
        flags: IPCACHE_NODE,
        zero: [0; 2],
        slot: 0,
        last_stamp: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::{Announced, node_addresses};
    use abi::AddressKey;
    use std::{collections::BTreeSet, net::IpAddr};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_is_behind_the_one_node_that_has_it() {
        let set = |texts: &[&str]| -> BTreeSet<IpAddr> { texts.iter().map(|text| ip(text)).collect() };
        let (own, one, two) = (
            set(&["2001:db8::1", "172.17.0.1", "192.0.2.3"]),
            set(&["192.0.2.22", "203.0.113.9", "172.17.0.1"]),
            set(&["2001:db8::3", "203.0.113.9", "192.0.2.2"]),
        );
        let announced = |underlay, others, is_own| Announced {
            is_own,
            underlay: ip(underlay),
            others,
        };
        let found = node_addresses([
            announced("192.0.2.1", &own, true),
            announced("192.0.2.2", &one, false),
            announced("192.0.2.3", &two, false),
        ]);
        let behind = |address: &str| found[&AddressKey::from(ip(address))].map(|node| node.ip());
        for (address, expected) in [
            ("192.0.2.1", None),
            ("2001:db8::1", None),
            ("192.0.2.22", Some("192.0.2.2")),
            ("2001:db8::3", Some("192.0.2.3")),
            // Of two nodes, one of which may be this one.
            ("203.0.113.9", None),
            ("172.17.0.1", None),
            // Whatever others say of it.
            ("192.0.2.2", Some("192.0.2.2")),
            ("192.0.2.3", Some("192.0.2.3")),
        ] {
            assert_eq!(behind(address), expected.map(ip), "{address}");
        }
    }
}
