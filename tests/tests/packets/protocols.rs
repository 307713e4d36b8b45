//! Protocols that are not TCP and UDP: SCTP, ICMP, and those without ports; and segments that stand for many packets.

use super::{
    bench::{BLUE_PLACE, Bench, RED_PLACE},
    flows::one_way,
    frame::{
        Frame, GATEWAY_A, GATEWAY_B, NOBODY, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC, POD_B6,
        REMOTE, SYN,
    },
    run::{Arrival, Outcome},
};
use abi::{Direction, DropReason, Hook, Path, node::GATEWAY_V4, policy::CELL_PORT_SET};
use harness::kernel_test;

#[test]
fn every_protocol_goes_where_any_protocol_may() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    // L2TP, GRE, ESP, AH, 6in4, IPIP, VRRP, UDP-Lite.
    for protocol in [115, 47, 50, 51, 41, 4, 112, 136] {
        let there = |to| Frame::ipv4(POD_A, to, protocol, &[protocol; 24]);
        let sent = bench.from_pod_a(&there(POD_B));
        let Outcome::Sent { path, frame, .. } = sent else {
            panic!("{protocol}: {sent:?}")
        };
        assert_eq!(path, Path::Local);
        assert_eq!(frame, there(POD_B).after_hop(POD_B_MAC, GATEWAY_B));
        assert_eq!(bench.from_pod_a(&there(REMOTE)).path(), Path::Encap);
        assert_eq!(bench.from_pod_a(&there(NOBODY)).path(), Path::ToOutside);
        // A node's kernel may have a device for other tunnels.
        for node in [NODE, OTHER_NODE] {
            let outcome = bench.from_pod_a(&there(node));
            if [4, 41, 47].contains(&protocol) {
                assert_eq!(outcome.reason(), DropReason::TunnelPort, "{protocol}");
            } else {
                assert!(matches!(outcome.path(), Path::ToHost | Path::Encap), "{protocol}");
            }
        }
        // In pieces, too.
        let piece = Frame::ipv4(POD_A, POD_B, protocol, &[0; 16]);
        assert_eq!(bench.from_pod_a(&piece.clone().piece(3, 0, true)).path(), Path::Local);
        assert_eq!(bench.from_pod_a(&piece.piece(3, 16, false)).path(), Path::Local);
        // It is answered where only one may ask.
        bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
        let back = Frame::ipv4(POD_B, POD_A, protocol, &[0; 24]);
        assert_eq!(bench.from_pod_b(&back).path(), Path::Local);
        bench.forget();
        assert_eq!(bench.from_pod_b(&back).reason(), DropReason::EgressDenied);
        bench.reset();
    }
    // What has no ports is nothing that a port opens, and no number of a protocol another one's.
    bench.set_port_set(1, &[(None, 0, 100), (Some(50), 0, u16::MAX)]);
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
    for (protocol, passes) in [(47, false), (50, true)] {
        let outcome = bench.from_pod_a(&Frame::ipv4(POD_A, POD_B, protocol, &[0; 24]));
        assert_eq!(matches!(outcome, Outcome::Sent { .. }), passes, "{protocol}");
    }
    // Behind IPv6's headers: authentication, and nothing at all.
    for (next, payload) in [(51, &[17, 4, 0, 0, 0, 0, 0, 0][..]), (59, &[]), (135, &[0; 8])] {
        let frame = Frame::ipv6(POD_A6, POD_B6, next, payload);
        bench.reset();
        assert_eq!(bench.from_pod_a(&frame).path(), Path::Local, "{next}");
    }
}

#[test]
fn what_stands_for_more_than_an_ipv4_header_can_say_goes_on() {
    kernel_test!();
    // Linux writes a total length of zero then (BIG TCP).
    let mut bench = Bench::new();
    let header = &Frame::tcp(POD_A, 1, POD_B, 80, SYN).0[34..];
    let many = Frame::ipv4(POD_A, POD_B, 6, &[header, &[0; 2000]].concat()).with(16, &[0, 0]);
    let mut arrival = Arrival::new(Hook::FromPod, &many, bench.pod_a);
    arrival.segment = 1000;
    assert_eq!(bench.run(&arrival).path(), Path::Local);
    // One packet has a length.
    arrival.segment = 0;
    assert_eq!(bench.run(&arrival).reason(), DropReason::InvalidHeader);
}

#[test]
fn the_gateway_answers_a_ping() {
    kernel_test!();
    let mut bench = Bench::new();
    let pod_a = bench.pod_a;
    let gateway6 = abi::node::GATEWAY_V6.0;
    for (request, reply) in [
        (
            Frame::echo(POD_A, GATEWAY_V4, false, 7).summed(),
            Frame::echo(GATEWAY_V4, POD_A, true, 7).summed(),
        ),
        (
            Frame::echo6(POD_A6, gateway6, false, 7).summed(),
            Frame::echo6(gateway6, POD_A6, true, 7).summed(),
        ),
    ] {
        let Outcome::Sent {
            path, ifindex, frame, ..
        } = bench.from_pod_a(&request)
        else {
            panic!("it is answered")
        };
        assert_eq!((path, ifindex), (Path::EchoReply, pod_a));
        assert_eq!(frame, reply.delivered(POD_A_MAC, GATEWAY_A));
    }
    // In nobody else's name.
    let forged = Frame::echo(POD_B, GATEWAY_V4, false, 7).summed();
    assert_eq!(bench.from_pod_a(&forged).reason(), DropReason::SpoofedAddress);
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
    bench.set_port_set(1, &[(Some(132), 38412, 38412)]);
    assert_eq!(bench.from_pod_a(&frame(38412)).path(), Path::Local);
    assert_eq!(bench.from_pod_a(&frame(38413)).reason(), DropReason::EgressDenied);
}

#[test]
fn an_echo_request_is_never_a_reply() {
    kernel_test!();
    // With the identifier zero both directions look the same.
    for identifier in [0, 13] {
        let mut bench = Bench::new();
        bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
        let ask = |from, to| Frame::echo(from, to, false, identifier);
        let answer = |from, to| Frame::echo(from, to, true, identifier);
        assert_eq!(bench.from_pod_a(&ask(POD_A, POD_B)).path(), Path::Local);
        assert_eq!(bench.from_pod_b(&answer(POD_B, POD_A)).path(), Path::Local);
        assert_eq!(bench.from_pod_b(&ask(POD_B, POD_A)).reason(), DropReason::EgressDenied);
        assert_eq!(bench.from_pod_b(&answer(POD_B, POD_A)).path(), Path::Local);
        assert_eq!(
            bench.from_pod_a(&answer(POD_A, POD_B)).reason(),
            DropReason::IcmpUnrelated
        );
    }
}

#[test]
fn a_request_for_the_time_has_a_flow_of_its_own() {
    kernel_test!();
    let mut bench = Bench::new();
    // Echo and timestamp requests are types of ICMP, as policy sees them.
    bench.set_port_set(1, &[(Some(1), 8, 8)]);
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
    let request = Frame::echo(POD_A, POD_B, false, 7);
    let time = Frame::echo(POD_A, POD_B, false, 7).with(34, &[13]);
    assert_eq!(bench.from_pod_a(&request).path(), Path::Local);
    assert_eq!(bench.from_pod_a(&time).reason(), DropReason::EgressDenied);
    bench.set_port_set(1, &[(Some(1), 13, 13)]);
    assert_eq!(bench.from_pod_a(&time).path(), Path::Local);
    let reply = Frame::echo(POD_B, POD_A, true, 7).with(34, &[14]);
    bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
    assert_eq!(bench.from_pod_b(&reply).path(), Path::Local);
    assert_eq!(
        bench.from_pod_b(&reply.with(34, &[43])).reason(),
        DropReason::IcmpUnrelated
    );
}

#[test]
fn an_echo_request_is_no_reply_to_another() {
    kernel_test!();
    let mut bench = one_way();
    assert_eq!(
        bench.from_pod_a(&Frame::echo(POD_A, POD_B, false, 7)).path(),
        Path::Local
    );
    assert_eq!(
        bench.from_pod_b(&Frame::echo(POD_B, POD_A, false, 7)).reason(),
        DropReason::EgressDenied
    );
    assert_eq!(
        bench.from_pod_b(&Frame::echo(POD_B, POD_A, true, 7)).path(),
        Path::Local
    );
    // The error about the request belongs to its flow, too.
    let error = Frame::unreachable(POD_B, &Frame::echo(POD_A, POD_B, false, 7));
    assert_eq!(bench.from_pod_b(&error).path(), Path::Local);
}
