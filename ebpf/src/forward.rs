//! Forwarding: rewrites the packet for where it goes, and names the action. Nothing is redirected here.

use crate::{
    identify::{Pod, Receiver, Way},
    maps,
    parse::{self, IPV4_CHECKSUM, IPV4_TTL},
};
use abi::{DropReason, Identity};
use aya_ebpf::{
    bindings::{BPF_F_ZERO_CSUM_TX, bpf_tunnel_key},
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
    /// Out of the vxlan device, to the node with this IPv4 address (in host byte order); the tunnel key is set.
    Encap { ifindex: u32, vni: Identity, remote: u32 },
    /// Up the node's own stack.
    ToHost,
    /// Up the node's own stack, to be routed to where no pod is.
    ToOutside,
    /// On its way from the node itself, into the pod.
    IntoPod,
    /// On its way from where no pod is, into the pod.
    FromOutside,
}

/// Sends a pod's packet on its way.
#[inline(always)]
pub fn deliver(ctx: &TcContext, sender: Identity, receiver: &Receiver) -> Result<Action, DropReason> {
    let place = &receiver.place;
    match place.way {
        Way::Pod => {
            into_pod(ctx, place.mac, place.gateway_mac)?;
            Ok(Action::Local { ifindex: place.ifindex })
        }
        Way::Host => Ok(Action::ToHost),
        Way::Outside => Ok(Action::ToOutside),
        Way::Remote => {
            let config = maps::config().ok_or(DropReason::Internal)?;
            decrement_ttl(ctx)?;
            let remote = u32::from_be_bytes(place.tunnel);
            set_tunnel_key(ctx, remote, sender)?;
            Ok(Action::Encap {
                ifindex: config.vxlan_ifindex,
                vni: sender,
                remote,
            })
        }
    }
}

/// Sends a packet from the tunnel into its pod.
#[inline(always)]
pub fn from_overlay(ctx: &TcContext, receiver: &Pod) -> Result<Action, DropReason> {
    into_pod(ctx, receiver.mac, receiver.gateway_mac)?;
    for_host(ctx)?;
    Ok(Action::Overlay {
        ifindex: receiver.ifindex,
    })
}

/// A frame from the tunnel was addressed to no interface of this node, a pod's ARP request to all. Older kernels keep
/// that mark into the pod's namespace, where the stack drops the first and makes little of the second.
#[inline(always)]
pub fn for_host(ctx: &TcContext) -> Result<(), DropReason> {
    ctx.change_type(PACKET_HOST).map_err(|_| DropReason::Internal)
}

#[inline(always)]
fn into_pod(ctx: &TcContext, mac: [u8; 6], gateway_mac: [u8; 6]) -> Result<(), DropReason> {
    decrement_ttl(ctx)?;
    parse::write(ctx, 0, mac)?;
    parse::write(ctx, 6, gateway_mac)
}

/// One hop more (RFC 1812, section 5.3.1), with the checksum updated in place (RFC 1624).
#[inline(always)]
fn decrement_ttl(ctx: &TcContext) -> Result<(), DropReason> {
    let ttl: u8 = parse::read(ctx, IPV4_TTL)?;
    if ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    parse::write(ctx, IPV4_TTL, ttl - 1)?;
    let checksum = u16::from_be(parse::read(ctx, IPV4_CHECKSUM)?);
    let sum = u32::from(checksum) + 0x0100;
    let folded = (sum & 0xffff) + (sum >> 16);
    parse::write(ctx, IPV4_CHECKSUM, (folded as u16).to_be())
}

#[inline(always)]
fn set_tunnel_key(ctx: &TcContext, remote: u32, vni: Identity) -> Result<(), DropReason> {
    // SAFETY: all zero is a value of this plain C struct.
    let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
    key.tunnel_id = vni.0;
    key.tunnel_ttl = 64;
    key.__bindgen_anon_1.remote_ipv4 = remote;
    // SAFETY: the context and the key are valid, and the size is the key's own.
    let failed = unsafe {
        bpf_skb_set_tunnel_key(
            ctx.skb.skb,
            &raw mut key,
            size_of::<bpf_tunnel_key>() as u32,
            u64::from(BPF_F_ZERO_CSUM_TX),
        )
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(DropReason::TunnelFailed)
    }
}
