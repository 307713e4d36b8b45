//! Affinity: a client keeps its backend of a service for a while.

use crate::{conntrack, lru, maps, packet::Flow, service};
use abi::{
    AffinityEntry, AffinityKey, Service, ServiceKey,
    conntrack::SECOND,
    service::{Backend, MAX_BACKENDS},
};
use aya_ebpf::bindings::BPF_ANY;

/// No backend.
pub const NONE: u32 = MAX_BACKENDS;

/// The number of the backend that the client had last, while that counts, and while it is one.
#[inline(never)]
pub fn recall(flow: &Flow, service: &Service, now: u64) -> u32 {
    let Some((key, entry)) = parts(flow, &service.key) else {
        return NONE;
    };
    let found = if flow.from_outside {
        maps::AFFINITY_OUTSIDE.get_ptr(&*key)
    } else {
        maps::AFFINITY.get_ptr(&*key)
    };
    let is_known = found.is_some_and(|pointer| lru::copy_out(pointer, entry, cookie(key), now));
    if is_known && service::has(service, entry.number, &entry.backend.address, entry.backend.port) {
        entry.number
    } else {
        NONE
    }
}

/// Remembers the client's backend, once policy has let it get there.
#[inline(never)]
pub fn remember(flow: &Flow) {
    let Some(scratch) = maps::scratch() else { return };
    // SAFETY: as in `Flow::begin`. The key is still that of the frontend that the packet goes to.
    let frontend = unsafe { &(*scratch).service };
    let Some((key, entry)) = parts(flow, frontend) else {
        return;
    };
    entry.cookie = cookie(key);
    entry.expires = conntrack::now() + u64::from(flow.affinity) * SECOND;
    entry.backend = Backend {
        address: flow.becomes.destination,
        port: flow.becomes.destination_port,
        zero: 0,
    };
    entry.number = flow.translation.backend;
    // Where the map takes no entry the client's next connection is on its own.
    let _ = if flow.from_outside {
        maps::AFFINITY_OUTSIDE.insert(&*key, &*entry, u64::from(BPF_ANY))
    } else {
        maps::AFFINITY.insert(&*key, &*entry, u64::from(BPF_ANY))
    };
}

/// The client's key, and where an entry is put together.
#[inline(always)]
fn parts(flow: &Flow, frontend: &ServiceKey) -> Option<(&'static mut AffinityKey, &'static mut AffinityEntry)> {
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; nothing else refers to these parts.
    let (key, entry) = unsafe { (&mut (*scratch).affinity_key, &mut (*scratch).affinity) };
    key.frontend = *frontend;
    key.client = flow.seen.source;
    Some((key, entry))
}

/// A hash of the key: what an entry says whose it is.
#[inline(always)]
fn cookie(key: &AffinityKey) -> u64 {
    let frontend = &key.frontend;
    let rest = u64::from(frontend.port) << 16 | u64::from(frontend.family) << 8 | u64::from(frontend.protocol);
    conntrack::hash(&key.client, &frontend.address, rest)
}
