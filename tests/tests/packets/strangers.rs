//! Clients outside who are not who they say, and pods that would like to answer others than they were asked by.

use super::{
    bench::{Bench, GREEN},
    frame::{ACK, Frame, NOBODY, NODE, OTHER_NODE, POD_A, POD_B, REMOTE, SYN},
    model::hash,
    node_ports::{PORT, bench_with, port_of},
    run::Outcome,
    services::frontend,
};
use abi::{DropReason, Identity, Path, node::TUNNEL_PORT, policy::UDP};
use harness::kernel_test;
use std::net::{IpAddr, Ipv4Addr};

/// What clients outside are dropped for, as shown here.
pub const REASONS: [DropReason; 1] = [DropReason::NoRouteBack];

#[test]
fn nobody_passes_for_another_at_a_node_port() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    bench.put_network(
        [100, 64, 0, 0],
        10,
        [Identity::WORLD; 2],
        [Identity::WORLD.0; 2],
        abi::network::UNROUTED,
    );
    for source in [POD_A, REMOTE, NODE, OTHER_NODE, [10, 9, 9, 9], [100, 64, 0, 1]] {
        let asked = Frame::tcp(source, 5000, NODE, PORT, SYN).summed();
        // What says that it is a node's is for the stack to believe.
        let expected = if [NODE, OTHER_NODE].contains(&source) {
            Outcome::Passed
        } else {
            Outcome::Dropped(DropReason::UnknownSource)
        };
        assert_eq!(bench.from_netdev(&asked), expected, "{source:?}");
        let inner = Frame::tcp(source, 5000, POD_B, 8080, SYN).summed();
        let outcome = bench.from_overlay(&inner, OTHER_NODE, Identity::WORLD);
        assert_eq!(outcome.reason(), DropReason::UnknownSource, "{source:?}");
    }
    // Not from whoever is no node, and not to the node itself.
    let inner = Frame::tcp(NOBODY, 5000, POD_B, 8080, SYN).summed();
    let outcome = bench.from_overlay(&inner, NOBODY, Identity::WORLD);
    assert_eq!(outcome.reason(), DropReason::UnknownNode);
    for to in [NODE, NOBODY, OTHER_NODE] {
        let inner = Frame::tcp([198, 51, 100, 7], 5000, to, 22, SYN).summed();
        let outcome = bench.from_overlay(&inner, OTHER_NODE, Identity::WORLD);
        assert_eq!(outcome.reason(), DropReason::NotLocal, "{to:?}");
    }
}

#[test]
fn no_pod_answers_to_a_tunnel_port() {
    kernel_test!();
    // Any address may be another node's, whose tunnel believes what this node sends.
    let client = [192, 0, 2, 22];
    let mut bench = bench_with(&[POD_B]);
    let asked = Frame::udp(client, TUNNEL_PORT, NODE, PORT).summed();
    assert_eq!(bench.from_netdev(&asked).reason(), DropReason::TunnelPort);
    // TCP has no tunnel, and datagrams from other ports are served.
    let tcp = Frame::tcp(client, TUNNEL_PORT, NODE, PORT, SYN).summed();
    assert_eq!(bench.from_netdev(&tcp).path(), Path::NodePort);
    // The same where another node says that it was asked.
    let asked = Frame::udp(client, TUNNEL_PORT, POD_A, 8080).summed();
    let outcome = bench.from_overlay(&asked, OTHER_NODE, Identity::WORLD);
    assert_eq!(outcome.reason(), DropReason::TunnelPort);
    // Whatever has let a flow in, its answers are looked at as they leave: here the port becomes the tunnel's later.
    let sent = bench.from_netdev(&Frame::udp(client, 5000, NODE, PORT).summed());
    let port = port_of(&sent);
    let answer = Frame::udp(POD_B, 8080, client, port).summed();
    assert_eq!(bench.from_pod_b(&answer).path(), Path::NodePortReply);
    bench.configure(|config| config.tunnel_port = 5000);
    assert_eq!(bench.from_pod_b(&answer).reason(), DropReason::TunnelPort);
    // Also those that a pod of another node gives by way of this one.
    let mut bench = bench_with(&[REMOTE]);
    let port = port_of(&bench.from_netdev(&Frame::udp(client, 5000, NODE, PORT).summed()));
    let answer = Frame::udp(REMOTE, 8080, client, port).summed();
    assert_eq!(
        bench.from_overlay(&answer, OTHER_NODE, GREEN).path(),
        Path::NodePortReply
    );
    bench.configure(|config| config.tunnel_port = 5000);
    let outcome = bench.from_overlay(&answer, OTHER_NODE, GREEN);
    assert_eq!(outcome.reason(), DropReason::TunnelPort);
    // And what a service makes of a pod's own packet.
    let mut bench = Bench::new();
    let service = frontend(Ipv4Addr::new(172, 16, 0, 1), UDP, 53);
    bench.put_service(service, &[(IpAddr::from(client), TUNNEL_PORT)], 0);
    let asked = Frame::udp(POD_A, 5000, [172, 16, 0, 1], 53).summed();
    assert_eq!(bench.from_pod_a(&asked).reason(), DropReason::TunnelPort);
}

#[test]
fn a_client_outside_asks_by_the_interface_that_leads_to_it() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    let elsewhere = [198, 51, 100, 9];
    bench
        .netns
        .ip(&["route", "add", "198.51.100.0/24", "dev", "va"])
        .unwrap();
    bench
        .netns
        .ip(&["route", "add", "unreachable", "198.51.101.0/24"])
        .unwrap();
    for client in [elsewhere, [198, 51, 101, 9], [127, 0, 0, 1]] {
        let asked = Frame::tcp(client, 5000, NODE, PORT, SYN).summed();
        assert_eq!(
            bench.from_netdev(&asked).reason(),
            DropReason::NoRouteBack,
            "{client:?}"
        );
    }
    // A connection that has begun goes on: its answers leave as they came.
    let asked = |flags| Frame::tcp(NOBODY, 5000, NODE, PORT, flags).summed();
    assert_eq!(bench.from_netdev(&asked(SYN)).path(), Path::NodePort);
    bench
        .netns
        .ip(&["route", "add", "203.0.113.0/24", "dev", "va"])
        .unwrap();
    assert_eq!(bench.from_netdev(&asked(ACK)).path(), Path::NodePort);
}

#[test]
fn no_client_outside_gets_the_port_of_the_tunnel() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B]);
    // One whose first choice that would be: the hash says so.
    let first_choice = |(client, port): ([u8; 4], u16)| {
        let rest = u64::from(port.to_be()) << 32 | u64::from(PORT.to_be()) << 16 | u64::from(UDP);
        let candidate = hash(client.into(), NODE.into(), rest).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        1024 + (((candidate >> 32) * (0x1_0000 - 1024)) >> 32)
    };
    let (client, port) = (1..=254)
        .flat_map(|last| (1..=u16::MAX).map(move |port| ([203, 0, 113, last], port)))
        .find(|client| first_choice(*client) == u64::from(TUNNEL_PORT))
        .unwrap();
    let sent = bench.from_netdev(&Frame::udp(client, port, NODE, PORT).summed());
    assert_eq!(sent.path(), Path::NodePort);
    let port = port_of(&sent);
    assert_ne!(port, TUNNEL_PORT);
    let answered = bench.from_pod_b(&Frame::udp(POD_B, 8080, client, port).summed());
    assert_eq!(answered.path(), Path::NodePortReply);
}

#[test]
fn what_comes_from_elsewhere_with_the_nodes_address_is_an_answer_or_nothing() {
    kernel_test!();
    // As where a container runtime has sent on what the pod has asked the node, or a container asks by itself.
    let mut bench = Bench::new();
    let by = bench.underlay;
    let from_node = |flags| Frame::tcp(NODE, 8081, POD_A, 5000, flags);
    for frame in [
        from_node(SYN),
        from_node(ACK),
        Frame::udp(NODE, 53, POD_A, 5000),
        Frame::echo(NODE, POD_A, false, 1),
        Frame::udp(NODE, 53, POD_A, 5000).piece(7, 64, false),
    ] {
        assert_eq!(
            bench.to_pod(&frame, by).reason(),
            DropReason::UnknownSource,
            "{frame:?}"
        );
    }
    let asked = Frame::tcp(POD_A, 5000, NODE, 8081, SYN);
    assert_eq!(bench.from_pod_a(&asked).path(), Path::ToHost);
    assert_eq!(bench.to_pod(&from_node(SYN | ACK), by).path(), Path::FromHost);
    assert_eq!(bench.to_pod(&from_node(ACK), by).path(), Path::FromHost);
    // Nobody turns it round.
    assert_eq!(bench.to_pod(&from_node(SYN), by).reason(), DropReason::UnknownSource);
    // The node itself may ask.
    assert_eq!(
        bench.to_pod(&Frame::tcp(NODE, 9000, POD_A, 22, SYN), 0).path(),
        Path::FromHost
    );
}
