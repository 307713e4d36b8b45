//! The fast path: that flows take it, and that it ends with whatever a flow was let open by.

use super::{
    bench::{BLUE, BLUE_PLACE, Bench, GREEN, RED_PLACE, TUNNEL_MTU, now},
    frame::{
        ACK, FIN, Frame, GATEWAY_B, NOBODY, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC, POD_B6, REMOTE,
        REMOTE6, RST, SYN,
    },
    run::{Arrival, Outcome},
};
use abi::{AddressKey, Direction, DropReason, Hook, Identity, Path, conntrack::SECOND, node::GATEWAY_V4};
use harness::kernel_test;

type Change = fn(&mut Bench);
type Sends = fn(&mut Bench) -> Outcome;

fn there(flags: u8) -> Frame {
    Frame::tcp(POD_A, 40000, POD_B, 80, flags)
}

fn there6(flags: u8) -> Frame {
    Frame::tcp6(POD_A6, 40000, POD_B6, 80, flags)
}

fn far(flags: u8) -> Frame {
    Frame::tcp(POD_A, 40000, REMOTE, 80, flags)
}

fn from_far(bench: &mut Bench, flags: u8) -> Outcome {
    bench.from_overlay(&Frame::tcp(REMOTE, 80, POD_A, 40000, flags), OTHER_NODE, GREEN)
}

/// Whether every flow may take the fast path.
fn is_armed(bench: &mut Bench) -> bool {
    let flows = bench.flows();
    !flows.is_empty()
        && flows.iter().all(|(_, entry)| {
            let links = entry.links;
            entry.fast_until > 0 && links.iter().all(|link| link.slot > 0)
        })
}

/// Pod A has a connection open to pod B, and to the remote pod, and neither may open one to it.
fn connected() -> Bench {
    let mut bench = Bench::new();
    connect(&mut bench);
    bench
}

/// The same anew: loading the programs for each case takes too long.
fn connect(bench: &mut Bench) {
    bench.reset();
    bench.set_cell(Direction::Ingress, RED_PLACE.0, BLUE_PLACE.1, 0);
    bench.set_cell(Direction::Ingress, RED_PLACE.0, super::bench::GREEN_COLUMN, 0);
    bench.from_pod_a(&there(SYN));
    bench.from_pod_b(&Frame::tcp(POD_B, 80, POD_A, 40000, SYN | ACK));
    bench.from_pod_a(&there(ACK));
    bench.from_pod_a(&far(SYN));
    from_far(bench, SYN | ACK);
    bench.from_pod_a(&far(ACK));
    assert!(is_armed(bench));
}

#[test]
fn a_flow_takes_it_once_it_is_established_and_its_packets_are_the_same() {
    kernel_test!();
    let mut bench = connected();
    for _ in 0..3 {
        let sent = bench.from_pod_a(&there(ACK));
        assert!(matches!(sent, Outcome::Sent { path: Path::Local, ifindex, .. } if ifindex == bench.pod_b));
        let Outcome::Sent { frame, .. } = sent else {
            unreachable!()
        };
        assert_eq!(frame, there(ACK).after_hop(POD_B_MAC, GATEWAY_B));
        let sent = bench.from_pod_a(&far(ACK));
        let expected = Some((Identity(0x01_0001), OTHER_NODE));
        assert!(matches!(sent, Outcome::Sent { path: Path::Encap, tunnel, .. } if tunnel == expected));
        let sent = from_far(&mut bench, ACK);
        assert!(matches!(sent, Outcome::Sent { path: Path::Overlay, ifindex, .. } if ifindex == bench.pod_a));
    }
    // UDP with answers, and IPv6.
    bench.forget();
    for (to, from) in [
        (Frame::udp(POD_A, 9, POD_B, 53), Frame::udp(POD_B, 53, POD_A, 9)),
        (Frame::udp6(POD_A6, 9, POD_B6, 53), Frame::udp6(POD_B6, 53, POD_A6, 9)),
    ] {
        bench.from_pod_a(&to);
        assert!(!is_armed(&mut bench));
        bench.from_pod_b(&from);
        bench.from_pod_a(&to);
        assert!(is_armed(&mut bench));
        assert_eq!(bench.from_pod_b(&from).path(), Path::Local);
        bench.forget();
    }
    let to = Frame::udp6(POD_A6, 9, REMOTE6, 53);
    let from = Frame::udp6(REMOTE6, 53, POD_A6, 9);
    bench.from_pod_a(&to);
    bench.from_overlay(&from, OTHER_NODE, GREEN);
    bench.from_pod_a(&to);
    assert!(is_armed(&mut bench));
    assert_eq!(bench.from_pod_a(&to).path(), Path::Encap);
    assert_eq!(bench.from_overlay(&from, OTHER_NODE, GREEN).path(), Path::Overlay);
}

/// What changes, what is sent then, and why it is dropped.
const CHANGES: &[(&str, Change, Sends, DropReason)] = &[
    (
        "a policy that forbids it",
        |b| {
            b.flip();
            b.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
        },
        |b| b.from_pod_a(&there(ACK)),
        DropReason::EgressDenied,
    ),
    (
        "the same, of what comes back",
        |b| {
            b.flip();
            b.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
        },
        |b| b.from_pod_b(&Frame::tcp(POD_B, 80, POD_A, 40000, ACK)),
        DropReason::EgressDenied,
    ),
    (
        "the receiver is relabelled",
        |b| b.put_pod(POD_B, [BLUE; 2], (2, 0), 9, b.pod_b),
        |b| {
            b.deny_egress(RED_PLACE.0, 0);
            b.from_pod_a(&there(ACK))
        },
        DropReason::EgressDenied,
    ),
    (
        "the sender is relabelled",
        |b| b.put_pod(POD_A, [Identity(0x01_0002); 2], (3, 20), 9, b.pod_a),
        |b| {
            b.deny_egress(3, BLUE_PLACE.1);
            b.from_pod_a(&there(ACK))
        },
        DropReason::EgressDenied,
    ),
    (
        "somebody else has the receiver's address",
        |b| {
            b.owner = 7;
            b.put_pod(POD_B, [BLUE; 2], BLUE_PLACE, 2, b.pod_b);
        },
        |b| b.from_pod_a(&there(ACK)),
        DropReason::MidStream,
    ),
    (
        "the receiver is gone",
        |b| b.remove_pod(POD_B),
        |b| b.from_pod_a(&there(ACK)),
        DropReason::UnknownDestination,
    ),
    (
        "the sender is gone",
        |b| b.remove_pod(POD_A),
        |b| b.from_pod_a(&far(ACK)),
        DropReason::SpoofedAddress,
    ),
    (
        "the pod that the tunnel leads to is gone",
        |b| b.remove_pod(POD_A),
        |b| from_far(b, ACK),
        DropReason::NotLocal,
    ),
    (
        "the remote pod has moved to another node",
        |b| b.put_remote(REMOTE, [GREEN; 2], [192, 0, 2, 3]),
        |b| from_far(b, ACK),
        DropReason::WrongNode,
    ),
    (
        "the other node is none any more",
        |b| b.remove_node(OTHER_NODE, &[REMOTE]),
        |b| {
            // Not even by way of what a pod sends there.
            b.from_pod_a(&far(ACK));
            from_far(b, ACK)
        },
        DropReason::UnknownNode,
    ),
    (
        "the remote pod has no identity of its own any more",
        |b| b.put_remote(REMOTE, [Identity::INIT; 2], OTHER_NODE),
        |b| {
            b.from_pod_a(&far(ACK));
            b.from_overlay(&Frame::tcp(REMOTE, 80, POD_A, 40000, ACK), OTHER_NODE, Identity::INIT)
        },
        DropReason::ReservedVni,
    ),
    (
        "hostd has started anew, and its stamps are the same again",
        |b| {
            b.flip();
            b.flip();
            b.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
        },
        |b| b.from_pod_a(&there(ACK)),
        DropReason::EgressDenied,
    ),
    (
        "the flow was forgotten",
        |b| b.forget(),
        |b| b.from_pod_a(&there(ACK)),
        DropReason::MidStream,
    ),
];

#[test]
fn it_ends_with_every_change_of_what_it_was_about() {
    kernel_test!();
    let mut bench = Bench::new();
    for (what, change, sends, reason) in CHANGES {
        connect(&mut bench);
        change(&mut bench);
        assert_eq!(sends(&mut bench).reason(), *reason, "{what}");
    }
    // Where it goes on elsewhere, it does at once.
    connect(&mut bench);
    bench.put_remote(REMOTE, [GREEN; 2], [192, 0, 2, 3]);
    let sent = bench.from_pod_a(&far(ACK));
    assert!(
        matches!(
            sent,
            Outcome::Sent {
                tunnel: Some((_, [192, 0, 2, 3])),
                ..
            }
        ),
        "{sent:?}"
    );
    connect(&mut bench);
    bench.put_pod(POD_B, [BLUE; 2], BLUE_PLACE, 2, bench.pod_a);
    let sent = bench.from_pod_a(&there(ACK));
    assert!(
        matches!(sent, Outcome::Sent { ifindex, .. } if ifindex == bench.pod_a),
        "{sent:?}"
    );
}

/// What is sent, and why it is dropped.
const STRAYS: &[(&str, Sends, DropReason)] = &[
    (
        "from another pod's interface",
        |b| b.run(&Arrival::new(Hook::FromPod, &there(ACK), b.pod_b)),
        DropReason::SpoofedAddress,
    ),
    (
        "from another MAC",
        |b| b.from_pod_a(&there(ACK).with(6, &POD_B_MAC)),
        DropReason::SpoofedMac,
    ),
    (
        "from one that differs in the last byte",
        |b| b.from_pod_a(&there(ACK).with(11, &[POD_A_MAC[5] ^ 1])),
        DropReason::SpoofedMac,
    ),
    (
        "to another MAC than the gateway's",
        |b| b.from_pod_a(&there(ACK).with(0, &POD_B_MAC)),
        DropReason::NotForGateway,
    ),
    (
        "to one that differs in the first byte",
        |b| b.from_pod_a(&there(ACK).with(0, &[4])),
        DropReason::NotForGateway,
    ),
    (
        "without another hop",
        |b| b.from_pod_a(&there(ACK).ttl(1)),
        DropReason::TtlExceeded,
    ),
    (
        "without another hop, to another node",
        |b| b.from_pod_a(&far(ACK).ttl(1)),
        DropReason::TtlExceeded,
    ),
    (
        "without another hop, by IPv6",
        |b| {
            b.from_pod_a(&there6(SYN));
            b.from_pod_b(&Frame::tcp6(POD_B6, 80, POD_A6, 40000, SYN | ACK));
            b.from_pod_a(&there6(ACK));
            assert!(is_armed(b));
            b.from_pod_a(&there6(ACK).with(21, &[1]))
        },
        DropReason::TtlExceeded,
    ),
    (
        "shorter than its headers",
        |b| b.from_pod_a(&there(ACK).with(16, &[0, 39])),
        DropReason::Truncated,
    ),
    (
        "longer than it is",
        |b| b.from_pod_a(&there(ACK).with(16, &[1, 0])),
        DropReason::Truncated,
    ),
    (
        "with options",
        |b| b.from_pod_a(&there(ACK).with(14, &[0x46])),
        DropReason::IpOptions,
    ),
    (
        "with half a TCP header",
        |b| b.from_pod_a(&there(ACK).with(46, &[0x40])),
        DropReason::InvalidHeader,
    ),
    (
        "larger than the tunnel carries",
        |b| {
            let header = &far(ACK).0[34..];
            let data = vec![0; TUNNEL_MTU as usize];
            b.from_pod_a(&Frame::ipv4(POD_A, REMOTE, 6, &[header, &data].concat()))
        },
        DropReason::TooBig,
    ),
    (
        "from the tunnel without metadata",
        |b| {
            let frame = Frame::tcp(REMOTE, 80, POD_A, 40000, ACK);
            b.run(&Arrival::new(Hook::FromOverlay, &frame, b.vxlan))
        },
        DropReason::NoTunnelKey,
    ),
    (
        "from another node",
        |b| {
            let frame = Frame::tcp(REMOTE, 80, POD_A, 40000, ACK);
            b.from_overlay(&frame, NOBODY, GREEN)
        },
        DropReason::UnknownNode,
    ),
    (
        "with another identity",
        |b| {
            let frame = Frame::tcp(REMOTE, 80, POD_A, 40000, ACK);
            b.from_overlay(&frame, OTHER_NODE, BLUE)
        },
        DropReason::WrongVni,
    ),
    (
        "from the tunnel, as a pod of this node",
        |b| {
            let frame = Frame::tcp(POD_B, 80, POD_A, 40000, ACK);
            b.from_overlay(&frame, OTHER_NODE, BLUE)
        },
        DropReason::WrongNode,
    ),
    (
        "from a pod, as a remote one",
        |b| b.from_pod_a(&Frame::tcp(REMOTE, 80, POD_A, 40000, ACK)),
        DropReason::SpoofedAddress,
    ),
    (
        "to the gateway",
        |b| b.from_pod_a(&Frame::tcp(POD_A, 40000, GATEWAY_V4, 80, ACK)),
        DropReason::UnknownDestination,
    ),
];

#[test]
fn nothing_gets_by_on_it_that_would_not_otherwise() {
    kernel_test!();
    let mut bench = Bench::new();
    for (what, sends, reason) in STRAYS {
        connect(&mut bench);
        assert_eq!(sends(&mut bench).reason(), *reason, "{what}");
        // Whoever tried that has not ended the flows.
        assert_eq!(bench.from_pod_a(&there(ACK)).path(), Path::Local, "{what}");
        assert_eq!(bench.from_pod_a(&far(ACK)).path(), Path::Encap, "{what}");
        assert_eq!(from_far(&mut bench, ACK).path(), Path::Overlay, "{what}");
    }
}

#[test]
fn what_says_something_about_the_flow_is_noted() {
    kernel_test!();
    let mut bench = connected();
    // The first piece of a packet, without which nobody knows whose the next one is.
    bench.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
    let piece = |offset, bytes: &[u8]| Frame::ipv4(POD_A, POD_B, 6, bytes).piece(9, offset, offset == 0);
    let header = there(ACK).0[34..54].to_vec();
    assert_eq!(
        bench.from_pod_a(&piece(0, &[&header[..], &[0; 4]].concat())).path(),
        Path::Local
    );
    assert_eq!(bench.from_pod_a(&piece(24, &[0; 8])).path(), Path::Local);
    // What is about the flow is not of it, and lets nothing of it take the fast path.
    bench.change_flows(|entry| entry.fast_until = 1);
    let error = Frame::unreachable(POD_B, &there(ACK));
    assert_eq!(bench.from_pod_b(&error).path(), Path::Local);
    assert!(bench.flows().iter().all(|(_, entry)| entry.fast_until == 1));
    connect(&mut bench);
    bench.from_pod_a(&there(FIN | ACK));
    bench.from_pod_b(&Frame::tcp(POD_B, 80, POD_A, 40000, FIN | ACK));
    bench.from_pod_a(&there(ACK));
    // It is closed: the same ports open another one.
    bench.set_cell(Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, 0);
    assert_eq!(bench.from_pod_a(&there(SYN)).reason(), DropReason::EgressDenied);
    connect(&mut bench);
    assert_eq!(from_far(&mut bench, RST).path(), Path::Overlay);
    bench.set_cell(Direction::Egress, RED_PLACE.0, super::bench::GREEN_COLUMN, 0);
    assert_eq!(bench.from_pod_a(&far(SYN)).reason(), DropReason::EgressDenied);
}

#[test]
fn a_flow_lives_and_ends_on_it_as_on_any_other() {
    kernel_test!();
    let mut bench = connected();
    for (key, _) in bench.flows() {
        if key.upper == AddressKey::v4(REMOTE).address {
            bench.forget_flow(&key);
        }
    }
    let set = |bench: &mut Bench, seconds: u64, fast: bool| {
        bench.change_flows(|entry| {
            entry.expires = now() + seconds * SECOND;
            entry.fast_until = if fast { u64::MAX } else { 1 };
        });
        assert_eq!(bench.from_pod_a(&there(ACK)).path(), Path::Local);
    };
    // Nothing is noted for a while, and then that the flow lives.
    bench.configure(|config| config.timeouts.tcp_established = 1000);
    set(&mut bench, 500, true);
    assert!(bench.lifetime() <= 500);
    set(&mut bench, 500, false);
    assert!(bench.lifetime() > 900);
    // A while is no longer than a quarter of the time-out, and 100 ticks.
    let until = |bench: &mut Bench| bench.flows()[0].1.fast_until;
    let long = until(&mut bench);
    bench.configure(|config| config.timeouts.tcp_established = 1);
    set(&mut bench, 500, false);
    let short = until(&mut bench);
    bench.configure(|config| config.timeouts.tcp_established = 1000);
    set(&mut bench, 500, false);
    let longer = until(&mut bench);
    assert!(long <= longer && short + 75 <= longer, "{long} {short} {longer}");
    // Short lives are prolonged, too.
    bench.configure(|config| config.timeouts.tcp_established = 3);
    bench.change_flows(|entry| (entry.expires, entry.fast_until) = (now() + 2 * SECOND + SECOND / 10, 1));
    let before = bench.flows()[0].1.expires;
    bench.from_pod_a(&there(ACK));
    assert!(bench.flows()[0].1.expires > before);
    // What has run out is none.
    bench.change_flows(|entry| (entry.expires, entry.fast_until) = (1, 1));
    assert_eq!(bench.from_pod_a(&there(ACK)).reason(), DropReason::MidStream);
}
