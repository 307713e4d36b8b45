//! Forwarding: rewrites the packet for where it goes, and names the action. Nothing is redirected here.

use crate::{
    identify::{Receiver, Way},
    maps,
    packet::Flow,
    parse::{self, ETHERNET_LEN, L3},
};
use abi::{DropReason, Family, Identity, NodeConfig};
use aya_ebpf::{
    bindings::{BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
    helpers::bpf_skb_set_tunnel_key,
    programs::TcContext,
};

/// `PACKET_HOST` (`include/uapi/linux/if_packet.h`).
const PACKET_HOST: u32 = 0;

/// What becomes of a packet that is not dropped.
#[derive(Clone, Copy)]
pub enum Action {
    /// Into the namespace of the pod whose host veth this is, from another pod of this node.
    Local { ifindex: u32 },
    /// The same, from the tunnel.
    Overlay { ifindex: u32 },
    /// Back into the pod that asked.
    AnswerArp { ifindex: u32 },
    /// Out of the vxlan device, to the node whose address ends in this word (in host byte order); the tunnel key is set.
    Encap { ifindex: u32, vni: Identity, remote: u32 },
    /// Back into the pod that asked for its neighbour.
    AnswerNeighbour { ifindex: u32 },
    /// Up the node's own stack.
    ToHost,
    /// Up the node's own stack, to be routed to where no pod is.
    ToOutside,
    /// On its way from the node itself, into the pod.
    IntoPod,
    /// On its way from where no pod is, into the pod.
    FromOutside,
}

/// Sends a pod's packet on its way. That is the one hop between any two pods: what comes out of the tunnel counts none.
#[inline(never)]
pub fn deliver(ctx: &TcContext, flow: &Flow, sender: Identity, receiver: &Receiver) -> Result<Action, DropReason> {
    let place = &receiver.place;
    match place.way {
        Way::Pod => {
            one_hop(ctx, flow)?;
            into_pod(ctx, place.macs)?;
            Ok(Action::Local { ifindex: place.ifindex })
        }
        Way::Host => Ok(Action::ToHost),
        Way::Outside => Ok(Action::ToOutside),
        Way::Remote => {
            let config = maps::config().ok_or(DropReason::Internal)?;
            one_hop(ctx, flow)?;
            fits(ctx, flow, config.tunnel_mtu)?;
            let remote = set_tunnel_key(ctx, config, &place.tunnel, sender)?;
            Ok(Action::Encap {
                ifindex: config.vxlan_ifindex,
                vni: sender,
                remote,
            })
        }
    }
}

/// Sends a packet from the tunnel into its pod, or up the node's stack.
#[inline(always)]
pub fn from_overlay(ctx: &TcContext, receiver: &Receiver) -> Result<Action, DropReason> {
    for_host(ctx)?;
    if receiver.place.way == Way::Host {
        return Ok(Action::ToHost);
    }
    into_pod(ctx, receiver.place.macs)?;
    Ok(Action::Overlay {
        ifindex: receiver.place.ifindex,
    })
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
    parse::write(ctx, offset, hops - 1)?;
    if v6 {
        return Ok(());
    }
    let checksum = u16::from_be(parse::read(ctx, IPV4_CHECKSUM)?);
    let sum = u32::from(checksum) + 0x0100;
    let folded = (sum & 0xffff) + (sum >> 16);
    parse::write(ctx, IPV4_CHECKSUM, (folded as u16).to_be())
}

/// A packet that the tunnel would have to cut, though its sender forbids that: IPv6, or IPv4 with "don't fragment". What
/// stands for many packets (GSO) is as large as one of them.
#[inline(always)]
fn fits(ctx: &TcContext, flow: &Flow, mtu: u32) -> Result<(), DropReason> {
    /// IPv4 and TCP headers without options: less than that no segment has in front of its data.
    const HEADERS: u32 = 40;
    const DONT_FRAGMENT: u8 = 0x40;
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let segment = unsafe { (*ctx.skb.skb).gso_size };
    let length = if segment == 0 {
        ctx.len() - ETHERNET_LEN as u32
    } else {
        segment + HEADERS
    };
    if length <= mtu {
        return Ok(());
    }
    let v6 = flow.family == Family::V6 as u8;
    if v6 || parse::read::<u8>(ctx, IPV4_FRAGMENT)? & DONT_FRAGMENT != 0 {
        return Err(DropReason::TooBig);
    }
    Ok(())
}

/// The answer is the last word of the node's address, in host byte order.
#[inline(never)]
fn set_tunnel_key(ctx: &TcContext, config: &NodeConfig, node: &[u32; 4], vni: Identity) -> Result<u32, DropReason> {
    // SAFETY: all zero is a value of this plain C struct.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni.0;
    key.tunnel_ttl = 64;
    // IPv6 has no other checksum than UDP's; a receiver drops what has none (RFC 6935).
    let (flags, remote) = if config.underlay_family == Family::V6 as u8 {
        key.__bindgen_anon_1.remote_ipv6 = *node;
        (BPF_F_TUNINFO_IPV6, node[3])
    } else {
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be(node[0]);
        (BPF_F_ZERO_CSUM_TX, node[0])
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
        Ok(u32::from_be(remote))
    } else {
        Err(DropReason::TunnelFailed)
    }
}
