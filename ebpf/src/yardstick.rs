//! What `cargo xtask bench path` and a test of many packets run the programs with, and against: never loaded by hostd.
//!
//! `BPF_PROG_TEST_RUN` repeats a program on one packet, which is changed by it. [`replay`] makes the packet anew, as another
//! flow's perhaps, and tail-calls the program that is measured.
#![no_std]
#![no_main]

mod object;
mod primitives;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_tunnel_key},
    btf_maps::{Array, HashMap, ProgramArray},
    helpers::{bpf_skb_set_tunnel_key, generated::bpf_redirect_peer},
    macros::{btf_map, classifier},
    programs::TcContext,
};

/// 64-bit words of a frame that are written anew.
const WORDS: usize = 11;

// Offsets into an IPv4 frame without options.
const MAC_LOW: usize = 2;
const SOURCE: usize = 26;
const DESTINATION: usize = 30;
const DESTINATION_LOW: usize = 32;
const SOURCE_PORT: usize = 34;
const DESTINATION_PORT: usize = 36;

/// What the packets are made of.
#[repr(C)]
pub struct Replay {
    frame: [u64; WORDS],
    /// Packets so far.
    count: u64,
    /// So many source ports take turns, counted up from the frame's; 0 for the frame's own.
    source_ports: u32,
    /// The same of destination ports, of which each has its turn with all source ports.
    destination_ports: u32,
    /// The same of destinations, counted up in the last two bytes of the address, in step with the source ports.
    destinations: u32,
    /// Where it comes from the tunnel: the outer source and destination address and the VNI, in host byte order.
    outer: u32,
    outer_destination: u32,
    vni: u32,
    /// Whether what became of each packet is counted.
    watch: u32,
    zero: u32,
}

/// A way that packets may go, and how many went it.
#[repr(C)]
pub struct Watched {
    ifindex: u32,
    /// The last four bytes of the MAC of the pod behind the interface, and both IPv4 addresses, as they are in memory.
    mac: u32,
    source: u32,
    destination: u32,
    packets: u64,
}

#[btf_map]
static REPLAY: Array<Replay, 1> = Array::new();
/// The program that is measured.
#[btf_map]
static TARGET: ProgramArray<1> = ProgramArray::new();
#[btf_map]
static WATCHED: Array<Watched, 4> = Array::new();
/// Packets that went any other way.
#[btf_map]
static STRAY: Array<u64, 1> = Array::new();
#[btf_map]
static HOT: HashMap<[u32; 4], u64, 64> = HashMap::new();

/// Adds to the number, in network byte order, at `OFFSET` of the frame.
#[inline(always)]
fn count_up(ctx: &TcContext, offset: usize, by: u32) {
    let start = ctx.data() + offset;
    if start + 2 <= ctx.data_end() {
        // SAFETY: the bounds were just checked.
        unsafe {
            let number = start as *mut u16;
            let before = u16::from_be(core::ptr::read_unaligned(number));
            core::ptr::write_unaligned(number, before.wrapping_add(by as u16).to_be());
        }
    }
}

/// Counts where the packet before this one went: the programs have left path and interface in `skb->cb`, and the packet is as
/// they have made it.
#[inline(always)]
unsafe fn watch(ctx: &TcContext, start: usize) {
    // SAFETY: the context is the kernel's `__sk_buff`, whose `cb` a tc program may use. The caller has seen that the packet has
    // so many bytes. Only this program writes the arrays.
    unsafe {
        let word = |offset: usize| core::ptr::read_unaligned((start + offset) as *const u32);
        let [path, ifindex, ..] = (*ctx.skb.skb).cb;
        (*ctx.skb.skb).cb[0] = 0;
        if path == 0 {
            return;
        }
        for index in 0..4 {
            let Some(watched) = WATCHED.get_ptr_mut(index) else {
                return;
            };
            let way = (
                (*watched).ifindex,
                (*watched).mac,
                (*watched).source,
                (*watched).destination,
            );
            if way == (ifindex, word(MAC_LOW), word(SOURCE), word(DESTINATION)) {
                (*watched).packets += 1;
                return;
            }
        }
        if let Some(stray) = STRAY.get_ptr_mut(0) {
            *stray += 1;
        }
    }
}

#[classifier]
pub fn replay(ctx: TcContext) -> i32 {
    let Some(replay) = REPLAY.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    let start = ctx.data();
    if start + WORDS * 8 > ctx.data_end() {
        return TC_ACT_SHOT;
    }
    // SAFETY: an array's element is there as long as the program, one program runs at a time, and the packet's bounds were
    // just checked.
    unsafe {
        let replay = &mut *replay;
        if replay.watch != 0 {
            watch(&ctx, start);
        }
        for word in 0..WORDS {
            core::ptr::write_unaligned((start + word * 8) as *mut u64, replay.frame[word]);
        }
        let count = replay.count;
        replay.count = count + 1;
        let source_ports = u64::from(replay.source_ports);
        let turns = count.checked_div(source_ports).unwrap_or(count);
        for (offset, turn) in [
            (SOURCE_PORT, count.checked_rem(source_ports)),
            (DESTINATION_PORT, turns.checked_rem(u64::from(replay.destination_ports))),
            (DESTINATION_LOW, count.checked_rem(u64::from(replay.destinations))),
        ] {
            if let Some(turn) = turn {
                count_up(&ctx, offset, turn as u32);
            }
        }
        if replay.outer != 0 {
            let mut key: bpf_tunnel_key = core::mem::zeroed();
            key.tunnel_id = replay.vni;
            key.__bindgen_anon_3.local_ipv4 = replay.outer;
            key.__bindgen_anon_1.remote_ipv4 = replay.outer_destination;
            if bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, size_of::<bpf_tunnel_key>() as u32, 0) != 0 {
                return TC_ACT_SHOT;
            }
        }
        // Returns only where there is no program.
        TARGET.tail_call(&ctx, 0);
    }
    TC_ACT_SHOT
}

/// Nothing: what the rest is more than.
#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// The least that a delivery on one node takes.
#[classifier]
pub fn bare_redirect(ctx: TcContext) -> i32 {
    // SAFETY: the helper only notes the target; the context is the kernel's.
    unsafe { bpf_redirect_peer((*ctx.skb.skb).ifindex, 0) as i32 }
}

/// 16 look-ups in a hash map with keys of 16 bytes, all of them found: what other machines' figures are told by.
#[classifier]
pub fn sixteen_lookups(_ctx: TcContext) -> i32 {
    let mut sum = 0;
    for number in 0..16_u32 {
        // SAFETY: nobody writes the map while this runs.
        sum += unsafe { HOT.get(&[number, 0, 0, 7]) }.copied().unwrap_or(1 << 32);
    }
    // What is missing shows.
    if sum >> 32 == 0 { TC_ACT_UNSPEC } else { TC_ACT_SHOT }
}
