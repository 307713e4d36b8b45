//! Services: what goes to a frontend goes on to one of its backends, and what a backend sends back comes from the frontend.
//!
//! A connection has two entries in conntrack: one between client and frontend, which says what becomes of the client's
//! packets, and the flow's own between client and backend, which says what becomes of the answers.

use crate::{
    affinity, conntrack,
    lookup::Party,
    maps,
    packet::{Ends, Flow, Fragment, Service as Stage, TCP, UDP},
};
use abi::{
    DropReason, Family, Service, ServiceKey,
    address::{Address, SHARED_SCOPE},
    conntrack::{FRONTEND, HAIRPIN, TRANSLATED, Translation},
    node::{GATEWAY_V4, GATEWAY_V6},
    service::{MAX_BACKENDS, SLOTS, SLOTS_PER_WORD},
};

/// Ports that are tried for a client whose own is taken.
const ATTEMPTS: u32 = 8;
/// The first port that no service of the system has (RFC 6335, section 6).
const FIRST_PORT: u32 = 1024;

/// Who is seen in the place of a pod that reaches itself through a service.
#[inline(always)]
pub fn gateway(flow: &Flow) -> Address {
    if flow.family == Family::V6 as u8 {
        GATEWAY_V6
    } else {
        Address::v4(GATEWAY_V4)
    }
}

/// The frontend that the packet goes to: at its address, or at every node's.
#[inline(always)]
fn frontend(flow: &Flow) -> Option<&'static Service> {
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; nothing else refers to this part.
    let key = unsafe { &mut (*scratch).service };
    *key = ServiceKey {
        address: if flow.at_node {
            Address::NONE
        } else {
            flow.ends.destination
        },
        port: flow.ends.destination_port,
        scope: SHARED_SCOPE,
        family: flow.family,
        protocol: flow.protocol,
        zero: 0,
    };
    find(key).or_else(|| find(key))
}

/// The entry of a frontend. One that is replaced just as it is read is looked at once more: that was one write of hostd's.
#[inline(always)]
fn find(key: &ServiceKey) -> Option<&'static Service> {
    let service = maps::service(key)?;
    (service.key == *key).then_some(service)
}

/// Whether a packet to a node's address goes to a node port; notes it.
#[inline(never)]
pub fn is_node_port(flow: &mut Flow) -> bool {
    let wanted = maps::config().is_some_and(|config| config.node_ports != 0);
    // A backend's address is none that could stand for another one.
    if !wanted || flow.service != Stage::None || !matches!(flow.protocol, TCP | UDP) || flow.fragment == Fragment::Ahead
    {
        return false;
    }
    flow.at_node = true;
    flow.at_node = frontend(flow).is_some() && !is_anothers(flow);
    flow.at_node
}

/// Whether a packet to a node port is of a connection that has nothing to do with it: one that somebody has opened from that
/// port, or that was open to a process of the node's before there was a service. Of clients outside the stack knows more
/// connections than conntrack does: those of masquerade have any port.
#[inline(always)]
fn is_anothers(flow: &mut Flow) -> bool {
    let goes_on = flow.related || (flow.protocol == TCP && !flow.is_syn());
    // A router's error is about somebody else's packet.
    flow.seen = flow.ends;
    if flow.related {
        flow.seen.source = flow.about;
    }
    let known = conntrack::place(flow, &flow.seen).and_then(|place| conntrack::find(&place, conntrack::now()));
    match known {
        Some(known) if known.entry.state & FRONTEND != 0 => false,
        Some(known) => known.reply || goes_on,
        None => flow.from_outside && goes_on,
    }
}

/// Sends a packet to a frontend's backend: the one that its connection has, or else one that is chosen for it.
#[inline(never)]
pub fn choose(flow: &mut Flow, client: &Party) -> Result<(), DropReason> {
    if flow.fragment == Fragment::Ahead {
        return Err(DropReason::FragmentUnknown);
    }
    let service = frontend(flow).ok_or(DropReason::NoService)?;
    let now = conntrack::now();
    flow.seen = flow.ends;
    if goes_on(flow, service, client, now)? {
        return Ok(());
    }
    if service.backends == 0 {
        return Err(DropReason::NoBackends);
    }
    let hash = conntrack::hash(&flow.seen.source, &flow.seen.destination, ports(flow));
    let last = if service.affinity == 0 {
        affinity::NONE
    } else {
        affinity::recall(flow, service, now)
    };
    let number = if last == affinity::NONE {
        slot(service, (hash >> 32) as u32 ^ hash as u32)
    } else {
        last
    };
    let Some(backend) = service.backend.get((number & (MAX_BACKENDS - 1)) as usize) else {
        return Err(DropReason::Internal);
    };
    flow.affinity = service.affinity;
    let config = maps::config().ok_or(DropReason::Internal)?;
    let mut candidate = hash;
    for attempt in 0..ATTEMPTS {
        // A client outside may ask at other nodes from the same port, which the backend could not tell apart.
        let port = if attempt == 0 && !flow.from_outside {
            flow.seen.source_port
        } else {
            candidate = candidate.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let spread = u64::from((candidate >> 32) as u32) * u64::from(0x1_0000 - FIRST_PORT);
            let port = (FIRST_PORT + (spread >> 32) as u32) as u16;
            // No pod could answer there.
            if port == config.tunnel_port {
                continue;
            }
            port.to_be()
        };
        let known = Translation {
            address: backend.address,
            port: backend.port,
            client_port: port,
            backend: number,
        };
        translate(flow, &known, backend.address == flow.seen.source);
        if is_free(flow, now) {
            return Ok(());
        }
    }
    Err(DropReason::ServicePorts)
}

#[inline(always)]
fn ports(flow: &Flow) -> u64 {
    u64::from(flow.seen.source_port) << 32 | u64::from(flow.seen.destination_port) << 16 | u64::from(flow.protocol)
}

/// Maglev's choice.
#[inline(always)]
fn slot(service: &Service, hash: u32) -> u32 {
    let slot = (u64::from(hash) * u64::from(SLOTS)) >> 32;
    let word = service.slots.get((slot / u64::from(SLOTS_PER_WORD)) as usize);
    word.map_or(0, |word| {
        (word >> ((slot % u64::from(SLOTS_PER_WORD)) * 16)) as u32 & 0xffff
    })
}

/// Whether a frontend has this backend under this number still.
#[inline(always)]
pub fn has(service: &Service, number: u32, address: &Address, port: u16) -> bool {
    let backend = service.backend.get((number & (MAX_BACKENDS - 1)) as usize);
    backend.is_some_and(|backend| backend.port == port && backend.address == *address)
}

/// Goes on with the backend that the packet's connection has. A connection of TCP that is open keeps a backend that the
/// service has no longer: it may come to its end. What can be sent elsewhere is, and so is a new connection.
#[inline(always)]
fn goes_on(flow: &mut Flow, service: &Service, client: &Party, now: u64) -> Result<bool, DropReason> {
    let place = conntrack::place(flow, &flow.ends).ok_or(DropReason::Internal)?;
    let known = conntrack::find(&place, now).filter(|known| {
        known.entry.state & FRONTEND != 0 && known.entry.peers[(place.sender & 1) as usize].owner == client.peer.owner
    });
    let Some(known) = known else {
        return if flow.related {
            Err(DropReason::IcmpUnrelated)
        } else {
            Ok(false)
        };
    };
    let translation = &known.entry.translation;
    // Whatever is chosen, it takes this entry's place.
    flow.frontend_expires = known.entry.expires;
    flow.backend_owner = known.entry.peers[1 - (place.sender & 1) as usize].owner;
    let is_open = flow.related || (flow.protocol == TCP && !flow.is_syn());
    if !is_open && !has(service, translation.backend, &translation.address, translation.port) {
        flow.frontend_expires = 1;
        return Ok(false);
    }
    flow.is_open = is_open;
    translate(flow, translation, known.entry.state & HAIRPIN != 0);
    // While the flow was closed or forgotten another one may have taken its port.
    if !is_open && !is_free(flow, now) {
        flow.frontend_expires = 1;
        return Ok(false);
    }
    Ok(true)
}

/// What is left of an open connection whose backend has another one's address now, or has none.
#[inline(always)]
pub fn is_gone(flow: &Flow, backend: &Party) -> bool {
    flow.is_open && flow.backend_owner != backend.peer.owner
}

/// What the packet becomes.
#[inline(never)]
fn translate(flow: &mut Flow, to: &Translation, hairpin: bool) {
    flow.service = Stage::Asked;
    flow.hairpin = hairpin;
    flow.ends = Ends {
        source: if hairpin { gateway(flow) } else { flow.seen.source },
        destination: to.address,
        source_port: to.client_port,
        destination_port: to.port,
    };
    flow.becomes = flow.ends;
    flow.translation = Translation {
        address: flow.seen.destination,
        port: flow.seen.destination_port,
        client_port: flow.seen.source_port,
        backend: to.backend,
    };
}

/// Whether no other connection looks as this one would to its backend.
#[inline(never)]
fn is_free(flow: &Flow, now: u64) -> bool {
    let Some(place) = conntrack::place(flow, &flow.ends) else {
        return false;
    };
    let Some(known) = conntrack::find(&place, now) else {
        return true;
    };
    let is_ours = known.entry.state & TRANSLATED != 0
        && known.entry.translation.address == flow.translation.address
        && known.entry.translation.port == flow.translation.port
        && known.entry.translation.client_port == flow.translation.client_port;
    is_ours || known.is_closed()
}

/// Remembers which backend the connection has, for as long as its flow is tracked.
#[inline(always)]
pub fn keep(flow: &Flow, client: &Party, backend: &Party) {
    if flow.opened && flow.affinity != 0 {
        affinity::remember(flow);
    }
    let same_time = !conntrack::is_later(flow, flow.frontend_expires);
    let same_backend = flow.backend_owner == backend.peer.owner;
    if flow.service == Stage::Asked && !flow.related && !(same_time && same_backend) {
        conntrack::keep_frontend(flow, client, backend);
    }
}
