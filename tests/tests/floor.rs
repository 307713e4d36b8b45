//! A short tour of everything, with time for slow machines: what must work on the oldest kernel, too. `cargo xtask
//! vm-test` runs it there.

use harness::{Cluster, Listener, Options, TcpOutcome, kernel_test, tcp_exchange, udp_exchange_of};
use std::{net::IpAddr, time::Duration};

/// What is allowed happens in this time, also where the processor is emulated.
const LONG: Duration = Duration::from_secs(90);
/// What is denied has not happened by then.
const WAIT: Duration = Duration::from_secs(3);

#[test]
fn two_nodes_with_both_families_under_a_policy_that_changes() {
    kernel_test!();
    let outside: IpAddr = "203.0.113.1".parse().unwrap();
    let mut cluster = Cluster::with(&Options {
        tables: "[wasm]\ncompile_seconds = 300\nevaluate_ms = 60000\n[lease]\nttl_seconds = 600\nload_seconds = 300"
            .to_owned(),
        externals: vec![outside],
        ..Options::dual_stack()
    })
    .unwrap();
    for (node, name) in [(0, "red/a"), (0, "red/b"), (1, "red/c"), (1, "blue/d")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    let external = cluster.external.as_ref().unwrap();
    let namespaces = cluster.pods.iter().map(|pod| pod.netns.name()).chain([external.name()]);
    let _listeners: Vec<Listener> = namespaces.map(|netns| Listener::new(netns, 80).unwrap()).collect();
    let from = cluster.pod("red/a").netns.name();
    let reaches = |to: IpAddr, wait| tcp_exchange(from, to, 80, wait).unwrap() == TcpOutcome::Open;

    cluster.load("tenant-isolation").unwrap();
    for to in ["red/b", "red/c"] {
        for address in &cluster.pod(to).addresses {
            assert!(reaches(*address, LONG), "{to} at {address}");
            // In pieces across nodes and in the pod.
            assert!(
                udp_exchange_of(from, *address, 80, 9000, LONG).unwrap(),
                "{to} at {address}"
            );
        }
    }
    for address in &cluster.pod("blue/d").addresses {
        assert!(!reaches(*address, WAIT), "blue/d at {address}");
    }
    assert!(!reaches(outside, WAIT), "the world");

    cluster.load("allow-all").unwrap();
    for address in &cluster.pod("blue/d").addresses {
        assert!(reaches(*address, LONG), "blue/d at {address}");
    }
    assert!(reaches(outside, LONG), "the world, by masquerade");
    let other = &cluster.nodes[1];
    let own = cluster.pod("red/a").address;
    let outcome = tcp_exchange(other.netns.name(), own, 80, LONG).unwrap();
    assert_eq!(outcome, TcpOutcome::Open, "from the other node");
}
