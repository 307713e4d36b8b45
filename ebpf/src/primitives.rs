//! What the programs are made of, each step alone: how fast none of them can be without.

use abi::{
    AddressKey, ConntrackEntry, ConntrackKey, Family, Identity,
    address::{Address, SHARED_SCOPE},
    conntrack::{Link, Peer, Translation},
};
use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_ZERO_CSUM_TX, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_tunnel_key},
    btf_maps::{Array, HashMap, LruHashMap},
    helpers::{
        bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key,
        generated::{bpf_jiffies64, bpf_ktime_get_ns},
    },
    macros::{btf_map, classifier},
    programs::TcContext,
};

/// As large as the datapath's.
#[btf_map]
static FLOWS: LruHashMap<ConntrackKey, ConntrackEntry, 131_072> = LruHashMap::new();
#[btf_map]
static ADDRESSES: HashMap<AddressKey, [u64; 10], 65_536> = HashMap::new();
#[btf_map]
static STAMPS: Array<u64, 1024> = Array::new();
/// Where an entry is put together, and how many there were.
#[btf_map]
static ENTRY: Array<(ConntrackEntry, u64), 1> = Array::new();

/// Addresses that have had their turn.
#[btf_map]
static TURNS: Array<u64, 1> = Array::new();

/// Times that a step is done, where once is too little to be measured.
const TIMES: u32 = 16;

#[inline(always)]
fn flow(number: u32) -> ConntrackKey {
    ConntrackKey {
        lower: Address([10, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        upper: Address([10, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        lower_port: number as u16,
        upper_port: (number >> 16) as u16,
        scope: SHARED_SCOPE,
        family: Family::V4 as u8,
        protocol: 6,
    }
}

#[inline(always)]
fn unspec_if(holds: bool) -> i32 {
    if holds { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}

/// A flow entered into a map that is full, once the first hundred thousand are.
#[classifier]
pub fn flow_insert(_ctx: TcContext) -> i32 {
    let Some(entry) = ENTRY.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: an array's element is there as long as the program, and one program runs at a time.
    let (entry, count) = unsafe { &mut *entry };
    *count += 1;
    entry.cookie = *count;
    (entry.links, entry.peers) = ([Link::NONE; 2], [Peer { owner: 1, epoch: 1 }; 2]);
    entry.translation = Translation::NONE;
    let key = flow(*count as u32);
    unspec_if(FLOWS.insert(&key, &*entry, u64::from(BPF_ANY)).is_ok())
}

/// The flow that was entered last, found 16 times.
#[classifier]
pub fn sixteen_flows(_ctx: TcContext) -> i32 {
    let Some(entry) = ENTRY.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: as above.
    let key = flow(unsafe { (*entry).1 } as u32);
    for _ in 0..TIMES {
        if FLOWS.get_ptr(&key).is_none() {
            return TC_ACT_SHOT;
        }
    }
    TC_ACT_UNSPEC
}

#[inline(always)]
fn address(number: u32) -> AddressKey {
    AddressKey::v4((0x0a00_0000 | number).to_be_bytes())
}

/// An address, found 16 times in a map with keys and values as large as the ipcache's.
#[classifier]
pub fn sixteen_addresses(ctx: TcContext) -> i32 {
    let key = address(ctx.len() & 255);
    for _ in 0..TIMES {
        if ADDRESSES.get_ptr(&key).is_none() {
            return TC_ACT_SHOT;
        }
    }
    TC_ACT_UNSPEC
}

/// One of 60,000 addresses, the next one each time.
#[classifier]
pub fn address_in_turn(_ctx: TcContext) -> i32 {
    let Some(turns) = TURNS.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: as above.
    let turn = unsafe {
        *turns += 1;
        *turns % 60_000
    };
    let Some(found) = ADDRESSES.get_ptr(&address(turn as u32)) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: nobody writes the map while this runs.
    unspec_if(unsafe { (*found)[0] } == 0)
}

/// 16 elements of an array.
#[classifier]
pub fn sixteen_stamps(ctx: TcContext) -> i32 {
    let first = ctx.len() & 255;
    let mut sum = 0;
    for number in 0..TIMES {
        if let Some(stamp) = STAMPS.get_ptr(first + number * 16) {
            // SAFETY: an array's element is there as long as the program.
            sum += unsafe { core::ptr::read_volatile(stamp) };
        }
    }
    unspec_if(sum == 0)
}

/// The time, 16 times.
#[classifier]
pub fn sixteen_times(_ctx: TcContext) -> i32 {
    let mut last = 0;
    for _ in 0..TIMES {
        // SAFETY: the helper has no preconditions.
        last = last.max(unsafe { bpf_ktime_get_ns() });
    }
    unspec_if(last != 0)
}

/// The kernel's ticks, 16 times.
#[classifier]
pub fn sixteen_jiffies(_ctx: TcContext) -> i32 {
    let mut last = 0;
    for _ in 0..TIMES {
        // SAFETY: the helper has no preconditions.
        last = last.max(unsafe { bpf_jiffies64() });
    }
    unspec_if(last != 0)
}

#[inline(always)]
fn tunnel_key() -> bpf_tunnel_key {
    // SAFETY: all zero is a value of this plain C struct.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = Identity::WORLD.0;
    key.tunnel_ttl = 64;
    key.__bindgen_anon_1.remote_ipv4 = 0xc000_0202;
    key
}

const KEY_SIZE: u32 = size_of::<bpf_tunnel_key>() as u32;

#[classifier]
pub fn set_tunnel_key(ctx: TcContext) -> i32 {
    let mut key = tunnel_key();
    // SAFETY: the context and the key are valid, and the size is the key's own.
    unspec_if(unsafe {
        bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, KEY_SIZE, u64::from(BPF_F_ZERO_CSUM_TX)) == 0
    })
}

/// Sets it, too: a packet of a test run comes from no tunnel.
#[classifier]
pub fn set_and_get_tunnel_key(ctx: TcContext) -> i32 {
    let mut key = tunnel_key();
    // SAFETY: as above.
    unspec_if(unsafe {
        bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, KEY_SIZE, u64::from(BPF_F_ZERO_CSUM_TX)) == 0
            && bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut key, KEY_SIZE, 0) == 0
    })
}

#[classifier]
pub fn change_type(ctx: TcContext) -> i32 {
    unspec_if(ctx.change_type(0).is_ok())
}
