//! The fast path: a packet of a flow between pods that is established goes by what its conntrack entry says, after one
//! look-up. Everything else, and every packet that something is to be noted or told of, takes the stages.
//!
//! An entry is armed by a packet that took the stages: it then holds how both ends are reached, each with slot and stamp of
//! its address. hostd writes another stamp to the slot before it changes anything about the address, so that what follows
//! from the old entry ends there; a policy load ends it with its generation. For some ticks no more than that is looked at,
//! then a packet takes the stages again, and what is due is done: the flow's time-out, and a look at everything.

use crate::{
    conntrack,
    forward::{self, Action},
    lookup, lru, maps, overlay,
    packet::{Ends, Flow, Fragment, TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, UDP},
    parse::{self, ETHERNET_LEN, IPV4_LEN, IPV6_LEN, L3},
    verdict,
};
use abi::{
    AddressKey, ConntrackEntry, ConntrackKey, Family, Identity, Path,
    address::Address,
    conntrack::{ESTABLISHED, Link, Peer, SECOND},
};
use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers::{bpf_skb_get_tunnel_key, generated::bpf_jiffies64},
    programs::TcContext,
};
use core::arch::asm;

/// Ticks for which a flow may take the fast path, at the most, and for each second that it would live without another
/// packet: no more than a quarter of that, whatever `CONFIG_HZ` is, from 100 to 1000.
const TICKS: u64 = 100;
const TICKS_A_SECOND: u64 = 25;

/// Loads a number from a packet, of which the kernel's BPF may read words at any address, and Rust may not
/// (RFC 9669, section 5.2).
macro_rules! load {
    ($size:literal, $start:expr, $offset:expr) => {{
        let value: u64;
        asm!(
            concat!("{value} = *(", $size, " *)({start} + {offset})"),
            value = out(reg) value,
            start = in(reg) $start,
            offset = const $offset,
            options(nostack, readonly, preserves_flags),
        );
        value
    }};
}

/// The same for stores.
macro_rules! store {
    ($size:literal, $start:expr, $offset:expr, $value:expr) => {
        asm!(
            concat!("*(", $size, " *)({start} + {offset}) = {value}"),
            start = in(reg) $start,
            offset = const $offset,
            value = in(reg) u64::from($value),
            options(nostack, preserves_flags),
        )
    };
}

/// Reads a field that another CPU may be writing.
macro_rules! read {
    ($pointer:expr, $field:ident) => {
        core::ptr::read_volatile(&raw const (*$pointer).$field)
    };
}

/// A packet that the fast path could carry.
struct Seen {
    key: ConntrackKey,
    /// 0 where the lower end sent it, 1 where the upper end did.
    sender: usize,
    v6: bool,
}

impl Seen {
    #[inline(always)]
    fn new() -> Self {
        Self {
            key: ConntrackKey {
                lower: Address::NONE,
                upper: Address::NONE,
                lower_port: 0,
                upper_port: 0,
                scope: 0,
                family: 0,
                protocol: 0,
            },
            sender: 0,
            v6: false,
        }
    }
}

/// Reads what identifies the flow: TCP in the middle of a connection, or UDP, whole, right behind a plain header, and with
/// hops to spare.
#[inline(always)]
fn look(ctx: &TcContext, seen: &mut Seen) -> bool {
    let start = ctx.data();
    if start + L3 + IPV4_LEN + 8 > ctx.data_end() {
        return false;
    }
    // SAFETY: the bounds are checked before each block of loads; the verifier holds us to it. The context is the kernel's.
    unsafe {
        if (*ctx.skb.skb).vlan_present != 0 {
            return false;
        }
        let mut ends = Ends::NONE;
        let protocol;
        let transport;
        match (load!("u16", start, 12) as u16).to_be() {
            0x0800 => {
                let fragment = (load!("u16", start, 20) as u16).to_be();
                let total = parse::total(ctx, u32::from((load!("u16", start, 16) as u16).to_be()));
                protocol = load!("u8", start, 23) as u8;
                let least = IPV4_LEN as u32 + if protocol == TCP { 20 } else { 8 };
                if load!("u8", start, 14) != 0x45
                    || fragment & 0x3fff != 0
                    || load!("u8", start, 22) <= 1
                    || total < least
                    || total + ETHERNET_LEN as u32 > ctx.len()
                {
                    return false;
                }
                ends.source = v4(load!("u32", start, 26) as u32);
                ends.destination = v4(load!("u32", start, 30) as u32);
                transport = start + L3 + IPV4_LEN;
            }
            0x86dd => {
                if start + L3 + IPV6_LEN + 8 > ctx.data_end() {
                    return false;
                }
                let length = u32::from((load!("u16", start, 18) as u16).to_be());
                protocol = load!("u8", start, 20) as u8;
                let least = if protocol == TCP { 20 } else { 8 };
                if load!("u8", start, 14) >> 4 != 6
                    || load!("u8", start, 21) <= 1
                    || length < least
                    || length + (L3 + IPV6_LEN) as u32 > ctx.len()
                {
                    return false;
                }
                seen.v6 = true;
                ends.source = v6([
                    load!("u32", start, 22) as u32,
                    load!("u32", start, 26) as u32,
                    load!("u32", start, 30) as u32,
                    load!("u32", start, 34) as u32,
                ]);
                ends.destination = v6([
                    load!("u32", start, 38) as u32,
                    load!("u32", start, 42) as u32,
                    load!("u32", start, 46) as u32,
                    load!("u32", start, 50) as u32,
                ]);
                transport = start + L3 + IPV6_LEN;
            }
            _ => return false,
        }
        match protocol {
            TCP => {
                if transport + 20 > ctx.data_end() {
                    return false;
                }
                let flags = load!("u8", transport, 13) as u8;
                let middle = flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK) == TCP_ACK;
                if !middle || load!("u8", transport, 12) >> 4 < 5 {
                    return false;
                }
            }
            UDP => {}
            _ => return false,
        }
        ends.source_port = load!("u16", transport, 0) as u16;
        ends.destination_port = load!("u16", transport, 2) as u16;
        let family = if seen.v6 { Family::V6 } else { Family::V4 };
        seen.sender = conntrack::key(&mut seen.key, &ends, family as u8, protocol) as usize;
    }
    true
}

#[inline(always)]
fn v4(word: u32) -> Address {
    v6([word, 0, 0, 0])
}

#[inline(always)]
fn v6(words: [u32; 4]) -> Address {
    // SAFETY: four words are 16 bytes.
    Address(unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) })
}

/// An established flow that packets may go on by.
struct Armed {
    entry: *const ConntrackEntry,
    cookie: u64,
    /// How sender and receiver are reached.
    from: *const Link,
    to: *const Link,
}

/// The flow, where both of its ends are still what they were.
#[inline(always)]
fn find(seen: &Seen) -> Option<Armed> {
    let entry = maps::CONNTRACK.get_ptr(&seen.key)?;
    let cookie = conntrack::cookie(&seen.key);
    // SAFETY: as in `lru::copy_out`: the memory is there, and what is read holds if the cookie is still there afterwards,
    // which is for the caller to see. Of the array only addresses of its two elements are taken.
    let (holds, links) = unsafe {
        let holds = read!(entry, cookie) == cookie
            && read!(entry, state) == ESTABLISHED
            && read!(entry, generation) == maps::generation()
            && read!(entry, fast_until) >= bpf_jiffies64();
        (holds, (&raw const (*entry).links).cast::<Link>())
    };
    if !holds {
        return None;
    }
    // SAFETY: as above.
    let (from, to) = unsafe { (links.add(seen.sender & 1), links.add(1 - (seen.sender & 1))) };
    let armed = Armed {
        entry,
        cookie,
        from,
        to,
    };
    (is_current(from) && is_current(to)).then_some(armed)
}

impl Armed {
    /// Whether what was read of the entry is this flow's.
    #[inline(always)]
    fn holds(&self) -> bool {
        // SAFETY: as in `find`.
        unsafe { read!(self.entry, cookie) == self.cookie }
    }
}

/// Whether an address is still what it was when this was found out.
#[inline(always)]
fn is_current(link: *const Link) -> bool {
    // SAFETY: as in `find`.
    let (slot, stamp) = unsafe { (read!(link, slot), read!(link, stamp)) };
    slot != 0 && maps::stamp(slot) == Some(stamp)
}

#[inline(always)]
fn place(link: *const Link) -> [u32; 4] {
    // SAFETY: as in `find`; word by word, since an array would be copied through the stack.
    unsafe {
        let words = (&raw const (*link).place).cast::<u32>();
        core::array::from_fn(|index| core::ptr::read_volatile(words.add(index)))
    }
}

/// Makes the frame one for a pod, whose MAC and its gateway's these are.
#[inline(always)]
unsafe fn into_pod(start: usize, [first, middle, last, _]: [u32; 4]) {
    // SAFETY: the caller has seen that the frame has its ethernet header.
    unsafe {
        store!("u32", start, 0, first);
        store!("u32", start, 4, middle);
        store!("u32", start, 8, last);
    }
}

/// One hop more, as in `forward`.
#[inline(always)]
unsafe fn one_hop(start: usize, v6: bool) {
    // SAFETY: the caller has seen that the frame has so many bytes, and `parse` that there are hops to spare.
    unsafe {
        if v6 {
            let hops = load!("u8", start, 21);
            store!("u8", start, 21, hops - 1);
        } else {
            let hops = load!("u8", start, 22);
            store!("u8", start, 22, hops - 1);
            let sum = u32::from((load!("u16", start, 24) as u16).to_be()) + 0x0100;
            let folded = (sum & 0xffff) + (sum >> 16);
            store!("u16", start, 24, (folded as u16).to_be());
        }
    }
}

/// Carries out what becomes of a packet that a pod sends; [`verdict::UNDECIDED`] where it has to take the stages, and is as it
/// was. A function of its own, with what it needs of the stack.
#[inline(never)]
pub fn from_pod(ctx: &TcContext) -> i32 {
    let mut action = Action::go_on(Path::Local);
    if pod_sends(ctx, &mut action) {
        verdict::forward(ctx, &action)
    } else {
        verdict::UNDECIDED
    }
}

/// The same for what comes from the tunnel.
#[inline(never)]
pub fn from_overlay(ctx: &TcContext) -> i32 {
    let mut action = Action::go_on(Path::Overlay);
    if overlay_delivers(ctx, &mut action) {
        verdict::forward(ctx, &action)
    } else {
        verdict::UNDECIDED
    }
}

#[inline(always)]
fn pod_sends(ctx: &TcContext, action: &mut Action) -> bool {
    let mut seen = Seen::new();
    if !look(ctx, &mut seen) {
        return false;
    }
    let Some(flow) = find(&seen) else {
        return false;
    };
    let (from, to) = (flow.from, flow.to);
    let own = place(from);
    let there = place(to);
    let start = ctx.data();
    if start + L3 + IPV4_LEN > ctx.data_end() {
        return false;
    }
    // SAFETY: as in `find`; the frame's bounds were just checked.
    unsafe {
        let ifindex = read!(to, ifindex);
        let identity = read!(from, identity);
        let is_own = read!(from, ifindex) == lookup::ifindex(ctx)
            && load!("u16", start, 0) as u32 == own[1] >> 16
            && load!("u32", start, 2) as u32 == own[2]
            && load!("u32", start, 6) as u32 == own[0]
            && load!("u16", start, 10) as u32 == own[1] & 0xffff;
        if !is_own || !flow.holds() {
            return false;
        }
        if ifindex != 0 {
            into_pod(start, there);
            one_hop(start, seen.v6);
            *action = Action::redirect(Path::Local, ifindex);
            return true;
        }
        if forward::into_tunnel(ctx, (seen.v6, seen.key.protocol), &there, identity, action).is_err() {
            return false;
        }
        one_hop(start, seen.v6);
    }
    true
}

#[inline(always)]
fn overlay_delivers(ctx: &TcContext, action: &mut Action) -> bool {
    let Some(config) = maps::config() else { return false };
    let by_v6 = config.underlay_family == Family::V6 as u8;
    // SAFETY: all zero is a value of this plain C struct.
    let mut tunnel: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    let flags = if by_v6 { u64::from(BPF_F_TUNINFO_IPV6) } else { 0 };
    // SAFETY: the context and the key are valid, and the size is the key's own.
    let failed =
        unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut tunnel, size_of::<bpf_tunnel_key>() as u32, flags) };
    let mut seen = Seen::new();
    if failed != 0 || !overlay::is_for_tunnel(&tunnel, config) || !look(ctx, &mut seen) {
        return false;
    }
    let Some(flow) = find(&seen) else {
        return false;
    };
    let (from, to) = (flow.from, flow.to);
    let node = place(from);
    let there = place(to);
    // SAFETY: as in `find`. The helper has filled in the address of the family that was asked for: in host byte order that
    // of IPv4, in network byte order that of IPv6.
    unsafe {
        let outer = if by_v6 {
            tunnel.__bindgen_anon_1.remote_ipv6
        } else {
            [tunnel.__bindgen_anon_1.remote_ipv4.to_be(), 0, 0, 0]
        };
        let ifindex = read!(to, ifindex);
        let is_its = read!(from, ifindex) == 0 && outer == node && Identity(tunnel.tunnel_id) == read!(from, identity);
        if !is_its || ifindex == 0 || !flow.holds() || forward::for_host(ctx).is_err() {
            return false;
        }
        let start = ctx.data();
        if start + ETHERNET_LEN > ctx.data_end() {
            return false;
        }
        into_pod(start, there);
        *action = Action::redirect(Path::Overlay, ifindex);
    }
    true
}

/// Lets the packets that follow on this flow take the fast path for a while, where they may.
#[inline(never)]
pub fn arm(flow: &Flow) {
    let is_plain = flow.state == ESTABLISHED
        && flow.fragment == Fragment::None
        && matches!(flow.protocol, TCP | UDP)
        && !flow.related;
    if !is_plain {
        return;
    }
    let Some(place) = conntrack::place(flow, &flow.ends) else {
        return;
    };
    let (Some(pointer), Some(scratch)) = (maps::CONNTRACK.get_ptr_mut(place.key), maps::scratch()) else {
        return;
    };
    // SAFETY: as in `conntrack::find`.
    let entry = unsafe { &mut (*scratch).found };
    let cookie = conntrack::cookie(place.key);
    let is_known = lru::copy_out(pointer, entry, cookie, 0);
    if !is_known || entry.state != ESTABLISHED || entry.generation != flow.generation {
        return;
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_jiffies64() };
    let life = conntrack::lifetime(flow.protocol, flow.state) / SECOND;
    let until = now + TICKS.min(life * TICKS_A_SECOND);
    if is_current(&raw const entry.links[0]) && is_current(&raw const entry.links[1]) {
        // Not for each packet that can't take it: all CPUs read that cache line.
        if entry.fast_until >= now {
            return;
        }
        // SAFETY: the element is valid memory (see `lru::copy_out`). Should it belong to another flow by now, that one takes
        // the fast path for a while longer, if it may at all.
        unsafe { core::ptr::write_volatile(&raw mut (*pointer).fast_until, until) };
        return;
    }
    entry.fast_until = until;
    let family = if flow.family == Family::V6 as u8 {
        Family::V6
    } else {
        Family::V4
    };
    if is_reached(
        AddressKey::new(family, place.key.lower),
        flow,
        &mut entry.links[0],
        entry.peers[0],
    ) && is_reached(
        AddressKey::new(family, place.key.upper),
        flow,
        &mut entry.links[1],
        entry.peers[1],
    ) {
        // Only where it is still there: what was forgotten meanwhile stays forgotten.
        let _ = maps::CONNTRACK.insert(place.key, &*entry, u64::from(BPF_EXIST));
        // What another CPU has noted of the flow meanwhile.
        // SAFETY: as in `find`.
        let (whose, state) = unsafe { (read!(pointer, cookie), read!(pointer, state)) };
        if whose == cookie && state != entry.state {
            conntrack::note(place.key, state);
        }
    }
}

/// Finds out how a pod's address is reached, where it is whose it was when the flow was judged.
#[inline(always)]
fn is_reached(key: AddressKey, flow: &Flow, link: &mut Link, peer: Peer) -> bool {
    // What is out of date already would only push something else out of the map.
    lookup::link(&key, flow.parity(), link, &peer) && is_current(link)
}
