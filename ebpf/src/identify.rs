//! Who sends and who receives: endpoints and ipcache turned into the two parties of a flow.

use crate::{
    maps,
    packet::{Flow, UDP},
    parse::Frame,
};
use abi::{
    AddressKey, DropReason, Endpoint, Family, Identity, IpcacheEntry, address::Address, conntrack::Peer,
    ipcache::IPCACHE_HOST, policy::NOT_ENFORCED,
};
use aya_ebpf::{bindings::bpf_tunnel_key, helpers::bpf_skb_get_tunnel_key, programs::TcContext};

/// One end of a flow, as policy and conntrack see it.
#[derive(Clone, Copy)]
pub struct Party {
    pub identity: Identity,
    /// Row in the policy matrix, or [`NOT_ENFORCED`] where this node does not enforce this end's policy.
    pub row: u32,
    pub column: u32,
    /// Slot and epoch of the address.
    pub peer: Peer,
}

/// A pod of this node.
pub struct Pod {
    pub party: Party,
    pub endpoint: &'static Endpoint,
}

/// Where a packet goes.
pub enum Place {
    Pod(&'static Endpoint),
    Host,
    /// Behind the node with this underlay address.
    Remote(Address),
}

/// Whom a pod's packet is for.
pub struct Receiver {
    pub party: Party,
    pub place: Place,
}

/// The outer header of a packet from the tunnel.
pub struct Outer {
    pub source: AddressKey,
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

#[inline(always)]
fn endpoint(key: &AddressKey) -> Option<&'static Endpoint> {
    // SAFETY: the map is without preallocation: an element that is replaced or removed is freed after a grace period,
    // and a program run is part of one.
    unsafe { maps::ENDPOINTS.get(key) }
}

#[inline(always)]
fn ipcache(key: &AddressKey) -> Option<&'static IpcacheEntry> {
    // SAFETY: as in `endpoint`.
    unsafe { maps::IPCACHE.get(key) }
}

#[inline(always)]
fn is_node(key: &AddressKey) -> bool {
    // SAFETY: as in `endpoint`.
    unsafe { maps::NODES.get(key) }.is_some()
}

impl Party {
    #[inline(always)]
    fn pod(endpoint: &Endpoint, parity: usize) -> Self {
        Self {
            identity: endpoint.identity[parity],
            row: endpoint.row[parity],
            column: endpoint.column[parity],
            peer: Peer {
                slot: endpoint.slot,
                epoch: endpoint.epoch,
            },
        }
    }

    #[inline(always)]
    fn address(entry: &IpcacheEntry, parity: usize) -> Self {
        Self {
            identity: entry.identity[parity],
            row: NOT_ENFORCED,
            column: entry.column[parity],
            peer: Peer {
                slot: entry.slot,
                epoch: entry.epoch,
            },
        }
    }
}

/// The pod that sent a packet: it must own the source address, the source MAC and the interface.
#[inline(always)]
pub fn sending_pod(ctx: &TcContext, frame: &Frame, flow: &mut Flow) -> Result<Pod, DropReason> {
    let endpoint = endpoint(&key(flow, flow.source)).ok_or(DropReason::SpoofedAddress)?;
    if endpoint.ifindex != ifindex(ctx) {
        return Err(DropReason::SpoofedAddress);
    }
    if endpoint.mac != frame.source {
        return Err(DropReason::SpoofedMac);
    }
    if endpoint.gateway_mac != frame.destination {
        return Err(DropReason::NotForGateway);
    }
    let party = Party::pod(endpoint, flow.parity());
    flow.from = party.identity;
    Ok(Pod { party, endpoint })
}

/// Whom a pod's packet is for. A node's tunnel port is no destination: behind masquerade such a packet would arrive
/// as the node's own.
#[inline(always)]
pub fn receiver(flow: &mut Flow) -> Result<Receiver, DropReason> {
    let key = key(flow, flow.destination);
    if let Some(endpoint) = endpoint(&key) {
        let party = Party::pod(endpoint, flow.parity());
        flow.to = party.identity;
        return Ok(Receiver {
            party,
            place: Place::Pod(endpoint),
        });
    }
    let config = maps::config().ok_or(DropReason::Internal)?;
    let to_tunnel = flow.protocol == UDP && !flow.related && flow.destination_port == config.tunnel_port.to_be();
    if to_tunnel && is_node(&key) {
        return Err(DropReason::TunnelPort);
    }
    let entry = ipcache(&key).ok_or(DropReason::UnknownDestination)?;
    let party = Party::address(entry, flow.parity());
    flow.to = party.identity;
    let place = if entry.flags & IPCACHE_HOST != 0 {
        Place::Host
    } else if entry.tunnel_family != 0 {
        Place::Remote(entry.tunnel_endpoint)
    } else {
        // A pod of this node that is being added or removed: known, but not reachable.
        return Err(DropReason::UnknownDestination);
    };
    Ok(Receiver { party, place })
}

/// The pod of this node that a packet from outside is for.
#[inline(always)]
pub fn local_receiver(flow: &mut Flow) -> Result<Pod, DropReason> {
    let endpoint = endpoint(&key(flow, flow.destination)).ok_or(DropReason::NotLocal)?;
    let party = Party::pod(endpoint, flow.parity());
    flow.to = party.identity;
    Ok(Pod { party, endpoint })
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
    let source = AddressKey::v4(unsafe { tunnel.__bindgen_anon_1.remote_ipv4 }.to_be_bytes());
    if !is_node(&source) {
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
    if !outer.vni.is_pod() {
        return Err(DropReason::ReservedVni);
    }
    let entry = ipcache(&key(flow, flow.source)).ok_or(DropReason::WrongNode)?;
    if entry.tunnel_endpoint != outer.source.address || entry.tunnel_family != outer.source.family {
        return Err(DropReason::WrongNode);
    }
    if outer.vni != entry.identity[0] && outer.vni != entry.identity[1] {
        return Err(DropReason::WrongVni);
    }
    let party = Party::address(entry, flow.parity());
    flow.from = party.identity;
    Ok(party)
}

/// The source of a packet from the node's own stack: the node itself, if the packet came in nowhere, or an address
/// that the node routes for.
#[inline(always)]
pub fn node_or_routed(ctx: &TcContext, flow: &mut Flow) -> Result<Party, DropReason> {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let came_in_nowhere = unsafe { (*ctx.skb.skb).ingress_ifindex } == 0;
    if came_in_nowhere {
        flow.from = Identity::HOST;
        return Ok(Party {
            identity: Identity::HOST,
            row: NOT_ENFORCED,
            column: Identity::HOST.0,
            peer: Peer { slot: 0, epoch: 0 },
        });
    }
    let entry = ipcache(&key(flow, flow.source)).ok_or(DropReason::UnknownSource)?;
    let party = Party::address(entry, flow.parity());
    flow.from = party.identity;
    Ok(party)
}
