//! What comes out of the tunnel: which node sent it, whose it is, and whom it is for.

use crate::{
    identify::{Receiver, Way, client, is_about_sender},
    lookup::{Known, Party, endpoint, ipcache, is_underlay, key, node, outside},
    maps,
    packet::Flow,
};
use abi::{AddressKey, DropReason, Family, Identity, NodeConfig, address::Address};
use aya_ebpf::{
    bindings::{BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers::bpf_skb_get_tunnel_key,
    programs::TcContext,
};

/// The outer header of a packet from the tunnel.
pub struct Outer {
    /// Its address, as a key.
    pub node: AddressKey,
    pub vni: Identity,
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

/// The node that a packet from the tunnel came from, which must be another one of the cluster, and the VNI. It must have
/// been sent to this node's underlay address: at others nobody keeps foreign sources out.
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
    let address = if by_v6 {
        // SAFETY: with BPF_F_TUNINFO_IPV6 the helper fills the IPv6 address, in network byte order; any bytes are one.
        let address = unsafe { core::mem::transmute::<[u32; 4], Address>(tunnel.__bindgen_anon_1.remote_ipv6) };
        AddressKey::new(Family::V6, address)
    } else {
        // SAFETY: without it, the IPv4 address, in host byte order.
        AddressKey::v4(unsafe { tunnel.__bindgen_anon_1.remote_ipv4 }.to_be_bytes())
    };
    if !is_for_tunnel(&tunnel, config) {
        return Err(DropReason::ForeignTunnel);
    }
    if !is_underlay(&address, maps::parity()) {
        return Err(DropReason::UnknownNode);
    }
    outer.node = address;
    outer.vni = Identity(tunnel.tunnel_id);
    Ok(())
}

/// Whether a packet came to this node's underlay address (`bpf_tunnel_key` has it since Linux 6.0).
#[inline(always)]
pub fn is_for_tunnel(tunnel: &bpf_tunnel_key, config: &NodeConfig) -> bool {
    let own = config.underlay.words();
    // SAFETY: the helper has filled in the address of the underlay's family: IPv4 in host byte order, IPv6 in network byte
    // order; any bytes are one.
    unsafe {
        if config.underlay_family == Family::V6 as u8 {
            tunnel.__bindgen_anon_3.local_ipv6 == own
        } else {
            tunnel.__bindgen_anon_3.local_ipv4.to_be() == own[0]
        }
    }
}

/// The pod of another node that sent a packet; that node itself, from its underlay address; or a client outside, which
/// has asked at a node port there. A pod's VNI is believed only where the ipcache says that the inner source lives behind
/// the outer one with that identity. While a policy is changed it may be the old one or the new one, for nodes do not
/// switch at the same instant; what is enforced is always this node's own generation. Who is outside is this node's own
/// to say, whatever the VNI.
#[inline(never)]
pub fn remote_sender(flow: &mut Flow, outer: &Outer, sender: &mut Party) -> Result<(), DropReason> {
    flow.from = outer.vni;
    if outer.vni == Identity::REMOTE_NODE {
        let known = node(&key(flow, flow.ends.source), flow.parity()).ok_or(DropReason::WrongNode)?;
        if !is_behind(known, &outer.node) {
            return Err(DropReason::WrongNode);
        }
        *sender = known.party;
        return is_about_sender(flow);
    }
    if outer.vni == Identity::WORLD {
        flow.via = outer.node.address;
        flow.translation.address = outer.node.address;
        return client(flow, sender);
    }
    if !outer.vni.is_allocated() {
        return Err(DropReason::ReservedVni);
    }
    let known = ipcache(&key(flow, flow.ends.source), flow.parity()).ok_or(DropReason::WrongNode)?;
    if !is_behind(&known, &outer.node) {
        return Err(DropReason::WrongNode);
    }
    if outer.vni != known.identity[0] && outer.vni != known.identity[1] {
        return Err(DropReason::WrongVni);
    }
    flow.from = known.party.identity;
    *sender = known.party;
    is_about_sender(flow)
}

/// Whether an address lives behind the node with this underlay address.
#[inline(always)]
fn is_behind(known: &Known, underlay: &AddressKey) -> bool {
    known.tunnel_family == underlay.family && known.tunnel == underlay.address.words()
}

/// Whom a packet from the tunnel is for: a pod of this node, or the node itself, which only pods write to this way; or a
/// client outside, which a pod answers that was asked by way of this node.
#[inline(never)]
pub fn receiver(flow: &mut Flow, sender: &Party, receiver: &mut Receiver) -> Result<(), DropReason> {
    let key = key(flow, flow.ends.destination);
    if let Some(pod) = endpoint(&key, flow.parity()) {
        receiver.party = pod.party;
        receiver.place.way = Way::Pod;
        receiver.place.ifindex = pod.ifindex;
        receiver.place.macs = pod.macs;
    } else if let Some(known) = ipcache(&key, flow.parity()) {
        if !known.is_host() || sender.identity == Identity::REMOTE_NODE || flow.via != Address::NONE {
            return Err(DropReason::NotLocal);
        }
        receiver.party = known.party;
        receiver.place.way = Way::Host;
    } else {
        if sender.peer.owner == 0 {
            return Err(DropReason::NotLocal);
        }
        receiver.party = outside(flow, &key).ok_or(DropReason::NotLocal)?.party;
        flow.in_transit = true;
        receiver.place.way = Way::Outside;
    }
    flow.to = receiver.party.identity;
    Ok(())
}
