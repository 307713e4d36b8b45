//! Map entries of an address and of a prefix: what the generation in force and the one aside say of it, put together by parity.

use super::{Generation, Partition};
use abi::{
    AddressKey, Endpoint, Identity, IpcacheEntry, Macs, NetworkEntry, address::Address, ipcache::IPCACHE_HOST,
    network::UNROUTED, policy::UNPLACED,
};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of an address, whatever the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Who has the address.
    pub owner: u32,
    /// Epoch of the address.
    pub epoch: u32,
    /// Where it is.
    pub stance: Stance,
}

/// Where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stance {
    /// A pod of this node, behind this interface.
    Local {
        /// Index of the host's end of the veth pair.
        ifindex: u32,
        /// MAC addresses of both ends.
        macs: Macs,
    },
    /// A pod of the node with this underlay address.
    Remote(AddressKey),
    /// An address of this node.
    Host,
    /// A pod of a node that is not known: nothing reaches it, and it is not taken for an address outside.
    Nowhere,
}

/// What the maps should hold of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// In the ipcache.
    pub ipcache: IpcacheEntry,
    /// In the endpoint map, where it is a pod of this node: few of a large cluster's are.
    pub endpoint: Option<Box<Endpoint>>,
}

/// The entries of an address of the pod that is known by its address `pod`, but for their stamps, which whoever writes
/// them gives. `parity` is that of the generation in force. A pod that it does not know has no entry. Where there is no generation aside, its half repeats the identity in force, so that no
/// other is accepted from the tunnel, and stands nowhere in the matrix.
#[must_use]
pub fn entry(
    pod: &AddressKey,
    address: &AddressKey,
    facts: &Facts,
    parity: usize,
    active: &Generation,
    aside: Option<&Generation>,
) -> Option<Desired> {
    let mut identity = [Identity::NONE; 2];
    let mut row = [UNPLACED; 2];
    let mut column = [UNPLACED; 2];
    if facts.stance == Stance::Host {
        identity = [Identity::HOST; 2];
        column = [Identity::HOST.0; 2];
    } else {
        let now = active.place(pod)?;
        (identity[parity], row[parity], column[parity]) = (now.identity, now.row, now.column);
        identity[1 - parity] = now.identity;
        if let Some(next) = aside.and_then(|aside| aside.place(pod)) {
            (identity[1 - parity], row[1 - parity], column[1 - parity]) = (next.identity, next.row, next.column);
        }
    }
    let Facts { owner, epoch, stance } = *facts;
    let (tunnel_endpoint, tunnel_family): (Address, u8) = match stance {
        Stance::Remote(node) => (node.address, node.family),
        Stance::Local { .. } | Stance::Host | Stance::Nowhere => (Address::NONE, 0),
    };
    let ipcache = IpcacheEntry {
        first_stamp: 0,
        address: address.address,
        identity,
        column,
        owner,
        epoch,
        tunnel_endpoint,
        tunnel_family,
        flags: if stance == Stance::Host { IPCACHE_HOST } else { 0 },
        zero: [0; 2],
        slot: 0,
        last_stamp: 0,
    };
    let endpoint = match stance {
        Stance::Local { ifindex, macs } => Some(Endpoint {
            first_stamp: 0,
            address: address.address,
            identity,
            row,
            column,
            owner,
            epoch,
            ifindex,
            macs,
            slot: 0,
            last_stamp: 0,
        }),
        Stance::Remote(_) | Stance::Host | Stance::Nowhere => None,
    };
    Some(Desired {
        ipcache,
        endpoint: endpoint.map(Box::new),
    })
}

/// What one side makes of the networks.
#[derive(Clone, Copy, Debug)]
pub struct NetworkSide<'a> {
    /// The address space, cut into pieces.
    pub partition: &'a Partition,
    /// Identity of each membership, by its index.
    pub identities: &'a [Identity],
    /// Where identities have their columns.
    pub generation: &'a Generation,
}

impl NetworkSide<'_> {
    fn place(&self, prefix: IpNet) -> (Identity, u32) {
        let identity = self.identities.get(self.partition.find(prefix)).copied();
        let identity = identity.unwrap_or(Identity::WORLD);
        (identity, self.generation.column(identity).unwrap_or(UNPLACED))
    }
}

/// The entries of all prefixes that either side or `unrouted` mentions. A prefix that only one of them mentions has what
/// the next longer one says for the others, since the kernel finds only the longest. `parity` is that of the side in
/// force; where there is none aside, its half repeats the other.
#[must_use]
pub fn network_entries(
    parity: usize,
    active: NetworkSide<'_>,
    aside: Option<NetworkSide<'_>>,
    unrouted: &BTreeSet<IpNet>,
) -> BTreeMap<IpNet, NetworkEntry> {
    let aside = aside.unwrap_or(active);
    let prefixes = active.partition.prefixes().chain(aside.partition.prefixes());
    prefixes
        .chain(unrouted.iter().copied())
        .map(|prefix| {
            let mut identity = [Identity::NONE; 2];
            let mut column = [UNPLACED; 2];
            (identity[parity], column[parity]) = active.place(prefix);
            (identity[1 - parity], column[1 - parity]) = aside.place(prefix);
            let closed = unrouted.iter().any(|outer| outer.contains(&prefix));
            let entry = NetworkEntry {
                identity,
                column,
                flags: if closed { UNROUTED } else { 0 },
                zero: 0,
            };
            (prefix, entry)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{NetworkSide, network_entries};
    use crate::plan::{Generation, Network, Partition, Shape};
    use abi::{Identity, network::UNROUTED};
    use ipnet::IpNet;
    use std::collections::BTreeSet;

    const SHAPE: Shape = Shape {
        rows: 2,
        columns: 32,
        port_sets: 1,
        breakpoints: 16,
    };

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn partition(cidr: &str) -> Partition {
        let network = Network {
            module: "m".to_owned(),
            name: "n".to_owned(),
            blocks: vec![(net(cidr), Vec::new())],
        };
        Partition::new(&[network]).unwrap()
    }

    #[test]
    fn each_side_of_a_prefix_is_what_that_side_says_and_pod_cidrs_stay_closed() {
        let generation = Generation::new(SHAPE);
        let (now, next) = (partition("203.0.113.0/24"), partition("203.0.113.128/25"));
        let (now_ids, next_ids) = ([Identity::WORLD, Identity(20)], [Identity::WORLD, Identity(21)]);
        let side = |partition, identities| NetworkSide {
            partition,
            identities,
            generation: &generation,
        };
        let unrouted: BTreeSet<IpNet> = [net("10.1.0.0/16"), net("203.0.113.0/28")].into();
        for parity in 0..2 {
            let entries = network_entries(parity, side(&now, &now_ids), Some(side(&next, &next_ids)), &unrouted);
            let of = |prefix: &str| {
                let entry = entries[&net(prefix)];
                (entry.identity[parity], entry.identity[1 - parity], entry.flags)
            };
            assert_eq!(of("203.0.113.0/24"), (Identity(20), Identity::WORLD, 0));
            assert_eq!(
                of("203.0.113.128/25"),
                (Identity(20), Identity(21), 0),
                "the longer one, for both"
            );
            assert_eq!(of("10.1.0.0/16"), (Identity::WORLD, Identity::WORLD, UNROUTED));
            assert_eq!(of("203.0.113.0/28"), (Identity(20), Identity::WORLD, UNROUTED));
            let alone = network_entries(parity, side(&now, &now_ids), None, &unrouted);
            assert_eq!(alone[&net("203.0.113.0/24")].identity, [Identity(20); 2]);
        }
        // A network that a policy names inside a pod CIDR opens nothing there.
        let inside = partition("10.1.7.0/24");
        let entries = network_entries(0, side(&inside, &now_ids), None, &unrouted);
        assert_eq!(entries[&net("10.1.7.0/24")].flags, UNROUTED);
    }
}
