//! A policy on two live nodes.

use harness::{Cluster, Listener, TcpOutcome, kernel_test, tcp_exchange, udp_exchange};
use std::time::Duration;

const WAIT: Duration = Duration::from_millis(500);

#[test]
fn allow_all_lets_everybody_talk_on_one_node_and_across() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    for (node, name) in [(0, "red/a"), (0, "red/b"), (1, "blue/c")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    let _listeners: Vec<_> = cluster
        .pods
        .iter()
        .map(|pod| Listener::new(pod.netns.name(), 80).unwrap())
        .collect();
    let exchange = |from: &str, to: &str| {
        let (from, to) = (cluster.pod(from), cluster.pod(to));
        let tcp = tcp_exchange(from.netns.name(), to.address, 80, WAIT).unwrap();
        let udp = udp_exchange(from.netns.name(), to.address, 80, WAIT).unwrap();
        (tcp, udp)
    };
    for (from, to) in [("red/a", "red/b"), ("red/a", "blue/c"), ("blue/c", "red/b")] {
        assert_eq!(
            exchange(from, to),
            (TcpOutcome::Silence, false),
            "{from} -> {to} before any policy"
        );
    }
    cluster.load("allow-all").unwrap();
    for (from, to) in [("red/a", "red/b"), ("red/a", "blue/c"), ("blue/c", "red/b")] {
        assert_eq!(
            exchange(from, to),
            (TcpOutcome::Open, true),
            "{from} -> {to} under allow-all"
        );
    }
}
