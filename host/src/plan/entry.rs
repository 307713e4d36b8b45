//! Map entries of an address and of a prefix: what the generation in force and the one aside say of it, put together by parity.

use super::{Generation, Partition};
use abi::{
    AddressKey, Endpoint, Identity, IpcacheEntry, NetworkEntry, address::Address, ipcache::IPCACHE_HOST,
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
        /// MAC address of the pod's end.
        mac: [u8; 6],
        /// MAC address of the host's end.
        gateway_mac: [u8; 6],
    },
    /// A pod of the node with this underlay address.
    Remote(AddressKey),
    /// An address of this node.
    Host,
    /// A pod of a node that is not known: nothing reaches it, and it is not taken for an address outside.
    Nowhere,
}

/// What the maps should hold of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desired {
    /// In the ipcache.
    pub ipcache: IpcacheEntry,
    /// In the endpoint map, where it is a pod of this node.
    pub endpoint: Option<Endpoint>,
}

/// The entries of an address, but for their stamps, which whoever writes them gives. `parity` is that of the generation
/// in force. An address that the generation in force does not know has no entry. Where there is no generation aside, its half repeats the identity in force, so that no
/// other is accepted from the tunnel, and stands nowhere in the matrix.
#[must_use]
pub fn entry(
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
        let now = active.place(address)?;
        (identity[parity], row[parity], column[parity]) = (now.identity, now.row, now.column);
        identity[1 - parity] = now.identity;
        if let Some(next) = aside.and_then(|aside| aside.place(address)) {
            (identity[1 - parity], row[1 - parity], column[1 - parity]) = (next.identity, next.row, next.column);
        }
    }
    let Facts { owner, epoch, stance } = *facts;
    let (tunnel_endpoint, tunnel_family): (Address, u8) = match stance {
        Stance::Remote(node) => (node.address, node.family),
        Stance::Local { .. } | Stance::Host | Stance::Nowhere => ([0; 16], 0),
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
        zero: [0; 6],
        last_stamp: 0,
    };
    let endpoint = match stance {
        Stance::Local {
            ifindex,
            mac,
            gateway_mac,
        } => Some(Endpoint {
            first_stamp: 0,
            address: address.address,
            identity,
            row,
            column,
            owner,
            epoch,
            ifindex,
            mac,
            gateway_mac,
            last_stamp: 0,
        }),
        Stance::Remote(_) | Stance::Host | Stance::Nowhere => None,
    };
    Some(Desired { ipcache, endpoint })
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
