//! The maps and the constants that hostd sets before the programs are loaded. Names are in [`abi::map`].

use crate::packet::Flow;
use abi::{
    AddressKey, AffinityEntry, AffinityKey, ConntrackEntry, ConntrackKey, Endpoint, Event, FragmentEntry, FragmentKey,
    IpcacheEntry, NetworkEntry, NodeConfig, PortSet, Service, ServiceKey,
    conntrack::Account,
    drop::DROP_REASONS,
    event::{Counter, PATHS},
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_fib_lookup},
    btf_maps::{Array, ArrayOfMaps, HashMap, HashOfMaps, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
    macros::btf_map,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// These maps are small most of the time. Their entries have stamps, since either kind of hash may hand the memory of a
/// replaced element to another key under the eyes of a program that still reads it.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

// Numbers of entries are placeholders where hostd sets them from its configuration.

#[btf_map]
pub static ENDPOINTS: HashMap<AddressKey, Endpoint, 1024, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static IPCACHE: HashMap<AddressKey, IpcacheEntry, 65536, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static NODES: HashMap<AddressKey, IpcacheEntry, 262_144, NO_PREALLOC> = HashMap::new();
#[btf_map]
pub static NETWORKS: LpmTrie<AddressKey, NetworkEntry, 16384> = LpmTrie::new();
#[btf_map]
pub static CONNTRACK: LruHashMap<ConntrackKey, ConntrackEntry, 131_072> = LruHashMap::new();
#[btf_map]
pub static ACCOUNTS: HashMap<u32, Account, 1024> = HashMap::new();
#[btf_map]
pub static TRACKED: Array<u64, 1> = Array::new();
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentEntry, 8192> = LruHashMap::new();
/// Each value is a [`Service`]. Here it is an array of words: Linux 6.1 takes a map that hostd makes without BTF for another
/// kind than one whose BTF says that its value is a struct (`timer_off` in `bpf_map_meta_equal`, `kernel/bpf/map_in_map.c`).
#[btf_map]
static SERVICES: HashOfMaps<ServiceKey, Array<[u64; size_of::<Service>() / 8], 1>, 4096, NO_PREALLOC> =
    HashOfMaps::new();

/// What a frontend's element holds. That it was not handed to another key the entry itself says.
#[inline(always)]
pub fn service(key: &ServiceKey) -> Option<&'static Service> {
    // SAFETY: an inner map is freed after a grace period only, and hostd never writes one that is in its place. Its one
    // value has the size of a service, which is whole words of integers, and is aligned as words are.
    unsafe {
        let words = core::ptr::from_ref(SERVICES.get(key)?.get(0)?);
        Some(&*words.cast::<Service>())
    }
}
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityEntry, 65536> = LruHashMap::new();
#[btf_map]
pub static AFFINITY_OUTSIDE: LruHashMap<AffinityKey, AffinityEntry, 65536> = LruHashMap::new();
/// What the stack of 512 bytes has no room for.
#[repr(C)]
pub struct Scratch {
    pub flow: Flow,
    pub key: ConntrackKey,
    pub entry: ConntrackEntry,
    pub found: ConntrackEntry,
    pub service: ServiceKey,
    pub affinity_key: AffinityKey,
    pub affinity: AffinityEntry,
    pub route: bpf_fib_lookup,
    pub network: Key<AddressKey>,
    pub outsider: crate::lookup::Known,
    pub fragment_key: FragmentKey,
    pub fragment: FragmentEntry,
    pub message: crate::tell::Message,
}

#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// This CPU's scratch.
#[inline(always)]
pub fn scratch() -> Option<*mut Scratch> {
    SCRATCH.get_ptr_mut(0)
}

#[btf_map]
pub static GENERATION: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
static STAMPS: Array<u64, 65536, MMAPABLE> = Array::new();

/// Stamp of the last write of the address that has the slot.
#[inline(always)]
pub fn stamp(slot: u32) -> Option<u32> {
    // SAFETY: as in `generation`.
    STAMPS
        .get_ptr(slot)
        .map(|word| unsafe { core::ptr::read_volatile(word) } as u32)
}

#[btf_map]
pub static CONFIG: Array<NodeConfig, 1> = Array::new();
#[btf_map]
pub static POLICY_EVEN: Array<u64, 1024, MMAPABLE> = Array::new();
#[btf_map]
pub static POLICY_ODD: Array<u64, 1024, MMAPABLE> = Array::new();
#[btf_map]
pub static PORT_SETS_EVEN: Array<PortSet, 1024> = Array::new();
#[btf_map]
pub static PORT_SETS_ODD: Array<PortSet, 1024> = Array::new();
#[btf_map]
pub static PORT_POOL_EVEN: Array<u64, 1024, MMAPABLE> = Array::new();
#[btf_map]
pub static PORT_POOL_ODD: Array<u64, 1024, MMAPABLE> = Array::new();
#[btf_map]
pub static DROPS: PerCpuArray<Counter, { DROP_REASONS as usize }> = PerCpuArray::new();
#[btf_map]
pub static FORWARDED: PerCpuArray<Counter, { PATHS as usize }> = PerCpuArray::new();
#[btf_map]
pub static EVENTS: RingBuf<Event, { 256 * 1024 }> = RingBuf::new();
#[btf_map]
pub static GRACE: ArrayOfMaps<Array<u32, 1>, 1> = ArrayOfMaps::new();

/// Rows of one direction of the policy matrix.
#[unsafe(no_mangle)]
static POLICY_ROWS: u32 = 0;
/// Columns of the policy matrix.
#[unsafe(no_mangle)]
static POLICY_COLUMNS: u32 = 0;
/// 1: the programs leave what they decided in `skb->cb`, for the packet table tests.
#[unsafe(no_mangle)]
static RECORD_ACTION: u32 = 0;

#[inline(always)]
fn constant(value: &'static u32) -> u32 {
    // SAFETY: a reference is valid to read. The read is volatile because hostd writes another value into the object
    // before it is loaded, which the compiler must not assume away.
    unsafe { core::ptr::read_volatile(value) }
}

/// Rows and columns of the policy matrix.
#[inline(always)]
pub fn policy_shape() -> (u32, u32) {
    (constant(&POLICY_ROWS), constant(&POLICY_COLUMNS))
}

/// Whether the packet table tests want to see the action.
#[inline(always)]
pub fn record_action() -> bool {
    constant(&RECORD_ACTION) != 0
}

/// This node's settings.
#[inline(always)]
pub fn config() -> Option<&'static NodeConfig> {
    CONFIG.get(0)
}

/// Parity of the generation in force, for what is the same in both.
#[inline(always)]
pub fn parity() -> usize {
    (generation() & 1) as usize
}

/// The generation in force. A packet asks once.
#[inline(always)]
pub fn generation() -> u32 {
    // SAFETY: the pointer is to an element of an array map, which is there as long as the program. hostd writes it
    // while programs run; a volatile read of an aligned word sees the old value or the new one.
    GENERATION
        .get_ptr(0)
        .map_or(0, |word| unsafe { core::ptr::read_volatile(word) } as u32)
}
