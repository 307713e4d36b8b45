//! Forwarding: rewrites the packet for where it goes, and names the action. Nothing is redirected here.

use crate::{
    identify::{Receiver, Way},
    lookup::is_underlay,
    maps,
    packet::{Flow, Service, TCP, UDP},
    parse::{self, ETHERNET_LEN, IPV4_LEN, IPV6_LEN, L3},
    translate::store,
};
use abi::{AddressKey, DropReason, Family, Identity, NodeConfig, Path, address::Address};
use aya_ebpf::{
    bindings::{BPF_F_RECOMPUTE_CSUM, BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
    helpers::bpf_skb_set_tunnel_key,
    programs::TcContext,
};

/// Protocols of tunnels that Linux has (IANA, "Protocol Numbers").
const IPIP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
const GRE: u8 = 47;

/// `PACKET_HOST` (`include/uapi/linux/if_packet.h`).
const PACKET_HOST: u32 = 0;

/// What becomes of a packet that is not dropped. A struct, whose fields are all set: what an enum leaves unset the
/// verifier does not let a program copy.
#[derive(Clone, Copy)]
pub struct Action {
    pub path: Path,
    /// Interface that the packet is redirected to, by its path; zero where it goes on by itself.
    pub ifindex: u32,
    /// Tunnel key: the VNI, and the last word of the other node's address, in host byte order; for [`Path::Encap`].
    pub vni: Identity,
    pub remote: u32,
}

impl Action {
    /// On to whatever else is attached to the hook, and up or down the node's stack.
    #[inline(always)]
    pub const fn go_on(path: Path) -> Self {
        Self::redirect(path, 0)
    }

    /// To an interface, or to the other end of its pair.
    #[inline(always)]
    pub const fn redirect(path: Path, ifindex: u32) -> Self {
        Self {
            path,
            ifindex,
            vni: Identity::NONE,
            remote: 0,
        }
    }
}

/// Sends a pod's packet on its way. That is the one hop between any two pods: what comes out of the tunnel counts none.
#[inline(never)]
pub fn deliver(
    ctx: &TcContext,
    flow: &Flow,
    sender: Identity,
    receiver: &Receiver,
    action: &mut Action,
) -> Result<(), DropReason> {
    let place = &receiver.place;
    if flow.leaves || !receiver.is_pod() {
        not_to_a_tunnel(flow, is_for_node(receiver))?;
    }
    if flow.leaves {
        one_hop(ctx, flow)?;
        *action = out_of_the_node()?;
        return Ok(());
    }
    if flow.via != Address::NONE {
        if !is_underlay(&underlay(flow.via)?, flow.parity()) {
            return Err(DropReason::UnknownNode);
        }
        return encapsulate(ctx, flow, sender, &flow.via.words(), action);
    }
    match place.way {
        Way::Pod => {
            one_hop(ctx, flow)?;
            into_pod(ctx, place.macs)?;
            *action = Action::redirect(Path::Local, place.ifindex);
        }
        Way::Host => *action = Action::go_on(Path::ToHost),
        Way::Outside => *action = Action::go_on(Path::ToOutside),
        Way::Remote => return encapsulate(ctx, flow, sender, &place.tunnel, action),
        Way::Service => return Err(DropReason::Internal),
    }
    Ok(())
}

/// What a pod has made never leaves for the tunnel port: other nodes believe this one, and any address may be a node's. The packet is
/// looked at as it leaves, translated; to pods the port is one like any other.
///
/// Nor do tunnels of other kinds go to a node: its kernel may have a device for them, which takes what is inside for its own.
#[inline(always)]
fn not_to_a_tunnel(flow: &Flow, for_node: bool) -> Result<(), DropReason> {
    if for_node && matches!(flow.protocol, IPIP | IPV6_IN_IP | GRE) {
        return Err(DropReason::TunnelPort);
    }
    let config = maps::config().ok_or(DropReason::Internal)?;
    let port = if flow.service == Service::None {
        flow.ends.destination_port
    } else {
        flow.becomes.destination_port
    };
    if flow.protocol == UDP && !flow.related && port == config.tunnel_port.to_be() {
        return Err(DropReason::TunnelPort);
    }
    Ok(())
}

/// Whether it is this node or another one.
#[inline(always)]
fn is_for_node(receiver: &Receiver) -> bool {
    matches!(receiver.place.way, Way::Host | Way::Remote) || receiver.party.identity == Identity::REMOTE_NODE
}

/// Key of an underlay address.
#[inline(always)]
fn underlay(address: Address) -> Result<AddressKey, DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    let family = if config.underlay_family == Family::V6 as u8 {
        Family::V6
    } else {
        Family::V4
    };
    Ok(AddressKey::new(family, address))
}

/// Into the tunnel, to another node.
#[inline(always)]
fn encapsulate(
    ctx: &TcContext,
    flow: &Flow,
    sender: Identity,
    node: &[u32; 4],
    action: &mut Action,
) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    one_hop(ctx, flow)?;
    if !fits(ctx, config.tunnel_mtu, flow.family == Family::V6 as u8, flow.protocol) {
        may_be_cut(ctx, flow)?;
    }
    tunnel(ctx, config, node, sender, action)
}

/// The same for a packet on the fast path, which is not changed; for one that does not fit this is an error.
#[inline(always)]
pub fn into_tunnel(
    ctx: &TcContext,
    (v6, protocol): (bool, u8),
    node: &[u32; 4],
    sender: Identity,
    action: &mut Action,
) -> Result<(), DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    if !fits(ctx, config.tunnel_mtu, v6, protocol) {
        return Err(DropReason::TooBig);
    }
    tunnel(ctx, config, node, sender, action)
}

#[inline(always)]
fn tunnel(
    ctx: &TcContext,
    config: &NodeConfig,
    node: &[u32; 4],
    sender: Identity,
    action: &mut Action,
) -> Result<(), DropReason> {
    set_tunnel_key(ctx, config, node, sender)?;
    let v6 = config.underlay_family == Family::V6 as u8;
    *action = Action::redirect(Path::Encap, config.vxlan_ifindex);
    action.vni = sender;
    action.remote = u32::from_be(if v6 { node[3] } else { node[0] });
    Ok(())
}

/// Out by the interface with the underlay address, where what is answered has come in. The stack would take the packet
/// for a forged one: it has the node's own address.
#[inline(always)]
fn out_of_the_node() -> Result<Action, DropReason> {
    let config = maps::config().ok_or(DropReason::Internal)?;
    Ok(Action::redirect(Path::NodePortReply, config.underlay_ifindex))
}

/// Whether a backend's answers to a client outside come by this node again: a pod's do.
#[inline(always)]
pub fn has_way_back(receiver: &Receiver) -> Result<(), DropReason> {
    match receiver.place.way {
        Way::Pod => Ok(()),
        Way::Remote if receiver.party.peer.owner != 0 => Ok(()),
        _ => Err(DropReason::BackendGone),
    }
}

/// Sends what a client outside asks for to a backend.
#[inline(never)]
pub fn from_outside(ctx: &TcContext, flow: &Flow, receiver: &Receiver, action: &mut Action) -> Result<(), DropReason> {
    let place = &receiver.place;
    match place.way {
        Way::Pod => {
            one_hop(ctx, flow)?;
            into_pod(ctx, place.macs)?;
            *action = Action::redirect(Path::NodePort, place.ifindex);
            Ok(())
        }
        // The other node says itself who the client is.
        Way::Remote => encapsulate(ctx, flow, Identity::WORLD, &place.tunnel, action),
        _ => Err(DropReason::Internal),
    }
}

/// Sends a packet from the tunnel into its pod, up the node's stack, or back to a client outside.
#[inline(always)]
pub fn from_overlay(ctx: &TcContext, flow: &Flow, receiver: &Receiver) -> Result<Action, DropReason> {
    for_host(ctx)?;
    if flow.leaves || receiver.place.way == Way::Host {
        not_to_a_tunnel(flow, !flow.leaves)?;
    }
    if flow.leaves {
        return out_of_the_node();
    }
    if receiver.place.way == Way::Host {
        return Ok(Action::go_on(Path::ToHost));
    }
    into_pod(ctx, receiver.place.macs)?;
    Ok(Action::redirect(Path::Overlay, receiver.place.ifindex))
}

/// A frame from the tunnel was addressed to no interface of this node, a pod's ARP request to all. Older kernels keep
/// that mark into the pod's namespace, where the stack drops the first and makes little of the second.
#[inline(always)]
pub fn for_host(ctx: &TcContext) -> Result<(), DropReason> {
    ctx.change_type(PACKET_HOST).map_err(|_| DropReason::Internal)
}

#[inline(always)]
fn into_pod(ctx: &TcContext, macs: [u32; 3]) -> Result<(), DropReason> {
    parse::write(ctx, 0, macs)
}

// Offsets into the frame (RFC 791, section 3.1; RFC 8200, section 3).
const IPV4_FRAGMENT: usize = L3 + 6;
const IPV4_TTL: usize = L3 + 8;
const IPV4_CHECKSUM: usize = L3 + 10;
const IPV6_HOP_LIMIT: usize = L3 + 7;

/// One hop more (RFC 1812, section 5.3.1; RFC 8200, section 3), with the checksum updated in place (RFC 1624).
#[inline(always)]
fn one_hop(ctx: &TcContext, flow: &Flow) -> Result<(), DropReason> {
    let v6 = flow.family == Family::V6 as u8;
    let offset = if v6 { IPV6_HOP_LIMIT } else { IPV4_TTL };
    let hops: u8 = parse::read(ctx, offset)?;
    if hops <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    // A device may have summed up the packet, and IPv6 has no checksum that would make up for the change.
    if v6 && flow.from_outside {
        return store(ctx, offset, &[hops - 1], u64::from(BPF_F_RECOMPUTE_CSUM));
    }
    parse::write(ctx, offset, hops - 1)?;
    if v6 {
        return Ok(());
    }
    let checksum = u16::from_be(parse::read(ctx, IPV4_CHECKSUM)?);
    let sum = u32::from(checksum) + 0x0100;
    let folded = (sum & 0xffff) + (sum >> 16);
    parse::write(ctx, IPV4_CHECKSUM, (folded as u16).to_be())
}

/// Whether the tunnel carries a packet whole. What stands for many packets (GSO) is as large as one of them: with the
/// least headers that a segment has in front of its data, for options are not counted.
#[inline(always)]
fn fits(ctx: &TcContext, mtu: u32, v6: bool, protocol: u8) -> bool {
    /// `GSO_BY_FRAGS` (`include/linux/skbuff.h`): SCTP's, whose pieces are each no larger than the sender's own MTU.
    const BY_FRAGS: u32 = 0xffff;
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    let length = match segment {
        0 => ctx.len() - ETHERNET_LEN as u32,
        BY_FRAGS => 0,
        _ => {
            let ip = if v6 { IPV6_LEN } else { IPV4_LEN } as u32;
            segment + ip + if protocol == TCP { 20 } else { 8 }
        }
    };
    length <= mtu
}

/// Whether the tunnel may cut a packet: its sender forbids that by IPv6, or IPv4's "don't fragment".
#[inline(always)]
fn may_be_cut(ctx: &TcContext, flow: &Flow) -> Result<(), DropReason> {
    const DONT_FRAGMENT: u8 = 0x40;
    let v6 = flow.family == Family::V6 as u8;
    if v6 || parse::read::<u8>(ctx, IPV4_FRAGMENT)? & DONT_FRAGMENT != 0 {
        return Err(DropReason::TooBig);
    }
    Ok(())
}

#[inline(never)]
fn set_tunnel_key(ctx: &TcContext, config: &NodeConfig, node: &[u32; 4], vni: Identity) -> Result<(), DropReason> {
    // SAFETY: all zero is a value of this plain C struct.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni.0;
    key.tunnel_ttl = 64;
    // The local address has a field since Linux 6.0. IPv6 has no other checksum than UDP's; a receiver drops what has none
    // (RFC 6935).
    let own = config.underlay.words();
    let flags = if config.underlay_family == Family::V6 as u8 {
        key.__bindgen_anon_1.remote_ipv6 = *node;
        key.__bindgen_anon_3.local_ipv6 = own;
        BPF_F_TUNINFO_IPV6
    } else {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(node[0]);
        key.__bindgen_anon_3.local_ipv4 = u32::from_be(own[0]);
        BPF_F_ZERO_CSUM_TX
    };
    // SAFETY: the context and the key are valid, and the size is the key's own.
    let failed = unsafe {
        bpf_skb_set_tunnel_key(
            ctx.skb.skb,
            &raw mut key,
            size_of::<bpf_tunnel_key>() as u32,
            u64::from(flags),
        )
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(DropReason::TunnelFailed)
    }
}
