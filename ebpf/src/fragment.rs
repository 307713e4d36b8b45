//! Fragments: the later ones go where the first one went, and no farther.
//!
//! The programs do not put packets together. They remember the ports of a first fragment, so that the others of its
//! packet are judged as it was. One that arrives before its first passes where policy lets the two talk at all: without
//! the first, which is judged by its ports, nobody can make a packet of it. Every sender has places of its own to be
//! remembered in.

use crate::{
    conntrack, lru, maps,
    packet::{Flow, Fragment},
};
use abi::{
    DropReason, Family, FragmentKey,
    address::SHARED_SCOPE,
    fragment::{REASSEMBLY_NS, SLOTS},
};
use aya_ebpf::bindings::BPF_ANY;

/// Remembers a first fragment, or gives a later one the ports of its first. The sender must be known to be who it says.
#[inline(never)]
pub fn track(flow: &mut Flow) -> Result<(), DropReason> {
    match flow.fragment {
        Fragment::None => Ok(()),
        Fragment::First => remember(flow),
        Fragment::Later | Fragment::Ahead => recall(flow),
    }
}

/// Fills in the key of the packet's place; the answer is the hash that tells it from others in that place.
#[inline(always)]
fn fill(key: &mut FragmentKey, flow: &Flow) -> u64 {
    let protocol = if flow.family == Family::V6 as u8 {
        0
    } else {
        flow.protocol
    };
    let rest = u64::from(flow.identification) << 16 | u64::from(flow.family) << 8 | u64::from(protocol);
    let cookie = conntrack::hash(&flow.ends.source, &flow.ends.destination, rest);
    key.source = flow.ends.source;
    key.slot = (cookie >> 32) as u32 % SLOTS;
    key.scope = SHARED_SCOPE;
    key.family = flow.family;
    key.zero = 0;
    cookie
}

#[inline(always)]
fn remember(flow: &Flow) -> Result<(), DropReason> {
    let scratch = maps::scratch().ok_or(DropReason::Internal)?;
    // SAFETY: as in `Flow::begin`; these parts are taken once a packet, here or in `recall`.
    let (key, entry) = unsafe { (&mut (*scratch).fragment_key, &mut (*scratch).fragment) };
    entry.cookie = fill(key, flow);
    entry.expires = conntrack::now() + REASSEMBLY_NS;
    entry.length = flow.fragment_length;
    entry.source_port = flow.ends.source_port;
    entry.destination_port = flow.ends.destination_port;
    entry.protocol = flow.protocol;
    entry.answer = u8::from(flow.answer);
    entry.zero = [0; 6];
    // Where the map takes no entry the others are taken for ones that came ahead.
    let _ = maps::FRAGMENTS.insert(&*key, &*entry, u64::from(BPF_ANY));
    Ok(())
}

#[inline(always)]
fn recall(flow: &mut Flow) -> Result<(), DropReason> {
    let scratch = maps::scratch().ok_or(DropReason::Internal)?;
    // SAFETY: as in `remember`.
    let (key, first) = unsafe { (&mut (*scratch).fragment_key, &mut (*scratch).fragment) };
    let cookie = fill(key, flow);
    let is_known = maps::FRAGMENTS
        .get_ptr(&*key)
        .is_some_and(|pointer| lru::copy_out(pointer, first, cookie, conntrack::now()));
    if !is_known {
        flow.fragment = Fragment::Ahead;
        return Ok(());
    }
    if flow.fragment_offset < first.length {
        return Err(DropReason::FragmentOverlap);
    }
    flow.protocol = first.protocol;
    flow.ends.source_port = first.source_port;
    flow.ends.destination_port = first.destination_port;
    flow.answer = first.answer != 0;
    Ok(())
}
