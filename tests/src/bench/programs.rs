//! The loaded programs. One bench after the other takes them: that the verifier looks at them takes longer than most tables.

use super::Setup;
use abi::{
    AddressKey, AffinityEntry, AffinityKey, ConntrackEntry, ConntrackKey, Endpoint, FragmentEntry, FragmentKey, Hook,
    IpcacheEntry, NetworkEntry, NodeConfig, PortSet, Service, ServiceKey, conntrack::Account, map,
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
use hostd::{
    config::Maps,
    datapath::{Constants, load_programs},
};
use std::{
    hash::Hash,
    ops::{Deref, DerefMut},
    sync::{Mutex, PoisonError},
    thread,
};

/// The programs of a node, and the one that leads to them.
pub struct Programs {
    pub ebpf: Ebpf,
    pub(crate) entry: Ebpf,
    pub(crate) events: RingBuf<MapData>,
    /// The program that the entry leads to.
    pub target: Option<Hook>,
    setup: Setup,
    /// Stamps from 0 on that may have been written.
    pub(super) stamps: u32,
}

/// Programs that no bench has at the moment.
static IDLE: Mutex<Vec<Programs>> = Mutex::new(Vec::new());

/// Programs that one bench has. Those of a bench that fails are not used again.
pub struct Lent(Option<Programs>);

impl Lent {
    /// Programs with empty maps.
    pub(super) fn new(setup: Setup) -> Self {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let known = idle.iter().position(|programs| programs.setup == setup);
        let known = known.map(|index| idle.swap_remove(index));
        drop(idle);
        let programs = known.map(Programs::emptied);
        Self(Some(programs.unwrap_or_else(|| Programs::load(setup))))
    }
}

impl Deref for Lent {
    type Target = Programs;

    fn deref(&self) -> &Programs {
        self.0.as_ref().unwrap()
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Programs {
        self.0.as_mut().unwrap()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(programs) = self.0.take()
            && !thread::panicking()
        {
            IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(programs);
        }
    }
}

impl Programs {
    fn load(setup: Setup) -> Self {
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
        Self {
            ebpf,
            entry,
            events,
            target: None,
            setup,
            stamps: 0,
        }
    }

    /// What tells a bench from one before it: everything but counters, of which benches look at differences, and scratch.
    fn emptied(mut self) -> Self {
        self.clear::<ConntrackKey, ConntrackEntry>(map::CONNTRACK);
        self.clear::<FragmentKey, FragmentEntry>(map::FRAGMENTS);
        for name in map::AFFINITY {
            self.clear::<AffinityKey, AffinityEntry>(name);
        }
        self.clear::<u32, Account>(map::ACCOUNTS);
        self.clear::<AddressKey, Endpoint>(map::ENDPOINTS);
        self.clear::<AddressKey, IpcacheEntry>(map::IPCACHE);
        self.clear::<AddressKey, IpcacheEntry>(map::NODES);
        self.clear_networks();
        self.clear_services();
        self.zero(map::TRACKED, &[0_u64], 1);
        self.zero(map::GENERATION, &[0_u64], 1);
        // SAFETY: integers, of which all zeros are a value.
        self.zero(map::CONFIG, &[unsafe { std::mem::zeroed::<NodeConfig>() }], 1);
        self.zero(map::STAMPS, &[0_u64], self.stamps);
        let shape = self.setup.shape;
        for parity in 0..2 {
            // Two rectangles of cells, four to an element.
            self.zero(map::POLICY[parity], &[0_u64], shape.rows * shape.columns / 2);
            self.zero(map::PORT_SETS[parity], &[PortSet { first: 0, len: 0 }], shape.port_sets);
            self.zero(map::PORT_POOL[parity], &[0_u64], shape.breakpoints);
        }
        while self.events.next().is_some() {}
        self.stamps = 0;
        self
    }

    /// Removes whatever is in a map.
    pub(super) fn clear<K: Pod + Eq + Hash, V: Pod>(&mut self, name: &str) {
        clear::<K, V>(self.ebpf.map_mut(name).unwrap());
    }

    fn clear_networks(&mut self) {
        let map = self.ebpf.map_mut(map::NETWORKS).unwrap();
        let mut networks: LpmTrie<_, AddressKey, NetworkEntry> = map.try_into().unwrap();
        let keys: Vec<Key<AddressKey>> = networks.keys().map(Result::unwrap).collect();
        for key in keys {
            networks.remove(&key).unwrap();
        }
    }

    fn clear_services(&mut self) {
        let map = self.ebpf.map_mut(map::SERVICES).unwrap();
        let mut services: HashOfMaps<_, ServiceKey, Array<MapData, Service>> = map.try_into().unwrap();
        let keys: Vec<ServiceKey> = services.keys().map(Result::unwrap).collect();
        for key in keys {
            services.remove(&key).unwrap();
        }
    }

    fn zero<V: Pod>(&mut self, name: &str, [zero]: &[V; 1], elements: u32) {
        let mut array: Array<_, V> = self.ebpf.map_mut(name).unwrap().try_into().unwrap();
        for index in 0..elements {
            array.set(index, zero, 0).unwrap();
        }
    }
}

fn clear<K: Pod + Eq + Hash, V: Pod>(map: &mut Map) {
    let mut map: HashMap<_, K, V> = HashMap::try_from(map).unwrap();
    let keys: Vec<K> = map.keys().map(Result::unwrap).collect();
    for key in keys {
        map.remove(&key).unwrap();
    }
}
