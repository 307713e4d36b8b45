//! Identities that nobody uses any more.

use crate::{LONG, cluster_identities};
use harness::{Cluster, Options, kernel_test, wait_until};
use std::{
    fs,
    time::{Duration, SystemTime},
};

#[test]
fn identities_that_nobody_uses_are_collected_and_others_are_not() {
    kernel_test!();
    let options = Options {
        tables: "[vni]\ncollect_seconds = 1".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("web-app").unwrap();
    cluster.add_pod(0, "red/stays", &[("app", "stays")]).unwrap();
    cluster.add_pod(1, "red/goes", &[("app", "goes")]).unwrap();
    cluster.settle().unwrap();
    let listed = |node: usize| -> Vec<String> {
        let all = cluster_identities(&cluster, node);
        all.into_iter().filter(|name| name.starts_with("red")).collect()
    };
    assert_eq!(listed(0).len(), 2);
    let goes = cluster.nodes[1].json(&["endpoint", "list"]).unwrap()[0]["identity"].clone();
    let pod = ["--namespace", "red", "--name", "goes"];
    cluster.nodes[1]
        .json(&[&["endpoint", "label"][..], &pod, &["app=other"]].concat())
        .unwrap();
    let collected = wait_until(LONG, || {
        (0..2).all(|node| !listed(node).contains(&"red{app=goes}".to_owned()))
    });
    assert!(collected, "{:?}", listed(0));
    assert_eq!(listed(1), listed(0));
    assert_eq!(listed(0).len(), 2, "those in use stay: {:?}", listed(0));
    // And nobody so much as marks them.
    let written = || -> Vec<(String, SystemTime)> {
        let files = fs::read_dir(cluster.folder().join("store/identities")).unwrap();
        let mut written: Vec<(String, SystemTime)> = files
            .map(|file| file.unwrap())
            .map(|file| {
                (
                    file.file_name().display().to_string(),
                    file.metadata().unwrap().modified().unwrap(),
                )
            })
            .collect();
        written.sort();
        written
    };
    let before = written();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(written(), before);
    // The same labels get the same number again: it was free.
    cluster.nodes[1]
        .json(&[&["endpoint", "label"][..], &pod, &["app=goes"]].concat())
        .unwrap();
    assert_eq!(
        cluster.nodes[1].json(&["endpoint", "list"]).unwrap()[0]["identity"],
        goes
    );
}

#[test]
fn an_identity_stays_while_a_node_that_may_hold_it_is_silent() {
    kernel_test!();
    let options = Options {
        tables: "[vni]\ncollect_seconds = 1\n[lease]\nttl_seconds = 1".to_owned(),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    cluster.load("web-app").unwrap();
    cluster.add_pod(0, "red/goes", &[("app", "goes")]).unwrap();
    cluster.settle().unwrap();
    cluster.nodes[1].stop(true).unwrap();
    cluster.nodes[0]
        .json(&["endpoint", "label", "--namespace", "red", "--name", "goes", "app=other"])
        .unwrap();
    std::thread::sleep(Duration::from_secs(5));
    let name = "red{app=goes}".to_owned();
    assert!(
        cluster_identities(&cluster, 0).contains(&name),
        "node2's kernel may hold it"
    );
    cluster.nodes[1].start().unwrap();
    let collected = wait_until(LONG, || !cluster_identities(&cluster, 0).contains(&name));
    assert!(collected, "once all nodes are there");
    // A tenant goes with its last identity, and another may have its number.
    let tenants = || fs::read_dir(cluster.folder().join("store/tenants")).unwrap().count();
    assert_eq!(tenants(), 1);
    let pod = ["endpoint", "delete", "--namespace", "red", "--name", "goes"];
    cluster.nodes[0].json(&pod).unwrap();
    assert!(wait_until(LONG, || tenants() == 0), "{}", tenants());
}
