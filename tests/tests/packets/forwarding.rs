//! Where packets go that are allowed, and what becomes of their bytes.

use super::{
    bench::{BLUE_PLACE, Bench, GREEN, RED, RED_PLACE},
    frame::{
        ACK, Frame, GATEWAY_A, GATEWAY_B, NOBODY, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_B, POD_B_MAC, REMOTE, SYN,
    },
    run::Outcome,
};
use abi::{Direction, DropReason, Identity, Path, node::GATEWAY_V4, policy::CELL_PORT_SET};
use harness::kernel_test;

#[test]
fn to_a_pod_of_the_same_node() {
    kernel_test!();
    let mut bench = Bench::new();
    let frame = Frame::tcp(POD_A, 40000, POD_B, 80, SYN);
    let expected = Outcome::Sent {
        path: Path::Local,
        ifindex: bench.pod_b,
        tunnel: None,
        frame: frame.clone().after_hop(POD_B_MAC, GATEWAY_B),
    };
    assert_eq!(bench.from_pod_a(&frame), expected);
}

#[test]
fn to_a_pod_of_another_node() {
    kernel_test!();
    let mut bench = Bench::new();
    let frame = Frame::udp(POD_A, 40000, REMOTE, 53);
    let expected = Outcome::Sent {
        path: Path::Encap,
        ifindex: bench.vxlan,
        tunnel: Some((RED, OTHER_NODE)),
        frame: frame.clone().ttl(63),
    };
    assert_eq!(bench.from_pod_a(&frame), expected);
}

#[test]
fn from_the_overlay() {
    kernel_test!();
    let mut bench = Bench::new();
    let frame = Frame::tcp(REMOTE, 40000, POD_A, 80, SYN);
    let expected = Outcome::Sent {
        path: Path::Overlay,
        ifindex: bench.pod_a,
        tunnel: None,
        // The hop was counted where it went into the tunnel.
        frame: frame.clone().delivered(POD_A_MAC, GATEWAY_A),
    };
    assert_eq!(bench.from_overlay(&frame, OTHER_NODE, GREEN), expected);
}

#[test]
fn while_a_policy_changes_the_old_and_the_new_vni_are_believed() {
    kernel_test!();
    let mut bench = Bench::new();
    let next = Identity(GREEN.0 + 1);
    bench.put_remote(REMOTE, [GREEN, next], OTHER_NODE);
    for (port, vni) in [(1, GREEN), (2, next)] {
        let frame = Frame::tcp(REMOTE, port, POD_A, 80, SYN);
        assert_eq!(bench.from_overlay(&frame, OTHER_NODE, vni).path(), Path::Overlay);
    }
    let frame = Frame::tcp(REMOTE, 3, POD_A, 80, SYN);
    assert_eq!(
        bench.from_overlay(&frame, OTHER_NODE, BLUE_OR_OTHER).reason(),
        DropReason::WrongVni
    );
}

const BLUE_OR_OTHER: Identity = Identity(GREEN.0 + 2);

#[test]
fn to_the_node_and_from_it() {
    kernel_test!();
    let mut bench = Bench::new();
    let up = Frame::tcp(POD_A, 40000, NODE, 22, SYN);
    let expected = Outcome::Sent {
        path: Path::ToHost,
        ifindex: 0,
        tunnel: None,
        frame: up.clone(),
    };
    assert_eq!(bench.from_pod_a(&up), expected);
    let down = Frame::tcp(NODE, 40001, POD_A, 80, SYN);
    let expected = Outcome::Sent {
        path: Path::FromHost,
        ifindex: 0,
        tunnel: None,
        frame: down.clone(),
    };
    assert_eq!(bench.to_pod(&down, 0), expected);
}

#[test]
fn the_gateway_answers_arp() {
    kernel_test!();
    let mut bench = Bench::new();
    let request = Frame::arp(1, POD_A_MAC, POD_A, GATEWAY_V4);
    let mut reply = Frame::arp(2, GATEWAY_A, GATEWAY_V4, POD_A);
    reply.0[..6].copy_from_slice(&POD_A_MAC);
    reply.0[32..38].copy_from_slice(&POD_A_MAC);
    let expected = Outcome::Sent {
        path: Path::ArpReply,
        ifindex: bench.pod_a,
        tunnel: None,
        frame: reply,
    };
    assert_eq!(bench.from_pod_a(&request), expected);
}

#[test]
fn a_low_ttl_and_every_checksum_carry_are_right() {
    kernel_test!();
    let mut bench = Bench::new();
    // The identification field moves the checksum through all of its carries.
    for id in (0..=0xffff_u16).step_by(251) {
        let frame = Frame::udp(POD_A, id, POD_B, 80).with(18, &id.to_be_bytes()).ttl(2);
        let Outcome::Sent { frame: sent, .. } = bench.from_pod_a(&frame) else {
            panic!("id {id}: dropped")
        };
        assert_eq!(sent, frame.after_hop(POD_B_MAC, GATEWAY_B), "id {id}");
    }
}

#[test]
fn a_port_set_lets_its_ports_through_and_no_others() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.set_port_set(
        1,
        &[
            (Some(6), 80, 80),
            (Some(6), 8000, 8010),
            (Some(17), 53, 53),
            (Some(1), 8, 8),
        ],
    );
    bench.set_port_set(2, &[(None, 443, 443)]);
    let cases: [(u16, Frame, bool); 14] = [
        (1, Frame::tcp(POD_A, 1, POD_B, 80, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 79, SYN), false),
        (1, Frame::tcp(POD_A, 1, POD_B, 8000, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 8005, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 8010, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 8011, SYN), false),
        (1, Frame::udp(POD_A, 1, POD_B, 53), true),
        (1, Frame::udp(POD_A, 1, POD_B, 80), false),
        (1, Frame::echo(POD_A, POD_B, false, 80), true),
        (2, Frame::echo(POD_A, POD_B, false, 443), false),
        (2, Frame::tcp(POD_A, 1, POD_B, 443, SYN), true),
        (2, Frame::udp(POD_A, 1, POD_B, 443), true),
        (2, Frame::udp(POD_A, 1, POD_B, 444), false),
        (3, Frame::udp(POD_A, 2, POD_B, 443), false), // an empty set
    ];
    for (set, frame, allowed) in cases {
        bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + set);
        let outcome = bench.from_pod_a(&frame);
        assert_eq!(
            matches!(outcome, Outcome::Sent { .. }),
            allowed,
            "set {set}: {frame:?}: {outcome:?}"
        );
    }
}

#[test]
fn many_ports_are_found_by_their_halves() {
    kernel_test!();
    let mut bench = Bench::new();
    let odd: Vec<(Option<u8>, u16, u16)> = (0..7).map(|n| (Some(6), 1001 + 2 * n, 1001 + 2 * n)).collect();
    bench.set_port_set(1, &odd);
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
    for port in 999..1016 {
        let outcome = bench.from_pod_a(&Frame::tcp(POD_A, 1, POD_B, port, SYN));
        let expected = port % 2 == 1 && (1001..1015).contains(&port);
        assert_eq!(matches!(outcome, Outcome::Sent { .. }), expected, "port {port}");
    }
}

#[test]
fn addresses_that_are_no_pods_are_routed_by_the_node_under_policy() {
    kernel_test!();
    let network = Identity(20);
    let out = |port: u16| Frame::tcp(POD_A, 40000, NOBODY, port, SYN);
    let into = |port: u16| Frame::tcp(NOBODY, 40001, POD_A, port, SYN);
    let mut bench = Bench::new();
    bench.forward();
    let vb = bench.pod_b;
    assert_eq!(bench.from_pod_a(&out(1)).path(), Path::ToOutside, "the world");
    assert_eq!(bench.to_pod(&into(1), vb).path(), Path::FromOutside);
    // The world's column counts while no network holds the address, then the network's, by parity.
    bench.deny_egress(RED_PLACE.0, Identity::WORLD.0);
    bench.set_cell(Direction::Ingress, RED_PLACE.0, Identity::WORLD.0, 0);
    assert_eq!(bench.from_pod_a(&out(2)).reason(), DropReason::EgressDenied);
    assert_eq!(bench.to_pod(&into(2), vb).reason(), DropReason::IngressDenied);
    let world = (Identity::WORLD, Identity::WORLD.0);
    bench.put_network(NOBODY, 24, [network, world.0], [19, world.1], 0);
    assert_eq!(bench.from_pod_a(&out(3)).path(), Path::ToOutside);
    assert_eq!(bench.to_pod(&into(3), vb).path(), Path::FromOutside);
    // Replies of what was let out come back.
    let reply = Frame::tcp(NOBODY, 3, POD_A, 40000, SYN | ACK);
    assert_eq!(bench.to_pod(&reply, vb).path(), Path::FromOutside);
    // The longest prefix decides, over what is open, too.
    bench.put_network(NOBODY, 32, [world.0; 2], [world.1; 2], 0);
    assert_eq!(bench.from_pod_a(&out(4)).reason(), DropReason::EgressDenied);
    assert_eq!(bench.to_pod(&reply, vb).reason(), DropReason::EgressDenied);
}

#[test]
fn another_node_is_a_peer_of_its_own() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    let vb = bench.pod_b;
    let out = Frame::tcp(POD_A, 40000, OTHER_NODE, 80, SYN);
    let into = Frame::tcp(OTHER_NODE, 40000, POD_A, 80, SYN);
    let expected = Outcome::Sent {
        path: Path::Encap,
        ifindex: bench.vxlan,
        tunnel: Some((RED, OTHER_NODE)),
        frame: out.clone().ttl(63),
    };
    assert_eq!(bench.from_pod_a(&out), expected);
    assert_eq!(
        bench.from_overlay(&into, OTHER_NODE, Identity::REMOTE_NODE).path(),
        Path::Overlay
    );
    // A pod of it reaches this node itself.
    let to_node = Frame::tcp(REMOTE, 40000, NODE, 22, SYN);
    assert_eq!(bench.from_overlay(&to_node, OTHER_NODE, GREEN).path(), Path::ToHost);
    bench.flip();
    bench.deny_egress(RED_PLACE.0, Identity::REMOTE_NODE.0);
    bench.set_cell(Direction::Ingress, RED_PLACE.0, Identity::REMOTE_NODE.0, 0);
    assert_eq!(bench.from_pod_a(&out).reason(), DropReason::EgressDenied);
    assert_eq!(
        bench.from_overlay(&into, OTHER_NODE, Identity::REMOTE_NODE).reason(),
        DropReason::IngressDenied
    );
    // Around the tunnel anybody could say so.
    assert_eq!(bench.to_pod(&into, vb).reason(), DropReason::UnknownSource);
}

/// Pieces that the stack has cut, and what it answers in others' names, have no interface that they came in by.
#[test]
fn what_has_come_in_by_no_interface_is_the_nodes_only_with_its_own_source() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    bench.address([198, 51, 100, 7]);
    bench.set_cell(Direction::Ingress, RED_PLACE.0, Identity::WORLD.0, 0);
    let from = |source, port| Frame::tcp(source, port, POD_A, 80, SYN);
    assert_eq!(bench.to_pod(&from(NODE, 1), 0).path(), Path::FromHost);
    assert_eq!(bench.to_pod(&from([198, 51, 100, 7], 1), 0).path(), Path::FromHost);
    assert_eq!(bench.to_pod(&from(NOBODY, 1), 0).reason(), DropReason::IngressDenied);
    assert_eq!(bench.to_pod(&from(REMOTE, 1), 0).reason(), DropReason::UnknownSource);
    assert_eq!(bench.to_pod(&from(POD_B, 1), 0).reason(), DropReason::UnknownSource);
}

#[test]
fn an_address_of_the_nodes_own_is_the_node_however_it_is_called() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    bench.address(NOBODY);
    let out = Frame::tcp(POD_A, 40000, NOBODY, 22, SYN);
    assert_eq!(bench.from_pod_a(&out).path(), Path::ToHost);
    bench.flip();
    bench.deny_egress(RED_PLACE.0, Identity::HOST.0);
    assert_eq!(bench.from_pod_a(&out).reason(), DropReason::EgressDenied);
}

#[test]
fn a_flow_is_judged_again_when_an_address_becomes_something_else() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    bench.deny_egress(RED_PLACE.0, Identity::HOST.0);
    let out = Frame::tcp(POD_A, 40000, NOBODY, 22, SYN);
    assert_eq!(bench.from_pod_a(&out).path(), Path::ToOutside, "the world");
    // The node takes the address over: no policy has changed, and no generation.
    bench.address(NOBODY);
    assert_eq!(bench.from_pod_a(&out).reason(), DropReason::EgressDenied);
    let ack = Frame::tcp(POD_A, 40000, NOBODY, 22, ACK);
    let outcome = bench.from_pod_a(&ack);
    assert_eq!(outcome.reason(), DropReason::EgressDenied, "nor what was open");
}

#[test]
fn an_empty_port_set_denies_whatever_the_pool_begins_with() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.set_port_set(0, &[(None, 0, 65535)]);
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 3);
    let out = Frame::tcp(POD_A, 40000, POD_B, 80, SYN);
    assert_eq!(bench.from_pod_a(&out).reason(), DropReason::EgressDenied);
}

#[test]
fn every_address_of_a_node_is_that_nodes() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    let (second, shared): ([u8; 4], [u8; 4]) = ([198, 51, 100, 22], [198, 51, 100, 77]);
    let second6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x22];
    bench.put_node(second, Some(OTHER_NODE));
    bench.put_node(second6, Some(OTHER_NODE));
    bench.put_node(shared, None);
    let to = |address| Frame::tcp(POD_A, 40000, address, 22, SYN);
    let to6 = Frame::tcp6(super::frame::POD_A6, 40000, second6, 22, SYN);
    // There through the tunnel, whatever the family; what several nodes have the stack has to find.
    for frame in [to(second), to6.clone()] {
        let Outcome::Sent { path, tunnel, .. } = bench.from_pod_a(&frame) else {
            panic!("it is sent")
        };
        assert_eq!((path, tunnel), (Path::Encap, Some((RED, OTHER_NODE))));
    }
    assert_eq!(bench.from_pod_a(&to(shared)).path(), Path::ToOutside);
    // A policy that lets pods out to the world is not one that lets them to nodes, nor the other way round.
    bench.forget();
    bench.deny_egress(RED_PLACE.0, Identity::REMOTE_NODE.0);
    for frame in [to(second), to(shared), to6] {
        assert_eq!(bench.from_pod_a(&frame).reason(), DropReason::EgressDenied);
    }
    assert_eq!(bench.from_pod_a(&to(NOBODY)).path(), Path::ToOutside);
    // From there it is that node, and it comes through its tunnel alone.
    let from = |address| Frame::tcp(address, 40000, POD_A, 22, SYN);
    let mut by_tunnel = |frame: &Frame, node| bench.from_overlay(frame, node, Identity::REMOTE_NODE);
    assert_eq!(by_tunnel(&from(second), OTHER_NODE).path(), Path::Overlay);
    let from6 = Frame::tcp6(second6, 40000, super::frame::POD_A6, 22, SYN);
    assert_eq!(by_tunnel(&from6, OTHER_NODE).path(), Path::Overlay);
    for stranger in [shared, NOBODY, NODE] {
        assert_eq!(by_tunnel(&from(stranger), OTHER_NODE).reason(), DropReason::WrongNode);
    }
    // No tunnel packet comes from an address that is not the underlay's.
    assert_eq!(by_tunnel(&from(second), second).reason(), DropReason::UnknownNode);
    let by = bench.underlay;
    assert_eq!(bench.to_pod(&from(second), by).reason(), DropReason::UnknownSource);
    assert_eq!(bench.to_pod(&from(shared), by).path(), Path::FromOutside);
    bench.set_cell(Direction::Ingress, RED_PLACE.0, Identity::REMOTE_NODE.0, 0);
    bench.forget();
    assert_eq!(bench.to_pod(&from(shared), by).reason(), DropReason::IngressDenied);
}
