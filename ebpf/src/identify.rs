//! Who sends and who receives: endpoints and ipcache turned into the two parties of a flow.
//!
//! A function that is called answers through a reference and returns a scalar: what it returned in the caller's stack it
//! would do by a pointer that may be left in `r0`, which the verifier takes for a pointer that is returned.

use crate::{
    lookup::{Party, Pod, endpoint, ifindex, ipcache, is_node, key, outside, reserved},
    maps,
    packet::{Flow, UDP},
    parse::Frame,
    routes::{is_own, is_reached_by},
    service,
};
use abi::{DropReason, Identity};
use aya_ebpf::programs::TcContext;

/// How a packet gets to where it goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Into a pod of this node.
    Pod,
    /// Up this node's own stack, to itself.
    Host,
    /// Up this node's own stack, which routes it: no pod, and not this node.
    Outside,
    /// Through the tunnel.
    Remote,
    /// To a backend of the service that has the address.
    Service,
}

/// Where a packet goes. What does not belong to its way is zero.
pub struct Place {
    pub way: Way,
    pub ifindex: u32,
    /// As in [`Pod`].
    pub macs: [u32; 3],
    /// Underlay address of the node that it lives behind, in words in network byte order.
    pub tunnel: [u32; 4],
}

/// Whom a pod's packet is for.
pub struct Receiver {
    pub party: Party,
    pub place: Place,
}

impl Receiver {
    /// Whether it is a pod, here or behind another node.
    #[inline(always)]
    pub fn is_pod(&self) -> bool {
        self.party.peer.owner != 0
    }

    /// Not known yet.
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            party: reserved(Identity::NONE),
            place: Place {
                way: Way::Host,
                ifindex: 0,
                macs: [0; 3],
                tunnel: [0; 4],
            },
        }
    }
}

/// The pod that sent a packet: it must own the source address, the source MAC and the interface.
#[inline(never)]
pub fn sending_pod(ctx: &TcContext, frame: &Frame, flow: &mut Flow, sender: &mut Party) -> Result<(), DropReason> {
    let pod = endpoint(&key(flow, flow.ends.source), flow.parity()).ok_or(DropReason::SpoofedAddress)?;
    if pod.ifindex != ifindex(ctx) {
        return Err(DropReason::SpoofedAddress);
    }
    if pod.mac() != frame.source {
        return Err(DropReason::SpoofedMac);
    }
    if pod.gateway_mac() != frame.destination {
        return Err(DropReason::NotForGateway);
    }
    flow.from = pod.party.identity;
    *sender = pod.party;
    is_about_sender(flow)
}

/// A pod sends errors about packets that were for itself, and about no others.
#[inline(always)]
pub fn is_about_sender(flow: &Flow) -> Result<(), DropReason> {
    if flow.related && flow.about != flow.ends.source {
        return Err(DropReason::IcmpUnrelated);
    }
    Ok(())
}

/// Whom a pod's packet is for.
#[inline(never)]
pub fn receiver(ctx: &TcContext, flow: &mut Flow, receiver: &mut Receiver) -> Result<(), DropReason> {
    // A pod that reaches itself through a service sees the gateway in its own place.
    let is_for_gateway = flow.ends.destination == service::gateway(flow);
    flow.hairpin |= is_for_gateway;
    let address = if is_for_gateway {
        flow.ends.source
    } else {
        flow.ends.destination
    };
    let key = key(flow, address);
    let place = &mut receiver.place;
    if let Some(pod) = endpoint(&key, flow.parity()) {
        flow.to = pod.party.identity;
        receiver.party = pod.party;
        place.way = Way::Pod;
        place.ifindex = pod.ifindex;
        place.macs = pod.macs;
        return Ok(());
    }
    let Some(known) = ipcache(&key, flow.parity()) else {
        let known = outside(flow, &key).ok_or(DropReason::UnknownDestination)?;
        receiver.party = known.party;
        place.tunnel = known.tunnel;
        let (is_node, is_behind) = (known.is_node(), known.tunnel_family != 0);
        if is_node && service::is_node_port(flow) {
            place.way = Way::Service;
            return Ok(());
        }
        if is_node && is_behind {
            place.way = Way::Remote;
        } else if is_own(ctx, flow, &flow.ends.destination)? {
            receiver.party = reserved(Identity::HOST);
            place.way = Way::Host;
        } else {
            place.way = Way::Outside;
        }
        flow.to = receiver.party.identity;
        return Ok(());
    };
    if known.is_service() || (known.is_host() && service::is_node_port(flow)) {
        place.way = Way::Service;
        return Ok(());
    }
    flow.to = known.party.identity;
    receiver.party = known.party;
    if known.is_host() {
        place.way = Way::Host;
    } else if known.tunnel_family != 0 {
        place.way = Way::Remote;
        place.tunnel = known.tunnel;
    } else {
        // A pod of this node that is being added or removed: known, but not reachable.
        return Err(DropReason::UnknownDestination);
    }
    Ok(())
}

/// Whom a packet is for that a service sends to a backend. Of one that is nowhere for the moment, or of which somebody else
/// has the address, an open connection is told only where it won't come back.
#[inline(always)]
pub fn backend(ctx: &TcContext, flow: &mut Flow, place: &mut Receiver) -> Result<(), DropReason> {
    if let Err(reason) = receiver(ctx, flow, place) {
        let is_known = maps::IPCACHE.get_ptr(&key(flow, flow.ends.destination)).is_some();
        return Err(match reason {
            DropReason::UnknownDestination if !is_known => DropReason::BackendGone,
            _ => reason,
        });
    }
    if place.place.way == Way::Service || service::is_gone(flow, &place.party) {
        return Err(DropReason::BackendGone);
    }
    Ok(())
}

/// Whether a packet that came in natively goes to this node's own address, and does not say that it is another node's. Pods'
/// answers to nodes take the tunnel, so that a node port could not serve those; they are the stack's.
#[inline(never)]
pub fn is_asked_from_outside(flow: &Flow) -> bool {
    ipcache(&key(flow, flow.ends.destination), flow.parity()).is_some_and(|known| known.is_host())
        && !is_node(&key(flow, flow.ends.source))
}

/// Whether the routes would answer a client outside by the interface that it asks at. What comes from elsewhere under its
/// address is forged, or the answers would go astray: the kernel has not looked yet (`rp_filter`). A connection that is known has
/// been looked at.
#[inline(always)]
pub fn comes_by_its_route(ctx: &TcContext, flow: &Flow) -> Result<(), DropReason> {
    let is_new = flow.frontend_expires == 0;
    if is_new && !is_reached_by(ctx, flow, &flow.seen.destination, &flow.seen.source)? {
        return Err(DropReason::NoRouteBack);
    }
    Ok(())
}

/// The pod of this node that a packet from the node's stack is for.
#[inline(always)]
pub fn local_receiver(flow: &mut Flow) -> Result<Pod, DropReason> {
    let pod = endpoint(&key(flow, flow.ends.destination), flow.parity()).ok_or(DropReason::NotLocal)?;
    flow.to = pod.party.identity;
    Ok(pod)
}

/// A client outside, who asks at a node port. Nodes and pods have ways of their own.
#[inline(never)]
pub fn client(flow: &mut Flow, sender: &mut Party) -> Result<(), DropReason> {
    let key = key(flow, flow.ends.source);
    let is_known = maps::ENDPOINTS.get_ptr(&key).is_some() || maps::IPCACHE.get_ptr(&key).is_some();
    if is_known {
        return Err(DropReason::UnknownSource);
    }
    let known = outside(flow, &key).ok_or(DropReason::UnknownSource)?;
    if known.is_node() {
        return Err(DropReason::UnknownSource);
    }
    *sender = known.party;
    let config = maps::config().ok_or(DropReason::Internal)?;
    if flow.protocol == UDP && !flow.related && flow.ends.source_port == config.tunnel_port.to_be() {
        return Err(DropReason::TunnelPort);
    }
    flow.from = sender.identity;
    if flow.related && flow.about != flow.ends.source {
        addressee(flow, sender)
    } else {
        Ok(())
    }
}

/// Who sends what the node's stack gives to a pod: the node itself, or an address from which the node has routed the
/// packet. Such an address may be anything but a pod's, and a node's: those do not come this way.
///
/// A packet that came in by no interface is the node's only where its source is, too: the stack puts packets together and
/// cuts them again, and answers in others' names, and the pieces have no interface either (`ip6_copy_metadata` in
/// `net/ipv6/ip6_output.c`).
#[inline(never)]
pub fn node_or_outside(ctx: &TcContext, flow: &mut Flow, sender: &mut Party) -> Result<(), DropReason> {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let came_in_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    let router = flow.related && flow.about != flow.ends.source;
    let key = key(flow, flow.ends.source);
    let known = ipcache(&key, flow.parity());
    let is_own = match &known {
        Some(known) => known.is_host(),
        None => came_in_by == 0 && is_own(ctx, flow, &flow.ends.source)?,
    };
    if is_own && (came_in_by == 0 || !flow.related) {
        *sender = reserved(Identity::HOST);
        // From elsewhere under the node's address comes what answers a pod that has asked there, where somebody has it sent on:
        // a container runtime that publishes a port.
        flow.must_answer = came_in_by != 0;
    } else {
        if known.is_some() || maps::ENDPOINTS.get_ptr(&key).is_some() {
            return Err(DropReason::UnknownSource);
        }
        let outsider = outside(flow, &key).ok_or(DropReason::UnknownSource)?;
        // Another node's packets come through the tunnel; but where several nodes have the address, who knows which.
        if outsider.is_node() && outsider.tunnel_family != 0 && !router {
            return Err(DropReason::UnknownSource);
        }
        *sender = outsider.party;
    }
    flow.from = sender.identity;
    if router { addressee(flow, sender) } else { Ok(()) }
}

/// A router's error is about a flow that is none of its own: whom that goes to, who takes the router's place. A router
/// is whoever is no pod; there is none between pods.
#[inline(never)]
fn addressee(flow: &mut Flow, party: &mut Party) -> Result<(), DropReason> {
    flow.ends.source = flow.about;
    let key = key(flow, flow.ends.source);
    match ipcache(&key, flow.parity()) {
        Some(known) if known.is_host() => {
            *party = known.party;
            Ok(())
        }
        None => {
            *party = outside(flow, &key).ok_or(DropReason::IcmpUnrelated)?.party;
            Ok(())
        }
        Some(_) => Err(DropReason::IcmpUnrelated),
    }
}
