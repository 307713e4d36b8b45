//! What comes in from outside the node: through the tunnel, and by the interface with the underlay address.

use super::{
    Model, Place, Sent, Step, about_sender, finish,
    flows::{Party, Travel},
    forward::not_to_a_tunnel,
    packet::{Fragment, Packet, ethertype},
    write,
};
use abi::{DropReason, Identity, Path, node::TUNNEL_PORT, policy::UDP};
use std::net::IpAddr;

#[expect(clippy::wrong_self_convention, reason = "methods are named after the hooks")]
impl Model {
    pub fn from_overlay(
        &mut self,
        frame: &mut [u8],
        outer: Option<(IpAddr, IpAddr, Identity)>,
        kept: &mut Option<Travel>,
    ) -> Step<Sent> {
        let (node, to, vni) = outer.ok_or(DropReason::NoTunnelKey)?;
        if !self.is_host(to) {
            return Err(DropReason::ForeignTunnel);
        }
        if self.nodes.get(&node) != Some(&Some(node)) {
            return Err(DropReason::UnknownNode);
        }
        ethertype(frame)?;
        let travel = kept.insert(Travel::new(Packet::parse(frame)?));
        if travel.packet.link != 0 {
            return Err(DropReason::LinkControl);
        }
        let sender = self.remote_sender(travel, node, vni)?;
        self.track(travel)?;
        let address = travel.destination.0;
        let (party, place) = if let Some(pod) = self.pods.get(&address) {
            (pod.party(), Place::Pod(pod.clone()))
        } else if self.is_host(address) {
            if sender.identity == Identity::REMOTE_NODE || travel.via.is_some() {
                return Err(DropReason::NotLocal);
            }
            (Party::reserved(Identity::HOST), Place::Host)
        } else {
            let party = self
                .outside(address)
                .filter(|_| sender.owner != 0 && !self.is_known(address));
            travel.in_transit = true;
            (party.ok_or(DropReason::NotLocal)?, Place::Outside)
        };
        if !matches!(place, Place::Host) {
            self.admit(travel, &sender, &party)?;
        }
        if travel.leaves || matches!(place, Place::Host) {
            not_to_a_tunnel(travel, !travel.leaves)?;
        }
        finish(frame, travel);
        if travel.leaves {
            return Ok((Path::NodePortReply, self.underlay, None));
        }
        match place {
            Place::Pod(pod) => {
                write::macs(frame, pod.mac, pod.gateway_mac);
                Ok((Path::Overlay, pod.ifindex, None))
            }
            _ => Ok((Path::ToHost, 0, None)),
        }
    }

    pub fn remote_sender(&self, travel: &mut Travel, node: IpAddr, vni: Identity) -> Step<Party> {
        let source = travel.source.0;
        if vni == Identity::REMOTE_NODE {
            if self.nodes.get(&source) != Some(&Some(node)) {
                return Err(DropReason::WrongNode);
            }
            about_sender(travel)?;
            return Ok(Party::reserved(vni));
        }
        if vni == Identity::WORLD {
            travel.via = Some(node);
            return self.client(travel);
        }
        if !vni.is_allocated() {
            return Err(DropReason::ReservedVni);
        }
        let remote = self.remotes.get(&source).filter(|remote| remote.node == node);
        let remote = remote.ok_or(DropReason::WrongNode)?;
        if vni != remote.identity {
            return Err(DropReason::WrongVni);
        }
        about_sender(travel)?;
        Ok(remote.party())
    }

    /// A client outside.
    pub fn client(&self, travel: &mut Travel) -> Step<Party> {
        let address = travel.source.0;
        let party = self.outside(address).filter(|_| !self.is_known(address));
        let party = party.ok_or(DropReason::UnknownSource)?;
        if self.nodes.contains_key(&address) {
            return Err(DropReason::UnknownSource);
        }
        if travel.packet.protocol == UDP && !travel.packet.related && travel.source.1 == TUNNEL_PORT {
            return Err(DropReason::TunnelPort);
        }
        if travel.packet.related && travel.packet.about != address {
            return self.addressee(travel);
        }
        Ok(party)
    }

    /// Who a router's error is about takes the router's place.
    pub fn addressee(&self, travel: &mut Travel) -> Step<Party> {
        let address = travel.packet.about;
        travel.source.0 = address;
        travel.rewrite.seen[0].0 = address;
        if self.is_host(address) {
            return Ok(Party::reserved(Identity::HOST));
        }
        // Pods of this node are no addresses of the cluster in these tables.
        let known = self.remotes.contains_key(&address) || self.is_service(address);
        self.outside(address)
            .filter(|_| !known)
            .ok_or(DropReason::IcmpUnrelated)
    }

    /// Nothing, where the packet is nobody's business here.
    pub fn from_netdev(&mut self, frame: &mut [u8], kept: &mut Option<Travel>) -> Option<Step<Sent>> {
        let mut travel = Travel::new(Packet::parse(frame).ok()?);
        let from_node = self.nodes.contains_key(&travel.source.0) || self.is_host(travel.source.0);
        if travel.packet.link != 0 || !self.is_host(travel.destination.0) || from_node {
            return None;
        }
        if travel.packet.fragment == Fragment::Later {
            self.track(&mut travel).ok()?;
        }
        travel.from_outside = true;
        if !self.is_node_port(&mut travel) {
            return None;
        }
        let travel = kept.insert(travel);
        Some(self.outside_asks(frame, travel))
    }

    pub fn outside_asks(&mut self, frame: &mut [u8], travel: &mut Travel) -> Step<Sent> {
        let sender = self.client(travel)?;
        if travel.packet.fragment == Fragment::First {
            self.track(travel)?;
        }
        self.choose(travel, &sender)?;
        let (party, place) = self.backend(travel)?;
        // Answers to a client outside come by here again only where a pod gives them.
        if !matches!(place, Place::Pod(_)) && (!matches!(place, Place::Remote(_)) || party.owner == 0) {
            return Err(DropReason::BackendGone);
        }
        self.admit(travel, &sender, &party)?;
        self.keep(travel, &sender, &party);
        let sent = match place {
            Place::Pod(pod) => {
                write::one_hop(frame, travel.packet.v6)?;
                write::macs(frame, pod.mac, pod.gateway_mac);
                (Path::NodePort, pod.ifindex, None)
            }
            Place::Remote(node) => self.encapsulate(frame, travel.packet.v6, Identity::WORLD, node)?,
            _ => unreachable!(),
        };
        finish(frame, travel);
        Ok(sent)
    }
}
