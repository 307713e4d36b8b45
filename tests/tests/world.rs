//! Pods, their node, other nodes, and hosts outside.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Capture, Cluster, Listener, Options, TcpOutcome, in_netns, kernel_test, run, tcp_exchange, udp_exchange,
    udp_exchange_of, wait_until,
};
use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

fn outside() -> [IpAddr; 2] {
    ["203.0.113.1", "2001:db8:99::1"].map(|address| address.parse().unwrap())
}

/// One red pod on each of two nodes, and a host outside.
fn world(keys: &str) -> Cluster {
    world_of(&Options {
        keys: keys.to_owned(),
        ..Options::dual_stack()
    })
}

/// The same, made otherwise.
fn world_of(options: &Options) -> Cluster {
    let mut cluster = Cluster::with(&Options {
        externals: outside().to_vec(),
        ..options.clone()
    })
    .unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.load("allow-all").unwrap();
    cluster
}

/// Who somebody at `to` sees when a connection is opened from a namespace.
fn seen(from: &str, there: &str, to: IpAddr) -> IpAddr {
    let listener = in_netns(there, || TcpListener::bind((to, 8000))).unwrap().unwrap();
    let stream = in_netns(from, || TcpStream::connect_timeout(&SocketAddr::new(to, 8000), WAIT)).unwrap();
    let _stream = stream.unwrap_or_else(|error| panic!("{from} -> {to}: {error}"));
    listener.accept().unwrap().1.ip()
}

#[test]
fn what_a_pod_sends_outside_comes_from_its_node() {
    kernel_test!();
    let cluster = world("");
    let external = cluster.external.as_ref().unwrap().name();
    let pod = cluster.pod("red/a");
    let node: [IpAddr; 2] = ["192.0.2.1", "2001:db8:0:2::1"].map(|address| address.parse().unwrap());
    for (to, node) in outside().into_iter().zip(node) {
        assert_eq!(seen(pod.netns.name(), external, to), node, "{to}");
    }
    // Who comes from outside is seen as who it is, and is answered.
    for (own, from) in pod.addresses.iter().zip(outside()) {
        let _listener = Listener::new(pod.netns.name(), 80).unwrap();
        assert_eq!(
            tcp_exchange(external, *own, 80, WAIT).unwrap(),
            TcpOutcome::Open,
            "{from}"
        );
    }
    // Nothing of it passes for the tunnel's.
    assert!(!udp_exchange(pod.netns.name(), outside()[0], 8472, WAIT).unwrap());
    assert!(cluster.nodes[0].drops("tunnel_port").unwrap() > 0);
}

/// Connections that a namespace's netfilter tracks.
fn tracked(netns: &str) -> u64 {
    let file = "/proc/sys/net/netfilter/nf_conntrack_count";
    let count = in_netns(netns, || std::fs::read_to_string(file)).unwrap().unwrap();
    count.trim().parse().unwrap()
}

#[test]
fn the_nodes_stack_tracks_what_it_routes_and_no_packet_of_the_tunnel() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let cluster = world_of(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        });
        let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
        let _listener = Listener::new(b.netns.name(), 80).unwrap();
        for address in &b.addresses {
            assert_eq!(
                tcp_exchange(a.netns.name(), *address, 80, WAIT).unwrap(),
                TcpOutcome::Open
            );
        }
        let nodes = [0, 1].map(|index: usize| cluster.nodes[index].netns.name());
        assert_eq!(nodes.map(tracked), [0, 0]);
        let external = cluster.external.as_ref().unwrap().name();
        seen(a.netns.name(), external, outside()[0]);
        assert_eq!(nodes.map(tracked), [1, 0]);
    }
}

#[test]
fn masquerade_has_exceptions_and_an_end() {
    kernel_test!();
    let cluster = world("masquerade_except = [\"203.0.113.0/24\"]");
    let external = cluster.external.as_ref().unwrap().name();
    let pod = cluster.pod("red/a");
    let [v4, v6] = outside();
    assert_eq!(seen(pod.netns.name(), external, v4), pod.addresses[0]);
    assert_ne!(seen(pod.netns.name(), external, v6), pod.addresses[1]);
    let cluster = world("masquerade = false");
    let external = cluster.external.as_ref().unwrap().name();
    let pod = cluster.pod("red/a");
    assert_eq!(seen(pod.netns.name(), external, v6), pod.addresses[1]);
}

#[test]
fn a_node_and_the_pods_of_another_reach_each_other_through_the_tunnel() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let mut cluster = Cluster::with(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        })
        .unwrap();
        cluster.add_pod(0, "red/a", &[]).unwrap();
        cluster.settle().unwrap();
        cluster.load("allow-all").unwrap();
        let (pod, other) = (cluster.pod("red/a"), &cluster.nodes[1]);
        // In both families, whatever the tunnel's is.
        let node: [IpAddr; 2] = ["192.0.2.2", "2001:db8:0:2::2"].map(|address| address.parse().unwrap());
        let ends: Vec<(IpAddr, IpAddr)> = pod.addresses.iter().copied().zip(node).collect();
        let _listeners = [pod.netns.name(), other.netns.name()].map(|netns| Listener::new(netns, 80).unwrap());
        let capture = (!ipv6_underlay).then(|| Capture::start(&cluster.nodes[0].netns, "underlay").unwrap());
        for (address, node) in &ends {
            // All of a node's addresses are known a moment after it.
            let open = || tcp_exchange(pod.netns.name(), *node, 80, WAIT).unwrap() == TcpOutcome::Open;
            assert!(wait_until(LONG, open), "{node}");
            // Each is seen as who it is.
            assert_eq!(seen(other.netns.name(), pod.netns.name(), *address), *node);
            assert_eq!(seen(pod.netns.name(), other.netns.name(), *node), *address);
            for (from, to) in [(other.netns.name(), *address), (pod.netns.name(), *node)] {
                assert_eq!(
                    tcp_exchange(from, to, 80, WAIT).unwrap(),
                    TcpOutcome::Open,
                    "{from} -> {to}"
                );
                assert!(udp_exchange(from, to, 80, WAIT).unwrap(), "{from} -> {to}");
                let ping = ["netns", "exec", from, "ping", "-c", "1", "-W", "2", &to.to_string()];
                assert!(run("ip", &ping).is_ok(), "ping {from} -> {to}");
            }
        }
        // What is larger than a pod's packets comes in pieces, from its own node, too.
        for (from, to) in [
            (other.netns.name(), pod.addresses[0]),
            (other.netns.name(), pod.addresses[1]),
            (cluster.nodes[0].netns.name(), pod.addresses[0]),
            (cluster.nodes[0].netns.name(), pod.addresses[1]),
        ] {
            assert!(udp_exchange_of(from, to, 80, 8000, WAIT).unwrap(), "{from} -> {to}");
        }
        if let Some(capture) = capture {
            let packets = capture.stop().unwrap();
            let from_node = packets.iter().filter(|packet| packet.source == other.underlay);
            let vnis: Vec<u32> = from_node.map(|packet| packet.vni).collect();
            assert!(
                !vnis.is_empty() && vnis.iter().all(|vni| *vni == abi::Identity::REMOTE_NODE.0),
                "{vnis:?}"
            );
        }
        // As the remote node that it is: no policy lets it in any more.
        cluster.load("tenant-isolation").unwrap();
        for (address, node) in &ends {
            for (from, to) in [(other.netns.name(), *address), (pod.netns.name(), *node)] {
                assert_eq!(
                    tcp_exchange(from, to, 80, WAIT).unwrap(),
                    TcpOutcome::Silence,
                    "{from} -> {to}"
                );
            }
        }
    }
}
