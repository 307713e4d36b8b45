//! Packets in pieces.

use super::{
    bench::{BLUE_PLACE, Bench, GREEN, RED_PLACE},
    frame::{Frame, OTHER_NODE, POD_A, POD_A6, POD_B, POD_B6, REMOTE, piece6},
    run::Outcome,
};
use abi::{Direction, DropReason, Path, policy::CELL_PORT_SET};
use harness::kernel_test;

/// A datagram for this port in three pieces of 16 bytes; the last one is shorter.
fn datagram(port: u16, identification: u16) -> [Frame; 3] {
    let mut first = vec![0, 1];
    first.extend(port.to_be_bytes());
    first.extend([0, 44, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let piece = |offset: u16, more: bool, bytes: &[u8]| {
        Frame::ipv4(POD_A, POD_B, 17, bytes).piece(identification, offset, more)
    };
    [
        piece(0, true, &first),
        piece(16, true, &[9; 16]),
        piece(32, false, &[9; 12]),
    ]
}

fn datagram6(port: u16, identification: u32) -> [Frame; 3] {
    let mut first = vec![0, 1];
    first.extend(port.to_be_bytes());
    first.extend([0, 44, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let piece = |offset: u16, more: bool, bytes: &[u8]| {
        Frame::ipv6(POD_A6, POD_B6, 44, &piece6(17, identification, offset, more, bytes))
    };
    [
        piece(0, true, &first),
        piece(16, true, &[9; 16]),
        piece(32, false, &[9; 12]),
    ]
}

/// A bench where the red pod may send to the blue one's UDP port 53 alone.
fn only_dns() -> Bench {
    let mut bench = Bench::new();
    bench.set_port_set(1, &[(Some(17), 53, 53)]);
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
    bench
}

fn passes(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Sent { path: Path::Local, .. })
}

#[test]
fn the_later_ones_go_the_way_of_the_first() {
    kernel_test!();
    for (port, expected) in [(53, true), (54, false)] {
        let mut bench = only_dns();
        for piece in datagram(port, 7).iter().chain(&datagram6(port, 7)) {
            let outcome = bench.from_pod_a(piece);
            assert_eq!(passes(&outcome), expected, "port {port}: {piece:?}: {outcome:?}");
            if !expected {
                assert_eq!(outcome.reason(), DropReason::EgressDenied);
            }
        }
    }
}

#[test]
fn another_packet_of_the_same_two_is_another_matter() {
    kernel_test!();
    let mut bench = only_dns();
    for (denied, allowed) in datagram(54, 1).iter().zip(&datagram(53, 2)) {
        assert!(!passes(&bench.from_pod_a(denied)));
        assert!(passes(&bench.from_pod_a(allowed)));
    }
}

#[test]
fn in_any_order_all_pieces_arrive_where_the_two_may_talk() {
    kernel_test!();
    for order in [[2, 1, 0], [1, 0, 2], [2, 0, 1]] {
        let mut bench = only_dns();
        for index in order {
            assert!(passes(&bench.from_pod_a(&datagram(53, 7)[index])), "{order:?}");
        }
        // Without its first piece nobody can make a packet of the rest.
        let mut bench = only_dns();
        let first = order.iter().position(|index| *index == 0);
        for (place, index) in order.iter().enumerate() {
            let outcome = bench.from_pod_a(&datagram(54, 7)[*index]);
            assert_eq!(passes(&outcome), first.is_some_and(|first| place < first), "{order:?}");
        }
    }
}

/// Policy lets only the other end open flows: what is answered in pieces that overtake each other still arrives.
#[test]
fn a_reply_in_pieces_arrives_in_any_order() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.set_cell(Direction::Ingress, RED_PLACE.0, super::bench::GREEN_COLUMN, 0);
    assert_eq!(bench.from_pod_a(&Frame::udp(POD_A, 1, REMOTE, 53)).path(), Path::Encap);
    let mut first = vec![0, 53, 0, 1, 0, 24, 0, 0];
    first.extend([0; 8]);
    let last = Frame::ipv4(REMOTE, POD_A, 17, &[0; 8]).piece(9, 16, false);
    let first = Frame::ipv4(REMOTE, POD_A, 17, &first).piece(9, 0, true);
    for piece in [last, first] {
        assert_eq!(bench.from_overlay(&piece, OTHER_NODE, GREEN).path(), Path::Overlay);
    }
}

/// RFC 6946: a fragment header with nothing cut off.
#[test]
fn a_packet_in_one_piece_is_whole() {
    kernel_test!();
    let mut bench = only_dns();
    let udp = &Frame::udp6(POD_A6, 1, POD_B6, 53).0[54..];
    let atomic = Frame::ipv6(POD_A6, POD_B6, 44, &piece6(17, 1, 0, false, udp));
    assert!(passes(&bench.from_pod_a(&atomic)));
    let udp = &Frame::udp6(POD_A6, 1, POD_B6, 54).0[54..];
    let atomic = Frame::ipv6(POD_A6, POD_B6, 44, &piece6(17, 1, 0, false, udp));
    assert_eq!(bench.from_pod_a(&atomic).reason(), DropReason::EgressDenied);
}

/// A spoofed first piece must not lend its ports to somebody else's packet.
#[test]
fn nobody_answers_for_anothers_pieces() {
    kernel_test!();
    let mut bench = only_dns();
    for piece in &datagram(54, 7)[..1] {
        assert!(!passes(&bench.from_pod_a(piece)));
    }
    let spoofed = datagram(53, 7)[0].clone();
    assert_eq!(bench.from_pod_b(&spoofed).reason(), DropReason::SpoofedAddress);
    assert_eq!(bench.from_pod_a(&datagram(54, 7)[1]).reason(), DropReason::EgressDenied);
}
