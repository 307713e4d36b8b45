//! Whose an address is, who may talk to whom, and services.

use super::{Bench, GREEN_COLUMN};
use crate::frame::{GATEWAY_A, GATEWAY_B, POD_A_MAC, POD_B_MAC};
use abi::{
    AddressKey, Direction, Endpoint, Identity, IpcacheEntry, NetworkEntry, PortSet, Service, ServiceKey,
    address::Address,
    ipcache::{IPCACHE_HOST, IPCACHE_SERVICE},
    map,
    network::NETWORK_KEY_BITS,
    policy::{CELL_ALLOW, CELLS_PER_ELEMENT, cell_index},
    service::Backend,
};
use aya::maps::{
    Array, MapData,
    lpm_trie::{Key, LpmTrie},
    of_maps::HashOfMaps,
};
use hostd::plan::{self, Decision, Ports, Shape};
use std::net::IpAddr;

impl Bench {
    pub fn put_pod(
        &mut self,
        address: impl Into<IpAddr>,
        identity: [Identity; 2],
        place: (u32, u32),
        epoch: u32,
        ifindex: u32,
    ) {
        let key = AddressKey::from(address.into());
        let (mac, gateway_mac) = if ifindex == self.pod_b {
            (POD_B_MAC, GATEWAY_B)
        } else {
            (POD_A_MAC, GATEWAY_A)
        };
        let (slot, stamp) = self.next_stamp(key);
        let endpoint = Endpoint {
            first_stamp: stamp,
            address: key.address,
            identity,
            row: [place.0; 2],
            column: [place.1; 2],
            owner: self.owner,
            epoch,
            ifindex,
            macs: abi::Macs {
                pod: mac,
                gateway: gateway_mac,
            },
            slot,
            last_stamp: stamp,
        };
        self.hash(map::ENDPOINTS).insert(key, endpoint, 0).unwrap();
    }

    pub fn put_remote(&mut self, address: impl Into<IpAddr>, identity: [Identity; 2], node: impl Into<IpAddr>) {
        self.put_remote_at(address, identity, node, GREEN_COLUMN);
    }

    /// The same with a column of its own.
    pub fn put_remote_at(
        &mut self,
        address: impl Into<IpAddr>,
        identity: [Identity; 2],
        node: impl Into<IpAddr>,
        column: u32,
    ) {
        self.put_ipcache(address.into(), identity, column, Some(node.into()), 0);
    }

    pub(super) fn put_ipcache(
        &mut self,
        address: IpAddr,
        identity: [Identity; 2],
        column: u32,
        node: Option<IpAddr>,
        flags: u8,
    ) {
        let key = AddressKey::from(address);
        let tunnel = node.map(AddressKey::from);
        let (slot, stamp) = self.next_stamp(key);
        let entry = IpcacheEntry {
            first_stamp: stamp,
            address: key.address,
            identity,
            column: [column; 2],
            // The node itself is nobody's pod.
            owner: if flags & IPCACHE_HOST == 0 { 100 } else { 0 },
            epoch: 1,
            tunnel_endpoint: tunnel.map_or(Address::NONE, |key| key.address),
            tunnel_family: tunnel.map_or(0, |key| key.family),
            flags,
            zero: [0; 2],
            slot,
            last_stamp: stamp,
        };
        self.hash(map::IPCACHE).insert(key, entry, 0).unwrap();
    }

    /// What the trie says of a prefix, by parity.
    pub fn put_network(
        &mut self,
        address: impl Into<IpAddr>,
        length: u32,
        identity: [Identity; 2],
        column: [u32; 2],
        flags: u32,
    ) {
        let mut trie: LpmTrie<_, AddressKey, NetworkEntry> =
            self.loaded.ebpf.map_mut(map::NETWORKS).unwrap().try_into().unwrap();
        let key = Key::new(NETWORK_KEY_BITS + length, AddressKey::from(address.into()));
        let entry = NetworkEntry {
            identity,
            column,
            flags,
            zero: 0,
        };
        trie.insert(&key, entry, 0).unwrap();
    }

    /// An address of a node, behind this underlay address; behind none, where it is this node's or several nodes have it.
    pub fn put_node(&mut self, address: impl Into<IpAddr>, behind: Option<[u8; 4]>) {
        self.stamp += 1;
        let stamp = self.stamp;
        let key = AddressKey::from(address.into());
        let entry = IpcacheEntry {
            first_stamp: stamp,
            last_stamp: stamp,
            ..plan::node_entry(&key, behind.map(AddressKey::v4).as_ref())
        };
        self.hash(map::NODES).insert(key, entry, 0).unwrap();
    }

    /// A node is none any more; those of its pods that are known are looked at anew, as hostd has it.
    pub fn remove_node(&mut self, node: [u8; 4], pods: &[[u8; 4]]) {
        for pod in pods {
            self.next_stamp(AddressKey::v4(*pod));
        }
        self.hash::<IpcacheEntry>(map::NODES)
            .remove(&AddressKey::v4(node))
            .unwrap();
    }

    pub fn remove_pod(&mut self, address: impl Into<IpAddr>) {
        let key = AddressKey::from(address.into());
        self.next_stamp(key);
        self.hash::<Endpoint>(map::ENDPOINTS).remove(&key).unwrap();
    }

    /// As hostd does before it changes anything about an address.
    fn next_stamp(&mut self, key: AddressKey) -> (u32, u32) {
        self.stamp += 1;
        let unused = u32::try_from(self.slots.len()).unwrap() + 1;
        let slot = *self.slots.entry(key).or_insert(unused);
        let stamp = u64::from(self.stamp);
        self.array::<u64>(map::STAMPS).set(slot, stamp, 0).unwrap();
        self.loaded.stamps = self.loaded.stamps.max(slot + 1);
        (slot, self.stamp)
    }

    /// Between pods of the first rows, which A and B are in, and everybody, in both directions.
    pub fn allow_everything(&mut self, parity: usize) {
        let all = u64::from(CELL_ALLOW) * 0x0001_0001_0001_0001;
        let Shape { rows, columns, .. } = self.setup.shape;
        let mut cells = self.array::<u64>(map::POLICY[parity]);
        for direction in [Direction::Egress, Direction::Ingress] {
            let first = cell_index(direction, 0, 0, rows, columns) / CELLS_PER_ELEMENT;
            let last = cell_index(direction, rows.min(4) - 1, columns - 1, rows, columns) / CELLS_PER_ELEMENT;
            for element in first..=last {
                cells.set(element, all, 0).unwrap();
            }
        }
    }

    /// Writes one cell of the generation in force.
    pub fn set_cell(&mut self, direction: Direction, row: u32, column: u32, cell: u16) {
        let parity = usize::try_from(self.generation & 1).unwrap();
        let index = cell_index(direction, row, column, self.setup.shape.rows, self.setup.shape.columns);
        let mut cells = self.array::<u64>(map::POLICY[parity]);
        let shift = (index % CELLS_PER_ELEMENT) * 16;
        let element = cells.get(&(index / CELLS_PER_ELEMENT), 0).unwrap();
        let element = element & !(0xffff << shift) | u64::from(cell) << shift;
        cells.set(index / CELLS_PER_ELEMENT, element, 0).unwrap();
    }

    /// Forbids what goes from one local pod to another, or to a column, at the sender.
    pub fn deny_egress(&mut self, row: u32, column: u32) {
        self.set_cell(Direction::Egress, row, column, 0);
    }

    /// Rules are protocol (none for any), first port and last port.
    pub fn set_port_set(&mut self, number: u32, rules: &[(Option<u8>, u16, u16)]) {
        let ports = rules.iter().map(|(protocol, first, last)| Ports {
            protocol: *protocol,
            first: *first,
            last: *last,
        });
        let breakpoints = Decision::allow(ports).line().settle(false).breakpoints();
        let set = PortSet {
            first: number * 16,
            len: u32::try_from(breakpoints.len()).unwrap(),
        };
        let parity = usize::try_from(self.generation & 1).unwrap();
        for (index, breakpoint) in (set.first..).zip(breakpoints) {
            let mut pool = self.array::<u64>(map::PORT_POOL[parity]);
            pool.set(index, breakpoint, 0).unwrap();
        }
        let mut sets = self.array::<PortSet>(map::PORT_SETS[parity]);
        sets.set(number, set, 0).unwrap();
    }

    /// Puts a service's frontend, with its backends behind it; those that were there keep their numbers.
    pub fn put_service(&mut self, key: ServiceKey, backends: &[(IpAddr, u16)], affinity: u32) -> Box<Service> {
        let backends = backends.iter().map(|(address, port)| Backend {
            address: AddressKey::from(*address).address,
            port: port.to_be(),
            zero: 0,
        });
        let numbers = self.numbers.entry(key).or_default();
        assert_eq!(numbers.follow(&backends.collect()), 0);
        let entry = numbers.entry(key, affinity);
        let mut inner = Array::<MapData, Service>::create(1, 0).unwrap();
        inner.set(0, *entry.clone(), 0).unwrap();
        self.services().insert(key, &inner, 0).unwrap();
        if key.address != Address::NONE {
            let address = abi::address::ip(key.family, key.address);
            self.put_ipcache(address, [Identity::NONE; 2], 0, None, IPCACHE_SERVICE);
        }
        entry
    }

    pub(super) fn clear_services(&mut self) {
        for key in std::mem::take(&mut self.numbers).into_keys() {
            self.services().remove(&key).unwrap();
        }
    }

    fn services(&mut self) -> HashOfMaps<&mut MapData, ServiceKey, Array<MapData, Service>> {
        self.loaded.ebpf.map_mut(map::SERVICES).unwrap().try_into().unwrap()
    }

    /// Ends a service at its only port.
    pub fn remove_service(&mut self, key: ServiceKey) {
        self.services().remove(&key).unwrap();
        self.numbers.remove(&key);
        let address = AddressKey::from(abi::address::ip(key.family, key.address));
        self.hash::<IpcacheEntry>(map::IPCACHE).remove(&address).unwrap();
    }
}
