//! Who sends and who receives: endpoints and ipcache turned into the two parties of a flow.

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
    bindings::{BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED, bpf_fib_lookup, bpf_tunnel_key},
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

/// A pod of this node, copied out of the map.
pub struct Pod {
    pub party: Party,
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub gateway_mac: [u8; 6],
}

/// An address of the cluster, copied out of the map.
struct Known {
    party: Party,
    /// Underlay address of its node, IPv4.
    tunnel: [u8; 4],
    tunnel_family: u8,
    identity: [Identity; 2],
    is_host: bool,
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

/// Where a packet goes. What does not belong to its way is zero: an enum with fields would leave them unset, and the
/// verifier does not let a program copy what was never written.
pub struct Place {
    pub way: Way,
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub gateway_mac: [u8; 6],
    /// Underlay address of the node that it lives behind.
    pub tunnel: [u8; 4],
}

impl Place {
    const fn new(way: Way) -> Self {
        Self {
            way,
            ifindex: 0,
            mac: [0; 6],
            gateway_mac: [0; 6],
            tunnel: [0; 4],
        }
    }
}

/// Whom a pod's packet is for.
pub struct Receiver {
    pub party: Party,
    pub place: Place,
}

/// The outer header of a packet from the tunnel.
pub struct Outer {
    /// IPv4 address, in network byte order.
    pub source: [u8; 4],
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

/// Times that an entry is looked up when it is replaced just as it is read. Each is one write of hostd's.
const ATTEMPTS: usize = 2;

/// Reads a field that hostd, or the kernel for another key, may be writing: whether the value holds is known only
/// after the stamps were read once more.
macro_rules! volatile {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: the pointer is to an element of a map, whose memory is never unmapped while programs run. All fields
        // are integers or arrays of them, for which any bytes are a value.
        unsafe { core::ptr::read_volatile(&raw const (*$pointer).$($field)+) }
    };
}

/// A pod of this node.
#[inline(always)]
pub fn endpoint(key: &AddressKey, parity: usize) -> Option<Pod> {
    for _ in 0..ATTEMPTS {
        let entry = maps::ENDPOINTS.get_ptr(key)?;
        let stamp = volatile!(entry, first_stamp);
        let whole_before = volatile!(entry, last_stamp) == stamp;
        let pod = Pod {
            party: Party {
                identity: volatile!(entry, identity[parity]),
                row: volatile!(entry, row[parity]),
                column: volatile!(entry, column[parity]),
                peer: Peer {
                    owner: volatile!(entry, owner),
                    epoch: volatile!(entry, epoch),
                },
            },
            ifindex: volatile!(entry, ifindex),
            mac: volatile!(entry, mac),
            gateway_mac: volatile!(entry, gateway_mac),
        };
        let own = volatile!(entry, address) == key.address;
        let whole_after = volatile!(entry, last_stamp) == stamp && volatile!(entry, first_stamp) == stamp;
        if whole_before && own && whole_after {
            return Some(pod);
        }
    }
    None
}

/// An address of the cluster.
#[inline(always)]
fn ipcache(key: &AddressKey, parity: usize) -> Option<Known> {
    for _ in 0..ATTEMPTS {
        let entry = maps::IPCACHE.get_ptr(key)?;
        let stamp = volatile!(entry, first_stamp);
        let whole_before = volatile!(entry, last_stamp) == stamp;
        let identity = [volatile!(entry, identity[0]), volatile!(entry, identity[1])];
        let known = Known {
            party: Party {
                identity: volatile!(entry, identity[parity]),
                row: NOT_ENFORCED,
                column: volatile!(entry, column[parity]),
                peer: Peer {
                    owner: volatile!(entry, owner),
                    epoch: volatile!(entry, epoch),
                },
            },
            tunnel: [
                volatile!(entry, tunnel_endpoint[0]),
                volatile!(entry, tunnel_endpoint[1]),
                volatile!(entry, tunnel_endpoint[2]),
                volatile!(entry, tunnel_endpoint[3]),
            ],
            tunnel_family: volatile!(entry, tunnel_family),
            identity,
            is_host: volatile!(entry, flags) & IPCACHE_HOST != 0,
        };
        let own = volatile!(entry, address) == key.address;
        let whole_after = volatile!(entry, last_stamp) == stamp && volatile!(entry, first_stamp) == stamp;
        if whole_before && own && whole_after {
            return Some(known);
        }
    }
    None
}

#[inline(always)]
fn is_node(key: &AddressKey) -> bool {
    maps::NODES.get_ptr(key).is_some()
}

/// The pod that sent a packet: it must own the source address, the source MAC and the interface.
#[inline(always)]
pub fn sending_pod(ctx: &TcContext, frame: &Frame, flow: &mut Flow) -> Result<Party, DropReason> {
    let pod = endpoint(&key(flow, flow.source), flow.parity()).ok_or(DropReason::SpoofedAddress)?;
    if pod.ifindex != ifindex(ctx) {
        return Err(DropReason::SpoofedAddress);
    }
    if pod.mac != frame.source {
        return Err(DropReason::SpoofedMac);
    }
    if pod.gateway_mac != frame.destination {
        return Err(DropReason::NotForGateway);
    }
    flow.from = pod.party.identity;
    Ok(pod.party)
}

/// Whom a pod's packet is for. The tunnel port is none but at pods: behind masquerade such a packet would arrive as this
/// node's own, and any address may be one of a node's.
#[inline(always)]
pub fn receiver(ctx: &TcContext, flow: &mut Flow) -> Result<Receiver, DropReason> {
    let key = key(flow, flow.destination);
    if let Some(pod) = endpoint(&key, flow.parity()) {
        flow.to = pod.party.identity;
        return Ok(Receiver {
            party: pod.party,
            place: Place {
                way: Way::Pod,
                ifindex: pod.ifindex,
                mac: pod.mac,
                gateway_mac: pod.gateway_mac,
                tunnel: [0; 4],
            },
        });
    }
    let config = maps::config().ok_or(DropReason::Internal)?;
    let to_tunnel = flow.protocol == UDP && !flow.related && flow.destination_port == config.tunnel_port.to_be();
    let Some(known) = ipcache(&key, flow.parity()) else {
        if to_tunnel {
            return Err(DropReason::TunnelPort);
        }
        let party = outside(flow, &key).ok_or(DropReason::UnknownDestination)?;
        flow.to = party.identity;
        if party.identity != Identity::REMOTE_NODE && is_for_this_node(ctx, flow)? {
            flow.to = Identity::HOST;
            return Ok(Receiver {
                party: reserved(Identity::HOST),
                place: Place::new(Way::Host),
            });
        }
        return Ok(Receiver {
            party,
            place: Place::new(Way::Outside),
        });
    };
    if to_tunnel && known.is_host {
        return Err(DropReason::TunnelPort);
    }
    flow.to = known.party.identity;
    let place = if known.is_host {
        Place::new(Way::Host)
    } else if known.tunnel_family != 0 {
        Place {
            tunnel: known.tunnel,
            ..Place::new(Way::Remote)
        }
    } else {
        // A pod of this node that is being added or removed: known, but not reachable.
        return Err(DropReason::UnknownDestination);
    };
    Ok(Receiver {
        party: known.party,
        place,
    })
}

/// The pod of this node that a packet from outside is for.
#[inline(always)]
pub fn local_receiver(flow: &mut Flow) -> Result<Pod, DropReason> {
    let pod = endpoint(&key(flow, flow.destination), flow.parity()).ok_or(DropReason::NotLocal)?;
    flow.to = pod.party.identity;
    Ok(pod)
}

/// The node that a packet from the tunnel came from, which must be one of the cluster, and the VNI.
#[inline(always)]
pub fn outer_source(ctx: &TcContext) -> Result<Outer, DropReason> {
    // SAFETY: all zero is a value of this plain C struct.
    let mut tunnel: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    // SAFETY: the context and the key are valid, and the size is the key's own.
    let failed = unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &raw mut tunnel, size_of::<bpf_tunnel_key>() as u32, 0) };
    if failed != 0 {
        return Err(DropReason::NoTunnelKey);
    }
    // SAFETY: without BPF_F_TUNINFO_IPV6 the helper fills the IPv4 address, in host byte order.
    let source = unsafe { tunnel.__bindgen_anon_1.remote_ipv4 }.to_be_bytes();
    if !is_node(&AddressKey::v4(source)) {
        return Err(DropReason::UnknownNode);
    }
    Ok(Outer {
        source,
        vni: Identity(tunnel.tunnel_id),
    })
}

/// The pod of another node that sent a packet. The VNI is believed only where the ipcache says that the inner source
/// lives behind the outer one with that identity. While a policy is changed it may be the old one or the new one, for
/// nodes do not switch at the same instant; what is enforced is always this node's own generation.
#[inline(always)]
pub fn remote_sender(flow: &mut Flow, outer: &Outer) -> Result<Party, DropReason> {
    flow.from = outer.vni;
    if !outer.vni.is_allocated() {
        return Err(DropReason::ReservedVni);
    }
    let known = ipcache(&key(flow, flow.source), flow.parity()).ok_or(DropReason::WrongNode)?;
    if known.tunnel_family != Family::V4 as u8 || known.tunnel != outer.source {
        return Err(DropReason::WrongNode);
    }
    if outer.vni != known.identity[0] && outer.vni != known.identity[1] {
        return Err(DropReason::WrongVni);
    }
    flow.from = known.party.identity;
    Ok(known.party)
}

/// Who sends what the node's stack gives to a pod: the node itself, or an address from which the node has routed the
/// packet. Such an address may be anything but a pod's and the node's own: those do not come this way.
#[inline(always)]
pub fn node_or_outside(ctx: &TcContext, flow: &mut Flow) -> Result<Party, DropReason> {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let came_in_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    if came_in_by == 0 {
        flow.from = Identity::HOST;
        return Ok(reserved(Identity::HOST));
    }
    let key = key(flow, flow.source);
    if maps::IPCACHE.get_ptr(&key).is_some() || maps::ENDPOINTS.get_ptr(&key).is_some() {
        return Err(DropReason::UnknownSource);
    }
    let party = outside(flow, &key).ok_or(DropReason::UnknownSource)?;
    flow.from = party.identity;
    Ok(party)
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

/// What an address is that the ipcache does not know: another node, or whatever the networks say of it. None where
/// nothing is routed to or from it.
#[inline(always)]
fn outside(flow: &Flow, address: &AddressKey) -> Option<Party> {
    if is_node(address) {
        return Some(reserved(Identity::REMOTE_NODE));
    }
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; nothing else refers to this part.
    let key: &mut Key<AddressKey> = unsafe { &mut (*scratch).network };
    let bits = if address.family == Family::V6 as u8 { 128 } else { 32 };
    *key = Key::new(NETWORK_KEY_BITS + bits, *address);
    let Some(entry) = maps::NETWORKS.get(&*key) else {
        return Some(reserved(Identity::WORLD));
    };
    if entry.flags & UNROUTED != 0 {
        return None;
    }
    // From map memory by the parity: see `endpoint`.
    let entry = core::ptr::from_ref(entry);
    let identity = volatile!(entry, identity[flow.parity()]);
    let column = volatile!(entry, column[flow.parity()]);
    Some(Party {
        identity,
        row: NOT_ENFORCED,
        column,
        peer: nobodys(identity),
    })
}

/// Length of a route query, as the helper wants it.
const ROUTE_LEN: i32 = 64;
const _: () = assert!(size_of::<bpf_fib_lookup>() == 64);

/// Whether the node would deliver a packet to itself: its routes know all its addresses, also those that hostd was
/// not told of. Where the node does not forward at all, nothing else can become of the packet.
#[inline(always)]
fn is_for_this_node(ctx: &TcContext, flow: &Flow) -> Result<bool, DropReason> {
    let scratch = maps::scratch().ok_or(DropReason::Internal)?;
    // SAFETY: as in `Flow::begin`; nothing else refers to this part. All zero is a value of this plain C struct.
    let route: &mut bpf_fib_lookup = unsafe {
        let route = &raw mut (*scratch).route;
        core::ptr::write_bytes(route.cast::<u8>(), 0, size_of::<bpf_fib_lookup>());
        &mut *route
    };
    let address = |address: &Address| u32::from_ne_bytes([address[0], address[1], address[2], address[3]]);
    // `AF_INET`.
    route.family = 2;
    route.l4_protocol = flow.protocol;
    route.ifindex = ifindex(ctx);
    route.__bindgen_anon_3.ipv4_src = address(&flow.source);
    route.__bindgen_anon_4.ipv4_dst = address(&flow.destination);
    // SAFETY: context and parameters are valid, and the size is the parameters' own.
    let found = unsafe { generated::bpf_fib_lookup(ctx.skb.skb.cast(), route, ROUTE_LEN, 0) };
    if found < 0 {
        return Err(DropReason::Internal);
    }
    Ok(found == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) || found == i64::from(BPF_FIB_LKUP_RET_FWD_DISABLED))
}
