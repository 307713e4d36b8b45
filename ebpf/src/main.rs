//! The tc programs. Entry points only dispatch: each runs its stages in order and hands the outcome to [`verdict`].
#![no_std]
#![no_main]
// Every compiler that has this target takes features: it is one of nightly's, or told to do as if.
#![feature(asm_experimental_arch)]

mod affinity;
mod arp;
mod conntrack;
mod echo;
mod enforce;
mod fast;
mod forward;
mod fragment;
mod guard;
mod icmp;
mod identify;
mod lookup;
mod lru;
mod maps;
mod neighbour;
mod object;
mod overlay;
mod packet;
mod parse;
mod reset;
mod routes;
mod service;
mod tell;
mod translate;
mod verdict;

use abi::{DropReason, Hook, Identity, Path};
use aya_ebpf::{
    macros::{cgroup_skb, classifier},
    programs::{SkBuffContext, TcContext},
};
use forward::Action;
use identify::{Receiver, Way};
use lookup::Party;
use overlay::Outer;
use packet::{Flow, Fragment};

/// tc ingress of a pod's host veth: what the pod sends.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    let done = fast::from_pod(&ctx);
    if done != verdict::UNDECIDED {
        return done;
    }
    let Some(flow) = Flow::begin() else {
        return verdict::broken();
    };
    let outcome = pod_sends(&ctx, flow);
    verdict::act(&ctx, Hook::FromPod, flow, outcome)
}

#[inline(always)]
fn pod_sends(ctx: &TcContext, flow: &mut Flow) -> Result<Action, DropReason> {
    let frame = parse::frame(ctx)?;
    if frame.ethertype == parse::ETHERTYPE_ARP {
        arp::answer(ctx, &frame)?;
        return Ok(Action::redirect(Path::ArpReply, lookup::ifindex(ctx)));
    }
    parse::packet(ctx, &frame, flow)?;
    if flow.link != 0 {
        neighbour::answer(ctx, &frame, flow)?;
        return Ok(Action::redirect(Path::NeighbourReply, lookup::ifindex(ctx)));
    }
    let mut sender = Party::new();
    identify::sending_pod(ctx, &frame, flow, &mut sender)?;
    if echo::is_for_gateway(flow) {
        echo::answer(ctx, &frame, flow)?;
        return Ok(Action::redirect(Path::EchoReply, lookup::ifindex(ctx)));
    }
    fragment::track(flow)?;
    let mut receiver = Receiver::new();
    identify::receiver(ctx, flow, &mut receiver)?;
    if receiver.place.way == Way::Service {
        service::choose(flow, &sender)?;
        identify::backend(ctx, flow, &mut receiver)?;
    }
    enforce::admit(flow, &sender, &receiver.party)?;
    service::keep(flow, &sender, &receiver.party);
    let mut action = Action::go_on(Path::ToHost);
    forward::deliver(ctx, flow, sender.identity, &receiver, &mut action)?;
    translate::rewrite(ctx, flow)?;
    if matches!(action.path, Path::Local | Path::Encap) {
        fast::arm(flow);
    }
    Ok(action)
}

/// tc ingress of the vxlan device: what other nodes send.
#[classifier]
pub fn from_overlay(ctx: TcContext) -> i32 {
    let done = fast::from_overlay(&ctx);
    if done != verdict::UNDECIDED {
        return done;
    }
    let Some(flow) = Flow::begin() else {
        return verdict::broken();
    };
    let outcome = overlay_delivers(&ctx, flow);
    verdict::act(&ctx, Hook::FromOverlay, flow, outcome)
}

#[inline(always)]
fn overlay_delivers(ctx: &TcContext, flow: &mut Flow) -> Result<Action, DropReason> {
    let mut outer = Outer::new();
    overlay::outer_source(ctx, &mut outer)?;
    let frame = parse::frame(ctx)?;
    parse::packet(ctx, &frame, flow)?;
    stays_on_the_link(flow)?;
    let mut sender = Party::new();
    overlay::remote_sender(flow, &outer, &mut sender)?;
    fragment::track(flow)?;
    let mut receiver = Receiver::new();
    overlay::receiver(flow, &sender, &mut receiver)?;
    // What goes to the node itself the sender's node has let out, and nothing is enforced here; and what the node sends
    // into the tunnel no program sees, so that there is no flow to look for.
    if receiver.place.way != Way::Host {
        enforce::admit(flow, &sender, &receiver.party)?;
    }
    translate::rewrite(ctx, flow)?;
    let action = forward::from_overlay(ctx, flow, &receiver)?;
    if action.path == Path::Overlay {
        fast::arm(flow);
    }
    Ok(action)
}

/// Egress of the node's own sockets, by their cgroup: none passes for the tunnel.
#[cgroup_skb(egress)]
pub fn guard_tunnel(ctx: SkBuffContext) -> i32 {
    guard::judge(&ctx)
}

/// In front of everything for the moment in which a program is moved on its hook: rather no packet than one past it.
#[classifier]
pub fn closed(_ctx: TcContext) -> i32 {
    verdict::broken()
}

/// What stays on a link has no business on another one.
#[inline(always)]
fn stays_on_the_link(flow: &Flow) -> Result<(), DropReason> {
    if flow.link == 0 {
        Ok(())
    } else {
        Err(DropReason::LinkControl)
    }
}

/// tc egress of a pod's host veth: what the node's own stack sends or routes to the pod. What the programs deliver
/// themselves does not pass here: `bpf_redirect_peer` goes straight into the pod.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    let Some(flow) = Flow::begin() else {
        return verdict::broken();
    };
    let outcome = node_sends(&ctx, flow);
    verdict::act(&ctx, Hook::ToPod, flow, outcome)
}

#[inline(always)]
fn node_sends(ctx: &TcContext, flow: &mut Flow) -> Result<Action, DropReason> {
    let frame = parse::frame(ctx)?;
    if frame.ethertype == parse::ETHERTYPE_ARP {
        return Err(DropReason::UnexpectedArp);
    }
    parse::packet(ctx, &frame, flow)?;
    stays_on_the_link(flow)?;
    let mut sender = Party::new();
    identify::node_or_outside(ctx, flow, &mut sender)?;
    fragment::track(flow)?;
    let receiver = identify::local_receiver(flow)?;
    if receiver.ifindex != lookup::ifindex(ctx) {
        return Err(DropReason::NotLocal);
    }
    enforce::admit(flow, &sender, &receiver.party)?;
    translate::rewrite(ctx, flow)?;
    Ok(Action::go_on(if sender.identity == Identity::HOST {
        Path::FromHost
    } else {
        Path::FromOutside
    }))
}

/// tc ingress of the interface with the node's underlay address, while there are node ports: what clients outside ask
/// for there. Everything else is none of the programs' business, and goes on.
#[classifier]
pub fn from_netdev(ctx: TcContext) -> i32 {
    let Some(flow) = Flow::begin() else {
        return verdict::pass();
    };
    if !asks_at_node_port(&ctx, flow) {
        return verdict::pass();
    }
    let outcome = outside_asks(&ctx, flow);
    verdict::act(&ctx, Hook::FromNetdev, flow, outcome)
}

#[inline(always)]
fn asks_at_node_port(ctx: &TcContext, flow: &mut Flow) -> bool {
    let Ok(frame) = parse::frame(ctx) else { return false };
    if frame.ethertype == parse::ETHERTYPE_ARP || parse::packet(ctx, &frame, flow).is_err() || flow.link != 0 {
        return false;
    }
    if !identify::is_asked_from_outside(flow) {
        return false;
    }
    // A later piece has its first one's ports, if that went to a node port.
    if flow.fragment == Fragment::Later && fragment::track(flow).is_err() {
        return false;
    }
    flow.from_outside = true;
    service::is_node_port(flow)
}

#[inline(always)]
fn outside_asks(ctx: &TcContext, flow: &mut Flow) -> Result<Action, DropReason> {
    let mut sender = Party::new();
    identify::client(flow, &mut sender)?;
    if flow.fragment == Fragment::First {
        fragment::track(flow)?;
    }
    service::choose(flow, &sender)?;
    identify::comes_by_its_route(ctx, flow)?;
    let mut receiver = Receiver::new();
    identify::backend(ctx, flow, &mut receiver)?;
    forward::has_way_back(&receiver)?;
    enforce::admit(flow, &sender, &receiver.party)?;
    service::keep(flow, &sender, &receiver.party);
    let mut action = Action::go_on(Path::NodePort);
    forward::from_outside(ctx, flow, &receiver, &mut action)?;
    translate::rewrite(ctx, flow)?;
    Ok(action)
}
