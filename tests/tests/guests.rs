//! Modules that are not written with the SDK.

use harness::{Cluster, Listener, TcpOutcome, kernel_test, tcp_exchange};
use std::{fs, time::Duration};
use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

#[test]
fn the_module_of_the_interfaces_page_is_a_policy() {
    kernel_test!();
    let root = toolchain::workspace_root();
    let mut module = wat::parse_file(root.join("docs/allow-all.wat")).unwrap();
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_dir(root.join("policy-sdk/wit")).unwrap();
    let world = resolve.select_world(&[package], Some("module")).unwrap();
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();

    let mut cluster = Cluster::new().unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "blue/b", &[("app", "web")]).unwrap();
    cluster.settle().unwrap();
    let file = cluster.folder().join("allow-all.wasm");
    fs::write(&file, module).unwrap();
    let _listener = Listener::new(cluster.pod("blue/b").netns.name(), 80).unwrap();
    let reached = || {
        let wait = Duration::from_millis(400);
        tcp_exchange(
            cluster.pod("red/a").netns.name(),
            cluster.pod("blue/b").address,
            80,
            wait,
        )
        .unwrap()
    };
    assert_eq!(reached(), TcpOutcome::Silence);
    cluster.nodes[0]
        .json(&["load-policy", &file.display().to_string()])
        .unwrap();
    assert_eq!(reached(), TcpOutcome::Open);
    let pods = cluster.nodes[1].json(&["endpoint", "list"]).unwrap();
    assert_eq!(
        pods[0]["identity_name"], "blue",
        "its tenant is its namespace, and no label matters"
    );
}
