//! The conntrack map under pressure, and its collection.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use abi::{AddressKey, ConntrackEntry, ConntrackKey, conntrack::Link, map};
use aya::maps::{Array, HashMap, Map, MapData};
use harness::{
    Cluster, Listener, Node, Options, TcpOutcome, in_netns, kernel_test, tcp_exchange, tcp_open, wait_until,
};
use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

fn node(tables: &str) -> Cluster {
    let mut cluster = Cluster::with(&Options {
        nodes: 1,
        tables: tables.to_owned(),
        ..Options::default()
    })
    .unwrap();
    for name in ["red/flood", "red/good", "red/server"] {
        cluster.add_pod(0, name, &[]).unwrap();
    }
    cluster.load("allow-all").unwrap();
    cluster
}

fn tracked(cluster: &Cluster) -> u64 {
    let status = cluster.nodes[0].json(&["status"]).unwrap();
    let maps = status["maps"].as_array().unwrap().iter();
    let map = maps.into_iter().find(|map| map["setting"] == "maps.conntrack");
    map.unwrap()["used"].as_u64().unwrap()
}

/// Opens so many UDP flows, by as many source ports and destination ports.
fn flood(from: &str, to: IpAddr, flows: u16) {
    in_netns(from, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for port in 1..=flows {
            // One that is refused by ICMP is a flow, too.
            let _ = socket.send_to(b"x", (to, 10_000 + port));
        }
    })
    .unwrap();
}

/// What a node's programs remember of flows.
fn flows(node: &Node) -> Vec<(ConntrackKey, ConntrackEntry)> {
    let pin = node.bpffs().join("maps").join(map::CONNTRACK);
    let map = Map::LruHashMap(MapData::from_pin(pin).unwrap());
    let map: HashMap<_, ConntrackKey, ConntrackEntry> = map.try_into().unwrap();
    map.iter().map(Result::unwrap).collect()
}

/// Whether a node's programs may take an established flow by its conntrack entry alone: both of its ends are as they are.
fn takes_the_fast_path(node: &Node, entry: &ConntrackEntry) -> bool {
    let pin = node.bpffs().join("maps").join(map::STAMPS);
    let stamps: Array<MapData, u64> = Map::Array(MapData::from_pin(pin).unwrap()).try_into().unwrap();
    let is_current = |link: &Link| link.slot != 0 && stamps.get(&link.slot, 0).unwrap() == u64::from(link.stamp);
    entry.fast_until > 0 && entry.links.iter().all(is_current)
}

#[test]
fn established_flows_of_one_node_and_of_two_take_the_fast_path() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    for (node, name) in [(0, "red/a"), (0, "red/here"), (1, "red/there")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    cluster.load("allow-all").unwrap();
    let a = cluster.pod("red/a").netns.name().to_owned();
    let mut streams = Vec::new();
    for name in ["red/here", "red/there"] {
        let server = cluster.pod(name);
        let listener = Listener::new(server.netns.name(), 80).unwrap();
        let mut stream = tcp_open(&a, server.address, 80, WAIT).unwrap();
        for _ in 0..3 {
            assert!(stream.exchange(WAIT).unwrap());
        }
        streams.push((listener, stream));
    }
    let expected = [2, 1];
    for (node, expected) in cluster.nodes.iter().zip(expected) {
        let flows = flows(node);
        let fast = flows.iter().filter(|(_, entry)| takes_the_fast_path(node, entry));
        assert_eq!((fast.count(), flows.len()), (expected, expected), "{}", node.name);
    }
    // What hostd changes about a pod ends that, for that pod's flows alone.
    cluster.remove_pod("red/here").unwrap();
    let node = &cluster.nodes[0];
    let fast = |(_, entry): &(ConntrackKey, ConntrackEntry)| takes_the_fast_path(node, entry);
    let there = AddressKey::from(cluster.pod("red/there").address).address;
    let left: Vec<_> = flows(node).into_iter().filter(fast).collect();
    assert!(
        left.len() == 1 && [left[0].0.lower, left[0].0.upper].contains(&there),
        "{left:?}"
    );
}

#[test]
fn a_pod_that_floods_pushes_out_nobody_elses_flows() {
    kernel_test!();
    let cluster = node("[maps]\nconntrack = 1024");
    let [bad, good, server] = ["red/flood", "red/good", "red/server"].map(|name| cluster.pod(name));
    let _listener = Listener::new(server.netns.name(), 80).unwrap();
    let mut open = tcp_open(good.netns.name(), server.address, 80, WAIT).unwrap();
    for _ in 0..5 {
        flood(bad.netns.name(), server.address, 5000);
        assert!(open.exchange(WAIT).unwrap(), "a connection of another pod goes on");
        assert_eq!(
            tcp_exchange(good.netns.name(), server.address, 80, WAIT).unwrap(),
            TcpOutcome::Open,
            "and it opens new ones"
        );
    }
    assert!(cluster.nodes[0].drops("conntrack_share").unwrap() > 10_000);
    let shown = tracked(&cluster);
    assert!((700..=1024).contains(&shown), "{shown}");
}

#[test]
fn flows_that_have_run_out_are_collected() {
    kernel_test!();
    let cluster = node("[maps]\nconntrack = 1024\n[conntrack]\nunreplied = 1\nassured = 1");
    let [bad, server] = ["red/flood", "red/server"].map(|name| cluster.pod(name));
    flood(bad.netns.name(), server.address, 600);
    assert!(tracked(&cluster) > 500);
    assert!(wait_until(LONG, || tracked(&cluster) < 10), "{}", tracked(&cluster));
    // Not in the books alone.
    let left = flows(&cluster.nodes[0]).len();
    assert!(left < 10, "{left}");
}
