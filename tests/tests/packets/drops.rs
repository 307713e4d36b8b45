//! Every reason for which a packet is dropped.

use super::{
    bench::{BLUE_PLACE, FULL, GREEN, RED, RED_PLACE},
    frame::{ACK, Frame, GATEWAY_B, NOBODY, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_B, POD_B_MAC, REMOTE, SYN},
    run::{Arrival, BadPacket, every_one_is_dropped_for_its_own_reason},
};
use abi::{Direction, DropReason, Hook, Identity, Path, policy::CELL_PORT_SET};
use harness::kernel_test;
use std::collections::BTreeSet;

/// Reasons that no packet can provoke while the maps are whole: a missing array element, an LRU map without an
/// element to recycle, a tunnel key that the kernel refuses.
const OUT_OF_REACH: [DropReason; 3] = [
    DropReason::Internal,
    DropReason::ConntrackFull,
    DropReason::TunnelFailed,
];

const THIRD_NODE: [u8; 4] = [192, 0, 2, 3];
const GATEWAY: [u8; 4] = abi::node::GATEWAY_V4;

fn syn() -> Frame {
    Frame::tcp(POD_A, 40000, POD_B, 80, SYN)
}

/// The first 16 bytes of a longer UDP datagram.
fn long_udp(port: u16) -> Vec<u8> {
    let mut bytes = vec![0, 1];
    bytes.extend(port.to_be_bytes());
    bytes.extend([0; 12]);
    bytes
}

/// From the overlay: a SYN of the green pod for pod A.
fn green() -> Frame {
    Frame::tcp(REMOTE, 40000, POD_A, 80, SYN)
}

const TABLE: &[BadPacket] = &[
    (DropReason::Truncated, "an IPv4 header with nothing behind it", |b| {
        b.from_pod_a(&syn().cut(34))
    }),
    (DropReason::Truncated, "an IPv4 length beyond the frame", |b| {
        b.from_pod_a(&syn().with(16, &[0, 200]))
    }),
    (
        DropReason::Truncated,
        "a TCP header cut short by the IPv4 length",
        |b| b.from_pod_a(&syn().with(16, &[0, 30])),
    ),
    (
        DropReason::Truncated,
        "a UDP header cut short by the IPv4 length",
        |b| b.from_pod_a(&Frame::udp(POD_A, 1, POD_B, 2).with(16, &[0, 27])),
    ),
    (DropReason::Truncated, "half an ARP packet", |b| {
        b.from_pod_a(&Frame::arp(1, POD_A_MAC, POD_A, GATEWAY).cut(30))
    }),
    (DropReason::UnknownEthertype, "LLDP", |b| {
        b.from_pod_a(&syn().with(12, &[0x88, 0xcc]))
    }),
    (DropReason::UnknownEthertype, "MPLS at the overlay", |b| {
        b.from_overlay(&green().with(12, &[0x88, 0x47]), OTHER_NODE, GREEN)
    }),
    (DropReason::UnknownEthertype, "ARP from the overlay", |b| {
        b.from_overlay(&Frame::arp(1, POD_A_MAC, REMOTE, POD_A), OTHER_NODE, GREEN)
    }),
    (DropReason::InvalidHeader, "IPv4 called IPv6", |b| {
        b.from_pod_a(&Frame::tcp(POD_A, 1, POD_B, 2, SYN).with(12, &[0x86, 0xdd]))
    }),
    (DropReason::VlanTag, "802.1Q", |b| {
        b.from_pod_a(&syn().with(12, &[0x81, 0]))
    }),
    (DropReason::VlanTag, "802.1ad", |b| {
        b.from_pod_a(&syn().with(12, &[0x88, 0xa8]))
    }),
    (DropReason::InvalidHeader, "IP version 5", |b| {
        b.from_pod_a(&syn().with(14, &[0x55]))
    }),
    (DropReason::InvalidHeader, "a header of four words", |b| {
        b.from_pod_a(&syn().with(14, &[0x44]))
    }),
    (DropReason::InvalidHeader, "a total length of 19", |b| {
        b.from_pod_a(&syn().with(16, &[0, 19]))
    }),
    (DropReason::IpOptions, "a header of six words", |b| {
        b.from_pod_a(&syn().with(14, &[0x46]))
    }),
    (DropReason::TunnelPort, "a fragment to a tunnel port", |b| {
        b.from_pod_a(&Frame::ipv4(POD_A, OTHER_NODE, 17, &long_udp(8472)).piece(1, 0, true))
    }),
    (DropReason::TunnelPort, "the rest of a packet to a tunnel port", |b| {
        b.from_pod_a(&Frame::ipv4(POD_A, OTHER_NODE, 17, &long_udp(8472)).piece(1, 0, true));
        b.from_pod_a(&Frame::ipv4(POD_A, OTHER_NODE, 17, &[0; 8]).piece(1, 16, false))
    }),
    (
        DropReason::FragmentUnknown,
        "a later fragment to one who may not be spoken to",
        |b| {
            b.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
            b.set_cell(Direction::Egress, BLUE_PLACE.0, RED_PLACE.1, 0);
            b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &[0; 8]).piece(1, 16, false))
        },
    ),
    (
        DropReason::EgressDenied,
        "the rest of a packet whose beginning was denied",
        |b| {
            b.set_port_set(1, &[(Some(17), 53, 53)]);
            b.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
            b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &long_udp(54)).piece(1, 0, true));
            b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &[0; 8]).piece(1, 16, false))
        },
    ),
    (
        DropReason::FragmentTiny,
        "a first fragment with half a TCP header",
        |b| b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 6, &[0; 16]).piece(1, 0, true)),
    ),
    (
        DropReason::FragmentTiny,
        "a fragment that begins inside the TCP header",
        |b| b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 6, &[0; 16]).piece(1, 8, false)),
    ),
    (
        DropReason::FragmentOverlap,
        "a fragment that begins inside the first one",
        |b| {
            b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &long_udp(53)).piece(1, 0, true));
            b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &[0; 16]).piece(1, 8, false))
        },
    ),
    (
        DropReason::InvalidHeader,
        "a fragment of 9 bytes that is not the last one",
        |b| b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &[0; 9]).piece(1, 0, true)),
    ),
    (
        DropReason::InvalidHeader,
        "a fragment that ends beyond the longest packet",
        |b| b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 17, &[0; 16]).piece(1, 65528, false)),
    ),
    (DropReason::InvalidHeader, "a TCP header of four words", |b| {
        b.from_pod_a(&syn().with(46, &[0x40]))
    }),
    (
        DropReason::EgressDenied,
        "GRE where only some protocols may pass",
        |b| {
            b.set_port_set(1, &[(Some(6), 0, u16::MAX), (None, 1, 100)]);
            b.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, CELL_PORT_SET + 1);
            b.from_pod_a(&Frame::ipv4(POD_A, POD_B, 47, &[0; 20]))
        },
    ),
    (DropReason::IcmpType, "an ICMP redirect", |b| {
        b.from_pod_a(&Frame::echo(POD_A, POD_B, false, 1).with(34, &[5]))
    }),
    (DropReason::IcmpUnrelated, "an error about no flow", |b| {
        b.from_pod_a(&Frame::unreachable(POD_A, &Frame::udp(POD_B, 1, POD_A, 2)))
    }),
    (DropReason::IcmpUnrelated, "an error about somebody else's flow", |b| {
        let others = Frame::udp(POD_B, 1, REMOTE, 2);
        b.from_pod_a(&Frame::unreachable(POD_A, &others))
    }),
    (
        DropReason::SpoofedAddress,
        "pod B's address on pod A's interface",
        |b| b.from_pod_a(&Frame::tcp(POD_B, 1, REMOTE, 2, SYN)),
    ),
    (DropReason::SpoofedAddress, "nobody's address", |b| {
        b.from_pod_a(&Frame::tcp(NOBODY, 1, POD_B, 2, SYN))
    }),
    (DropReason::SpoofedAddress, "the node's address", |b| {
        b.from_pod_a(&Frame::tcp(NODE, 1, POD_B, 2, SYN))
    }),
    (DropReason::SpoofedMac, "pod B's MAC", |b| {
        b.from_pod_a(&syn().with(6, &POD_B_MAC))
    }),
    (DropReason::SpoofedArp, "an ARP request with pod B's address", |b| {
        b.from_pod_a(&Frame::arp(1, POD_A_MAC, POD_B, GATEWAY))
    }),
    (DropReason::SpoofedArp, "an ARP request with pod B's MAC", |b| {
        b.from_pod_a(&Frame::arp(1, POD_B_MAC, POD_A, GATEWAY))
    }),
    (DropReason::SpoofedArp, "an ARP request with nobody's address", |b| {
        b.from_pod_a(&Frame::arp(1, POD_A_MAC, NOBODY, GATEWAY))
    }),
    (DropReason::UnexpectedArp, "an ARP reply", |b| {
        b.from_pod_a(&Frame::arp(2, POD_A_MAC, POD_A, GATEWAY))
    }),
    (DropReason::UnexpectedArp, "an ARP request for another pod", |b| {
        b.from_pod_a(&Frame::arp(1, POD_A_MAC, POD_A, POD_B))
    }),
    (DropReason::UnexpectedArp, "the node's ARP", |b| {
        b.to_pod(&Frame::arp(1, POD_A_MAC, NODE, POD_A), 0)
    }),
    (DropReason::NotForGateway, "a frame for pod B's gateway", |b| {
        b.from_pod_a(&syn().with(0, &GATEWAY_B))
    }),
    (DropReason::NotForGateway, "a broadcast", |b| {
        b.from_pod_a(&syn().with(0, &[0xff; 6]))
    }),
    (DropReason::TunnelPort, "the other node's tunnel port", |b| {
        b.from_pod_a(&Frame::udp(POD_A, 1, OTHER_NODE, 8472))
    }),
    (
        DropReason::TunnelPort,
        "the tunnel port of any address: it may be a node's",
        |b| b.from_pod_a(&Frame::udp(POD_A, 1, NOBODY, 8472)),
    ),
    (DropReason::TunnelPort, "this node's tunnel port", |b| {
        b.from_pod_a(&Frame::udp(POD_A, 1, NODE, 8472))
    }),
    (
        DropReason::UnknownDestination,
        "an address of a pod CIDR that is no pod's",
        |b| b.from_pod_a(&Frame::tcp(POD_A, 1, [10, 9, 9, 9], 2, SYN)),
    ),
    (DropReason::UnknownDestination, "multicast", |b| {
        b.from_pod_a(&Frame::udp(POD_A, 1, [224, 0, 0, 1], 2))
    }),
    (
        DropReason::UnknownSource,
        "a routed packet from an address of a pod CIDR that is no pod's",
        |b| {
            let vb = b.pod_b;
            b.to_pod(&Frame::tcp([10, 9, 9, 9], 1, POD_A, 2, SYN), vb)
        },
    ),
    (
        DropReason::UnknownSource,
        "a routed packet that claims to be the node's",
        |b| {
            let vb = b.pod_b;
            b.to_pod(&Frame::tcp(NODE, 1, POD_A, 2, SYN), vb)
        },
    ),
    (
        DropReason::UnknownSource,
        "a routed packet that claims to be another pod's",
        |b| {
            let vb = b.pod_b;
            b.to_pod(&Frame::tcp(REMOTE, 1, POD_A, 2, SYN), vb)
        },
    ),
    (
        DropReason::NotLocal,
        "the node's packet on another pod's interface",
        |b| b.to_pod(&Frame::tcp(NODE, 1, POD_B, 2, SYN), 0),
    ),
    (DropReason::IcmpUnrelated, "an echo reply that nobody asked for", |b| {
        b.from_pod_a(&Frame::echo(POD_A, POD_B, true, 1))
    }),
    (DropReason::TtlExceeded, "an ICMP error with TTL 1", |b| {
        let flow = Frame::udp(POD_B, 1, POD_A, 2);
        assert_eq!(b.from_pod_b(&flow).path(), Path::Local);
        b.from_pod_a(&Frame::unreachable(POD_A, &flow).ttl(1))
    }),
    (
        DropReason::TooBig,
        "a later fragment that does not fit into the tunnel",
        |b| {
            let piece = Frame::ipv4(POD_A, REMOTE, 17, &[0; 1440]).piece(1, 16, false);
            b.from_pod_a(&piece.with(20, &[0x40, 2]))
        },
    ),
    (DropReason::EgressDenied, "the sender's policy", |b| {
        b.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
        b.from_pod_a(&syn())
    }),
    (DropReason::EgressDenied, "a pod without a place in the matrix", |b| {
        let va = b.pod_a;
        b.deny_egress(0, BLUE_PLACE.1);
        b.put_pod(POD_A, [RED; 2], (0, 0), 1, va);
        b.from_pod_a(&syn())
    }),
    (DropReason::EgressDenied, "a row beyond the matrix", |b| {
        let va = b.pod_a;
        b.put_pod(POD_A, [RED; 2], (4, 16), 1, va);
        b.from_pod_a(&syn())
    }),
    (DropReason::IngressDenied, "the receiver's policy", |b| {
        b.set_cell(Direction::Ingress, BLUE_PLACE.0, RED_PLACE.1, 0);
        b.from_pod_a(&syn())
    }),
    (
        DropReason::IngressDenied,
        "the receiver's policy, from the overlay",
        |b| {
            b.set_cell(Direction::Ingress, RED_PLACE.0, super::bench::GREEN_COLUMN, 0);
            b.from_overlay(&green(), OTHER_NODE, GREEN)
        },
    ),
    (DropReason::IngressDenied, "the node, where policy denies it", |b| {
        b.set_cell(Direction::Ingress, RED_PLACE.0, Identity::HOST.0, 0);
        b.to_pod(&Frame::tcp(NODE, 1, POD_A, 2, SYN), 0)
    }),
    (
        DropReason::MidStream,
        "an ACK out of nowhere, allowed one way only",
        |b| {
            b.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
            b.from_pod_a(&Frame::tcp(POD_A, 1, POD_B, 2, ACK))
        },
    ),
    (
        DropReason::ConntrackShare,
        "a new flow of a pod that has its share of a full map",
        |b| {
            b.set_tracked(FULL.into());
            b.from_pod_a(&syn())
        },
    ),
    (DropReason::NoTunnelKey, "a packet without metadata", |b| {
        b.run(&Arrival::new(Hook::FromOverlay, &green(), b.vxlan))
    }),
    (DropReason::UnknownNode, "an outer source that is no node", |b| {
        b.from_overlay(&green(), NOBODY, GREEN)
    }),
    (
        DropReason::UnknownNode,
        "this node's own address as outer source",
        |b| b.from_overlay(&green(), NODE, GREEN),
    ),
    (
        DropReason::ForeignTunnel,
        "a tunnel packet for another address of this node",
        |b| {
            b.run(&Arrival {
                outer: Some((OTHER_NODE, GREEN)),
                outer_destination: [192, 0, 2, 77],
                ..Arrival::new(Hook::FromOverlay, &green(), b.vxlan)
            })
        },
    ),
    (
        DropReason::TunnelPort,
        "a pod of another node to the tunnel port of this one",
        |b| b.from_overlay(&Frame::udp(REMOTE, 5000, NODE, 8472), OTHER_NODE, GREEN),
    ),
    (DropReason::WrongNode, "an inner source behind another node", |b| {
        b.put_node(THIRD_NODE, Some(THIRD_NODE));
        b.from_overlay(&green(), THIRD_NODE, GREEN)
    }),
    (DropReason::WrongNode, "an inner source that nobody has", |b| {
        b.from_overlay(&Frame::tcp(NOBODY, 1, POD_A, 2, SYN), OTHER_NODE, GREEN)
    }),
    (
        DropReason::WrongNode,
        "an inner source that is a pod of this node",
        |b| b.from_overlay(&Frame::tcp(POD_B, 1, POD_A, 2, SYN), OTHER_NODE, GREEN),
    ),
    (DropReason::ReservedVni, "VNI 0", |b| {
        b.from_overlay(&green(), OTHER_NODE, Identity::NONE)
    }),
    (DropReason::ReservedVni, "the host's identity as VNI", |b| {
        b.from_overlay(&green(), OTHER_NODE, Identity::HOST)
    }),
    (DropReason::ReservedVni, "init as VNI", |b| {
        b.from_overlay(&green(), OTHER_NODE, Identity::INIT)
    }),
    (DropReason::WrongVni, "another pod's identity as VNI", |b| {
        b.from_overlay(&green(), OTHER_NODE, RED)
    }),
    (DropReason::NotLocal, "an inner destination that is not here", |b| {
        b.from_overlay(&Frame::tcp(REMOTE, 1, [10, 1, 0, 99], 2, SYN), OTHER_NODE, GREEN)
    }),
    (
        DropReason::NotLocal,
        "from one node to another, through the tunnel",
        |b| {
            b.from_overlay(
                &Frame::tcp(OTHER_NODE, 1, NODE, 22, SYN),
                OTHER_NODE,
                Identity::REMOTE_NODE,
            )
        },
    ),
    (
        DropReason::WrongNode,
        "another node's identity from an address that is not its own",
        |b| b.from_overlay(&Frame::tcp(NOBODY, 1, POD_A, 2, SYN), OTHER_NODE, Identity::REMOTE_NODE),
    ),
    (
        DropReason::WrongNode,
        "a pod's address with another node's identity",
        |b| b.from_overlay(&green(), OTHER_NODE, Identity::REMOTE_NODE),
    ),
];

#[test]
fn every_bad_packet_is_dropped_for_its_own_reason() {
    kernel_test!();
    every_one_is_dropped_for_its_own_reason(TABLE);
}

#[test]
fn the_table_has_every_reason() {
    let tables = TABLE.iter().chain(super::ipv6::TABLE);
    let elsewhere = OUT_OF_REACH
        .into_iter()
        .chain(super::services::REASONS)
        .chain(super::strangers::REASONS);
    let covered: BTreeSet<_> = tables.map(|(reason, ..)| *reason).chain(elsewhere).collect();
    let missing: Vec<_> = DropReason::ALL
        .iter()
        .filter(|reason| !covered.contains(reason))
        .collect();
    assert!(missing.is_empty(), "no packet for {missing:?}");
}
