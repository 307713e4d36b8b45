//! Connection tracking: which packets belong to a flow that policy has already let open.

use crate::{
    lookup::Party,
    lru, maps,
    packet::{Ends, Flow, Service, TCP, TCP_FIN, TCP_RST},
};
use abi::{
    ConntrackEntry, ConntrackKey, DropReason, NodeConfig,
    address::{Address, SHARED_SCOPE},
    conntrack::{
        Account, CONFIRMED, FIN_ORIGINAL, FIN_REPLY, FRONTEND, HAIRPIN, Link, NODE_PORT, Peer, RESET, SECOND,
        SEEN_REPLY, TRANSLATED, Translation, VIA_NODE,
    },
};
use aya_ebpf::{bindings::BPF_ANY, helpers::generated::bpf_ktime_get_ns};
use core::arch::asm;

/// Where a packet's flow is found, and which way the packet travels in it.
pub struct Place {
    pub key: &'static ConntrackKey,
    /// Where an entry is put together.
    entry: &'static mut ConntrackEntry,
    /// 0 where the lower end sent the packet, 1 where the upper end did.
    pub sender: u32,
}

/// A flow's entry, copied out of the map.
#[derive(Clone, Copy)]
pub struct Tracked {
    pub entry: &'static ConntrackEntry,
    /// The packet travels against the direction in which the flow was opened.
    pub reply: bool,
}

/// The same for both directions of a flow between these ends.
#[inline(always)]
pub fn place(flow: &Flow, ends: &Ends) -> Option<Place> {
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; nothing else refers to these parts while the place is used.
    let (key, entry) = unsafe { (&mut (*scratch).key, &mut (*scratch).entry) };
    let sender = fill(key, flow, ends);
    Some(Place { key, entry, sender })
}

#[inline(never)]
fn fill(to: &mut ConntrackKey, flow: &Flow, ends: &Ends) -> u32 {
    key(to, ends, flow.family, flow.protocol)
}

/// Fills in a key; 1 where the upper end is the sender.
#[inline(always)]
pub fn key(key: &mut ConntrackKey, ends: &Ends, family: u8, protocol: u8) -> u32 {
    let sender_is_upper = is_above(ends);
    if sender_is_upper {
        key.lower = ends.destination;
        key.upper = ends.source;
        key.lower_port = ends.destination_port;
        key.upper_port = ends.source_port;
    } else {
        key.lower = ends.source;
        key.upper = ends.destination;
        key.lower_port = ends.source_port;
        key.upper_port = ends.destination_port;
    }
    key.scope = SHARED_SCOPE;
    key.family = family;
    key.protocol = protocol;
    u32::from(sender_is_upper)
}

/// Whether (source, port) is above (destination, port).
#[inline(always)]
fn is_above(ends: &Ends) -> bool {
    let (source, destination) = (ends.source.words(), ends.destination.words());
    for (source, destination) in source.into_iter().zip(destination) {
        if source != destination {
            return source > destination;
        }
    }
    ends.source_port > ends.destination_port
}

/// A hash of the key: what an entry says whose it is. Multilinear and mixed at the end, which takes the processor less time
/// than one word after the other; never zero.
#[inline(always)]
pub fn cookie(key: &ConntrackKey) -> u64 {
    // Digits of the golden ratio, of pi and of e, made odd.
    const FACTORS: [u64; 5] = [
        0x9e37_79b9_7f4a_7c15,
        0x243f_6a88_85a3_08d3,
        0x1319_8a2e_0370_7345,
        0xb7e1_5162_8aed_2a6b,
        0xbf71_5880_9cf4_f3c7,
    ];
    let ports = u64::from(key.lower_port) << 32 | u64::from(key.upper_port) << 16 | u64::from(key.protocol);
    let words = [
        word(&key.lower, 0),
        word(&key.lower, 2),
        word(&key.upper, 0),
        word(&key.upper, 2),
        ports,
    ];
    let mut sum = 0_u64;
    for (part, factor) in words.into_iter().zip(FACTORS) {
        // Of a product only bits above those of the factors tell: IPv4 has one half alone.
        sum = sum.wrapping_add((part ^ part >> 32).wrapping_mul(factor));
    }
    sum = (sum ^ sum >> 32).wrapping_mul(FACTORS[0]);
    (sum ^ sum >> 29) | 1
}

/// Half of an address.
#[inline(always)]
fn word(address: &Address, at: usize) -> u64 {
    let words = address.words();
    u64::from(words[at]) << 32 | u64::from(words[at + 1])
}

/// FNV-1a over 64-bit words; never zero.
#[inline(always)]
pub fn hash(one: &Address, other: &Address, rest: u64) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in [word(one, 0), word(one, 2), word(other, 0), word(other, 2), rest] {
        hash = (hash ^ part).wrapping_mul(PRIME);
        hash ^= hash >> 29;
    }
    hash | 1
}

/// The live entry of a flow.
#[inline(always)]
pub fn find(place: &Place, now: u64) -> Option<Tracked> {
    if !copy_out(place.key, now) {
        return None;
    }
    // SAFETY: nothing writes this part but `copy_out`, and nothing refers any more to what was found before.
    let entry = unsafe { &(*maps::scratch()?).found };
    Some(Tracked {
        entry,
        reply: entry.originator != place.sender,
    })
}

/// Copies a live entry out of the map; false where there is none.
#[inline(never)]
fn copy_out(key: &ConntrackKey, now: u64) -> bool {
    let (Some(pointer), Some(scratch)) = (maps::CONNTRACK.get_ptr(key), maps::scratch()) else {
        return false;
    };
    // SAFETY: as in `find`.
    let found = unsafe { &mut (*scratch).found };
    lru::copy_out(pointer, found, cookie(key), now)
}

impl Tracked {
    /// Whether the flow was closed or reset, so that a SYN on it opens another one.
    #[inline(always)]
    pub fn is_closed(&self) -> bool {
        let fins = FIN_ORIGINAL | FIN_REPLY;
        self.entry.state & RESET != 0 || self.entry.state & fins == fins
    }

    /// Whether it is a flow, and between those who have its addresses now. If not, it is none of theirs.
    #[inline(always)]
    pub fn is_flow_between(&self, peers: &[Peer; 2]) -> bool {
        self.entry.state & FRONTEND == 0
            && self.entry.peers[0].owner == peers[0].owner
            && self.entry.peers[1].owner == peers[1].owner
    }

    /// Whether the verdict still holds: same generation, and both addresses mean what they meant.
    #[inline(always)]
    pub fn is_current(&self, flow: &Flow, peers: [Peer; 2]) -> bool {
        self.entry.generation == flow.generation && self.entry.peers[0] == peers[0] && self.entry.peers[1] == peers[1]
    }

    /// Whether the flow goes to a service's backend.
    #[inline(always)]
    pub fn is_translated(&self) -> bool {
        self.entry.state & TRANSLATED != 0
    }

    /// Whether it does, and the packet comes from there.
    #[inline(always)]
    pub fn is_answer(&self) -> bool {
        self.reply && self.is_translated()
    }

    /// Notes by way of which node a packet goes back to a client outside.
    #[inline(always)]
    pub fn goes_via_node(&self, flow: &mut Flow) {
        if self.reply && self.entry.state & VIA_NODE != 0 {
            flow.via = self.entry.translation.address;
        }
    }

    /// Notes what becomes of a packet that comes from a service's backend.
    #[inline(always)]
    pub fn answer(&self, flow: &mut Flow) {
        let frontend = &self.entry.translation;
        flow.service = Service::Answered;
        flow.leaves = self.entry.state & NODE_PORT != 0;
        flow.hairpin = self.entry.state & HAIRPIN != 0;
        flow.seen = flow.ends;
        flow.becomes = Ends {
            source: frontend.address,
            // Who reaches itself is its own backend.
            destination: if flow.hairpin {
                flow.ends.source
            } else {
                flow.ends.destination
            },
            source_port: frontend.port,
            destination_port: frontend.client_port,
        };
    }
}

/// The parties as an entry holds them: lower end, upper end.
#[inline(always)]
pub fn peers(place: &Place, from: &Party, to: &Party) -> [Peer; 2] {
    if place.sender == 0 {
        [from.peer, to.peer]
    } else {
        [to.peer, from.peer]
    }
}

/// Notes a packet of a flow whose verdict holds.
#[inline(always)]
pub fn touch(place: &Place, tracked: &Tracked, flow: &mut Flow, now: u64) {
    let state = next_state(flow, tracked.reply, tracked.entry.state);
    (flow.state, flow.expires) = (state, now + lifetime(flow.protocol, state));
    // A packet that is about the flow (an ICMP error) does not keep it alive.
    if flow.related || (state == tracked.entry.state && !is_later(flow, tracked.entry.expires)) {
        return;
    }
    if let Some(pointer) = maps::CONNTRACK.get_ptr_mut(place.key) {
        // SAFETY: the element is valid memory (see `lru::copy_out`). Should it belong to another flow by now, that flow gets
        // a wrong time-out at worst: neither verdict nor peers are written here.
        unsafe {
            core::ptr::write_volatile(&raw mut (*pointer).expires, flow.expires);
            core::ptr::write_volatile(&raw mut (*pointer).state, state);
        }
        // Another CPU may have put a new entry in its place, with what it had read before.
        if state != tracked.entry.state && maps::CONNTRACK.get_ptr_mut(place.key) != Some(pointer) {
            note(place.key, state);
        }
    }
}

/// Notes a flow's state where its entry is now.
#[inline(always)]
pub fn note(key: &ConntrackKey, state: u32) {
    if let Some(pointer) = maps::CONNTRACK.get_ptr_mut(key) {
        // SAFETY: as in `touch`.
        unsafe { core::ptr::write_volatile(&raw mut (*pointer).state, state) };
    }
}

/// Whether the flow lives longer by this packet than an entry says. A flow at full rate would write the same cache line from
/// every CPU: a second's precision is enough, or a quarter of a life that is short.
#[inline(always)]
pub fn is_later(flow: &Flow, expires: u64) -> bool {
    let life = lifetime(flow.protocol, flow.state);
    flow.expires.wrapping_sub(expires) >= SECOND.min(life / 4)
}

/// Enters a flow that policy lets open, on this account. Where the map is nearly full each pod has its share of it, so
/// that none pushes out another's flows.
#[inline(always)]
pub fn open(place: &mut Place, flow: &mut Flow, peers: [Peer; 2], account: u32, now: u64) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    let all = maps::TRACKED.get_ptr_mut(0).ok_or(DropReason::Internal)?;
    let own = maps::ACCOUNTS.get_ptr_mut(&account);
    if !has_room(config, all, own) {
        return Err(DropReason::ConntrackShare);
    }
    if !enter(place, None, flow, peers, account, now) {
        return Err(DropReason::ConntrackFull);
    }
    count(1, all, own);
    Ok(())
}

/// Whether an account may have another entry.
#[inline(always)]
fn has_room(config: &NodeConfig, all: *const u64, own: Option<*mut Account>) -> bool {
    // SAFETY: as in `lru::copy_out`; hostd may set either number meanwhile.
    unsafe {
        core::ptr::read_volatile(all) < u64::from(config.conntrack_limit)
            || own.is_some_and(|own| {
                core::ptr::read_volatile(&raw const (*own).flows) < u64::from(config.conntrack_share)
            })
    }
}

/// Enters what becomes of what a client sends to a frontend, on the client's account, for as long as its flow lives.
/// Where the map takes no entry the next packet finds its backend as this one did.
#[inline(never)]
pub fn keep_frontend(flow: &Flow, client: &Party, backend: &Party) {
    let account = client.peer.owner;
    let (Some(config), Some(all)) = (maps::config(), maps::TRACKED.get_ptr_mut(0)) else {
        return;
    };
    let own = maps::ACCOUNTS.get_ptr_mut(&account);
    let is_new = flow.frontend_expires == 0;
    if is_new && !has_room(config, all, own) {
        return;
    }
    let Some(place) = place(flow, &flow.seen) else { return };
    let entry = place.entry;
    entry.cookie = cookie(place.key);
    entry.expires = flow.expires;
    (entry.fast_until, entry.links) = (0, [Link::NONE; 2]);
    entry.generation = flow.generation;
    entry.state = FRONTEND | if flow.hairpin { HAIRPIN } else { 0 };
    entry.peers = if place.sender == 0 {
        [client.peer, backend.peer]
    } else {
        [backend.peer, client.peer]
    };
    entry.originator = place.sender;
    entry.account = account;
    entry.translation = Translation {
        address: flow.becomes.destination,
        port: flow.becomes.destination_port,
        client_port: flow.becomes.source_port,
        backend: flow.translation.backend,
    };
    if maps::CONNTRACK.insert(place.key, &*entry, u64::from(BPF_ANY)).is_ok() && is_new {
        count(1, all, own);
    }
}

/// Adds to a number that other CPUs add to as well.
#[inline(always)]
fn add(number: *mut u64, by: i64) {
    // SAFETY: the number is a field of a map's element, aligned, and valid as long as the program runs. The instruction is
    // BPF's `BPF_ATOMIC | BPF_ADD` (RFC 9669, section 5.3), for which this target's `core` has no name.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) number, in(reg) by, options(nostack)) };
}

/// Adds to the numbers of entries: of all, and of a pod's.
#[inline(always)]
fn count(by: i64, all: *mut u64, own: Option<*mut Account>) {
    add(all, by);
    if let Some(own) = own {
        // SAFETY: only the field's address is taken.
        add(unsafe { &raw mut (*own).flows }, by);
    }
}

/// Renews a flow that policy lets go on. Where the map takes no entry the next packet is judged as this one was.
#[inline(always)]
pub fn renew(place: &mut Place, known: &Tracked, flow: &mut Flow, peers: [Peer; 2], now: u64) {
    enter(place, Some(known), flow, peers, known.entry.account, now);
}

/// False where the map took no entry.
#[inline(always)]
fn enter(
    place: &mut Place,
    known: Option<&Tracked>,
    flow: &mut Flow,
    peers: [Peer; 2],
    account: u32,
    now: u64,
) -> bool {
    let (reply, state, translation) = match known {
        Some(known) => (known.reply, known.entry.state, known.entry.translation),
        None => (false, translated(flow), flow.translation),
    };
    let state = next_state(flow, reply, state);
    (flow.state, flow.expires) = (state, now + lifetime(flow.protocol, state));
    let entry = &mut *place.entry;
    entry.cookie = cookie(place.key);
    entry.expires = flow.expires;
    (entry.fast_until, entry.links) = (0, [Link::NONE; 2]);
    entry.translation = translation;
    entry.generation = flow.generation;
    entry.state = state;
    entry.peers = peers;
    entry.originator = if reply { 1 - place.sender } else { place.sender };
    entry.account = account;
    maps::CONNTRACK.insert(place.key, &*entry, u64::from(BPF_ANY)).is_ok()
}

/// What a new flow's state says of a service.
#[inline(always)]
fn translated(flow: &Flow) -> u32 {
    let flag = |is: bool, flag: u32| if is { flag } else { 0 };
    match flow.service {
        Service::Asked => TRANSLATED | flag(flow.hairpin, HAIRPIN) | flag(flow.from_outside, NODE_PORT),
        _ => flag(flow.via != Address::NONE, VIA_NODE),
    }
}

/// Forgets a flow that policy lets go on no longer.
#[inline(always)]
pub fn forget(place: &Place, known: &Tracked) {
    // Already gone is as good.
    if maps::CONNTRACK.remove(place.key).is_ok()
        && let Some(all) = maps::TRACKED.get_ptr_mut(0)
    {
        count(-1, all, maps::ACCOUNTS.get_ptr_mut(&known.entry.account));
    }
}

/// Time, in nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// What is known of a flow after this packet of it.
#[inline(always)]
fn next_state(flow: &Flow, reply: bool, before: u32) -> u32 {
    if flow.related {
        return before;
    }
    let mut state = before;
    if reply {
        state |= SEEN_REPLY;
    } else if before & SEEN_REPLY != 0 && !flow.is_syn() {
        state |= CONFIRMED;
    }
    if flow.protocol != TCP {
        return state;
    }
    if flow.tcp_flags & TCP_FIN != 0 {
        state |= if reply { FIN_REPLY } else { FIN_ORIGINAL };
    }
    // One that somebody has made up ends nothing: a flow that goes on is none that was reset.
    if flow.tcp_flags & TCP_RST != 0 {
        state | RESET
    } else {
        state & !RESET
    }
}

/// Nanoseconds that a flow lives without another packet.
#[inline(always)]
pub fn lifetime(protocol: u8, state: u32) -> u64 {
    // Without a configuration nothing gets here.
    let Some(config) = maps::config() else { return 0 };
    let after = &config.timeouts;
    let fins = state & (FIN_ORIGINAL | FIN_REPLY);
    let seconds = if protocol != TCP {
        if state & SEEN_REPLY != 0 {
            after.assured
        } else {
            after.unreplied
        }
    } else if state & RESET != 0 || fins == FIN_ORIGINAL | FIN_REPLY {
        after.tcp_closed
    } else if fins != 0 {
        after.tcp_half_closed
    } else if state & CONFIRMED != 0 {
        after.tcp_established
    } else {
        after.tcp_syn
    };
    u64::from(seconds) * SECOND
}
