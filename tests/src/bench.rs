//! A bench for the programs: loaded for real, their maps filled by hand, in a namespace of its own.

use crate::frame::{
    GATEWAY_A, GATEWAY_B, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC, POD_B6, REMOTE, REMOTE6,
};
use abi::{
    AddressKey, AffinityEntry, AffinityKey, ConntrackEntry, ConntrackKey, Direction, Endpoint, Family, FragmentEntry,
    FragmentKey, Hook, Identity, IpcacheEntry, NetworkEntry, NodeConfig, NodeEntry, PortSet, Service, ServiceKey,
    address::Address,
    conntrack::{Account, SECOND},
    ipcache::{IPCACHE_HOST, IPCACHE_SERVICE},
    map,
    network::{NETWORK_KEY_BITS, UNROUTED},
    node::{REPORT_DROPS, REPORT_FLOWS, TUNNEL_PORT},
    policy::{CELL_ALLOW, CELLS_PER_ELEMENT, cell_index},
    service::Backend,
};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{
        Array, HashMap, Map, MapData, RingBuf,
        lpm_trie::{Key, LpmTrie},
        of_maps::HashOfMaps,
    },
    programs::SchedClassifier,
};
use harness::{Namespace, in_netns};
use hostd::{
    config::Maps,
    datapath::{Constants, load_programs},
    plan::{Action, Decision, Numbers, Ports, Rule, Shape},
};
use std::{collections::BTreeMap, net::IpAddr};

pub const RED: Identity = Identity(0x01_0001);
pub const BLUE: Identity = Identity(0x02_0001);
pub const GREEN: Identity = Identity(0x03_0001);

/// Row and column of each identity.
pub const RED_PLACE: (u32, u32) = (1, 16);
pub const BLUE_PLACE: (u32, u32) = (2, 17);
pub const GREEN_COLUMN: u32 = 18;

/// Entries of conntrack from which on each pod has a share of 4.
pub const FULL: u32 = 1000;
/// MTU of the tunnel.
pub const TUNNEL_MTU: u32 = 1450;

/// What a bench is made for: tables of packets, unless something else is said.
pub struct Setup {
    pub shape: Shape,
    /// Entries of the map of flows, and how many of them are taken without a look at anybody's share.
    pub conntrack: u32,
    pub conntrack_limit: u32,
    /// The programs leave behind what they have decided, and report it.
    pub tells: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            shape: Shape {
                rows: 4,
                columns: 32,
                port_sets: 4,
                breakpoints: 64,
            },
            conntrack: 1024,
            conntrack_limit: FULL,
            tells: true,
        }
    }
}

fn clear<K: Pod + Eq + std::hash::Hash, V: Pod>(map: &mut Map) {
    let mut map: HashMap<_, K, V> = HashMap::try_from(map).unwrap();
    let keys: Vec<K> = map.keys().map(Result::unwrap).collect();
    for key in keys {
        map.remove(&key).unwrap();
    }
}

/// Now, in nanoseconds of `CLOCK_MONOTONIC`.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * SECOND + u64::try_from(now.tv_nsec).unwrap()
}

/// The programs, and what they run in.
pub struct Bench {
    pub ebpf: Ebpf,
    pub(crate) entry: Ebpf,
    pub(crate) events: RingBuf<MapData>,
    /// The program that the entry leads to.
    pub target: Option<Hook>,
    pub netns: Namespace,
    pub pod_a: u32,
    pub pod_b: u32,
    pub vxlan: u32,
    pub underlay: u32,
    pub generation: u64,
    /// Who has the addresses of the pods that are put.
    pub owner: u32,
    numbers: BTreeMap<ServiceKey, Numbers>,
    /// Slot of each address, and the last stamp of any.
    slots: BTreeMap<AddressKey, u32>,
    stamp: u32,
    setup: Setup,
}

impl Bench {
    /// Pods A (red) and B (blue) here, a green one on another node, and a policy that allows everything.
    pub fn new() -> Self {
        Self::with(Setup::default())
    }

    /// The same for something else.
    pub fn with(setup: Setup) -> Self {
        let netns = Namespace::new("bench").unwrap();
        netns
            .ip(&["link", "add", "va", "type", "veth", "peer", "name", "pa"])
            .unwrap();
        netns
            .ip(&["link", "add", "vb", "type", "veth", "peer", "name", "pb"])
            .unwrap();
        let index = |name: &str| -> u32 {
            let link = netns.ip(&["-o", "link", "show", name]).unwrap();
            link.split(':').next().unwrap().parse().unwrap()
        };
        let (pod_a, pod_b, vxlan, underlay) = (index("va"), index("vb"), index("pa"), index("pb"));
        let constants = Constants {
            shape: setup.shape,
            record_action: setup.tells,
        };
        let maps = Maps {
            conntrack: setup.conntrack,
            ..Maps::default()
        };
        let mut ebpf = load_programs(&maps, &constants, &[]).unwrap();
        let events = RingBuf::try_from(ebpf.take_map(map::EVENTS).unwrap()).unwrap();
        let object = toolchain::target_dir().join("bpf/bpfel-unknown-none/release/packet_table");
        let mut entry = EbpfLoader::new().load_file(object).unwrap();
        let program: &mut SchedClassifier = entry.program_mut("packet_table").unwrap().try_into().unwrap();
        program.load().unwrap();
        let mut bench = Self {
            ebpf,
            entry,
            events,
            target: None,
            netns,
            pod_a,
            pod_b,
            vxlan,
            underlay,
            generation: 2,
            owner: 1,
            numbers: BTreeMap::new(),
            slots: BTreeMap::new(),
            stamp: 0,
            setup,
        };
        bench.furnish();
        bench
    }

    /// Forgets all flows.
    pub fn forget(&mut self) {
        clear::<ConntrackKey, ConntrackEntry>(self.ebpf.map_mut(map::CONNTRACK).unwrap());
        clear::<FragmentKey, FragmentEntry>(self.ebpf.map_mut(map::FRAGMENTS).unwrap());
        for name in map::AFFINITY {
            clear::<AffinityKey, AffinityEntry>(self.ebpf.map_mut(name).unwrap());
        }
    }

    /// Makes the maps what they were at first: loading the programs for each case takes too long.
    pub fn reset(&mut self) {
        self.forget();
        clear::<u32, Account>(self.ebpf.map_mut(map::ACCOUNTS).unwrap());
        clear::<AddressKey, Endpoint>(self.ebpf.map_mut(map::ENDPOINTS).unwrap());
        clear::<AddressKey, IpcacheEntry>(self.ebpf.map_mut(map::IPCACHE).unwrap());
        self.clear_services();
        self.set_tracked(0);
        (self.generation, self.owner) = (2, 1);
        self.furnish();
    }

    fn furnish(&mut self) {
        let config = NodeConfig {
            vxlan_ifindex: self.vxlan,
            report: if self.setup.tells {
                REPORT_DROPS | REPORT_FLOWS
            } else {
                0
            },
            tunnel_port: TUNNEL_PORT,
            underlay_family: Family::V4 as u8,
            zero: 0,
            tunnel_mtu: TUNNEL_MTU,
            timeouts: abi::conntrack::Timeouts::default(),
            conntrack_limit: self.setup.conntrack_limit,
            conntrack_share: 4,
            underlay_ifindex: self.underlay,
            node_ports: 1,
        };
        self.array::<NodeConfig>(map::CONFIG).set(0, config, 0).unwrap();
        let generation = self.generation;
        self.array::<u64>(map::GENERATION).set(0, generation, 0).unwrap();
        for node in [NODE, OTHER_NODE] {
            let local = u32::from(node == NODE);
            self.hash(map::NODES)
                .insert(AddressKey::v4(node), NodeEntry { local }, 0)
                .unwrap();
        }
        let (a, b) = (self.pod_a, self.pod_b);
        self.put_pod(POD_A, [RED; 2], RED_PLACE, 1, a);
        self.put_pod(POD_B, [BLUE; 2], BLUE_PLACE, 2, b);
        self.put_remote(REMOTE, [GREEN; 2], OTHER_NODE);
        self.put_pod(POD_A6, [RED; 2], RED_PLACE, 1, a);
        self.put_pod(POD_B6, [BLUE; 2], BLUE_PLACE, 2, b);
        self.put_remote(REMOTE6, [GREEN; 2], OTHER_NODE);
        self.put_ipcache(NODE.into(), [Identity::HOST; 2], Identity::HOST.0, None, IPCACHE_HOST);
        let none = [Identity::WORLD; 2];
        for (address, length) in [([10, 0, 0, 0], 8), ([224, 0, 0, 0], 3)] {
            self.put_network(address, length, none, [Identity::WORLD.0; 2], UNROUTED);
        }
        for parity in 0..2 {
            self.allow_everything(parity);
        }
    }

    fn array<V: Pod>(&mut self, name: &str) -> Array<&mut MapData, V> {
        self.ebpf.map_mut(name).unwrap().try_into().unwrap()
    }

    pub fn hash<V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, AddressKey, V> {
        self.ebpf.map_mut(name).unwrap().try_into().unwrap()
    }

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

    fn put_ipcache(&mut self, address: IpAddr, identity: [Identity; 2], column: u32, node: Option<IpAddr>, flags: u8) {
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
        let rules = rules.iter().map(|(protocol, first, last)| Rule {
            ports: Ports {
                protocol: *protocol,
                first: *first,
                last: *last,
            },
            action: Action::Allow,
            reason: String::new(),
        });
        let decision = Decision {
            rules: rules.collect(),
            otherwise: Action::Deny,
            reason: String::new(),
        };
        let breakpoints = decision.line().settle(false).breakpoints();
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

    /// Gives the node one more address, of which hostd knows nothing.
    pub fn address(&self, address: [u8; 4]) {
        let address = std::net::Ipv4Addr::from(address).to_string();
        self.netns.ip(&["addr", "add", &address, "dev", "lo"]).unwrap();
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
            self.ebpf.map_mut(map::NETWORKS).unwrap().try_into().unwrap();
        let key = Key::new(NETWORK_KEY_BITS + length, AddressKey::from(address.into()));
        let entry = NetworkEntry {
            identity,
            column,
            flags,
            zero: 0,
        };
        trie.insert(&key, entry, 0).unwrap();
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

    fn clear_services(&mut self) {
        for key in std::mem::take(&mut self.numbers).into_keys() {
            self.services().remove(&key).unwrap();
        }
    }

    fn services(&mut self) -> HashOfMaps<&mut MapData, ServiceKey, Array<MapData, Service>> {
        self.ebpf.map_mut(map::SERVICES).unwrap().try_into().unwrap()
    }

    /// Ends a service at its only port.
    pub fn remove_service(&mut self, key: ServiceKey) {
        self.services().remove(&key).unwrap();
        self.numbers.remove(&key);
        let address = AddressKey::from(abi::address::ip(key.family, key.address));
        self.hash::<IpcacheEntry>(map::IPCACHE).remove(&address).unwrap();
    }

    /// Lets the node route: without it everything that is no pod's ends at the node itself.
    pub fn forward(&self) {
        in_netns(self.netns.name(), || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        })
        .unwrap()
        .unwrap();
        let route = ["route", "add", "default", "dev", "vb"];
        self.netns.ip(&["link", "set", "vb", "up"]).unwrap();
        self.netns.ip(&["link", "set", "va", "up"]).unwrap();
        self.netns.ip(&route).unwrap();
        self.netns.ip(&["-6", "route", "add", "default", "dev", "vb"]).unwrap();
    }

    /// Puts the next generation in force.
    pub fn flip(&mut self) {
        self.generation += 1;
        let generation = self.generation;
        self.array::<u64>(map::GENERATION).set(0, generation, 0).unwrap();
    }

    /// A node is none any more; those of its pods that are known are looked at anew, as hostd has it.
    pub fn remove_node(&mut self, node: [u8; 4], pods: &[[u8; 4]]) {
        for pod in pods {
            self.next_stamp(AddressKey::v4(*pod));
        }
        self.hash::<NodeEntry>(map::NODES)
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
        (slot, self.stamp)
    }

    /// The flows that are tracked, and what is remembered of each.
    pub fn flows(&mut self) -> Vec<(ConntrackKey, ConntrackEntry)> {
        let tracked: HashMap<_, ConntrackKey, ConntrackEntry> =
            HashMap::try_from(self.ebpf.map_mut(map::CONNTRACK).unwrap()).unwrap();
        tracked.iter().map(Result::unwrap).collect()
    }

    /// Forgets one of them.
    pub fn forget_flow(&mut self, key: &ConntrackKey) {
        let mut tracked: HashMap<_, ConntrackKey, ConntrackEntry> =
            HashMap::try_from(self.ebpf.map_mut(map::CONNTRACK).unwrap()).unwrap();
        tracked.remove(key).unwrap();
    }

    /// Changes the node's settings.
    pub fn configure(&mut self, change: impl FnOnce(&mut NodeConfig)) {
        let mut config = self.array::<NodeConfig>(map::CONFIG).get(&0, 0).unwrap();
        change(&mut config);
        self.array::<NodeConfig>(map::CONFIG).set(0, config, 0).unwrap();
    }

    /// How long the one flow that is tracked lives from now on, in seconds.
    pub fn lifetime(&mut self) -> u64 {
        let entries = self.flows();
        assert_eq!(entries.len(), 1);
        (entries[0].1.expires - now()).div_ceil(SECOND)
    }

    /// Changes what is remembered of all flows.
    pub fn change_flows(&mut self, mut change: impl FnMut(&mut ConntrackEntry)) {
        let flows = self.flows();
        let mut tracked: HashMap<_, ConntrackKey, ConntrackEntry> =
            HashMap::try_from(self.ebpf.map_mut(map::CONNTRACK).unwrap()).unwrap();
        for (key, mut entry) in flows {
            change(&mut entry);
            tracked.insert(key, entry, 0).unwrap();
        }
    }

    /// Makes the clients of pods' services as old as this, in nanoseconds of `CLOCK_MONOTONIC`; the answer is how old they
    /// were.
    pub fn age_clients(&mut self, expires: u64) -> Vec<u64> {
        let mut clients: HashMap<_, AffinityKey, AffinityEntry> =
            HashMap::try_from(self.ebpf.map_mut(map::AFFINITY[0]).unwrap()).unwrap();
        let known: Vec<(AffinityKey, AffinityEntry)> = clients.iter().map(Result::unwrap).collect();
        for (key, entry) in &known {
            clients.insert(key, AffinityEntry { expires, ..*entry }, 0).unwrap();
        }
        known.iter().map(|(_, entry)| entry.expires).collect()
    }

    /// Says how many flows are tracked in all.
    pub fn set_tracked(&mut self, flows: u64) {
        self.array::<u64>(map::TRACKED).set(0, flows, 0).unwrap();
    }

    pub fn tracked(&mut self) -> u64 {
        self.array::<u64>(map::TRACKED).get(&0, 0).unwrap()
    }

    /// Opens an account with so many flows on it.
    pub fn set_account(&mut self, owner: u32, flows: u64) {
        let mut accounts: HashMap<_, u32, Account> =
            HashMap::try_from(self.ebpf.map_mut(map::ACCOUNTS).unwrap()).unwrap();
        accounts.insert(owner, Account { flows }, 0).unwrap();
    }
}
