//! The datapath: the only writer of BPF maps, and the one who loads, pins and attaches the programs.
//!
//! Everything is pinned under one folder per node, so that traffic flows and policy holds while hostd is down:
//!
//! | pin | what |
//! | --- | --- |
//! | `maps/NAME` | the maps that the attached programs use |
//! | `guard/link` | the link of the guard to a cgroup |
//! | `links/INTERFACE-HOOK` | the tcx links; a clsact filter has no link, it stays by itself |
//!
//! A hostd that starts builds maps anew, but for conntrack, fills them, and then swaps the programs in the links: each
//! packet meets the old programs with the old maps or the new ones with the new.

mod addresses;
mod attach;
mod cells;
mod conntrack;
mod error;
mod events;
mod guard;
mod matrix;
mod networks;
mod object;
mod read;
mod services;
mod stamps;

pub use attach::detach_node_ports;
pub use error::DatapathError;
pub use events::EventStream;
pub use guard::cgroup_root;
pub use object::{Constants, load_programs};
pub use read::{Counters, Flow};
pub use services::Placed as PlacedService;

use crate::{
    config::{Attach, Maps},
    net,
    plan::{Desired, Numbers, Shape},
};
use abi::{
    AddressKey, Endpoint, Family, IpcacheEntry, NetworkEntry, NodeConfig, PortSet, Service, ServiceKey,
    conntrack::{Account, OUTSIDE, Timeouts},
    event::Counter,
    map,
};
use attach::Attacher;
use aya::{
    Ebpf,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf,
        lpm_trie::LpmTrie,
        of_maps::{ArrayOfMaps, HashOfMaps},
    },
};
use cells::Mapped;
use conntrack::Counted;
use error::chain;
use ipnet::IpNet;
use stamps::Stamps;
use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Instant,
};

/// What the datapath is opened with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of the pins.
    pub bpffs: PathBuf,
    /// Sizes of the maps.
    pub maps: Maps,
    /// How to attach.
    pub attach: Attach,
    /// How long flows live.
    pub timeouts: Timeouts,
}

/// The programs and the maps of one node.
pub struct Datapath {
    attacher: Attacher,
    endpoints: HashMap<MapData, AddressKey, Endpoint>,
    ipcache: HashMap<MapData, AddressKey, IpcacheEntry>,
    nodes: HashMap<MapData, AddressKey, IpcacheEntry>,
    networks: LpmTrie<MapData, AddressKey, NetworkEntry>,
    port_sets: [Array<MapData, PortSet>; 2],
    port_pool: [Mapped; 2],
    config: Array<MapData, NodeConfig>,
    cells: [Mapped; 2],
    generation: Mapped,
    drops: PerCpuArray<MapData, Counter>,
    forwarded: PerCpuArray<MapData, Counter>,
    grace: ArrayOfMaps<MapData, Array<MapData, u32>>,
    accounts: HashMap<MapData, u32, Account>,
    tracked: Array<MapData, u64>,
    conntrack_capacity: u32,
    counted: Counted,
    shape: Shape,
    /// What the maps hold, so that what has not changed is not written.
    placed: BTreeMap<AddressKey, Desired>,
    /// Nodes' addresses, with what they are behind; and how often one was written.
    placed_nodes: BTreeMap<AddressKey, Option<AddressKey>>,
    node_writes: u32,
    placed_networks: BTreeMap<IpNet, NetworkEntry>,
    network_capacity: u32,
    services: HashOfMaps<MapData, ServiceKey, Array<MapData, Service>>,
    placed_services: BTreeMap<ServiceKey, PlacedService>,
    /// Numbers of backends that an earlier hostd has given.
    earlier_numbers: BTreeMap<ServiceKey, Numbers>,
    service_capacity: u32,
    stamps: Stamps,
    node_config: NodeConfig,
    bpffs: PathBuf,
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<Map, DatapathError> {
    ebpf.take_map(name).ok_or_else(|| {
        DatapathError::Load(format!(
            "the object has no map {name}: built from other sources than hostd?"
        ))
    })
}

macro_rules! typed {
    ($ebpf:expr, $name:expr) => {
        take($ebpf, $name)?.try_into().map_err(DatapathError::map($name))?
    };
}

/// Shape of the policy matrix for these map sizes.
#[must_use]
pub fn shape(maps: &Maps) -> Shape {
    Shape {
        rows: maps.local_identities + 1,
        columns: maps.identities + abi::policy::FIRST_POD_COLUMN,
        port_sets: maps.port_sets,
        breakpoints: maps.breakpoints,
    }
}

impl Datapath {
    /// Loads programs and maps. Nothing is attached or pinned yet, and what an earlier hostd left goes on working.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses the programs, or a map can't be made.
    pub fn load(settings: &Settings) -> Result<(Self, EventStream), DatapathError> {
        object::mount_bpffs(&settings.bpffs)?;
        let shape = shape(&settings.maps);
        let before = object::leftovers(&settings.bpffs, &settings.maps);
        let constants = Constants {
            shape,
            record_action: false,
        };
        let mut ebpf = load_programs(&settings.maps, &constants, &before.reuse)?;
        let ring: RingBuf<MapData> = typed!(&mut ebpf, map::EVENTS);
        let mut datapath = Self::from_object(ebpf, settings, shape)?;
        datapath.open_account(OUTSIDE)?;
        datapath.earlier_numbers = before.numbers;
        // Verdicts that conntrack carries over from an earlier hostd must not pass for this one's.
        datapath.generation.store_u64(0, u64::from(before.generation) + 2);
        Ok((datapath, EventStream::new(ring)?))
    }

    fn from_object(mut ebpf: Ebpf, settings: &Settings, shape: Shape) -> Result<Self, DatapathError> {
        let generation: Array<MapData, u64> = typed!(&mut ebpf, map::GENERATION);
        let stamps: Array<MapData, u64> = typed!(&mut ebpf, map::STAMPS);
        let even: Array<MapData, u64> = typed!(&mut ebpf, map::POLICY[0]);
        let odd: Array<MapData, u64> = typed!(&mut ebpf, map::POLICY[1]);
        let pins = settings.bpffs.join("maps-new");
        object::remake(&pins)?;
        let pin = |name: &str| pins.join(name);
        // Pinned one by one: a typed map of aya does not give its data back.
        generation.pin(pin(map::GENERATION)).map_err(pin_failed)?;
        even.pin(pin(map::POLICY[0])).map_err(pin_failed)?;
        stamps.pin(pin(map::STAMPS)).map_err(pin_failed)?;
        odd.pin(pin(map::POLICY[1])).map_err(pin_failed)?;
        for name in map::PORT_POOL {
            let pool: Array<MapData, u64> = typed!(&mut ebpf, name);
            pool.pin(pin(name)).map_err(pin_failed)?;
        }
        for (name, map) in ebpf.maps() {
            if name.contains('.') {
                continue; // .rodata and its like
            }
            map.pin(pin(name)).map_err(pin_failed)?;
        }
        let mapped = |name: &str| Mapped::open(&pins.join(name));
        let config: Array<MapData, NodeConfig> = typed!(&mut ebpf, map::CONFIG);
        Ok(Self {
            endpoints: typed!(&mut ebpf, map::ENDPOINTS),
            ipcache: typed!(&mut ebpf, map::IPCACHE),
            nodes: typed!(&mut ebpf, map::NODES),
            networks: typed!(&mut ebpf, map::NETWORKS),
            port_pool: [mapped(map::PORT_POOL[0])?, mapped(map::PORT_POOL[1])?],
            port_sets: [
                typed!(&mut ebpf, map::PORT_SETS[0]),
                typed!(&mut ebpf, map::PORT_SETS[1]),
            ],
            cells: [mapped(map::POLICY[0])?, mapped(map::POLICY[1])?],
            generation: mapped(map::GENERATION)?,
            drops: typed!(&mut ebpf, map::DROPS),
            forwarded: typed!(&mut ebpf, map::FORWARDED),
            grace: typed!(&mut ebpf, map::GRACE),
            services: typed!(&mut ebpf, map::SERVICES),
            accounts: typed!(&mut ebpf, map::ACCOUNTS),
            tracked: typed!(&mut ebpf, map::TRACKED),
            conntrack_capacity: settings.maps.conntrack,
            counted: Counted::default(),
            attacher: Attacher::new(ebpf, settings.attach, &settings.bpffs)?,
            config,
            shape,
            placed: BTreeMap::new(),
            placed_nodes: BTreeMap::new(),
            node_writes: 0,
            placed_networks: BTreeMap::new(),
            network_capacity: settings.maps.networks,
            placed_services: BTreeMap::new(),
            earlier_numbers: BTreeMap::new(),
            service_capacity: settings.maps.services,
            stamps: Stamps::new(mapped(map::STAMPS)?),
            node_config: NodeConfig {
                vxlan_ifindex: 0,
                report: 0,
                underlay: abi::Address::NONE,
                tunnel_port: abi::node::TUNNEL_PORT,
                underlay_family: Family::V4 as u8,
                zero: 0,
                tunnel_mtu: 0,
                timeouts: settings.timeouts,
                conntrack_limit: 0,
                conntrack_share: 0,
                underlay_ifindex: 0,
                node_ports: 0,
                settling_ifindex: 0,
            },
            bpffs: settings.bpffs.clone(),
        })
    }

    /// Makes this object's pins the ones that count, in place of an earlier hostd's.
    ///
    /// # Errors
    ///
    /// Where the pins can't be moved.
    pub fn adopt_pins(&self) -> Result<(), DatapathError> {
        object::swap_pins(&self.bpffs)
    }

    /// Shape of the policy matrix.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// The generation in force.
    #[must_use]
    pub fn generation(&self) -> u32 {
        object::low_half(self.generation.load_u64(0))
    }

    /// Parity of the generation in force.
    #[must_use]
    pub fn parity(&self) -> usize {
        (self.generation() & 1) as usize
    }

    /// Tells the programs of the vxlan device: its index, the largest packet that it takes, and what underlay it is on.
    ///
    /// # Errors
    ///
    /// Where the map can't be written.
    pub fn set_vxlan(&mut self, ifindex: u32, mtu: u32, underlay: IpAddr) -> Result<(), DatapathError> {
        self.node_config.vxlan_ifindex = ifindex;
        self.node_config.tunnel_mtu = mtu;
        let underlay = AddressKey::from(underlay);
        self.node_config.underlay = underlay.address;
        self.node_config.underlay_family = underlay.family;
        self.write_config()
    }

    /// Tells the programs which interface has the underlay address.
    ///
    /// # Errors
    ///
    /// Where the map can't be written.
    pub fn set_underlay(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        self.node_config.underlay_ifindex = ifindex;
        self.write_config()
    }

    /// What the programs report: [`abi::node::REPORT_DROPS`], [`abi::node::REPORT_FLOWS`].
    ///
    /// # Errors
    ///
    /// Where the map can't be written.
    pub fn set_report(&mut self, report: u32) -> Result<(), DatapathError> {
        self.node_config.report = report;
        self.write_config()
    }

    fn write_config(&mut self) -> Result<(), DatapathError> {
        self.config
            .set(0, self.node_config, 0)
            .map_err(DatapathError::map(map::CONFIG))
    }

    /// Looks whether a program is still first on its hook, and puts it there where it is not. The answer is what was wrong.
    ///
    /// # Errors
    ///
    /// Where the hook can't be looked at, or the program can't be put there.
    pub fn keep_attached(&mut self, hook: abi::Hook, interface: &str) -> Result<Option<&'static str>, DatapathError> {
        let Some(wrong) = self.attacher.wrong(hook, interface)? else {
            return Ok(None);
        };
        self.attach(hook, interface)?;
        match self.attacher.wrong(hook, interface)? {
            None => Ok(Some(wrong)),
            Some(_) => Err(attach::failed(hook, interface)(attach::IN_FRONT.to_owned())),
        }
    }

    /// Attaches a program, in front of all others, or swaps it into the link that is there.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn attach(&mut self, hook: abi::Hook, interface: &str) -> Result<(), DatapathError> {
        if !self.attacher.meets_another(hook, interface) {
            return self.attacher.attach(hook, interface);
        }
        let ifindex = net::ifindex(interface).map_err(|error| attach::failed(hook, interface)(error.to_string()))?;
        self.node_config.settling_ifindex = ifindex;
        self.write_config()?;
        let attached = self.attacher.attach(hook, interface);
        self.node_config.settling_ifindex = 0;
        self.write_config()?;
        attached
    }

    /// Attaches a program to a pod's interface as fast as the kernel can; [`Self::settle`] does the rest.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn attach_pod(&mut self, hook: abi::Hook, interface: &str) -> Result<(), DatapathError> {
        if self.attacher.attach_filter(hook, interface)? {
            return Ok(());
        }
        self.attach(hook, interface)
    }

    /// Since when a filter has waited for a link to take over, where one does.
    #[must_use]
    pub fn unsettled_since(&self) -> Option<Instant> {
        self.attacher.unsettled().map(|(_, _, since)| since)
    }

    /// Puts a link in the place of the filter that has waited longest, where there is one.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses. The filter stays then, and waits again, behind all others.
    pub fn settle(&mut self) -> Result<(), DatapathError> {
        let Some((interface, hook, _)) = self.attacher.unsettled() else {
            return Ok(());
        };
        let interface = interface.to_owned();
        self.attach(hook, &interface)
    }

    /// Forgets the links of an interface that is about to go.
    ///
    /// # Errors
    ///
    /// Where a pin can't be removed.
    pub fn detach(&mut self, interface: &str) -> Result<(), DatapathError> {
        self.attacher.detach(interface)
    }

    /// Interfaces that an earlier hostd left links on, which are none of `known`.
    ///
    /// # Errors
    ///
    /// Where the pins can't be listed.
    pub fn forget_links_except(&mut self, known: &[&str]) -> Result<(), DatapathError> {
        self.attacher.forget_except(known)
    }

    /// How programs are attached: `tcx` or `clsact`.
    #[must_use]
    pub fn attach_mode(&self) -> &'static str {
        self.attacher.mode()
    }
}

/// Removing what is not there is as good.
fn gone(result: Result<(), MapError>, name: &str) -> Result<(), DatapathError> {
    match result {
        Err(MapError::KeyNotFound) | Ok(()) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(DatapathError::map(name)(error)),
    }
}

fn full(error: MapError, map: &'static str, setting: &'static str) -> DatapathError {
    match &error {
        // The kernel answers E2BIG where a hash has no room (`kernel/bpf/hashtab.c`).
        // A trie answers ENOSPC (`kernel/bpf/lpm_trie.c`).
        MapError::SyscallError(call)
            if matches!(
                call.io_error.kind(),
                std::io::ErrorKind::ArgumentListTooLong | std::io::ErrorKind::StorageFull
            ) =>
        {
            DatapathError::Full { map, setting }
        }
        _ => DatapathError::map(map)(error),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn pin_failed(error: aya::pin::PinError) -> DatapathError {
    DatapathError::Load(format!("pinning a map: {error}"))
}

/// Removes every pin and link of a node, so that nothing of it is attached any more.
///
/// # Errors
///
/// Where a pin can't be removed.
pub fn cleanup(bpffs: &Path) -> Result<(), DatapathError> {
    object::remove_all(bpffs)
}
