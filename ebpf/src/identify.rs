//! Who sends and who receives: endpoints and ipcache turned into the two parties of a flow.
//!
//! A function that is called answers through a reference and returns a scalar: what it returned in the caller's stack it
//! would do by a pointer that may be left in `r0`, which the verifier takes for a pointer that is returned.

use crate::{
    maps,
    packet::{Flow, UDP},
    parse::Frame,
};
use abi::{
    AddressKey, DropReason, Family, Identity,
    address::Address,
    conntrack::Peer,
    ipcache::IPCACHE_HOST,
    network::{NETWORK_KEY_BITS, UNROUTED},
    policy::NOT_ENFORCED,
};
use aya_ebpf::{
    bindings::{
        BPF_F_TUNINFO_IPV6, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED, bpf_fib_lookup, bpf_tunnel_key,
    },
    btf_maps::lpm_trie::Key,
    helpers::{bpf_skb_get_tunnel_key, generated},
    programs::TcContext,
};

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
struct Known {
    party: Party,
    /// Underlay address of its node, in words in network byte order.
    tunnel: [u32; 4],
    tunnel_family: u8,
    identity: [Identity; 2],
    /// [`IPCACHE_HOST`] or zero.
    flags: u8,
}

impl Known {
    #[inline(always)]
    fn is_host(&self) -> bool {
        self.flags & IPCACHE_HOST != 0
    }
}

/// How a packet gets to where it goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Into a pod of this node.
    Pod,
    /// Up this node's own stack, to itself.
    Host,
    /// Up this node's own stack, which routes it: no pod, and not this node.
    Outside,
    /// Through the tunnel.
    Remote,
}

/// Where a packet goes. What does not belong to its way is zero.
pub struct Place {
    pub way: Way,
    pub ifindex: u32,
    /// As in [`Pod`].
    pub macs: [u32; 3],
    /// Underlay address of the node that it lives behind, in words in network byte order.
    pub tunnel: [u32; 4],
}

/// Whom a pod's packet is for.
pub struct Receiver {
    pub party: Party,
    pub place: Place,
}

impl Receiver {
    /// Not known yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            party: reserved(Identity::NONE),
            place: Place {
                way: Way::Host,
                ifindex: 0,
                macs: [0; 3],
                tunnel: [0; 4],
            },
        }
    }
}

impl Outer {
    /// Not known yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            node: AddressKey::v4([0; 4]),
            vni: Identity::NONE,
        }
    }
}

/// The outer header of a packet from the tunnel.
pub struct Outer {
    /// Its address, as a key.
    pub node: AddressKey,
    pub vni: Identity,
}

/// Interface that the program runs on.
#[inline(always)]
pub fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    unsafe { (*ctx.skb.skb).ifindex }
}

#[inline(always)]
fn key(flow: &Flow, address: Address) -> AddressKey {
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

#[inline(never)]
fn look_at_address(key: &AddressKey, parity: usize, known: &mut Known) -> Look {
    look!(maps::IPCACHE, key, |entry| {
        known.party.identity = volatile!(entry, identity[parity & 1]);
        known.party.row = NOT_ENFORCED;
        known.party.column = volatile!(entry, column[parity & 1]);
        known.party.peer.owner = volatile!(entry, owner);
        known.party.peer.epoch = volatile!(entry, epoch);
        known.tunnel = volatile_words!(entry, tunnel_endpoint);
        known.tunnel_family = volatile!(entry, tunnel_family);
        known.identity = [volatile!(entry, identity[0]), volatile!(entry, identity[1])];
        known.flags = volatile!(entry, flags);
    })
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
fn ipcache(key: &AddressKey, parity: usize) -> Option<Known> {
    let mut known = Known {
        party: reserved(Identity::NONE),
        tunnel: [0; 4],
        tunnel_family: 0,
        identity: [Identity::NONE; 2],
        flags: 0,
    };
    let mut look = look_at_address(key, parity, &mut known);
    if look == Look::Torn {
        look = look_at_address(key, parity, &mut known);
    }
    (look == Look::Whole).then_some(known)
}

#[inline(always)]
fn is_node(key: &AddressKey) -> bool {
    maps::NODES.get_ptr(key).is_some()
}

/// The pod that sent a packet: it must own the source address, the source MAC and the interface.
#[inline(never)]
pub fn sending_pod(ctx: &TcContext, frame: &Frame, flow: &mut Flow, sender: &mut Party) -> Result<(), DropReason> {
    let pod = endpoint(&key(flow, flow.source), flow.parity()).ok_or(DropReason::SpoofedAddress)?;
    if pod.ifindex != ifindex(ctx) {
        return Err(DropReason::SpoofedAddress);
    }
    if pod.mac() != frame.source {
        return Err(DropReason::SpoofedMac);
    }
    if pod.gateway_mac() != frame.destination {
        return Err(DropReason::NotForGateway);
    }
    flow.from = pod.party.identity;
    *sender = pod.party;
    is_about_sender(flow)
}

/// A pod sends errors about packets that were for itself, and about no others.
#[inline(always)]
fn is_about_sender(flow: &Flow) -> Result<(), DropReason> {
    if flow.related && flow.about != flow.source {
        return Err(DropReason::IcmpUnrelated);
    }
    Ok(())
}

/// Whom a pod's packet is for. The tunnel port is none but at pods: behind masquerade such a packet would arrive as this
/// node's own, and any address may be one of a node's.
#[inline(never)]
pub fn receiver(ctx: &TcContext, flow: &mut Flow, receiver: &mut Receiver) -> Result<(), DropReason> {
    let key = key(flow, flow.destination);
    let place = &mut receiver.place;
    if let Some(pod) = endpoint(&key, flow.parity()) {
        flow.to = pod.party.identity;
        receiver.party = pod.party;
        place.way = Way::Pod;
        place.ifindex = pod.ifindex;
        place.macs = pod.macs;
        return Ok(());
    }
    let config = maps::config().ok_or(DropReason::Internal)?;
    let to_tunnel = flow.protocol == UDP && !flow.related && flow.destination_port == config.tunnel_port.to_be();
    let Some(known) = ipcache(&key, flow.parity()) else {
        if to_tunnel {
            return Err(DropReason::TunnelPort);
        }
        if !outside(flow, &key, &mut receiver.party) {
            return Err(DropReason::UnknownDestination);
        }
        if receiver.party.identity == Identity::REMOTE_NODE {
            place.way = Way::Remote;
            place.tunnel = flow.destination.words();
        } else if is_own(ctx, flow, &flow.destination)? {
            receiver.party = reserved(Identity::HOST);
            place.way = Way::Host;
        } else {
            place.way = Way::Outside;
        }
        flow.to = receiver.party.identity;
        return Ok(());
    };
    if to_tunnel && known.is_host() {
        return Err(DropReason::TunnelPort);
    }
    flow.to = known.party.identity;
    receiver.party = known.party;
    if known.is_host() {
        place.way = Way::Host;
    } else if known.tunnel_family != 0 {
        place.way = Way::Remote;
        place.tunnel = known.tunnel;
    } else {
        // A pod of this node that is being added or removed: known, but not reachable.
        return Err(DropReason::UnknownDestination);
    }
    Ok(())
}

/// Whom a packet from the tunnel is for: a pod of this node, or the node itself, which only pods write to this way.
#[inline(never)]
pub fn overlay_receiver(flow: &mut Flow, sender: &Party, receiver: &mut Receiver) -> Result<(), DropReason> {
    let key = key(flow, flow.destination);
    if let Some(pod) = endpoint(&key, flow.parity()) {
        receiver.party = pod.party;
        receiver.place.way = Way::Pod;
        receiver.place.ifindex = pod.ifindex;
        receiver.place.macs = pod.macs;
    } else {
        let known = ipcache(&key, flow.parity()).ok_or(DropReason::NotLocal)?;
        if !known.is_host() || sender.identity == Identity::REMOTE_NODE {
            return Err(DropReason::NotLocal);
        }
        receiver.party = known.party;
        receiver.place.way = Way::Host;
    }
    flow.to = receiver.party.identity;
    Ok(())
}

/// The pod of this node that a packet from the node's stack is for.
#[inline(always)]
pub fn local_receiver(flow: &mut Flow) -> Result<Pod, DropReason> {
    let pod = endpoint(&key(flow, flow.destination), flow.parity()).ok_or(DropReason::NotLocal)?;
    flow.to = pod.party.identity;
    Ok(pod)
}

/// The node that a packet from the tunnel came from, which must be one of the cluster, and the VNI.
#[inline(never)]
pub fn outer_source(ctx: &TcContext, outer: &mut Outer) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    let by_v6 = config.underlay_family == Family::V6 as u8;
    let flags = if by_v6 { u64::from(BPF_F_TUNINFO_IPV6) } else { 0 };
    // SAFETY: all zero is a value of this plain C struct.
    let mut tunnel: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    // SAFETY: the context and the key are valid, and the size is the key's own.
    let failed =
        unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut tunnel, size_of::<bpf_tunnel_key>() as u32, flags) };
    if failed != 0 {
        return Err(DropReason::NoTunnelKey);
    }
    let node = if by_v6 {
        // SAFETY: with BPF_F_TUNINFO_IPV6 the helper fills the IPv6 address, in network byte order; any bytes are one.
        let address = unsafe { core::mem::transmute::<[u32; 4], Address>(tunnel.__bindgen_anon_1.remote_ipv6) };
        AddressKey::new(Family::V6, address)
    } else {
        // SAFETY: without it, the IPv4 address, in host byte order.
        AddressKey::v4(unsafe { tunnel.__bindgen_anon_1.remote_ipv4 }.to_be_bytes())
    };
    if !is_node(&node) {
        return Err(DropReason::UnknownNode);
    }
    outer.node = node;
    outer.vni = Identity(tunnel.tunnel_id);
    Ok(())
}

/// The pod of another node that sent a packet, or that node itself, from its underlay address. A pod's VNI is believed only where the ipcache says that the inner source
/// lives behind the outer one with that identity. While a policy is changed it may be the old one or the new one, for
/// nodes do not switch at the same instant; what is enforced is always this node's own generation.
#[inline(never)]
pub fn remote_sender(flow: &mut Flow, outer: &Outer, sender: &mut Party) -> Result<(), DropReason> {
    flow.from = outer.vni;
    if outer.vni == Identity::REMOTE_NODE {
        if key(flow, flow.source) != outer.node {
            return Err(DropReason::WrongNode);
        }
        *sender = reserved(Identity::REMOTE_NODE);
        return is_about_sender(flow);
    }
    if !outer.vni.is_allocated() {
        return Err(DropReason::ReservedVni);
    }
    let known = ipcache(&key(flow, flow.source), flow.parity()).ok_or(DropReason::WrongNode)?;
    if known.tunnel_family != outer.node.family || known.tunnel != outer.node.address.words() {
        return Err(DropReason::WrongNode);
    }
    if outer.vni != known.identity[0] && outer.vni != known.identity[1] {
        return Err(DropReason::WrongVni);
    }
    flow.from = known.party.identity;
    *sender = known.party;
    is_about_sender(flow)
}

/// Who sends what the node's stack gives to a pod: the node itself, or an address from which the node has routed the
/// packet. Such an address may be anything but a pod's, and a node's: those do not come this way.
///
/// A packet that came in by no interface is the node's only where its source is, too: the stack puts packets together and
/// cuts them again, and answers in others' names, and the pieces have no interface either (`ip6_copy_metadata` in
/// `net/ipv6/ip6_output.c`).
#[inline(never)]
pub fn node_or_outside(ctx: &TcContext, flow: &mut Flow, sender: &mut Party) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let came_in_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    let router = flow.related && flow.about != flow.source;
    let key = key(flow, flow.source);
    let known = ipcache(&key, flow.parity());
    let is_own = match &known {
        Some(known) => known.is_host(),
        None => came_in_by == 0 && is_own(ctx, flow, &flow.source)?,
    };
    if came_in_by == 0 && is_own {
        *sender = reserved(Identity::HOST);
    } else {
        if known.is_some() || maps::ENDPOINTS.get_ptr(&key).is_some() {
            return Err(DropReason::UnknownSource);
        }
        if !outside(flow, &key, sender) {
            return Err(DropReason::UnknownSource);
        }
        // Another node's packets come through the tunnel.
        if sender.identity == Identity::REMOTE_NODE && !router {
            return Err(DropReason::UnknownSource);
        }
    }
    flow.from = sender.identity;
    if router { addressee(flow, sender) } else { Ok(()) }
}

/// A router's error is about a flow that is none of its own: whom that goes to, who takes the router's place. A router
/// is whoever is no pod; there is none between pods.
#[inline(never)]
fn addressee(flow: &mut Flow, party: &mut Party) -> Result<(), DropReason> {
    flow.source = flow.about;
    let key = key(flow, flow.source);
    match ipcache(&key, flow.parity()) {
        Some(known) if known.is_host() => {
            *party = known.party;
            Ok(())
        }
        None if outside(flow, &key, party) => Ok(()),
        _ => Err(DropReason::IcmpUnrelated),
    }
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
fn reserved(identity: Identity) -> Party {
    Party {
        identity,
        row: NOT_ENFORCED,
        column: identity.0,
        peer: nobodys(identity),
    }
}

/// What an address is that the ipcache does not know: another node, or whatever the networks say of it. False where
/// nothing is routed to or from it.
#[inline(never)]
fn outside(flow: &Flow, address: &AddressKey, party: &mut Party) -> bool {
    if is_node(address) {
        *party = reserved(Identity::REMOTE_NODE);
        return true;
    }
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

/// Length of a route query, as the helper wants it.
const ROUTE_LEN: i32 = 64;
const _: () = assert!(size_of::<bpf_fib_lookup>() == 64);

/// Whether the node would deliver to itself what is for an address: its routes know all its addresses, also those that
/// hostd was not told of. Where the node does not forward at all, nothing else can become of the packet.
#[inline(never)]
fn is_own(ctx: &TcContext, flow: &Flow, address: &Address) -> Result<bool, DropReason> {
    let scratch = maps::scratch().ok_or(DropReason::Internal)?;
    // SAFETY: as in `Flow::begin`; nothing else refers to this part. All zero is a value of this plain C struct.
    let route: &mut bpf_fib_lookup = unsafe {
        let route = &raw mut (*scratch).route;
        core::ptr::write_bytes(route.cast::<u8>(), 0, size_of::<bpf_fib_lookup>());
        &mut *route
    };
    route.family = flow.family;
    route.l4_protocol = flow.protocol;
    route.ifindex = ifindex(ctx);
    // The first word of what has room for IPv6 is IPv4's.
    route.__bindgen_anon_3.ipv6_src = flow.source.words();
    route.__bindgen_anon_4.ipv6_dst = address.words();
    // SAFETY: context and parameters are valid, and the size is the parameters' own.
    let found = unsafe { generated::bpf_fib_lookup(ctx.skb.skb.cast(), route, ROUTE_LEN, 0) };
    if found < 0 {
        return Err(DropReason::Internal);
    }
    Ok(found == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) || found == i64::from(BPF_FIB_LKUP_RET_FWD_DISABLED))
}
