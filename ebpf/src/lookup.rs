//! What the maps say of an address: pods of this node, addresses of the cluster, and everything else.

use crate::{maps, packet::Flow};
use abi::{
    AddressKey, Family, Identity,
    address::Address,
    conntrack::{Link, Peer},
    ipcache::{IPCACHE_HOST, IPCACHE_NODE, IPCACHE_SERVICE},
    network::{NETWORK_KEY_BITS, UNROUTED},
    policy::NOT_ENFORCED,
};
use aya_ebpf::{btf_maps::lpm_trie::Key, programs::TcContext};

/// One end of a flow, as policy and conntrack see it.
#[derive(Clone, Copy)]
pub struct Party {
    pub identity: Identity,
    /// Row in the policy matrix, or [`NOT_ENFORCED`] where this node does not enforce this end's policy.
    pub row: u32,
    pub column: u32,
    /// Owner and epoch of the address.
    pub peer: Peer,
}

impl Party {
    /// Not known yet.
    #[inline(always)]
    pub fn new() -> Self {
        reserved(Identity::NONE)
    }
}

/// A pod of this node, copied out of the map.
pub struct Pod {
    pub party: Party,
    pub ifindex: u32,
    /// MAC addresses of the pod and of its gateway, one after the other: the beginning of a frame for the pod.
    pub macs: [u32; 3],
}

impl Pod {
    #[inline(always)]
    pub fn mac(&self) -> [u8; 6] {
        let [first, middle, _] = self.macs.map(u32::to_ne_bytes);
        [first[0], first[1], first[2], first[3], middle[0], middle[1]]
    }

    #[inline(always)]
    pub fn gateway_mac(&self) -> [u8; 6] {
        let [_, middle, last] = self.macs.map(u32::to_ne_bytes);
        [middle[2], middle[3], last[0], last[1], last[2], last[3]]
    }
}

/// An address of the cluster, copied out of the map.
pub struct Known {
    pub party: Party,
    /// Underlay address of its node, in words in network byte order.
    pub tunnel: [u32; 4],
    pub tunnel_family: u8,
    pub identity: [Identity; 2],
    /// [`IPCACHE_HOST`], [`IPCACHE_SERVICE`], [`IPCACHE_NODE`] or zero.
    pub flags: u8,
}

impl Known {
    /// Not known yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            party: reserved(Identity::NONE),
            tunnel: [0; 4],
            tunnel_family: 0,
            identity: [Identity::NONE; 2],
            flags: 0,
        }
    }

    /// Another node has it; behind a tunnel, unless several nodes do.
    #[inline(always)]
    pub fn is_node(&self) -> bool {
        self.flags & IPCACHE_NODE != 0
    }

    #[inline(always)]
    pub fn is_host(&self) -> bool {
        self.flags & IPCACHE_HOST != 0
    }

    /// Nobody has it: it stands for a service's backends.
    #[inline(always)]
    pub fn is_service(&self) -> bool {
        self.flags & IPCACHE_SERVICE != 0
    }
}

/// Interface that the program runs on.
#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    unsafe { (*ctx.skb.skb).ifindex }
}

#[inline(always)]
pub fn key(flow: &Flow, address: Address) -> AddressKey {
    let family = if flow.family == Family::V6 as u8 {
        Family::V6
    } else {
        Family::V4
    };
    AddressKey::new(family, address)
}

/// Reads a field that hostd, or the kernel for another key, may be writing: whether the value holds is known only
/// after the stamps were read once more.
macro_rules! volatile {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: the pointer is to an element of a map, whose memory is never unmapped while programs run. All fields
        // are integers, for which any bytes are a value.
        unsafe { core::ptr::read_volatile(&raw const (*$pointer).$($field)+) }
    };
}

/// The same for what is read word by word: an array would be copied through the stack.
macro_rules! volatile_words {
    ($pointer:expr, $field:ident) => {{
        // SAFETY: as in `volatile`.
        unsafe {
            let words = (&raw const (*$pointer).$field).cast::<u32>();
            core::array::from_fn(|index| core::ptr::read_volatile(words.add(index)))
        }
    }};
}

/// What a look at an entry has found.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Look {
    Nothing,
    /// It was replaced under the reader's eyes.
    Torn,
    Whole,
}

/// Looks at an entry: it is believed only where its stamps and its address say, before and after the fields were read,
/// that it is one entry, whole.
macro_rules! look {
    ($map:expr, $key:expr, |$entry:ident| $read:block) => {{
        let Some($entry) = $map.get_ptr($key) else {
            return Look::Nothing;
        };
        let stamp = volatile!($entry, first_stamp);
        let whole_before = volatile!($entry, last_stamp) == stamp;
        $read
        let address: [u32; 4] = volatile_words!($entry, address);
        let whole_after = volatile!($entry, last_stamp) == stamp && volatile!($entry, first_stamp) == stamp;
        if whole_before && whole_after && address == $key.address.words() {
            Look::Whole
        } else {
            Look::Torn
        }
    }};
}

#[inline(never)]
fn look_at_endpoint(key: &AddressKey, parity: usize, pod: &mut Pod) -> Look {
    look!(maps::ENDPOINTS, key, |entry| {
        pod.party.identity = volatile!(entry, identity[parity & 1]);
        pod.party.row = volatile!(entry, row[parity & 1]);
        pod.party.column = volatile!(entry, column[parity & 1]);
        pod.party.peer.owner = volatile!(entry, owner);
        pod.party.peer.epoch = volatile!(entry, epoch);
        pod.ifindex = volatile!(entry, ifindex);
        pod.macs = volatile_words!(entry, macs);
    })
}

/// Looks into the ipcache, or into the map of nodes, whose entries are alike.
macro_rules! look_at_address {
    ($map:expr, $key:expr, $parity:expr, $known:expr) => {
        look!($map, $key, |entry| {
            $known.party.identity = volatile!(entry, identity[$parity & 1]);
            $known.party.row = NOT_ENFORCED;
            $known.party.column = volatile!(entry, column[$parity & 1]);
            $known.party.peer.owner = volatile!(entry, owner);
            $known.party.peer.epoch = volatile!(entry, epoch);
            $known.tunnel = volatile_words!(entry, tunnel_endpoint);
            $known.tunnel_family = volatile!(entry, tunnel_family);
            $known.identity = [volatile!(entry, identity[0]), volatile!(entry, identity[1])];
            $known.flags = volatile!(entry, flags);
        })
    };
}

#[inline(never)]
fn look_at_address(key: &AddressKey, parity: usize, known: &mut Known) -> Look {
    look_at_address!(maps::IPCACHE, key, parity, known)
}

#[inline(never)]
fn look_at_node(key: &AddressKey, parity: usize, known: &mut Known) -> Look {
    look_at_address!(maps::NODES, key, parity, known)
}

#[inline(never)]
fn look_at_near_link(key: &AddressKey, parity: usize, link: &mut Link, peer: &mut Peer) -> Look {
    look!(maps::ENDPOINTS, key, |entry| {
        link.slot = volatile!(entry, slot);
        link.stamp = volatile!(entry, first_stamp);
        link.ifindex = volatile!(entry, ifindex);
        link.identity = volatile!(entry, identity[parity & 1]);
        let macs: [u32; 3] = volatile_words!(entry, macs);
        link.place = [macs[0], macs[1], macs[2], 0];
        peer.owner = volatile!(entry, owner);
        peer.epoch = volatile!(entry, epoch);
    })
}

#[inline(never)]
fn look_at_far_link(key: &AddressKey, parity: usize, link: &mut Link, peer: &mut Peer) -> Look {
    look!(maps::IPCACHE, key, |entry| {
        link.ifindex = 0;
        link.identity = volatile!(entry, identity[parity & 1]);
        // Nothing else has a tunnel, and the tunnel carries no other identity from a pod.
        let is_far = volatile!(entry, tunnel_family) != 0 && link.identity.is_allocated();
        link.slot = if is_far { volatile!(entry, slot) } else { 0 };
        link.stamp = volatile!(entry, first_stamp);
        link.place = volatile_words!(entry, tunnel_endpoint);
        peer.owner = volatile!(entry, owner);
        peer.epoch = volatile!(entry, epoch);
    })
}

/// How a pod's address is reached, where it is still whose it was; false where there is no telling.
#[inline(always)]
pub fn link(key: &AddressKey, parity: usize, link: &mut Link, whose: &Peer) -> bool {
    let mut peer = Peer { owner: 0, epoch: 0 };
    let look = match look_at_near_link(key, parity, link, &mut peer) {
        Look::Nothing => look_at_far_link(key, parity, link, &mut peer),
        near => near,
    };
    look == Look::Whole && link.slot != 0 && peer == *whose
}

/// A pod of this node. An entry that is replaced just as it is read is looked at once more: that was one write of hostd's.
#[inline(always)]
pub fn endpoint(key: &AddressKey, parity: usize) -> Option<Pod> {
    let mut pod = Pod {
        party: reserved(Identity::NONE),
        ifindex: 0,
        macs: [0; 3],
    };
    let mut look = look_at_endpoint(key, parity, &mut pod);
    if look == Look::Torn {
        look = look_at_endpoint(key, parity, &mut pod);
    }
    (look == Look::Whole).then_some(pod)
}

/// An address of the cluster, likewise.
#[inline(always)]
pub fn ipcache(key: &AddressKey, parity: usize) -> Option<Known> {
    let mut known = Known::new();
    let mut look = look_at_address(key, parity, &mut known);
    if look == Look::Torn {
        look = look_at_address(key, parity, &mut known);
    }
    (look == Look::Whole).then_some(known)
}

/// Whether a node has the address.
#[inline(always)]
pub fn is_node(key: &AddressKey) -> bool {
    maps::NODES.get_ptr(key).is_some()
}

/// An address of another node, or of several. It is in this CPU's scratch until somebody else is looked up: callers have little room on
/// the stack (512 bytes for all of a chain of calls, on Linux 6.1 also for programs that have more of their own later).
#[inline(always)]
pub fn node(key: &AddressKey, parity: usize) -> Option<&'static Known> {
    let known = outsider()?;
    let mut look = look_at_node(key, parity, known);
    if look == Look::Torn {
        look = look_at_node(key, parity, known);
    }
    (look == Look::Whole).then_some(known)
}

#[inline(always)]
fn outsider() -> Option<&'static mut Known> {
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; nothing else refers to this part, and what was found before is not used any more.
    Some(unsafe { &mut (*scratch).outsider })
}

/// Whether it is the underlay address of another node, by which packets come through the tunnel and go into it.
#[inline(never)]
pub fn is_underlay(key: &AddressKey, parity: usize) -> bool {
    node(key, parity).is_some_and(|known| known.tunnel_family == key.family && known.tunnel == key.address.words())
}

/// An address that is no pod's has no owner. What it is takes the place of the epoch, so that its flows are judged again
/// when that changes, also without a change of policy: a node that joins, an address that moves.
#[inline(always)]
const fn nobodys(identity: Identity) -> Peer {
    Peer {
        owner: 0,
        epoch: identity.0,
    }
}

#[inline(always)]
pub fn reserved(identity: Identity) -> Party {
    Party {
        identity,
        row: NOT_ENFORCED,
        column: identity.0,
        peer: nobodys(identity),
    }
}

/// What an address is that the ipcache does not know: another node, or whatever the networks say of it. `None` where
/// nothing is routed to or from it. As in [`node`] it is in this CPU's scratch.
#[inline(always)]
pub fn outside(flow: &Flow, address: &AddressKey) -> Option<&'static Known> {
    if is_outside(flow, address) {
        outsider().map(|known| &*known)
    } else {
        None
    }
}

#[inline(never)]
fn is_outside(flow: &Flow, address: &AddressKey) -> bool {
    if node(address, flow.parity()).is_some() {
        if let Some(known) = outsider() {
            known.party.peer = nobodys(known.party.identity);
        }
        return true;
    }
    let Some(known) = outsider() else { return false };
    *known = Known::new();
    let party = &mut known.party;
    let Some(scratch) = maps::scratch() else { return false };
    // SAFETY: as in `Flow::begin`; nothing else refers to this part.
    let key: &mut Key<AddressKey> = unsafe { &mut (*scratch).network };
    let bits = if address.family == Family::V6 as u8 { 128 } else { 32 };
    *key = Key::new(NETWORK_KEY_BITS + bits, *address);
    let Some(entry) = maps::NETWORKS.get(&*key) else {
        *party = reserved(Identity::WORLD);
        return true;
    };
    if entry.flags & UNROUTED != 0 {
        return false;
    }
    // From map memory by the parity: see `endpoint`.
    let entry = core::ptr::from_ref(entry);
    let identity = volatile!(entry, identity[flow.parity()]);
    *party = Party {
        column: volatile!(entry, column[flow.parity()]),
        ..reserved(identity)
    };
    true
}
