//! What the node's routes say (`bpf_fib_lookup`, `net/core/filter.c`).

use crate::{lookup::ifindex, maps, packet::Flow};
use abi::{DropReason, address::Address};
use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS,
        bpf_fib_lookup,
    },
    helpers::generated,
    programs::TcContext,
};

/// Length of a route query, as the helper wants it.
const ROUTE_LEN: i32 = 64;
const _: () = assert!(size_of::<bpf_fib_lookup>() == 64);

/// Whether the node would deliver to itself what is for an address: its routes know all its addresses, also those that
/// hostd was not told of. Where the node does not forward at all, nothing else can become of the packet.
#[inline(never)]
pub fn is_own(ctx: &TcContext, flow: &Flow, address: &Address) -> Result<bool, DropReason> {
    let found = route(ctx, flow, &flow.ends.source, address)?;
    Ok(matches!(
        found,
        BPF_FIB_LKUP_RET_NOT_FWDED | BPF_FIB_LKUP_RET_FWD_DISABLED
    ))
}

/// Whether the node would send what goes from one address to another by the interface that the program runs on.
#[inline(never)]
pub fn is_reached_by(ctx: &TcContext, flow: &Flow, from: &Address, to: &Address) -> Result<bool, DropReason> {
    let found = route(ctx, flow, from, to)?;
    let scratch = maps::scratch().ok_or(DropReason::Internal)?;
    // SAFETY: as in `route`, which has filled it in.
    let by = unsafe { (*scratch).route.ifindex };
    // The interface is known before the neighbour is. Of an interface that does not forward the helper says nothing.
    let is_found = matches!(found, BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH);
    Ok((is_found && by == ifindex(ctx)) || found == BPF_FIB_LKUP_RET_FWD_DISABLED)
}

/// Asks the node's routes; the answer is one of `BPF_FIB_LKUP_RET_*`, and the rest is in this CPU's scratch.
#[inline(always)]
fn route(ctx: &TcContext, flow: &Flow, from: &Address, to: &Address) -> Result<u32, DropReason> {
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
    route.__bindgen_anon_3.ipv6_src = from.words();
    route.__bindgen_anon_4.ipv6_dst = to.words();
    // SAFETY: context and parameters are valid, and the size is the parameters' own.
    let found = unsafe { generated::bpf_fib_lookup(ctx.skb.skb.cast(), route, ROUTE_LEN, 0) };
    u32::try_from(found).map_err(|_| DropReason::Internal)
}
