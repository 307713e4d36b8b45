//! Node ports: clients outside, who ask at a node's address, and the pods that answer them.

use super::{
    bench::{BLUE_PLACE, Bench, GREEN, GREEN_COLUMN, RED, TUNNEL_MTU},
    frame::{
        ACK, Frame, GATEWAY_A, GATEWAY_B, NOBODY, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_B, POD_B_MAC, REMOTE, RST,
        SYN, checksum,
    },
    run::Outcome,
    services::{frame_of, frontend},
};
use abi::{
    Direction, DropReason, Identity, Path,
    policy::{TCP, UDP},
};
use harness::kernel_test;
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

pub const PORT: u16 = 30080;
const SYN_ACK: u8 = SYN | ACK;
/// What a frame from outside has.
const MACS: ([u8; 6], [u8; 6]) = (GATEWAY_A, POD_A_MAC);

/// Node ports for TCP and UDP.
pub fn bench_with(backends: &[[u8; 4]]) -> Bench {
    let mut bench = Bench::new();
    bench.forward();
    serve(&mut bench, backends);
    bench
}

pub fn serve(bench: &mut Bench, backends: &[[u8; 4]]) {
    let backends: Vec<(IpAddr, u16)> = backends.iter().map(|address| (IpAddr::from(*address), 8080)).collect();
    for protocol in [TCP, UDP] {
        bench.put_service(frontend(Ipv4Addr::UNSPECIFIED, protocol, PORT), &backends, 0);
    }
}

/// The port that a client outside has towards its backend: one of the node's choice.
pub fn port_of(sent: &Outcome) -> u16 {
    let frame = frame_of(sent.clone());
    u16::from_be_bytes([frame.0[34], frame.0[35]])
}

fn tunnel(outcome: &Outcome) -> (Path, (Identity, [u8; 4])) {
    match outcome {
        Outcome::Sent { path, tunnel, .. } => (*path, tunnel.unwrap()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_outside_is_answered_from_where_it_asked() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    for tcp in [true, false] {
        let packet = |from, from_port, to, to_port, flags| {
            if tcp {
                Frame::tcp(from, from_port, to, to_port, flags)
            } else {
                Frame::udp(from, from_port, to, to_port)
            }
        };
        let asked = packet(NOBODY, 5000, NODE, PORT, SYN);
        let seen = packet(NODE, PORT, NOBODY, 5000, SYN_ACK);
        for _ in 0..2 {
            let sent = bench.from_netdev(&asked.clone().summed());
            let port = port_of(&sent);
            let got = packet(NOBODY, port, POD_B, 8080, SYN);
            let answer = packet(POD_B, 8080, NOBODY, port, SYN_ACK);
            assert_eq!(sent.path(), Path::NodePort);
            assert_eq!(frame_of(sent), got.clone().summed().after_hop(POD_B_MAC, GATEWAY_B));
            let answered = bench.from_pod_b(&answer.clone().summed());
            let Outcome::Sent {
                path, ifindex, frame, ..
            } = answered
            else {
                panic!("{answered:?}")
            };
            assert_eq!((path, ifindex), (Path::NodePortReply, bench.underlay));
            assert_eq!(frame, seen.clone().summed().after_hop(GATEWAY_B, POD_B_MAC));
        }
    }
    // An error comes from the node, too, and one about an answer reaches the pod.
    let port = port_of(&bench.from_netdev(&Frame::udp(NOBODY, 5000, NODE, PORT).summed()));
    let got = Frame::udp(NOBODY, port, POD_B, 8080).summed();
    let refused = bench.from_pod_b(&Frame::unreachable(POD_B, &got).summed());
    let asked = Frame::udp(NOBODY, 5000, NODE, PORT).summed();
    let expected = Frame::unreachable(NODE, &asked).summed();
    assert_eq!(frame_of(refused), expected.after_hop(GATEWAY_B, POD_B_MAC));
    let router = [198, 51, 100, 7];
    let seen = Frame::udp(NODE, PORT, NOBODY, 5000).summed();
    let told = bench.from_netdev(&Frame::unreachable(router, &seen).summed());
    let answer = Frame::udp(POD_B, 8080, NOBODY, port).summed();
    let expected = Frame::unreachable(router, &answer).summed();
    assert_eq!(frame_of(told), expected.after_hop(POD_B_MAC, GATEWAY_B));
}

#[test]
fn a_backend_on_another_node_is_told_who_asks_and_answers_by_way_of_this_one() {
    kernel_test!();
    let mut bench = bench_with(&[REMOTE]);
    let asked = Frame::tcp(NOBODY, 5000, NODE, PORT, SYN).summed();
    let sent = bench.from_netdev(&asked);
    assert_eq!(tunnel(&sent), (Path::Encap, (Identity::WORLD, OTHER_NODE)));
    let port = port_of(&sent);
    let got = Frame::tcp(NOBODY, port, REMOTE, 8080, SYN).summed();
    assert_eq!(frame_of(sent), got.after_hop(MACS.0, MACS.1));
    let answer = Frame::tcp(REMOTE, 8080, NOBODY, port, SYN_ACK).summed();
    let answered = bench.from_overlay(&answer, OTHER_NODE, GREEN);
    assert_eq!(answered.path(), Path::NodePortReply);
    let seen = Frame::tcp(NODE, PORT, NOBODY, 5000, SYN_ACK).summed();
    assert_eq!(frame_of(answered), seen.delivered(MACS.0, MACS.1));
    // Nothing else goes out that way.
    for stray in [
        Frame::tcp(REMOTE, 8080, NOBODY, port ^ 1, SYN_ACK),
        Frame::tcp(REMOTE, 8080, NOBODY, port ^ 1, SYN),
        Frame::udp(REMOTE, 8080, NOBODY, port),
        Frame::unreachable(REMOTE, &Frame::udp(NOBODY, port, REMOTE, 8080)),
    ] {
        let outcome = bench.from_overlay(&stray, OTHER_NODE, GREEN);
        assert!(
            matches!(outcome.reason(), DropReason::NotLocal | DropReason::IcmpUnrelated),
            "{outcome:?}"
        );
    }
    // Nor what was a flow of the pod's to the outside when it was here.
    let mut bench = bench_with(&[]);
    bench.owner = 100;
    bench.put_pod(REMOTE, [GREEN; 2], (1, GREEN_COLUMN), 1, bench.pod_a);
    let opened = Frame::tcp(REMOTE, 5000, NOBODY, 80, SYN);
    assert_eq!(bench.from_pod_a(&opened).path(), Path::ToOutside);
    bench.remove_pod(REMOTE);
    let outcome = bench.from_overlay(&opened, OTHER_NODE, GREEN);
    assert_eq!(outcome.reason(), DropReason::NotLocal);
}

#[test]
fn at_the_backends_node_the_client_is_who_it_is() {
    kernel_test!();
    let mut bench = bench_with(&[]);
    let got = Frame::tcp(NOBODY, 5000, POD_A, 8080, SYN).summed();
    let sent = bench.from_overlay(&got, OTHER_NODE, Identity::WORLD);
    assert_eq!(sent.path(), Path::Overlay);
    let answer = Frame::tcp(POD_A, 8080, NOBODY, 5000, SYN_ACK).summed();
    let answered = bench.from_pod_a(&answer);
    assert_eq!(tunnel(&answered), (Path::Encap, (RED, OTHER_NODE)));
    assert_eq!(frame_of(answered), answer.after_hop(MACS.0, MACS.1));
    // What the pod asks for itself goes out as ever.
    let own = Frame::tcp(POD_A, 5000, NOBODY, 80, SYN).summed();
    assert_eq!(bench.from_pod_a(&own).path(), Path::ToOutside);
    // Policy is that of the network which the client is in, as this node knows it.
    let network = Identity(20);
    bench.put_network([203, 0, 113, 0], 24, [network; 2], [20; 2], 0);
    bench.set_cell(Direction::Ingress, super::bench::RED_PLACE.0, 20, 0);
    let other = Frame::tcp(NOBODY, 5001, POD_A, 8080, SYN).summed();
    let denied = bench.from_overlay(&other, OTHER_NODE, Identity::WORLD);
    assert_eq!(denied.reason(), DropReason::IngressDenied);
}

#[test]
fn policy_is_that_of_the_client_and_the_pod() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    bench.set_cell(Direction::Ingress, BLUE_PLACE.0, Identity::WORLD.0, 0);
    let asked = Frame::tcp(NOBODY, 5000, NODE, PORT, SYN).summed();
    assert_eq!(bench.from_netdev(&asked).reason(), DropReason::IngressDenied);
    bench.set_cell(Direction::Ingress, BLUE_PLACE.0, Identity::WORLD.0, 1);
    let sent = bench.from_netdev(&asked);
    assert_eq!(sent.path(), Path::NodePort);
    let port = port_of(&sent);
    bench.flip();
    bench.set_cell(Direction::Ingress, BLUE_PLACE.0, Identity::WORLD.0, 0);
    let again = Frame::tcp(NOBODY, 5000, NODE, PORT, ACK).summed();
    assert_eq!(bench.from_netdev(&again).reason(), DropReason::IngressDenied);
    bench.deny_egress(BLUE_PLACE.0, Identity::WORLD.0);
    let answer = Frame::tcp(POD_B, 8080, NOBODY, port, ACK).summed();
    assert_eq!(bench.from_pod_b(&answer).reason(), DropReason::EgressDenied);
}

#[test]
fn everything_else_that_comes_in_is_left_alone() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    for frame in [
        Frame::tcp(NOBODY, 5000, NODE, 22, SYN),
        Frame::tcp(NOBODY, 5000, OTHER_NODE, PORT, SYN),
        Frame::tcp(NOBODY, 5000, POD_B, PORT, SYN),
        Frame::udp(OTHER_NODE, 5000, NODE, 8472),
        Frame::echo(NOBODY, NODE, false, 1),
        Frame::ipv4(NOBODY, NODE, 89, &[0; 20]),
        Frame::tcp(NOBODY, 5000, NODE, PORT, SYN).cut(40),
        Frame::udp(NOBODY, 5000, NODE, 22).piece(7, 0, true),
        Frame::udp(NOBODY, 5000, NODE, PORT).piece(7, 16, false),
        Frame::arp(1, POD_A_MAC, NOBODY, NODE),
        Frame(vec![0; 60]),
    ] {
        assert_eq!(bench.from_netdev(&frame), Outcome::Passed, "{frame:?}");
    }
}

#[test]
fn a_client_outside_is_told_by_the_node() {
    kernel_test!();
    let mut bench = bench_with(&[]);
    let told = |outcome: Outcome| match outcome {
        Outcome::Told(reason, frame) => (reason, frame),
        other => panic!("{other:?}"),
    };
    let (reason, frame) = told(bench.from_netdev(&Frame::tcp(NOBODY, 5000, NODE, PORT, SYN).summed()));
    assert_eq!(reason, DropReason::NoBackends);
    let expected = Frame::tcp(NODE, PORT, NOBODY, 5000, RST | ACK)
        .with(18, &[0, 0, 0, 0])
        .with(42, &1_u32.to_be_bytes());
    assert_eq!(frame, expected.summed().delivered(MACS.1, MACS.0));
    let (reason, frame) = told(bench.from_netdev(&Frame::udp(NOBODY, 5000, NODE, PORT).summed()));
    assert_eq!(reason, DropReason::NoBackends);
    assert_eq!(
        (&frame.0[26..34], &frame.0[34..36]),
        (&[NODE, NOBODY].concat()[..], &[3, 3][..])
    );
    // What does not fit into the tunnel to a backend.
    serve(&mut bench, &[REMOTE]);
    let mut large = Frame::udp(NOBODY, 5000, NODE, PORT);
    large.0.resize(14 + 1500, 0);
    let large = large.with(16, &1500_u16.to_be_bytes()).with(20, &[0x40, 0]);
    let (reason, frame) = told(bench.from_netdev(&large));
    assert_eq!(reason, DropReason::TooBig);
    assert_eq!(
        (&frame.0[26..34], &frame.0[34..36]),
        (&[NODE, NOBODY].concat()[..], &[3, 4][..])
    );
    assert_eq!(frame.0[40..42], u16::try_from(TUNNEL_MTU).unwrap().to_be_bytes());
    assert_eq!(checksum(&frame.0[34..]), 0);
    // A backend that is no pod has no way back.
    serve(&mut bench, &[[198, 51, 100, 9]]);
    let (reason, _) = told(bench.from_netdev(&Frame::tcp(NOBODY, 5002, NODE, PORT, SYN).summed()));
    assert_eq!(reason, DropReason::BackendGone);
}

#[test]
fn pods_reach_node_ports_of_all_nodes() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    for node in [NODE, OTHER_NODE] {
        let asked = Frame::tcp(POD_A, 5000, node, PORT, SYN).summed();
        let sent = bench.from_pod_a(&asked);
        assert_eq!(sent.path(), Path::Local);
        let port = u16::from_be_bytes([frame_of(sent.clone()).0[34], frame_of(sent).0[35]]);
        let answer = Frame::tcp(POD_B, 8080, POD_A, port, SYN_ACK).summed();
        let seen = Frame::tcp(node, PORT, POD_A, 5000, SYN_ACK).summed();
        assert_eq!(
            frame_of(bench.from_pod_b(&answer)),
            seen.after_hop(POD_A_MAC, GATEWAY_A)
        );
    }
    // Other ports are the nodes' own.
    assert_eq!(
        bench.from_pod_a(&Frame::tcp(POD_A, 5000, NODE, 22, SYN)).path(),
        Path::ToHost
    );
    assert_eq!(
        bench.from_pod_a(&Frame::tcp(POD_A, 5000, OTHER_NODE, 22, SYN)).path(),
        Path::Encap
    );
}

#[test]
fn one_port_of_a_client_that_asks_at_two_nodes_is_two_connections() {
    kernel_test!();
    // What this node makes of it is no port that another one would make of it.
    let mut bench = bench_with(&[POD_B]);
    let ports: Vec<u16> = (5000..5064)
        .map(|port| port_of(&bench.from_netdev(&Frame::tcp(NOBODY, port, NODE, PORT, SYN).summed())))
        .collect();
    assert!(ports.iter().all(|port| *port >= 1024));
    assert!((5000..5064).zip(&ports).filter(|(asked, got)| asked == *got).count() < 2);
    assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 64);
}

#[test]
fn what_clients_outside_have_open_counts_on_an_account_of_their_own() {
    kernel_test!();
    let mut bench = bench_with(&[REMOTE]);
    bench.set_tracked(u64::from(super::bench::FULL));
    let asked = Frame::tcp(NOBODY, 5000, NODE, PORT, SYN).summed();
    assert_eq!(bench.from_netdev(&asked).reason(), DropReason::ConntrackShare);
    bench.set_account(abi::conntrack::OUTSIDE, 0);
    assert_eq!(bench.from_netdev(&asked).path(), Path::Encap);
    // What has no way back takes nothing of it.
    serve(&mut bench, &[[198, 51, 100, 9]]);
    let before = bench.tracked();
    let refused = bench.from_netdev(&Frame::tcp(NOBODY, 5001, NODE, PORT, SYN).summed());
    assert_eq!(refused.reason(), DropReason::BackendGone);
    assert_eq!(bench.tracked(), before);
}

#[test]
fn answers_do_not_go_to_a_node_that_is_none_any_more() {
    kernel_test!();
    let mut bench = bench_with(&[]);
    let got = Frame::tcp(NOBODY, 5000, POD_A, 8080, SYN).summed();
    assert_eq!(
        bench.from_overlay(&got, OTHER_NODE, Identity::WORLD).path(),
        Path::Overlay
    );
    bench
        .hash::<abi::IpcacheEntry>(abi::map::NODES)
        .remove(&abi::AddressKey::v4(OTHER_NODE))
        .unwrap();
    let answer = Frame::tcp(POD_A, 8080, NOBODY, 5000, SYN_ACK).summed();
    assert_eq!(bench.from_pod_a(&answer).reason(), DropReason::UnknownNode);
}

#[test]
fn connections_that_have_nothing_to_do_with_a_node_port_go_on() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    bench.allow_everything(0);
    // Of a connection of the node's own, or of a pod's behind masquerade, from that very port.
    for frame in [
        Frame::tcp(NOBODY, 443, NODE, PORT, SYN_ACK),
        Frame::tcp(NOBODY, 443, NODE, PORT, ACK),
        Frame::tcp(NOBODY, 443, NODE, PORT, RST),
        Frame::unreachable(NOBODY, &Frame::tcp(NODE, PORT, NOBODY, 443, SYN)),
    ] {
        assert_eq!(bench.from_netdev(&frame.summed()), Outcome::Passed);
    }
    // Of one that the node has opened to a pod from there: the pod's answers are the node's.
    for (asked, answer) in [
        (
            Frame::tcp(NODE, PORT, POD_A, 22, SYN),
            Frame::tcp(POD_A, 22, NODE, PORT, SYN_ACK),
        ),
        (Frame::udp(NODE, PORT, POD_A, 53), Frame::udp(POD_A, 53, NODE, PORT)),
    ] {
        assert_eq!(bench.to_pod(&asked.summed(), 0).path(), Path::FromHost);
        assert_eq!(bench.from_pod_a(&answer.summed()).path(), Path::ToHost);
    }
    // Of one that was open to a process of the node's before there was a service: TCP goes on, a new one is the service's.
    let mut bench = Bench::new();
    let to_node = |flags| Frame::tcp(POD_A, 4000, NODE, PORT, flags).summed();
    assert_eq!(bench.from_pod_a(&to_node(SYN)).path(), Path::ToHost);
    serve(&mut bench, &[POD_B]);
    assert_eq!(bench.from_pod_a(&to_node(ACK)).path(), Path::ToHost);
    assert_eq!(bench.from_pod_a(&to_node(SYN)).path(), Path::Local);
    assert_eq!(bench.from_pod_a(&to_node(ACK)).path(), Path::Local);
}

#[test]
fn a_client_outside_keeps_its_backend_where_the_service_says_so() {
    kernel_test!();
    let mut bench = bench_with(&[]);
    let both = [(POD_B.into(), 8080), (REMOTE.into(), 8080)];
    let mut backends = |affinity| -> BTreeSet<[u8; 4]> {
        bench.put_service(frontend(Ipv4Addr::UNSPECIFIED, TCP, PORT), &both, affinity);
        let asked = |port| Frame::tcp(NOBODY, port, NODE, PORT, SYN).summed();
        let to = (5000..5032).map(|port| frame_of(bench.from_netdev(&asked(port))).0[30..34].try_into().unwrap());
        let to = to.collect();
        bench.forget();
        to
    };
    assert_eq!(backends(0).len(), 2);
    assert_eq!(backends(60).len(), 1);
}

#[test]
fn only_pods_answer_at_node_ports() {
    kernel_test!();
    for other in [OTHER_NODE, NOBODY] {
        let mut bench = bench_with(&[other]);
        let asked = Frame::tcp([198, 51, 100, 9], 5000, NODE, PORT, SYN).summed();
        let outcome = bench.from_netdev(&asked);
        assert_eq!(outcome.reason(), DropReason::BackendGone, "{other:?}");
    }
}
