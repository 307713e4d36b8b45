//! Connection tracking: which packets belong to a flow that policy has already let open.

use crate::{
    lookup::Party,
    maps,
    packet::{Flow, TCP, TCP_FIN, TCP_RST},
};
use abi::{
    ConntrackEntry, ConntrackKey, DropReason,
    address::{Address, SHARED_SCOPE},
    conntrack::{Account, CONFIRMED, FIN_ORIGINAL, FIN_REPLY, Peer, RESET, SECOND, SEEN_REPLY},
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
    pub entry: ConntrackEntry,
    /// The packet travels against the direction in which the flow was opened.
    pub reply: bool,
}

/// The same for both directions of a flow.
#[inline(always)]
pub fn place(flow: &Flow) -> Option<Place> {
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; these parts are taken once a packet, here.
    let (key, entry) = unsafe { (&mut (*scratch).key, &mut (*scratch).entry) };
    let sender_is_upper = is_above(flow);
    if sender_is_upper {
        key.lower = flow.destination;
        key.upper = flow.source;
        key.lower_port = flow.destination_port;
        key.upper_port = flow.source_port;
    } else {
        key.lower = flow.source;
        key.upper = flow.destination;
        key.lower_port = flow.source_port;
        key.upper_port = flow.destination_port;
    }
    key.scope = SHARED_SCOPE;
    key.family = flow.family;
    key.protocol = flow.protocol;
    Some(Place {
        key,
        entry,
        sender: u32::from(sender_is_upper),
    })
}

/// Whether (source, port) is above (destination, port).
#[inline(always)]
fn is_above(flow: &Flow) -> bool {
    let (source, destination) = (
        u128::from_ne_bytes(flow.source.0),
        u128::from_ne_bytes(flow.destination.0),
    );
    if source == destination {
        flow.source_port > flow.destination_port
    } else {
        source > destination
    }
}

/// A hash of the key: what an entry says whose it is.
#[inline(always)]
fn cookie(key: &ConntrackKey) -> u64 {
    let ports = u64::from(key.lower_port) << 32 | u64::from(key.upper_port) << 16 | u64::from(key.protocol);
    hash(&key.lower, &key.upper, ports)
}

/// FNV-1a over 64-bit words; never zero.
#[inline(always)]
pub fn hash(one: &Address, other: &Address, rest: u64) -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let word = |address: &Address, at: usize| {
        let words = address.words();
        u64::from(words[at]) << 32 | u64::from(words[at + 1])
    };
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
    let pointer = maps::CONNTRACK.get_ptr(place.key)?;
    let cookie = cookie(place.key);
    // SAFETY: the kernel never unmaps an LRU element, it only gives it to another key: the reads are of valid memory.
    // They are volatile because that may happen at any moment; the cookie, read before and after the copy, tells.
    let (before, entry, after) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*pointer).cookie),
            core::ptr::read_volatile(pointer),
            core::ptr::read_volatile(&raw const (*pointer).cookie),
        )
    };
    if before != cookie || after != cookie || entry.expires <= now {
        return None;
    }
    Some(Tracked {
        entry,
        reply: entry.originator != place.sender,
    })
}

impl Tracked {
    /// Whether the flow was closed or reset, so that a SYN on it opens another one.
    #[inline(always)]
    pub fn is_closed(&self) -> bool {
        let fins = FIN_ORIGINAL | FIN_REPLY;
        self.entry.state & RESET != 0 || self.entry.state & fins == fins
    }

    /// Whether the flow is between those who have its addresses now. If not, it is none of theirs.
    #[inline(always)]
    pub fn is_between(&self, peers: &[Peer; 2]) -> bool {
        self.entry.peers[0].owner == peers[0].owner && self.entry.peers[1].owner == peers[1].owner
    }

    /// Whether the verdict still holds: same generation, and both addresses mean what they meant.
    #[inline(always)]
    pub fn is_current(&self, flow: &Flow, peers: [Peer; 2]) -> bool {
        self.entry.generation == flow.generation && self.entry.peers[0] == peers[0] && self.entry.peers[1] == peers[1]
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
pub fn touch(place: &Place, tracked: &Tracked, flow: &Flow, now: u64) {
    let state = next_state(flow, tracked.reply, tracked.entry.state);
    let expires = now + lifetime(flow.protocol, state);
    // A flow at full rate would write the same cache line from every CPU; a second's precision is enough. A packet
    // that is about the flow (an ICMP error) does not keep it alive.
    let same_time = expires.wrapping_sub(tracked.entry.expires) < SECOND;
    if flow.related || (state == tracked.entry.state && same_time) {
        return;
    }
    if let Some(pointer) = maps::CONNTRACK.get_ptr_mut(place.key) {
        // SAFETY: the element is valid memory (see `find`). Should it belong to another flow by now, that flow gets
        // a wrong time-out at worst: neither verdict nor peers are written here.
        unsafe {
            core::ptr::write_volatile(&raw mut (*pointer).expires, expires);
            core::ptr::write_volatile(&raw mut (*pointer).state, state);
        }
    }
}

/// Enters a flow that policy lets open, on this account. Where the map is nearly full each pod has its share of it, so
/// that none pushes out another's flows.
#[inline(always)]
pub fn open(place: &mut Place, flow: &Flow, peers: [Peer; 2], account: u32, now: u64) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    let all = maps::TRACKED.get_ptr_mut(0).ok_or(DropReason::Internal)?;
    let own = maps::ACCOUNTS.get_ptr_mut(&account);
    // SAFETY: as in `find`; hostd may set either number meanwhile.
    unsafe {
        let is_full = core::ptr::read_volatile(all) >= u64::from(config.conntrack_limit);
        let is_spent = own
            .is_none_or(|own| core::ptr::read_volatile(&raw const (*own).flows) >= u64::from(config.conntrack_share));
        if is_full && is_spent {
            return Err(DropReason::ConntrackShare);
        }
    }
    if !enter(place, None, flow, peers, account, now) {
        return Err(DropReason::ConntrackFull);
    }
    count(1, all, own);
    Ok(())
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
pub fn renew(place: &mut Place, known: &Tracked, flow: &Flow, peers: [Peer; 2], now: u64) {
    enter(place, Some(known), flow, peers, known.entry.account, now);
}

/// False where the map took no entry.
#[inline(always)]
fn enter(place: &mut Place, known: Option<&Tracked>, flow: &Flow, peers: [Peer; 2], account: u32, now: u64) -> bool {
    let (reply, state) = known.map_or((false, 0), |tracked| (tracked.reply, tracked.entry.state));
    let state = next_state(flow, reply, state);
    let entry = &mut *place.entry;
    entry.cookie = cookie(place.key);
    entry.expires = now + lifetime(flow.protocol, state);
    entry.generation = flow.generation;
    entry.state = state;
    entry.peers = peers;
    entry.originator = if reply { 1 - place.sender } else { place.sender };
    entry.account = account;
    maps::CONNTRACK.insert(place.key, &*entry, u64::from(BPF_ANY)).is_ok()
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
fn lifetime(protocol: u8, state: u32) -> u64 {
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
