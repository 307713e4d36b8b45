//! Where a packet goes.

use super::{
    Model, Pod, Sent, Step,
    flows::{Party, Travel, key},
    gateway,
    packet::Fragment,
    write,
};
use abi::{
    DropReason, Identity, Path,
    conntrack::FRONTEND,
    node::TUNNEL_PORT,
    policy::{TCP, UDP},
};
use std::net::IpAddr;

/// Who has an address.
pub(super) enum Place {
    Pod(Pod),
    Host,
    Outside,
    Remote(IpAddr),
    Service,
}

/// Nothing leaves for the tunnel port, whatever a service has made of the packet.
pub(super) fn not_to_a_tunnel(travel: &Travel, for_node: bool) -> Step<()> {
    let packet = &travel.packet;
    if for_node && matches!(packet.protocol, 4 | 41 | 47) {
        return Err(DropReason::TunnelPort);
    }
    let port = if travel.asked || travel.answered {
        travel.rewrite.becomes[1].1
    } else {
        travel.destination.1
    };
    if packet.protocol == UDP && !packet.related && port == TUNNEL_PORT {
        return Err(DropReason::TunnelPort);
    }
    Ok(())
}

impl Model {
    pub(super) fn is_node_port(&self, travel: &mut Travel) -> bool {
        if travel.asked {
            return false;
        }
        let packet = &travel.packet;
        let key = (None, packet.v6, packet.protocol, travel.destination.1);
        travel.at_node = matches!(packet.protocol, TCP | UDP)
            && packet.fragment != Fragment::Ahead
            && self.services.contains_key(&key)
            && !self.is_anothers(travel);
        travel.at_node
    }

    /// Whether a packet to a node port is of a connection that somebody has opened from there, or to the node itself.
    fn is_anothers(&self, travel: &Travel) -> bool {
        let packet = &travel.packet;
        let goes_on = packet.related || (packet.protocol == TCP && !packet.is_syn());
        let source = if packet.related {
            (packet.about, travel.source.1)
        } else {
            travel.source
        };
        match self.conntrack.get(&key(packet.protocol, source, travel.destination)) {
            Some(entry) if entry.state & FRONTEND != 0 => false,
            Some(entry) => goes_on || entry.originator == travel.destination,
            None => travel.from_outside && goes_on,
        }
    }

    pub(super) fn receiver(&self, travel: &mut Travel) -> Step<(Party, Place)> {
        let for_gateway = travel.destination.0 == gateway(travel.packet.v6);
        travel.hairpin |= for_gateway;
        let address = if for_gateway {
            travel.source.0
        } else {
            travel.destination.0
        };
        if let Some(pod) = self.pods.get(&address) {
            return Ok((pod.party(), Place::Pod(pod.clone())));
        }
        let nobody = Party::reserved(Identity::NONE);
        if let Some(remote) = self.remotes.get(&address) {
            return Ok((remote.party(), Place::Remote(remote.node)));
        }
        if self.is_service(address) || (self.is_host(address) && self.is_node_port(travel)) {
            return Ok((nobody, Place::Service));
        }
        if self.is_host(address) {
            return Ok((Party::reserved(Identity::HOST), Place::Host));
        }
        let party = self.outside(address).ok_or(DropReason::UnknownDestination)?;
        if let Some(behind) = self.nodes.get(&address) {
            if self.is_node_port(travel) {
                return Ok((nobody, Place::Service));
            }
            if let Some(node) = behind {
                return Ok((party, Place::Remote(*node)));
            }
        }
        if self.own.contains(&address) {
            return Ok((Party::reserved(Identity::HOST), Place::Host));
        }
        Ok((party, Place::Outside))
    }

    pub(super) fn backend(&self, travel: &mut Travel) -> Step<(Party, Place)> {
        match self.receiver(travel) {
            Ok((_, Place::Service)) | Err(DropReason::UnknownDestination) => Err(DropReason::BackendGone),
            // Somebody else has the address of an open connection's backend.
            Ok((party, _)) if travel.backend_owner.is_some_and(|owner| owner != party.owner) => {
                Err(DropReason::BackendGone)
            }
            other => other,
        }
    }

    pub(super) fn encapsulate(&self, frame: &mut [u8], v6: bool, vni: Identity, node: IpAddr) -> Step<Sent> {
        write::one_hop(frame, v6)?;
        write::fits(frame, v6, self.tunnel_mtu)?;
        Ok((Path::Encap, self.vxlan, Some((vni, node))))
    }

    pub(super) fn deliver(&self, frame: &mut [u8], travel: &Travel, vni: Identity, place: Place) -> Step<Sent> {
        let v6 = travel.packet.v6;
        let is_for_pod = match &place {
            Place::Pod(_) => true,
            Place::Remote(_) => self.remotes.contains_key(&travel.destination.0),
            _ => false,
        };
        if travel.leaves || !is_for_pod {
            let is_node = self.nodes.contains_key(&travel.destination.0);
            not_to_a_tunnel(travel, is_node || matches!(place, Place::Host))?;
        }
        if travel.leaves {
            write::one_hop(frame, v6)?;
            return Ok((Path::NodePortReply, self.underlay, None));
        }
        if let Some(node) = travel.via {
            return self.encapsulate(frame, v6, vni, node);
        }
        match place {
            Place::Pod(pod) => {
                write::one_hop(frame, v6)?;
                write::macs(frame, pod.mac, pod.gateway_mac);
                Ok((Path::Local, pod.ifindex, None))
            }
            Place::Host => Ok((Path::ToHost, 0, None)),
            Place::Outside => Ok((Path::ToOutside, 0, None)),
            Place::Remote(node) => self.encapsulate(frame, v6, vni, node),
            Place::Service => unreachable!(),
        }
    }
}
