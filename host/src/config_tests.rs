//! Tests of the configuration.

use super::Config;
use std::path::Path;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("node.toml")).map_err(|error| error.to_string())
}

const GOOD: &str = r#"
    node = "a"
    underlay = "192.0.2.1"
    pod_cidrs = ["10.1.0.0/24"]
    store = "file:/var/lib/wasmgate/cluster"
"#;

#[test]
fn four_keys_are_enough() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.node, "a");
    assert_eq!(config.vni.tenant_bits, 8);
}

#[test]
fn the_example_shows_every_default() {
    let example = include_str!("../node.example.toml");
    let uncommented: String = example
        .lines()
        .map(|line| match line.strip_prefix("#:") {
            Some(key) => format!("{key}\n"),
            None => format!("{line}\n"),
        })
        .collect();
    let plain = parse(example).unwrap();
    assert_eq!(
        parse(&uncommented).unwrap(),
        plain,
        "a default in node.example.toml is not the default"
    );
    // Every key of every table is there.
    for key in [
        "state_dir",
        "socket",
        "bpffs",
        "attach",
        "forwarding",
        "masquerade",
        "masquerade_except",
        "ignore_interfaces",
        "tenant_bits",
        "ttl_seconds",
        "grace_seconds",
        "load_seconds",
        "tcp_syn",
        "tcp_established",
        "tcp_half_closed",
        "tcp_closed",
        "unreplied",
        "assured",
        "max_module_bytes",
        "compile_seconds",
        "compile_memory_mib",
        "evaluate_ms",
        "memory_mib",
        "fuel_per_call",
        "endpoints",
        "addresses",
        "identities",
        "local_identities",
        "port_sets",
        "breakpoints",
        "networks",
        "conntrack",
        "fragments",
        "collect_seconds",
        "prefix",
        "hold_seconds",
        "answer_seconds",
    ] {
        assert!(
            example.contains(&format!("#:{key} = ")),
            "node.example.toml does not show `{key}`"
        );
    }
}

#[test]
fn wrong_values_are_named() {
    for (text, expected) in [
        ("nod = 1", "unknown field `nod`"),
        (
            "[vni]\ntenant_bits = 17",
            "`vni.tenant_bits`: 17 is not between 1 and 16",
        ),
        ("[vni]\ntenant_bits = \"x\"", "invalid type"),
        ("[lease]\nttl_seconds = 0", "lease.ttl_seconds"),
        ("[lease]\nload_seconds = 0", "lease.load_seconds"),
        ("[maps]\nidentities = 1", "`maps.identities`: 1 is not between"),
        ("attach = \"xdp\"", "unknown variant `xdp`"),
    ] {
        let error = parse(&format!("{GOOD}\n{text}")).unwrap_err();
        assert!(
            error.contains(expected) && error.contains("node.toml"),
            "{text}: {error}"
        );
    }
    for (from, to, expected) in [
        ("192.0.2.1", "127.0.0.1", "`underlay`"),
        ("192.0.2.1", "10.1.0.9", "contains the node's own address"),
        ("\"10.1.0.0/24\"", "\"10.1.0.0/24\", \"10.1.0.128/25\"", "overlaps"),
        ("\"10.1.0.0/24\"", "", "`pod_cidrs`: give at least one"),
        ("\"10.1.0.0/24\"", "\"fe80::/64\"", "unique local"),
        ("\"10.1.0.0/24\"", "\"::ffff:10.1.0.0/120\"", "unique local"),
        ("file:/", "etcd:/", "`store`"),
        ("file:/", "/", "`store`"),
        ("node = \"a\"", "node = \"a/b\"", "`node`"),
    ] {
        let error = parse(&GOOD.replace(from, to)).unwrap_err();
        assert!(error.contains(expected), "{to}: {error}");
    }
}
