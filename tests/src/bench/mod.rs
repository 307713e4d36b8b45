//! A bench for the programs: loaded for real, their maps filled by hand, in a namespace of its own.

mod flows;
mod programs;
mod tables;

pub use flows::now;

use crate::frame::{NODE, OTHER_NODE, POD_A, POD_A6, POD_B, POD_B6, REMOTE, REMOTE6};
use abi::{
    AddressKey, Endpoint, Family, Hook, Identity, IpcacheEntry, NodeConfig, ServiceKey,
    conntrack::Account,
    ipcache::IPCACHE_HOST,
    map,
    network::UNROUTED,
    node::{REPORT_DROPS, REPORT_FLOWS, TUNNEL_PORT},
};
use aya::{
    Pod,
    maps::{Array, HashMap, MapData},
    programs::{ProgramFd, SchedClassifier},
};
use harness::{Namespace, in_netns};
use hostd::plan::{Numbers, Shape};
use programs::Lent;
use std::collections::BTreeMap;

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
#[derive(Clone, Copy, PartialEq, Eq)]
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

/// The programs, and what they run in.
pub struct Bench {
    pub loaded: Lent,
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
        let mut bench = Self {
            loaded: Lent::new(setup),
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

    /// Makes the maps what they were at first: loading the programs for each case takes too long.
    pub fn reset(&mut self) {
        self.forget();
        self.loaded.clear::<u32, Account>(map::ACCOUNTS);
        self.loaded.clear::<AddressKey, Endpoint>(map::ENDPOINTS);
        self.loaded.clear::<AddressKey, IpcacheEntry>(map::IPCACHE);
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
            underlay: AddressKey::v4(NODE).address,
            tunnel_port: TUNNEL_PORT,
            underlay_family: Family::V4 as u8,
            zero: 0,
            tunnel_mtu: TUNNEL_MTU,
            timeouts: abi::conntrack::Timeouts::default(),
            conntrack_limit: self.setup.conntrack_limit,
            conntrack_share: 4,
            underlay_ifindex: self.underlay,
            node_ports: 1,
            settling_ifindex: 0,
        };
        self.array::<NodeConfig>(map::CONFIG).set(0, config, 0).unwrap();
        let generation = self.generation;
        self.array::<u64>(map::GENERATION).set(0, generation, 0).unwrap();
        self.put_node(NODE, None);
        self.put_node(OTHER_NODE, Some(OTHER_NODE));
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

    /// One of the programs, to be run by something else.
    pub fn program(&self, hook: Hook) -> ProgramFd {
        let program: &SchedClassifier = self.loaded.ebpf.program(hook.name()).unwrap().try_into().unwrap();
        program.fd().unwrap().try_clone().unwrap()
    }

    fn array<V: Pod>(&mut self, name: &str) -> Array<&mut MapData, V> {
        self.loaded.ebpf.map_mut(name).unwrap().try_into().unwrap()
    }

    pub fn hash<V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, AddressKey, V> {
        self.loaded.ebpf.map_mut(name).unwrap().try_into().unwrap()
    }

    /// Gives the node one more address, of which hostd knows nothing.
    pub fn address(&self, address: [u8; 4]) {
        let address = std::net::Ipv4Addr::from(address).to_string();
        self.netns.ip(&["addr", "add", &address, "dev", "lo"]).unwrap();
    }

    /// Lets the node route: without it everything that is no pod's ends at the node itself.
    pub fn forward(&self) {
        in_netns(self.netns.name(), || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        })
        .unwrap()
        .unwrap();
        let route = ["route", "add", "default", "dev", "pb"];
        self.netns.ip(&["link", "set", "vb", "up"]).unwrap();
        for link in ["pb", "va"] {
            self.netns.ip(&["link", "set", link, "up"]).unwrap();
        }
        self.netns.ip(&route).unwrap();
        self.netns.ip(&["-6", "route", "add", "default", "dev", "pb"]).unwrap();
    }

    /// Puts the next generation in force.
    pub fn flip(&mut self) {
        self.generation += 1;
        let generation = self.generation;
        self.array::<u64>(map::GENERATION).set(0, generation, 0).unwrap();
    }

    /// Changes the node's settings.
    pub fn configure(&mut self, change: impl FnOnce(&mut NodeConfig)) {
        let mut config = self.array::<NodeConfig>(map::CONFIG).get(&0, 0).unwrap();
        change(&mut config);
        self.array::<NodeConfig>(map::CONFIG).set(0, config, 0).unwrap();
    }
}
