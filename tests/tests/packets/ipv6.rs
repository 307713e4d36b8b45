//! IPv6: where packets go, and every way in which they can be wrong.

use super::{
    bench::{BLUE_PLACE, Bench, GREEN, RED, RED_PLACE},
    frame::{
        ACK, Frame, GATEWAY_A, GATEWAY_B, NOBODY6, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B_MAC, POD_B6, REMOTE6,
        SYN, checksum6, piece6,
    },
    run::{BadPacket, Outcome, every_one_is_dropped_for_its_own_reason},
};
use abi::{Direction, DropReason, Identity, Path, node::GATEWAY_V6, policy::CELL_PORT_SET};
use harness::kernel_test;

/// Eight bytes of an extension header that asks for nothing: `next`, no more bytes, and padding (RFC 8200, section 4.2).
fn options(next: u8) -> Vec<u8> {
    vec![next, 0, 1, 4, 0, 0, 0, 0]
}

/// A datagram for port 53 behind these headers.
fn behind(first: u8, headers: &[u8]) -> Frame {
    let udp = &Frame::udp6(POD_A6, 1, POD_B6, 53).0[54..];
    Frame::ipv6(POD_A6, POD_B6, first, &[headers, udp].concat())
}

#[test]
fn every_way_is_open_to_it() {
    kernel_test!();
    let mut bench = Bench::new();
    let (a, b, vxlan) = (bench.pod_a, bench.pod_b, bench.vxlan);
    let local = Frame::tcp6(POD_A6, 40000, POD_B6, 80, SYN);
    let expected = Outcome::Sent {
        path: Path::Local,
        ifindex: b,
        tunnel: None,
        frame: local.clone().after_hop(POD_B_MAC, GATEWAY_B),
    };
    assert_eq!(bench.from_pod_a(&local), expected);
    let reply = Frame::tcp6(POD_B6, 80, POD_A6, 40000, SYN | ACK);
    assert_eq!(bench.from_pod_b(&reply).path(), Path::Local);

    let away = Frame::udp6(POD_A6, 40000, REMOTE6, 53);
    let expected = Outcome::Sent {
        path: Path::Encap,
        ifindex: vxlan,
        tunnel: Some((RED, OTHER_NODE)),
        frame: away.clone().with(21, &[63]),
    };
    assert_eq!(bench.from_pod_a(&away), expected);

    let back = Frame::udp6(REMOTE6, 53, POD_A6, 40000);
    let expected = Outcome::Sent {
        path: Path::Overlay,
        ifindex: a,
        tunnel: None,
        frame: back.clone().delivered(POD_A_MAC, GATEWAY_A),
    };
    assert_eq!(bench.from_overlay(&back, OTHER_NODE, GREEN), expected);
    assert_eq!(
        bench.from_overlay(&back, OTHER_NODE, RED).reason(),
        DropReason::WrongVni
    );
}

#[test]
fn policy_sees_its_ports_and_its_echo() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.set_port_set(1, &[(Some(17), 53, 53), (Some(58), 128, 128)]);
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
    for (frame, passes) in [
        (Frame::udp6(POD_A6, 1, POD_B6, 53), true),
        (Frame::udp6(POD_A6, 1, POD_B6, 54), false),
        (Frame::tcp6(POD_A6, 1, POD_B6, 53, SYN), false),
        (Frame::echo6(POD_A6, POD_B6, false, 7), true),
        (behind(60, &options(17)), true),
        (behind(0, &[options(60), options(17)].concat()), true),
    ] {
        let outcome = bench.from_pod_a(&frame);
        assert_eq!(
            matches!(outcome, Outcome::Sent { .. }),
            passes,
            "{frame:?}: {outcome:?}"
        );
    }
    // IPv4's echo is another protocol's.
    assert_eq!(
        bench
            .from_pod_a(&Frame::echo(POD_A, super::frame::POD_B, false, 7))
            .reason(),
        DropReason::EgressDenied
    );
    assert_eq!(
        bench.from_pod_b(&Frame::echo6(POD_B6, POD_A6, true, 7)).path(),
        Path::Local
    );
}

/// RFC 4890, section 4.3.1: what must not be dropped.
#[test]
fn errors_reach_whom_they_are_for() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
    let flow = Frame::udp6(POD_A6, 1, POD_B6, 2);
    assert_eq!(bench.from_pod_a(&flow).path(), Path::Local);
    for kind in 1..=4 {
        assert_eq!(
            bench.from_pod_b(&Frame::error6(POD_B6, kind, &flow)).path(),
            Path::Local,
            "type {kind}"
        );
    }
    let other = Frame::udp6(POD_A6, 1, POD_B6, 3);
    assert_eq!(
        bench.from_pod_b(&Frame::error6(POD_B6, 1, &other)).reason(),
        DropReason::IcmpUnrelated
    );
    // About the first piece of a packet, as the first to be too big; the others say nothing of a flow.
    let piece = |offset| Frame::ipv6(POD_A6, POD_B6, 44, &piece6(17, 5, offset, true, &flow.0[54..62]));
    assert_eq!(
        bench.from_pod_b(&Frame::error6(POD_B6, 2, &piece(0))).path(),
        Path::Local
    );
    assert_eq!(
        bench.from_pod_b(&Frame::error6(POD_B6, 2, &piece(8))).reason(),
        DropReason::IcmpUnrelated
    );
    // A router on the way, which is no pod, has its say; a pod about somebody else's flow has not.
    bench.forward();
    let out = Frame::udp6(POD_A6, 1, NOBODY6, 2);
    assert_eq!(bench.from_pod_a(&out).path(), Path::ToOutside);
    let router = [0x20, 1, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let vb = bench.pod_b;
    assert_eq!(
        bench.to_pod(&Frame::error6(router, 2, &out), vb).path(),
        Path::FromOutside
    );
    assert_eq!(
        bench.from_pod_b(&Frame::error6(POD_B6, 2, &out)).reason(),
        DropReason::IcmpUnrelated
    );
    // Between pods there is no router.
    assert_eq!(
        bench.to_pod(&Frame::error6(router, 2, &flow), vb).reason(),
        DropReason::IcmpUnrelated
    );
    // What is quoted may have extension headers.
    let with_options = Frame::ipv6(POD_A6, NOBODY6, 60, &[&options(17), &out.0[54..]].concat());
    assert_eq!(
        bench.to_pod(&Frame::error6(router, 2, &with_options), vb).path(),
        Path::FromOutside
    );
}

#[test]
fn the_gateway_answers_a_solicitation() {
    kernel_test!();
    let mut bench = Bench::new();
    let request = Frame::solicitation(POD_A6, POD_A_MAC, GATEWAY_V6.0);
    let Outcome::Sent {
        path, ifindex, frame, ..
    } = bench.from_pod_a(&request)
    else {
        panic!("no answer")
    };
    assert_eq!((path, ifindex), (Path::NeighbourReply, bench.pod_a));
    let mut payload = vec![136, 0, frame.0[56], frame.0[57], 0xe0, 0, 0, 0];
    payload.extend(GATEWAY_V6.0);
    payload.extend([2, 1]);
    payload.extend(GATEWAY_A);
    let expected = Frame::ipv6(GATEWAY_V6.0, POD_A6, 58, &payload)
        .with(21, &[255])
        .delivered(POD_A_MAC, GATEWAY_A);
    assert_eq!(frame, expected);
    assert_eq!(checksum6(&frame), 0, "the checksum");
}

pub const TABLE: &[BadPacket] = &[
    (DropReason::Truncated, "an IPv6 header with nothing behind it", |b| {
        b.from_pod_a(&Frame::udp6(POD_A6, 1, POD_B6, 2).cut(54))
    }),
    (DropReason::Truncated, "a length beyond the frame", |b| {
        b.from_pod_a(&Frame::udp6(POD_A6, 1, POD_B6, 2).with(18, &[1, 0]))
    }),
    (
        DropReason::Truncated,
        "an extension header that ends beyond the packet",
        |b| b.from_pod_a(&behind(60, &[17, 9, 0, 0, 0, 0, 0, 0])),
    ),
    (DropReason::Truncated, "a fragment header cut short", |b| {
        b.from_pod_a(&Frame::ipv6(POD_A6, POD_B6, 44, &[17, 0, 0, 1]))
    }),
    (DropReason::ReservedAddress, "an IPv4-mapped source", |b| {
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 0, 2];
        b.from_pod_a(&Frame::udp6(mapped, 1, POD_B6, 2))
    }),
    (DropReason::ReservedAddress, "an IPv4-mapped destination", |b| {
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 0, 3];
        b.from_pod_a(&Frame::udp6(POD_A6, 1, mapped, 2))
    }),
    (DropReason::ReservedAddress, "a multicast source", |b| {
        b.from_pod_a(&Frame::udp6(super::frame::SOLICITED_GATEWAY, 1, POD_B6, 2))
    }),
    (DropReason::ReservedAddress, "from the unspecified address", |b| {
        b.from_pod_a(&Frame::udp6([0; 16], 1, POD_B6, 2))
    }),
    (DropReason::ReservedAddress, "to loopback", |b| {
        let mut loopback = [0; 16];
        loopback[15] = 1;
        b.from_pod_a(&Frame::udp6(POD_A6, 1, loopback, 2))
    }),
    (DropReason::ExtensionHeaders, "a source route", |b| {
        b.from_pod_a(&behind(43, &[17, 0, 0, 1, 0, 0, 0, 0]))
    }),
    (DropReason::ExtensionHeaders, "seven headers", |b| {
        let headers: Vec<u8> = (0..7).flat_map(|n| options(if n < 6 { 60 } else { 17 })).collect();
        b.from_pod_a(&behind(60, &headers))
    }),
    (DropReason::ExtensionHeaders, "a header of 264 bytes", |b| {
        let mut header = vec![0; 264];
        header[..2].copy_from_slice(&[17, 32]);
        b.from_pod_a(&behind(60, &header))
    }),
    (
        DropReason::InvalidHeader,
        "hop-by-hop options in the second place",
        |b| b.from_pod_a(&behind(60, &[options(0), options(17)].concat())),
    ),
    (DropReason::UnknownProtocol, "ICMP for IPv4", |b| {
        b.from_pod_a(&Frame::ipv6(POD_A6, POD_B6, 1, &[8, 0, 0, 0, 0, 1, 0, 1]))
    }),
    (DropReason::UnknownProtocol, "ICMPv6 in IPv4", |b| {
        b.from_pod_a(&Frame::ipv4(
            POD_A,
            super::frame::POD_B,
            58,
            &[128, 0, 0, 0, 0, 1, 0, 1],
        ))
    }),
    (DropReason::SpoofedAddress, "another pod's address", |b| {
        b.from_pod_a(&Frame::udp6(REMOTE6, 1, POD_B6, 2))
    }),
    (
        DropReason::SpoofedNeighbour,
        "a solicitation from another pod's address",
        |b| b.from_pod_a(&Frame::solicitation(POD_B6, POD_A_MAC, GATEWAY_V6.0)),
    ),
    (
        DropReason::SpoofedNeighbour,
        "a solicitation with another MAC in it",
        |b| b.from_pod_a(&Frame::solicitation(POD_A6, POD_B_MAC, GATEWAY_V6.0).with(6, &POD_A_MAC)),
    ),
    (
        DropReason::SpoofedNeighbour,
        "a solicitation that a router has passed on",
        |b| b.from_pod_a(&Frame::solicitation(POD_A6, POD_A_MAC, GATEWAY_V6.0).with(21, &[254])),
    ),
    (DropReason::LinkControl, "a solicitation for another pod", |b| {
        b.from_pod_a(&Frame::solicitation(POD_A6, POD_A_MAC, POD_B6))
    }),
    (DropReason::LinkControl, "an advertisement", |b| {
        b.from_pod_a(&Frame::solicitation(POD_A6, POD_A_MAC, GATEWAY_V6.0).with(54, &[136]))
    }),
    (DropReason::LinkControl, "a router solicitation", |b| {
        b.from_pod_a(&Frame::ipv6(
            POD_A6,
            super::frame::SOLICITED_GATEWAY,
            58,
            &[133, 0, 0, 0, 0, 0, 0, 0],
        ))
    }),
    (DropReason::LinkControl, "a solicitation from the overlay", |b| {
        b.from_overlay(
            &Frame::solicitation(REMOTE6, POD_A_MAC, GATEWAY_V6.0),
            OTHER_NODE,
            GREEN,
        )
    }),
    (DropReason::UnknownDestination, "multicast", |b| {
        let key = super::frame::SOLICITED_GATEWAY;
        b.put_network(
            [0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            8,
            [Identity::WORLD; 2],
            [2; 2],
            1,
        );
        b.from_pod_a(&Frame::udp6(POD_A6, 1, key, 2))
    }),
    (
        DropReason::FragmentTiny,
        "a first fragment with half a UDP header",
        |b| b.from_pod_a(&Frame::ipv6(POD_A6, POD_B6, 44, &piece6(6, 7, 0, true, &[0; 16]))),
    ),
    (DropReason::IcmpUnrelated, "an ICMPv6 error in pieces", |b| {
        let mut error = vec![1, 0, 0, 0, 0, 0, 0, 0];
        error.extend([0; 64]);
        b.from_pod_a(&Frame::ipv6(POD_A6, POD_B6, 44, &piece6(58, 7, 0, true, &error)))
    }),
];

#[test]
fn every_bad_packet_is_dropped_for_its_own_reason() {
    kernel_test!();
    every_one_is_dropped_for_its_own_reason(TABLE);
}
