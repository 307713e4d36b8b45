//! A model of the datapath in plain Rust: what the programs should do with a packet, written from the architecture and the
//! RFCs, and not from the programs. It knows no maps and no verifier, and time does not pass in it.

mod flows;
mod forward;
mod link;
mod outside;
mod packet;
mod services;
mod write;

pub use flows::{Cell, Cells, Conntrack, Entry, Key, Translation, key};
pub use services::{Frontend, hash};

use abi::{
    DropReason, Hook, Identity, Path,
    node::{GATEWAY_V4, GATEWAY_V6},
};
use flows::{Party, Travel};
use forward::Place;
use packet::{Fragment, Packet, ethertype};
use services::Affinity;
use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

/// A pod of this node.
#[derive(Clone, Debug)]
pub struct Pod {
    pub ifindex: u32,
    pub mac: [u8; 6],
    pub gateway_mac: [u8; 6],
    pub identity: Identity,
    pub row: u32,
    pub column: u32,
    pub owner: u32,
    pub epoch: u32,
}

/// A pod of another node.
#[derive(Clone, Debug)]
pub struct Remote {
    pub identity: Identity,
    pub column: u32,
    pub node: IpAddr,
    pub owner: u32,
    pub epoch: u32,
}

/// What a prefix stands for; nothing, where nothing is routed to or from it.
#[derive(Clone, Debug)]
pub struct Network {
    pub address: IpAddr,
    pub length: u32,
    pub identity: Option<Identity>,
    pub column: u32,
}

/// Frontends by address (none for node ports), family, protocol and port.
pub type Services = BTreeMap<(Option<IpAddr>, bool, u8, u16), Frontend>;

/// Source, and one of its places.
type FragmentKey = (IpAddr, u64);

/// What is known of a packet in pieces.
#[derive(Clone, Debug)]
pub struct FirstPiece {
    cookie: u64,
    length: u32,
    protocol: u8,
    ports: (u16, u16),
    answer: bool,
}

/// What the model does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Dropped(DropReason),
    Told(DropReason, Vec<u8>),
    Passed,
    Sent {
        path: Path,
        ifindex: u32,
        tunnel: Option<(Identity, IpAddr)>,
        frame: Vec<u8>,
    },
}

/// What a node knows, and what it remembers.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub pods: BTreeMap<IpAddr, Pod>,
    pub remotes: BTreeMap<IpAddr, Remote>,
    /// The node's own address, as its pods and other nodes know it, and others that it has.
    pub own: Vec<IpAddr>,
    /// Addresses of other nodes, each with the underlay address that it is behind; with none, where several nodes have it.
    pub nodes: BTreeMap<IpAddr, Option<IpAddr>>,
    pub networks: Vec<Network>,
    pub services: Services,
    /// Both generations' cells, by parity.
    pub cells: [Cells; 2],
    pub generation: u32,
    pub vxlan: u32,
    pub underlay: u32,
    pub tunnel_mtu: usize,
    pub conntrack: Conntrack,
    pub affinity: Affinity,
    pub fragments: HashMap<FragmentKey, FirstPiece>,
}

type Step<T> = Result<T, DropReason>;

fn gateway(v6: bool) -> IpAddr {
    if v6 { GATEWAY_V6.0.into() } else { GATEWAY_V4.into() }
}

impl Pod {
    fn party(&self) -> Party {
        Party {
            identity: self.identity,
            row: Some(self.row),
            column: self.column,
            owner: self.owner,
            epoch: self.epoch,
        }
    }
}

impl Remote {
    fn party(&self) -> Party {
        Party {
            identity: self.identity,
            row: None,
            column: self.column,
            owner: self.owner,
            epoch: self.epoch,
        }
    }
}

impl Network {
    fn holds(&self, address: IpAddr) -> bool {
        let (mine, other) = (write::octets(self.address), write::octets(address));
        let bit = |octets: &[u8], bit: u32| octets[bit as usize / 8] >> (7 - bit % 8) & 1;
        mine.len() == other.len() && (0..self.length).all(|at| bit(&mine, at) == bit(&other, at))
    }
}

#[expect(clippy::wrong_self_convention, reason = "methods are named after the hooks")]
impl Model {
    fn cells(&self) -> &Cells {
        &self.cells[(self.generation & 1) as usize]
    }

    /// Forgets all flows.
    pub fn forget(&mut self) {
        self.conntrack.clear();
        self.affinity.clear();
        self.fragments.clear();
    }

    /// The node's own address that everybody knows.
    fn is_host(&self, address: IpAddr) -> bool {
        self.own.first() == Some(&address)
    }

    fn is_service(&self, address: IpAddr) -> bool {
        self.services.keys().any(|(at, ..)| *at == Some(address))
    }

    fn is_known(&self, address: IpAddr) -> bool {
        self.pods.contains_key(&address)
            || self.remotes.contains_key(&address)
            || self.is_host(address)
            || self.is_service(address)
    }

    /// Who has an address that is no pod's and not the node's.
    fn outside(&self, address: IpAddr) -> Option<Party> {
        if self.nodes.contains_key(&address) {
            return Some(Party::reserved(Identity::REMOTE_NODE));
        }
        let longest = self.networks.iter().filter(|network| network.holds(address));
        let Some(network) = longest.max_by_key(|network| network.length) else {
            return Some(Party::reserved(Identity::WORLD));
        };
        Some(Party {
            column: network.column,
            ..Party::reserved(network.identity?)
        })
    }

    /// What a program does with a packet.
    pub fn run(
        &mut self,
        hook: Hook,
        frame: &[u8],
        ifindex: u32,
        came_in_by: u32,
        outer: Option<(IpAddr, IpAddr, Identity)>,
    ) -> Verdict {
        let mut out = frame.to_vec();
        let mut travel = None;
        let result = match hook {
            Hook::FromPod => self.from_pod(&mut out, ifindex, &mut travel),
            Hook::FromOverlay => self.from_overlay(&mut out, outer, &mut travel),
            Hook::ToPod => self.to_pod(&mut out, ifindex, came_in_by, &mut travel),
            Hook::FromNetdev => match self.from_netdev(&mut out, &mut travel) {
                Some(result) => result,
                None => return Verdict::Passed,
            },
        };
        match result {
            Ok((path, ifindex, tunnel)) => Verdict::Sent {
                path,
                ifindex,
                tunnel,
                frame: out,
            },
            Err(reason) => {
                let is_told = matches!(hook, Hook::FromPod | Hook::FromNetdev);
                let told = travel.filter(|_| is_told).and_then(|travel: Travel| {
                    let [source, destination] = travel.rewrite.seen;
                    let from = if travel.from_outside {
                        destination.0
                    } else {
                        gateway(travel.packet.v6)
                    };
                    write::told(
                        &out,
                        &travel.packet,
                        reason,
                        (source.0, destination.0),
                        from,
                        travel.lost && !travel.from_outside,
                        self.tunnel_mtu,
                    )
                });
                told.map_or(Verdict::Dropped(reason), |told| Verdict::Told(reason, told))
            }
        }
    }

    fn from_pod(&mut self, frame: &mut [u8], ifindex: u32, kept: &mut Option<Travel>) -> Step<Sent> {
        if ethertype(frame)? == 0x0806 {
            return self.arp(frame, ifindex);
        }
        let packet = Packet::parse(frame)?;
        if packet.link != 0 {
            return self.neighbour(frame, &packet, ifindex);
        }
        let travel = kept.insert(Travel::new(packet));
        let sender = self
            .pods
            .get(&travel.source.0)
            .ok_or(DropReason::SpoofedAddress)?
            .clone();
        if sender.ifindex != ifindex {
            return Err(DropReason::SpoofedAddress);
        }
        if frame[6..12] != sender.mac {
            return Err(DropReason::SpoofedMac);
        }
        if frame[..6] != sender.gateway_mac {
            return Err(DropReason::NotForGateway);
        }
        about_sender(travel)?;
        let is_ping = travel.packet.request && travel.destination == (gateway(travel.packet.v6), 0);
        if is_ping && travel.packet.fragment == Fragment::None {
            write::pong(frame, &travel.packet);
            return Ok((Path::EchoReply, ifindex, None));
        }
        self.track(travel)?;
        let (mut party, mut place) = self.receiver(travel)?;
        if matches!(place, Place::Service) {
            self.choose(travel, &sender.party())?;
            (party, place) = self.backend(travel)?;
        }
        self.admit(travel, &sender.party(), &party)?;
        self.keep(travel, &sender.party(), &party);
        let sent = self.deliver(frame, travel, sender.identity, place)?;
        finish(frame, travel);
        Ok(sent)
    }

    fn admit(&mut self, travel: &mut Travel, from: &Party, to: &Party) -> Step<()> {
        let cells = self.cells().clone();
        flows::admit(&mut self.conntrack, &cells, self.generation, travel, from, to)
    }

    fn keep(&mut self, travel: &Travel, client: &Party, backend: &Party) {
        let (conntrack, affinity) = (&mut self.conntrack, &mut self.affinity);
        services::keep(conntrack, affinity, self.generation, travel, client, backend);
    }

    fn choose(&mut self, travel: &mut Travel, client: &Party) -> Step<()> {
        if travel.packet.fragment == Fragment::Ahead {
            return Err(DropReason::FragmentUnknown);
        }
        let (address, port) = travel.destination;
        let at = if travel.at_node { None } else { Some(address) };
        let key = (at, travel.packet.v6, travel.packet.protocol, port);
        let frontend = self.services.get(&key).ok_or(DropReason::NoService)?;
        let gateway = gateway(travel.packet.v6);
        services::choose(&self.conntrack, &self.affinity, frontend, travel, client, gateway)
    }

    /// Later pieces have the ports of the first one, where it has been here.
    fn track(&mut self, travel: &mut Travel) -> Step<()> {
        let packet = &mut travel.packet;
        let (family, protocol) = if packet.v6 { (10, 0) } else { (2, packet.protocol) };
        let identification = if packet.v6 {
            packet.identification.to_be()
        } else {
            u32::from(u16::try_from(packet.identification).unwrap().to_be())
        };
        let rest = u64::from(identification) << 16 | family << 8 | u64::from(protocol);
        let cookie = hash(travel.source.0, travel.destination.0, rest);
        let key = (travel.source.0, (cookie >> 32) % u64::from(abi::fragment::SLOTS));
        match packet.fragment {
            Fragment::None => {}
            Fragment::First => {
                let first = FirstPiece {
                    cookie,
                    length: packet.length,
                    protocol: packet.protocol,
                    ports: (travel.source.1, travel.destination.1),
                    answer: packet.answer,
                };
                self.fragments.insert(key, first);
            }
            Fragment::Later | Fragment::Ahead => match self.fragments.get(&key) {
                Some(first) if first.cookie == cookie => {
                    if packet.offset < first.length {
                        return Err(DropReason::FragmentOverlap);
                    }
                    (packet.protocol, packet.answer) = (first.protocol, first.answer);
                    (travel.source.1, travel.destination.1) = first.ports;
                    travel.rewrite.seen = [travel.source, travel.destination];
                }
                _ => packet.fragment = Fragment::Ahead,
            },
        }
        Ok(())
    }

    fn to_pod(&mut self, frame: &mut [u8], ifindex: u32, came_in_by: u32, kept: &mut Option<Travel>) -> Step<Sent> {
        if ethertype(frame)? == 0x0806 {
            return Err(DropReason::UnexpectedArp);
        }
        let travel = kept.insert(Travel::new(Packet::parse(frame)?));
        if travel.packet.link != 0 {
            return Err(DropReason::LinkControl);
        }
        let source = travel.source.0;
        let router = travel.packet.related && travel.packet.about != source;
        let by_another = self.is_host(source) && !travel.packet.related;
        let mut sender = if (came_in_by == 0 && self.own.contains(&source)) || by_another {
            travel.must_answer = came_in_by != 0;
            Party::reserved(Identity::HOST)
        } else {
            let party = self.outside(source).filter(|_| !self.is_known(source));
            let party = party.ok_or(DropReason::UnknownSource)?;
            let is_behind = self.nodes.get(&source).is_some_and(Option::is_some);
            if is_behind && !router {
                return Err(DropReason::UnknownSource);
            }
            party
        };
        let identity = sender.identity;
        if router {
            sender = self.addressee(travel)?;
        }
        self.track(travel)?;
        let pod = self
            .pods
            .get(&travel.destination.0)
            .ok_or(DropReason::NotLocal)?
            .clone();
        if pod.ifindex != ifindex {
            return Err(DropReason::NotLocal);
        }
        self.admit(travel, &sender, &pod.party())?;
        finish(frame, travel);
        let identity = if router { sender.identity } else { identity };
        let path = if identity == Identity::HOST {
            Path::FromHost
        } else {
            Path::FromOutside
        };
        Ok((path, 0, None))
    }
}

/// Path, interface, and tunnel.
type Sent = (Path, u32, Option<(Identity, IpAddr)>);

fn finish(frame: &mut [u8], travel: &Travel) {
    if travel.asked || travel.answered {
        write::rewrite(frame, &travel.packet, &travel.rewrite);
    }
}

fn about_sender(travel: &Travel) -> Step<()> {
    if travel.packet.related && travel.packet.about != travel.source.0 {
        return Err(DropReason::IcmpUnrelated);
    }
    Ok(())
}
