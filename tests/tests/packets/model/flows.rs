//! Policy, connection tracking and services, as the architecture describes them.

use super::{
    packet::{End, FIN, Fragment, Packet, RST},
    services::AffinityKey,
};
use abi::{
    DropReason, Identity,
    conntrack::{
        CONFIRMED, FIN_ORIGINAL, FIN_REPLY, FRONTEND, HAIRPIN, NODE_PORT, OUTSIDE, RESET, SEEN_REPLY, TRANSLATED,
        VIA_NODE,
    },
    policy::{ICMP, ICMPV6, SCTP, TCP, UDP},
};
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

/// One end of a flow, as policy sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Party {
    pub identity: Identity,
    /// Row in the policy matrix, where this node enforces this end's policy.
    pub row: Option<u32>,
    pub column: u32,
    pub owner: u32,
    pub epoch: u32,
}

impl Party {
    pub fn reserved(identity: Identity) -> Self {
        Self {
            identity,
            row: None,
            column: identity.0,
            owner: 0,
            epoch: identity.0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cell {
    Deny,
    /// Protocol (any where there is none), first and last port.
    Ports(Vec<(Option<u8>, u16, u16)>),
}

/// Egress (true) or ingress, row, column; what is not there is allowed.
pub type Cells = BTreeMap<(bool, u32, u32), Cell>;

/// Rows and columns of the matrix.
pub const SHAPE: (u32, u32) = (4, 32);

fn permits(cells: &Cells, egress: bool, row: Option<u32>, column: u32, protocol: u8, port: u16) -> bool {
    let Some(row) = row else { return true };
    if row >= SHAPE.0 || column >= SHAPE.1 {
        return false;
    }
    match cells.get(&(egress, row, column)) {
        None => true,
        Some(Cell::Deny) => false,
        Some(Cell::Ports(rules)) => {
            let port = match (protocol, port) {
                (ICMP, 0) => 8,
                (ICMPV6, 0) => 128,
                _ => port,
            };
            let has_ports = matches!(protocol, TCP | UDP | SCTP);
            let matches = |(of, first, last): &(Option<u8>, u16, u16)| match of {
                Some(of) => *of == protocol && (*first..=*last).contains(&port),
                None => (*first, *last) == (0, u16::MAX) || (has_ports && (*first..=*last).contains(&port)),
            };
            rules.iter().any(matches)
        }
    }
}

/// What of a packet's ends becomes of it: source, destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    pub seen: [End; 2],
    pub becomes: [End; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    pub to: End,
    pub client_port: u16,
    pub backend: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub state: u32,
    pub generation: u32,
    /// Owner and epoch of who has opened it, and of the other end.
    pub peers: [(u32, u32); 2],
    pub originator: End,
    pub account: u32,
    pub translation: Option<Translation>,
    /// The node by way of which the originator asks.
    pub via: Option<IpAddr>,
}

/// Protocol and both ends, the lower one first.
pub type Key = (u8, End, End);

pub fn key(protocol: u8, one: End, other: End) -> Key {
    (protocol, one.min(other), one.max(other))
}

pub type Conntrack = HashMap<Key, Entry>;

/// What a packet is on its way through the programs.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one thing that is known of the packet"
)]
pub struct Travel {
    pub packet: Packet,
    pub source: End,
    pub destination: End,
    /// A service takes part: asked, or answering.
    pub asked: bool,
    pub answered: bool,
    pub rewrite: Rewrite,
    pub translation: Option<Translation>,
    pub hairpin: bool,
    pub at_node: bool,
    pub from_outside: bool,
    pub in_transit: bool,
    /// From elsewhere under the node's own address.
    pub must_answer: bool,
    pub leaves: bool,
    pub via: Option<IpAddr>,
    pub opened: bool,
    /// In the middle of a connection that nobody knows, or that looks like another.
    pub lost: bool,
    /// Owner of the backend of a connection that is open.
    pub backend_owner: Option<u32>,
    /// Where the client's backend is remembered, once it has got there.
    pub sticky: Option<AffinityKey>,
}

impl Travel {
    pub fn new(packet: Packet) -> Self {
        let ends = [packet.source, packet.destination];
        Self {
            source: packet.source,
            destination: packet.destination,
            packet,
            asked: false,
            answered: false,
            rewrite: Rewrite {
                seen: ends,
                becomes: ends,
            },
            translation: None,
            hairpin: false,
            at_node: false,
            from_outside: false,
            in_transit: false,
            must_answer: false,
            leaves: false,
            via: None,
            opened: false,
            lost: false,
            backend_owner: None,
            sticky: None,
        }
    }
}

fn next_state(travel: &Travel, reply: bool, before: u32) -> u32 {
    let packet = &travel.packet;
    if packet.related {
        return before;
    }
    let mut state = before;
    if reply {
        state |= SEEN_REPLY;
    } else if before & SEEN_REPLY != 0 && !packet.is_syn() {
        state |= CONFIRMED;
    }
    if packet.protocol == TCP {
        if packet.flags & FIN != 0 {
            state |= if reply { FIN_REPLY } else { FIN_ORIGINAL };
        }
        state &= !RESET;
        if packet.flags & RST != 0 {
            state |= RESET;
        }
    }
    state
}

pub fn is_closed(entry: &Entry) -> bool {
    entry.state & RESET != 0 || entry.state & (FIN_ORIGINAL | FIN_REPLY) == FIN_ORIGINAL | FIN_REPLY
}

fn judge(cells: &Cells, travel: &Travel, from: &Party, to: &Party, port: u16) -> Result<(), DropReason> {
    let protocol = travel.packet.protocol;
    if travel.hairpin {
        return Ok(());
    }
    if !permits(cells, true, from.row, to.column, protocol, port) {
        return Err(DropReason::EgressDenied);
    }
    if !permits(cells, false, to.row, from.column, protocol, port) {
        return Err(DropReason::IngressDenied);
    }
    Ok(())
}

/// A piece whose first one is not known passes where the two may talk at all, in either direction.
fn ahead(cells: &Cells, from: &Party, to: &Party) -> Result<(), DropReason> {
    let something = |egress: bool, row: Option<u32>, column: u32| {
        row.is_none_or(|row| {
            row < SHAPE.0 && column < SHAPE.1 && cells.get(&(egress, row, column)) != Some(&Cell::Deny)
        })
    };
    let either =
        |one: &Party, other: &Party| something(true, one.row, other.column) && something(false, other.row, one.column);
    if either(from, to) || either(to, from) {
        Ok(())
    } else {
        Err(DropReason::FragmentUnknown)
    }
}

/// What goes to the gateway answers a flow of the pod's to itself, or nobody wants it.
const fn leads_nowhere(travel: &Travel) -> bool {
    travel.hairpin && !travel.asked && !travel.answered
}

/// What becomes of a packet of a flow that is tracked; nothing, where it opens another one.
fn goes_on(
    conntrack: &mut Conntrack,
    cells: &Cells,
    generation: u32,
    travel: &mut Travel,
    (from, to): (&Party, &Party),
    (key, entry): (Key, Entry),
) -> Option<Result<(), DropReason>> {
    let packet = travel.packet.clone();
    let reply = entry.originator != travel.source;
    let asks = (packet.request || packet.is_syn()) && !packet.related;
    if travel.must_answer && (!reply || asks) {
        return Some(Err(DropReason::UnknownSource));
    }
    // Datagrams are answered where they were sent last; of a connection there can be only one.
    let crossed = !packet.related && !reply && (entry.state & TRANSLATED != 0) != travel.asked;
    if crossed && packet.protocol == TCP && !is_closed(&entry) {
        travel.lost = true;
        return Some(Err(DropReason::ServicePorts));
    }
    if packet.answer && !reply {
        return Some(Err(DropReason::IcmpUnrelated));
    }
    let asks_back = packet.request && reply;
    let again = packet.is_syn() && (reply || is_closed(&entry));
    let anew = crossed || (!packet.related && (asks_back || again));
    if !anew {
        if reply {
            travel.via = entry.via.or(travel.via);
        }
        if let Some(frontend) = entry.translation.filter(|_| reply) {
            travel.answered = true;
            travel.hairpin = entry.state & HAIRPIN != 0;
            travel.leaves = entry.state & NODE_PORT != 0;
            let client = if travel.hairpin {
                travel.source.0
            } else {
                travel.destination.0
            };
            travel.rewrite = Rewrite {
                seen: [travel.source, travel.destination],
                becomes: [frontend.to, (client, frontend.client_port)],
            };
        }
        if travel.in_transit && !travel.leaves {
            return Some(Err(DropReason::NotLocal));
        }
        if leads_nowhere(travel) {
            return Some(Err(DropReason::UnknownDestination));
        }
        let (opener, other, port) = if reply {
            (to, from, travel.source.1)
        } else {
            (from, to, travel.destination.1)
        };
        let peers = [(opener.owner, opener.epoch), (other.owner, other.epoch)];
        let current = entry.generation == generation && entry.peers == peers;
        let verdict = if current {
            Ok(())
        } else {
            judge(cells, travel, opener, other, port)
        };
        if packet.related {
            return Some(verdict);
        }
        if verdict.is_err() {
            conntrack.remove(&key);
            return Some(verdict);
        }
        let state = next_state(travel, reply, entry.state);
        let renewed = Entry {
            state,
            generation,
            peers,
            ..entry
        };
        conntrack.insert(key, renewed);
        return Some(Ok(()));
    }
    None
}

pub fn admit(
    conntrack: &mut Conntrack,
    cells: &Cells,
    generation: u32,
    travel: &mut Travel,
    from: &Party,
    to: &Party,
) -> Result<(), DropReason> {
    let packet = travel.packet.clone();
    if packet.fragment == Fragment::Ahead && travel.must_answer {
        return Err(DropReason::UnknownSource);
    }
    if packet.fragment == Fragment::Ahead {
        return match (travel.in_transit, leads_nowhere(travel)) {
            (true, _) => Err(DropReason::NotLocal),
            (_, true) => Err(DropReason::UnknownDestination),
            _ => ahead(cells, from, to),
        };
    }
    let key = key(packet.protocol, travel.source, travel.destination);
    let known = conntrack.get(&key).cloned().filter(|entry| {
        let owners = if entry.originator == travel.source {
            [from.owner, to.owner]
        } else {
            [to.owner, from.owner]
        };
        entry.state & FRONTEND == 0 && entry.peers.map(|(owner, _)| owner) == owners
    });
    if let Some(entry) = known {
        if let Some(verdict) = goes_on(conntrack, cells, generation, travel, (from, to), (key, entry)) {
            return verdict;
        }
    } else if travel.must_answer {
        return Err(DropReason::UnknownSource);
    } else if packet.related || packet.answer {
        return Err(DropReason::IcmpUnrelated);
    }
    if travel.in_transit {
        return Err(DropReason::NotLocal);
    }
    if leads_nowhere(travel) {
        return Err(DropReason::UnknownDestination);
    }
    travel.lost = packet.protocol == TCP && !packet.is_syn();
    judge(cells, travel, from, to, travel.destination.1)?;
    if travel.lost {
        judge(cells, travel, to, from, travel.source.1).map_err(|_| DropReason::MidStream)?;
    }
    conntrack.insert(key, opened(generation, travel, from, to));
    travel.opened = true;
    Ok(())
}

/// The entry of a flow that is new.
fn opened(generation: u32, travel: &Travel, from: &Party, to: &Party) -> Entry {
    let flag = |is: bool, flag: u32| if is { flag } else { 0 };
    let state = if travel.asked {
        TRANSLATED | flag(travel.hairpin, HAIRPIN) | flag(travel.from_outside, NODE_PORT)
    } else {
        flag(travel.via.is_some(), VIA_NODE)
    };
    Entry {
        state: next_state(travel, false, state),
        generation,
        peers: [(from.owner, from.epoch), (to.owner, to.epoch)],
        originator: travel.source,
        account: match (from.row, to.row) {
            (Some(_), _) => from.owner,
            (_, Some(_)) => to.owner,
            _ => OUTSIDE,
        },
        translation: travel.translation.filter(|_| travel.asked),
        via: travel.via.filter(|_| !travel.asked),
    }
}
