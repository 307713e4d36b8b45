//! The guard of the tunnel against the node's own processes: other nodes believe whatever comes from its underlay address.
//!
//! It sees what sockets of the node send, and not what the tunnel does, which sends with a socket of the kernel's.

use crate::{
    maps,
    packet::UDP,
    parse::{
        IPV6_LEN,
        ipv6::{DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ROUTING},
    },
};
use abi::{Family, address::Address};
use aya_ebpf::{
    helpers::generated::{bpf_get_socket_uid, bpf_skb_load_bytes},
    programs::SkBuffContext,
};

/// What a `cgroup_skb` program answers (`include/uapi/linux/bpf.h`: `bpf_prog_attach` of `BPF_CGROUP_INET_EGRESS`).
pub const PASS: i32 = 1;
pub const DENY: i32 = 0;

// Offsets into IP headers, with which such a packet begins (RFC 791, section 3.1; RFC 8200, section 3).
const PROTOCOL4: usize = 9;
const SOURCE4: usize = 12;
const NEXT6: usize = 6;
const SOURCE6: usize = 8;
/// Offset of the destination port in a UDP header (RFC 768).
const DESTINATION_PORT: usize = 2;

#[inline(always)]
fn load<T: Default>(ctx: &SkBuffContext, offset: usize) -> Option<T> {
    let mut value = T::default();
    // SAFETY: the context is valid, and the value has so many bytes; the helper checks the packet's bounds.
    let failed = unsafe {
        bpf_skb_load_bytes(
            ctx.skb.skb.cast(),
            offset as u32,
            (&raw mut value).cast(),
            size_of::<T>() as u32,
        )
    };
    (failed == 0).then_some(value)
}

/// Whether a packet of the node's own goes from its underlay address to a tunnel port, in the underlay's family. What can't be read
/// does, and what has IPv6 extension headers, which hide where it goes.
#[inline(always)]
fn is_to_a_tunnel(ctx: &SkBuffContext) -> Option<bool> {
    let config = maps::config()?;
    let first: u8 = load(ctx, 0)?;
    let v6 = first >> 4 == 6;
    if v6 != (config.underlay_family == Family::V6 as u8) {
        return Some(false);
    }
    let (protocol, transport, is_own) = if v6 {
        let source: [u32; 4] = load(ctx, SOURCE6)?;
        (load::<u8>(ctx, NEXT6)?, IPV6_LEN, source == config.underlay.words())
    } else {
        let source: u32 = load(ctx, SOURCE4)?;
        let own = Address::words(&config.underlay)[0];
        (
            load::<u8>(ctx, PROTOCOL4)?,
            usize::from(first & 0x0f) * 4,
            source == own,
        )
    };
    if v6 && is_own && matches!(protocol, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS) {
        return Some(true);
    }
    if protocol != UDP || !is_own {
        return Some(false);
    }
    let port: u16 = load(ctx, transport + DESTINATION_PORT)?;
    Some(port == config.tunnel_port.to_be())
}

/// Lets everything pass but what would be taken for the tunnel's; root may do as it likes.
#[inline(always)]
pub fn judge(ctx: &SkBuffContext) -> i32 {
    if !is_to_a_tunnel(ctx).unwrap_or(true) {
        return PASS;
    }
    // SAFETY: the context is the kernel's. The answer is the user that has made the socket, as the network namespace's user
    // namespace calls it.
    let user = unsafe { bpf_get_socket_uid(ctx.skb.skb) };
    if user == 0 { PASS } else { DENY }
}
