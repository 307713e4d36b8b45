//! Nodes: they meet, grow stale, go, and come back, and hostd may be killed at any time.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{Cluster, Listener, Options, TcpOutcome, kernel_test, run, tcp_exchange, wait_until};
use std::{collections::BTreeSet, fs, process::Output, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

fn with_lease(lease: &str) -> Cluster {
    let options = Options {
        tables: format!("[lease]\n{lease}"),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("allow-all").unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster
}

fn addresses(cluster: &Cluster, node: usize) -> BTreeSet<String> {
    let entries = cluster.nodes[node].others_addresses().unwrap();
    entries
        .iter()
        .map(|entry| entry["address"].as_str().unwrap().to_owned())
        .collect()
}

fn is_stale(cluster: &Cluster) -> bool {
    cluster.nodes[0].json(&["status"]).unwrap()["nodes"][1]["state"] == "stale"
}

#[test]
fn two_nodes_that_meet_the_same_labels_at_once_give_them_the_same_number() {
    kernel_test!();
    let mut cluster = Cluster::new().unwrap();
    cluster.load("web-app").unwrap();
    for round in 0..8 {
        let app = format!("app{round}");
        let add = |node: usize, netns: &str| -> u64 {
            let (label, name) = (format!("app={app}"), format!("pod{round}-{node}"));
            let arguments = [
                "endpoint",
                "add",
                "--netns",
                netns,
                "--namespace",
                "new",
                "--name",
                &name,
                "--label",
                &label,
            ];
            cluster.nodes[node].json(&arguments).unwrap()["identity"]
                .as_u64()
                .unwrap()
        };
        let namespaces = [0, 1].map(|_| harness::Namespace::new("pod").unwrap());
        let (one, other) = std::thread::scope(|scope| {
            let one = scope.spawn(|| add(0, namespaces[0].name()));
            let other = scope.spawn(|| add(1, namespaces[1].name()));
            (one.join().unwrap(), other.join().unwrap())
        });
        assert_eq!(one, other, "{app}");
    }
    let numbers = |node: usize| {
        let listed = cluster.nodes[node].json(&["identity", "list"]).unwrap();
        let of = |one: &serde_json::Value| (one["name"].to_string(), one["identity"].to_string());
        listed.as_array().unwrap().iter().map(of).collect::<BTreeSet<_>>()
    };
    assert!(wait_until(LONG, || numbers(0) == numbers(1)));
    assert_eq!(
        numbers(0).iter().filter(|(name, _)| name.contains("app=app")).count(),
        8
    );
    cluster.pods.clear();
}

#[test]
fn pods_of_a_stale_node_stay_reachable_until_it_is_deleted() {
    kernel_test!();
    let mut cluster = with_lease("ttl_seconds = 1");
    let refusal = cluster.nodes[0].refusal(&["node", "delete", "node2"]).unwrap();
    assert!(refusal.contains("node2 is alive"), "{refusal}");
    cluster.nodes[1].stop(true).unwrap();
    assert!(wait_until(LONG, || is_stale(&cluster)));
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    let _listener = Listener::new(b.netns.name(), 80).unwrap();
    assert_eq!(
        tcp_exchange(a.netns.name(), b.address, 80, WAIT).unwrap(),
        TcpOutcome::Open
    );
    assert_eq!(
        cluster.nodes[0].json(&["node", "delete", "node2"]).unwrap()["deleted"],
        true
    );
    assert!(wait_until(LONG, || !addresses(&cluster, 0).contains(&b.address.to_string())));
    assert_eq!(
        tcp_exchange(a.netns.name(), b.address, 80, WAIT).unwrap(),
        TcpOutcome::Unreachable
    );
    assert_eq!(
        cluster.nodes[0].json(&["node", "delete", "node2"]).unwrap()["deleted"],
        false
    );
    // It comes back as it was.
    cluster.nodes[1].start().unwrap();
    cluster.settle().unwrap();
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    assert_eq!(
        tcp_exchange(a.netns.name(), b.address, 80, WAIT).unwrap(),
        TcpOutcome::Open
    );
}

#[test]
fn a_node_that_stays_away_is_removed_after_the_grace_period() {
    kernel_test!();
    let mut cluster = with_lease("ttl_seconds = 1\ngrace_seconds = 1");
    cluster.nodes[1].stop(true).unwrap();
    let gone = || {
        cluster.nodes[0].json(&["status"]).unwrap()["nodes"]
            .as_array()
            .unwrap()
            .len()
            == 1
    };
    assert!(wait_until(LONG, gone));
    assert!(wait_until(LONG, || addresses(&cluster, 0).len() == 1));
}

/// What hostd says to `command --config FILE` on the second node.
fn by_config(cluster: &Cluster, command: &str) -> Output {
    let node = &cluster.nodes[1];
    node.netns
        .command("timeout")
        .arg("60")
        .arg(harness::hostd().unwrap())
        .args([command, "--config"])
        .arg(node.config())
        .output()
        .unwrap()
}

/// Nothing of hostd is on the second node any more, and the first one has forgotten it.
fn nothing_is_left(cluster: &Cluster) {
    let node = &cluster.nodes[1];
    assert!(!cluster.folder().join("node2/state").exists());
    let links = node.netns.ip(&["-o", "link", "show"]).unwrap();
    assert!(!links.contains("wg-") && !links.contains("vxlan"), "{links}");
    let tables = node.netns.command("nft").args(["list", "tables"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&tables.stdout), "", "nftables");
    // What is left is the kernel's own.
    let pins = ["-type", "f", "-not", "-name", "*.debug"];
    let pins = run("find", &[&[node.bpffs().to_str().unwrap()][..], &pins].concat());
    assert_eq!(pins.unwrap(), "");
    assert!(wait_until(LONG, || addresses(cluster, 0).len() == 1));
}

/// Numbers of identities would get another meaning.
#[test]
fn a_store_that_is_not_mounted_is_not_made_anew() {
    kernel_test!();
    let mut cluster = with_lease("ttl_seconds = 15");
    cluster.nodes[1].stop(false).unwrap();
    let (store, elsewhere) = (cluster.folder().join("store"), cluster.folder().join("elsewhere"));
    fs::rename(&store, &elsewhere).unwrap();
    fs::create_dir(&store).unwrap();
    for command in ["run", "cleanup"] {
        let output = by_config(&cluster, command);
        let said = String::from_utf8_lossy(&output.stderr);
        let expected = format!("there is no store in {}", store.display());
        assert!(!output.status.success() && said.contains(&expected), "{said}");
    }
    assert_eq!(fs::read_dir(&store).unwrap().count(), 0);
    fs::remove_dir(&store).unwrap();
    fs::rename(&elsewhere, &store).unwrap();
    assert!(by_config(&cluster, "cleanup").status.success());
    nothing_is_left(&cluster);
}

#[test]
fn cleanup_takes_everything_away() {
    kernel_test!();
    let mut cluster = with_lease("ttl_seconds = 15");
    let output = by_config(&cluster, "cleanup");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("stop hostd first"));
    cluster.nodes[1].stop(false).unwrap();
    // In another namespace it would only take the guard from pods that it does not find.
    for command in ["cleanup", "drain"] {
        let mut elsewhere = cluster.pods[0].netns.command(harness::hostd().unwrap());
        let output = elsewhere
            .args([command, "--config"])
            .arg(cluster.nodes[1].config())
            .output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains("the node's network namespace?"),
            "{said}"
        );
    }
    assert!(cluster.nodes[1].bpffs().join("links").exists());
    // Also without what it knows of its pods.
    fs::write(cluster.folder().join("node2/state/endpoints"), "torn").unwrap();
    let output = by_config(&cluster, "cleanup");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    nothing_is_left(&cluster);
}

#[test]
fn a_node_that_is_drained_leaves_and_may_come_back() {
    kernel_test!();
    let mut cluster = with_lease("ttl_seconds = 15");
    let output = by_config(&cluster, "drain");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1 pods disconnected\n");
    assert!(!cluster.pod("red/b").netns.ip(&["link"]).unwrap().contains("eth0"));
    nothing_is_left(&cluster);
    // It has ended by itself, well.
    assert!(cluster.nodes[1].ended().unwrap().success());
    // Once more does nothing.
    assert!(by_config(&cluster, "drain").status.success());
    nothing_is_left(&cluster);
    cluster.nodes[1].start().unwrap();
    cluster.add_pod(1, "red/c", &[]).unwrap();
    let _listener = Listener::new(cluster.pod("red/c").netns.name(), 80).unwrap();
    let (a, c) = (cluster.pod("red/a"), cluster.pod("red/c").address);
    let reaches = || tcp_exchange(a.netns.name(), c, 80, WAIT).unwrap() == TcpOutcome::Open;
    assert!(wait_until(LONG, reaches));
}

#[test]
fn a_node_that_was_removed_while_it_was_away_registers_again() {
    kernel_test!();
    let mut cluster = with_lease("ttl_seconds = 1");
    let pid = cluster.nodes[1].pid().unwrap();
    let signal = |name: &str| run("kill", &[&format!("-{name}"), &pid.to_string()]).unwrap();
    signal("STOP");
    assert!(wait_until(LONG, || is_stale(&cluster)));
    cluster.nodes[0].json(&["node", "delete", "node2"]).unwrap();
    let known = cluster.pod("red/b").address.to_string();
    assert!(wait_until(LONG, || !addresses(&cluster, 0).contains(&known)));
    signal("CONT");
    assert!(wait_until(LONG, || addresses(&cluster, 0).contains(&known)));
    let (a, b) = (cluster.pod("red/a"), cluster.pod("red/b"));
    let _listener = Listener::new(b.netns.name(), 80).unwrap();
    let open = || tcp_exchange(a.netns.name(), b.address, 80, WAIT).unwrap() == TcpOutcome::Open;
    assert!(wait_until(LONG, open));
    cluster.pods.clear();
}
