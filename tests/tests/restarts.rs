//! hostd starts anew: packets, programs and interfaces.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use aya::programs::{SchedClassifier, TcAttachType};
use harness::{Cluster, Listener, Options, TcpOutcome, Traffic, kernel_test, tcp_exchange};
use std::{fs, time::Duration};

const WAIT: Duration = Duration::from_millis(400);

#[test]
fn killing_and_restarting_hostd_loses_no_packet_by_links_or_filters() {
    kernel_test!();
    kill_and_restart("auto", "tcx");
}

#[test]
fn killing_and_restarting_hostd_loses_no_packet_by_links() {
    kernel_test!();
    kill_and_restart("tcx", "tcx");
}

#[test]
fn killing_and_restarting_hostd_loses_no_packet_by_filters() {
    kernel_test!();
    kill_and_restart("clsact", "clsact");
}

fn kill_and_restart(attach: &str, shown: &str) {
    let options = Options {
        keys: format!("attach = \"{attach}\""),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    assert_eq!(cluster.nodes[0].json(&["status"]).unwrap()["attach"], shown);
    for (node, name) in [(0, "red/a"), (0, "red/b"), (1, "red/c"), (1, "blue/d")] {
        cluster.add_pod(node, name, &[]).unwrap();
    }
    cluster.settle().unwrap();
    cluster.load("tenant-isolation").unwrap();
    let _listeners: Vec<_> = cluster
        .pods
        .iter()
        .map(|pod| Listener::new(pod.netns.name(), 80).unwrap())
        .collect();
    let (a, d) = (
        cluster.pod("red/a").netns.name().to_owned(),
        cluster.pod("blue/d").address,
    );
    let traffic: Vec<_> = ["red/b", "red/c"]
        .iter()
        .map(|to| Traffic::start(&a, cluster.pod(to).address, 80, Duration::from_secs(1)))
        .collect();
    for kill in [true, false, true] {
        for node in 0..2 {
            cluster.nodes[node].stop(kill).unwrap();
            assert_eq!(
                tcp_exchange(&a, d, 80, WAIT).unwrap(),
                TcpOutcome::Silence,
                "policy holds without hostd"
            );
            cluster.nodes[node].start().unwrap();
        }
    }
    assert_eq!(tcp_exchange(&a, d, 80, WAIT).unwrap(), TcpOutcome::Silence);
    for one in traffic {
        let counts = one.stop().unwrap();
        assert!(counts.answered > 100 && counts.lost == 0, "{attach}: {counts:?}");
    }
    assert_eq!(
        cluster.nodes[0]
            .json(&["endpoint", "list"])
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );
    // What came back can be changed as before.
    cluster.load("allow-all").unwrap();
    assert_eq!(tcp_exchange(&a, d, 80, WAIT).unwrap(), TcpOutcome::Open);
}

#[test]
fn a_restart_in_another_attach_mode_leaves_none_of_the_other_behind() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    for name in ["red/a", "red/b"] {
        cluster.add_pod(0, name, &[]).unwrap();
    }
    let _listener = Listener::new(cluster.pod("red/b").netns.name(), 80).unwrap();
    let (a, b) = (
        cluster.pod("red/a").netns.name().to_owned(),
        cluster.pod("red/b").address,
    );
    let config = cluster.nodes[0].config();
    let text = fs::read_to_string(&config).unwrap();
    for attach in ["clsact", "tcx", "clsact"] {
        cluster.nodes[0].stop(true).unwrap();
        fs::write(&config, format!("attach = \"{attach}\"\n{text}")).unwrap();
        cluster.nodes[0].start().unwrap();
        let node = &cluster.nodes[0];
        let interface = node.json(&["endpoint", "list"]).unwrap()[0]["interface"]
            .as_str()
            .unwrap()
            .to_owned();
        let query = || {
            SchedClassifier::query_tcx(&interface, TcAttachType::Ingress)
                .unwrap()
                .1
                .len()
        };
        let links = harness::in_netns(node.netns.name(), query).unwrap();
        let filters = node
            .netns
            .command("tc")
            .args(["filter", "show", "dev", &interface, "ingress"])
            .output();
        let filters = String::from_utf8(filters.unwrap().stdout).unwrap();
        let has_filter = filters.contains("from_pod");
        assert_eq!(
            (links, has_filter),
            if attach == "tcx" { (1, false) } else { (0, true) },
            "{attach}: {filters}"
        );
        // With the other mode's programs in front a change of policy would have no effect.
        cluster.load("allow-all").unwrap();
        assert_eq!(tcp_exchange(&a, b, 80, WAIT).unwrap(), TcpOutcome::Open, "{attach}");
        cluster.load("web-app").unwrap();
        assert_eq!(tcp_exchange(&a, b, 80, WAIT).unwrap(), TcpOutcome::Silence, "{attach}");
    }
}

#[test]
fn a_restart_takes_the_interfaces_of_gone_pods_and_no_others() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    for name in ["red/a", "red/b"] {
        cluster.add_pod(0, name, &[]).unwrap();
    }
    let foreign = ["link", "add", "wg-mesh", "type", "veth", "peer", "name", "wg-peer"];
    cluster.nodes[0].netns.ip(&foreign).unwrap();
    let interface_of = |cluster: &Cluster, name: &str| -> String {
        let listed = cluster.nodes[0].json(&["endpoint", "list"]).unwrap();
        let of = |one: &&serde_json::Value| one["pod"]["name"] == name;
        let found = listed.as_array().unwrap().iter().find(of).unwrap();
        found["interface"].as_str().unwrap().to_owned()
    };
    let (gone, stays) = (interface_of(&cluster, "a"), interface_of(&cluster, "b"));
    cluster.nodes[0].stop(true).unwrap();
    // Somebody inside renames the interface: hostd can't tell the pod from another one any more.
    let inside = &cluster.pod("red/a").netns;
    inside.ip(&["link", "set", "eth0", "down"]).unwrap();
    inside.ip(&["link", "set", "eth0", "name", "eth9"]).unwrap();
    cluster.nodes[0].start().unwrap();
    let links = cluster.nodes[0].netns.ip(&["-o", "link", "show"]).unwrap();
    assert!(
        !links.contains(&gone) && links.contains(&stays) && links.contains("wg-mesh"),
        "{links}"
    );
    assert_eq!(
        cluster.nodes[0]
            .json(&["endpoint", "list"])
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        1
    );
}
