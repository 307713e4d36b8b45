//! Services, as the architecture describes them: which backend a connection gets, and for how long.

use super::{
    flows::{Conntrack, Entry, Party, Translation, Travel, is_closed, key},
    packet::End,
};
use abi::{
    DropReason,
    conntrack::{FRONTEND, HAIRPIN, TRANSLATED},
    node::TUNNEL_PORT,
    policy::TCP,
    service::SLOTS,
};
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

/// A service's frontend: backends by number, and Maglev's slots.
#[derive(Clone, Debug)]
pub struct Frontend {
    pub backends: BTreeMap<u32, End>,
    pub slots: Vec<u32>,
    pub affinity: bool,
}

/// FNV-1a over 64-bit words of host byte order, with a shift in between: which backend a connection gets is part of what
/// all nodes and all restarts agree on.
pub fn hash(one: IpAddr, other: IpAddr, rest: u64) -> u64 {
    let words = |address: IpAddr| {
        let mut bytes = [0; 16];
        match address {
            IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => bytes = v6.octets(),
        }
        let word = |at: usize| u64::from(u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()));
        [word(0) << 32 | word(4), word(8) << 32 | word(12)]
    };
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in [words(one), words(other)].concat().into_iter().chain([rest]) {
        hash = (hash ^ part).wrapping_mul(0x0000_0100_0000_01b3);
        hash ^= hash >> 29;
    }
    hash | 1
}

/// Clients' backends by frontend and address.
pub type Affinity = HashMap<AffinityKey, (u32, End)>;

/// Frontend, protocol and family, and client.
pub type AffinityKey = (End, u8, bool, IpAddr);

pub fn choose(
    conntrack: &Conntrack,
    affinity: &Affinity,
    frontend: &Frontend,
    travel: &mut Travel,
    client: &Party,
    gateway: IpAddr,
) -> Result<(), DropReason> {
    let packet = travel.packet.clone();
    let seen = [travel.source, travel.destination];
    travel.rewrite.seen = seen;
    let translate = |travel: &mut Travel, to: End, client_port: u16, backend: u32, hairpin: bool| {
        travel.asked = true;
        travel.hairpin = hairpin;
        travel.source = (if hairpin { gateway } else { seen[0].0 }, client_port);
        travel.destination = to;
        travel.rewrite.becomes = [travel.source, to];
        travel.translation = Some(Translation {
            to: seen[1],
            client_port: seen[0].1,
            backend,
        });
    };
    let has = |number: u32, backend: End| frontend.backends.get(&number) == Some(&backend);
    let known = conntrack
        .get(&key(packet.protocol, seen[0], seen[1]))
        .filter(|entry| entry.state & FRONTEND != 0 && entry.originator == seen[0] && entry.peers[0].0 == client.owner);
    match known.and_then(|entry| Some((entry, entry.translation?))) {
        None if packet.related => return Err(DropReason::IcmpUnrelated),
        None => {}
        Some((entry, to)) => {
            let open = packet.related || (packet.protocol == TCP && !packet.is_syn());
            if open || has(to.backend, to.to) {
                travel.backend_owner = open.then_some(entry.peers[1].0);
                translate(travel, to.to, to.client_port, to.backend, entry.state & HAIRPIN != 0);
                if open || is_free(conntrack, travel, seen) {
                    return Ok(());
                }
            }
        }
    }
    if frontend.backends.is_empty() {
        return Err(DropReason::NoBackends);
    }
    let port = |end: End| u64::from(end.1.to_be());
    let rest = port(seen[0]) << 32 | port(seen[1]) << 16 | u64::from(packet.protocol);
    let hash = hash(seen[0].0, seen[1].0, rest);
    let mixed = (hash >> 32) ^ (hash & 0xffff_ffff);
    let slot = usize::try_from((mixed * u64::from(SLOTS)) >> 32).unwrap();
    let place = if travel.at_node { None } else { Some(seen[1].0) };
    let unspecified: IpAddr = if packet.v6 { [0; 16].into() } else { [0; 4].into() };
    let client_key = (
        (place.unwrap_or(unspecified), seen[1].1),
        packet.protocol,
        packet.v6,
        seen[0].0,
    );
    let sticky = affinity
        .get(&client_key)
        .copied()
        .filter(|(number, backend)| has(*number, *backend));
    let number = match sticky {
        Some((number, _)) if frontend.affinity => number,
        _ => frontend.slots[slot],
    };
    let backend = frontend.backends[&number];
    travel.sticky = frontend.affinity.then_some(client_key);
    let mut candidate = hash;
    for attempt in 0..8 {
        let port = if attempt == 0 && !travel.from_outside {
            seen[0].1
        } else {
            candidate = candidate.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let port = u16::try_from(1024 + (((candidate >> 32) * (0x1_0000 - 1024)) >> 32)).unwrap();
            if port == TUNNEL_PORT {
                continue;
            }
            port
        };
        translate(travel, backend, port, number, backend.0 == seen[0].0);
        if is_free(conntrack, travel, seen) {
            return Ok(());
        }
    }
    Err(DropReason::ServicePorts)
}

/// Whether no other connection has these ends; `seen` is what the client has sent.
fn is_free(conntrack: &Conntrack, travel: &Travel, seen: [End; 2]) -> bool {
    conntrack
        .get(&key(travel.packet.protocol, travel.source, travel.destination))
        .is_none_or(|entry| {
            let ours = entry.translation.map(|known| (known.to, known.client_port)) == Some((seen[1], seen[0].1));
            (entry.state & TRANSLATED != 0 && ours) || is_closed(entry)
        })
}

/// The frontend's entry, for as long as the flow's own lives.
pub fn keep(
    conntrack: &mut Conntrack,
    affinity: &mut Affinity,
    generation: u32,
    travel: &Travel,
    client: &Party,
    backend: &Party,
) {
    let Some(translation) = travel.translation.filter(|_| travel.asked && !travel.packet.related) else {
        return;
    };
    if let (true, Some(key)) = (travel.opened, travel.sticky) {
        affinity.insert(key, (translation.backend, travel.rewrite.becomes[1]));
    }
    let [seen, frontend] = travel.rewrite.seen;
    let entry = Entry {
        state: FRONTEND | if travel.hairpin { HAIRPIN } else { 0 },
        generation,
        peers: [(client.owner, client.epoch), (backend.owner, backend.epoch)],
        originator: seen,
        account: client.owner,
        translation: Some(Translation {
            to: travel.rewrite.becomes[1],
            client_port: travel.rewrite.becomes[0].1,
            backend: translation.backend,
        }),
        via: None,
    };
    conntrack.insert(key(travel.packet.protocol, seen, frontend), entry);
}
