//! Verdicts: the only place that turns an outcome into a tc action, counts it and reports it.

use crate::{
    forward::Action,
    lookup,
    maps::{self, DROPS, EVENTS, FORWARDED},
    packet::Flow,
    tell,
};
use abi::{
    DropReason, Event, Hook, Path,
    event::{ALLOWED, Counter},
    node::{REPORT_DROPS, REPORT_FLOWS, SEEN_MARK},
};
use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    programs::TcContext,
};

/// No `TC_ACT_*`: the packet has not been looked at enough.
pub const UNDECIDED: i32 = i32::MIN;

/// For a packet that nothing can be said of.
#[inline(always)]
pub fn broken() -> i32 {
    TC_ACT_SHOT
}

/// For a packet that is none of the programs' business.
#[inline(always)]
pub fn pass() -> i32 {
    TC_ACT_UNSPEC
}

/// Carries out an outcome.
#[inline(always)]
pub fn act(ctx: &TcContext, hook: Hook, flow: &Flow, outcome: Result<Action, DropReason>) -> i32 {
    match outcome {
        Ok(action) => {
            if flow.opened && is_wanted(REPORT_FLOWS) {
                report(ctx, hook, flow, ALLOWED, action.path as u8);
            }
            forward(ctx, &action)
        }
        Err(reason) => {
            count(DROPS.get_ptr_mut(reason as u32), ctx.len());
            if is_wanted(REPORT_DROPS) {
                report(ctx, hook, flow, reason as u8, 0);
            }
            let told = matches!(hook, Hook::FromPod | Hook::FromNetdev) && tell::sender(ctx, flow, reason).is_some();
            if !told {
                return TC_ACT_SHOT;
            }
            let back = lookup::ifindex(ctx);
            // SAFETY: as in `carry_out`.
            unsafe {
                if matches!(hook, Hook::FromPod) {
                    bpf_redirect_peer(back, 0) as i32
                } else {
                    bpf_redirect(back, 0) as i32
                }
            }
        }
    }
}

/// Carries out what is not dropped.
#[inline(always)]
pub fn forward(ctx: &TcContext, action: &Action) -> i32 {
    count(FORWARDED.get_ptr_mut(action.path as u32), ctx.len());
    record(ctx, action);
    carry_out(ctx, action)
}

/// What is for the node or comes from it goes on to whatever else is attached to the hook (`TC_ACT_UNSPEC`).
#[inline(always)]
fn carry_out(ctx: &TcContext, action: &Action) -> i32 {
    // SAFETY: the helpers only note the target; they have no preconditions.
    unsafe {
        match action.path {
            Path::Local | Path::Overlay | Path::ArpReply | Path::NeighbourReply | Path::EchoReply | Path::NodePort => {
                bpf_redirect_peer(action.ifindex, 0) as i32
            }
            Path::Encap => bpf_redirect(action.ifindex, 0) as i32,
            Path::NodePortReply => bpf_redirect_neigh(action.ifindex, core::ptr::null_mut(), 0, 0) as i32,
            Path::ToHost | Path::ToOutside => {
                // Of the context, which is the kernel's `__sk_buff`, a tc program may write the mark.
                (*ctx.skb.skb).mark = SEEN_MARK;
                go_on(ctx)
            }
            Path::FromHost | Path::FromOutside => go_on(ctx),
        }
    }
}

/// To whatever is behind on the hook, but to no filter that the link in front is about to replace: it would take a packet
/// whose addresses are translated already for another one.
#[inline(always)]
fn go_on(ctx: &TcContext) -> i32 {
    let settling = maps::config().map_or(0, |config| config.settling_ifindex);
    if settling == lookup::ifindex(ctx) {
        TC_ACT_OK
    } else {
        TC_ACT_UNSPEC
    }
}

#[inline(always)]
fn count(counter: Option<*mut Counter>, length: u32) {
    if let Some(counter) = counter {
        // SAFETY: an element of a per-CPU array is there as long as the program, and only this CPU writes it.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(length);
        }
    }
}

/// Whether anybody watches.
#[inline(always)]
fn is_wanted(report: u32) -> bool {
    maps::config().is_some_and(|config| config.report & report != 0)
}

/// Reports to whoever watches. Where the ring buffer is full the report is lost; the counters are not.
#[inline(never)]
fn report(ctx: &TcContext, hook: Hook, flow: &Flow, reason: u8, path: u8) {
    let Some(mut slot) = EVENTS.reserve(0) else { return };
    let event: *mut Event = slot.as_mut_ptr();
    // Field by field into the ring buffer: a whole event would not fit on the stack beside everything else.
    macro_rules! put {
        ($($field:ident: $value:expr,)*) => {
            // SAFETY: the slot is reserved for an event, and is ours until it is submitted.
            unsafe { $((&raw mut (*event).$field).write($value);)* }
        };
    }
    put! {
        time: crate::conntrack::now(),
        source: flow.ends.source,
        destination: flow.ends.destination,
        from: flow.from,
        to: flow.to,
        ifindex: lookup::ifindex(ctx),
        length: ctx.len(),
        generation: flow.generation,
        source_port: u16::from_be(flow.ends.source_port),
        destination_port: u16::from_be(flow.ends.destination_port),
        family: flow.family,
        protocol: flow.protocol,
        hook: hook as u8,
        reason: reason,
        path: path,
        zero: [0; 3],
    }
    slot.submit(0);
}

/// Leaves path, target and tunnel key in `skb->cb`, where a test run hands them back. Otherwise the verifier sees that
/// the condition is false, and removes this.
#[inline(always)]
fn record(ctx: &TcContext, action: &Action) {
    if !maps::record_action() {
        return;
    }
    // SAFETY: the context is the kernel's `__sk_buff`, whose `cb` a tc program may write.
    unsafe {
        (*ctx.skb.skb).cb[0] = action.path as u32 + 1;
        (*ctx.skb.skb).cb[1] = action.ifindex;
        (*ctx.skb.skb).cb[2] = action.vni.0;
        (*ctx.skb.skb).cb[3] = action.remote;
    }
}
