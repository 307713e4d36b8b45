//! Where packets go that are allowed, and what becomes of their bytes.

use super::{
    bench::{BLUE_PLACE, Bench, GREEN, Outcome, RED, RED_PLACE},
    frame::{Frame, GATEWAY_A, GATEWAY_B, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_B, POD_B_MAC, REMOTE, SYN},
};
use abi::{
    Direction, DropReason, Identity, Path, PortRule,
    node::GATEWAY_V4,
    policy::{ANY_PROTOCOL, CELL_PORT_SET},
};
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
        frame: frame.clone().after_hop(POD_A_MAC, GATEWAY_A),
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
    let rule = |protocol, first, last| PortRule {
        first,
        last,
        protocol,
        zero: 0,
    };
    let mut bench = Bench::new();
    bench.set_port_set(
        1,
        &[rule(6, 80, 80), rule(6, 8000, 8010), rule(17, 53, 53), rule(1, 0, 0)],
    );
    bench.set_port_set(2, &[rule(ANY_PROTOCOL, 443, 443)]);
    let cases: [(u16, Frame, bool); 13] = [
        (1, Frame::tcp(POD_A, 1, POD_B, 80, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 79, SYN), false),
        (1, Frame::tcp(POD_A, 1, POD_B, 8000, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 8005, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 8010, SYN), true),
        (1, Frame::tcp(POD_A, 1, POD_B, 8011, SYN), false),
        (1, Frame::udp(POD_A, 1, POD_B, 53), true),
        (1, Frame::udp(POD_A, 1, POD_B, 80), false),
        (1, Frame::echo(POD_A, POD_B, false, 80), true),
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
fn sctp_is_matched_by_port() {
    kernel_test!();
    let mut bench = Bench::new();
    let frame = |port: u16| {
        Frame::ipv4(
            POD_A,
            POD_B,
            132,
            &[&[0, 9], &port.to_be_bytes()[..], &[0; 12]].concat(),
        )
    };
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
    bench.set_port_set(
        1,
        &[PortRule {
            first: 38412,
            last: 38412,
            protocol: 132,
            zero: 0,
        }],
    );
    assert_eq!(bench.from_pod_a(&frame(38412)).path(), Path::Local);
    assert_eq!(bench.from_pod_a(&frame(38413)).reason(), DropReason::EgressDenied);
}
