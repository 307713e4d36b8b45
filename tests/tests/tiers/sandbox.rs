//! What a module may use: the cache of compiled modules, the log, limits, quotas.

use crate::{cluster_identities, deed, load, module, two_tenants};
use harness::{Cluster, kernel_test, test_policy};
use std::{fs, os::unix::fs::MetadataExt};

#[test]
fn the_second_load_of_a_module_comes_from_the_cache() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    cluster.load("tenant-isolation").unwrap();
    let cache = cluster.folder().join("node1/state/compiled");
    let files = || -> Vec<std::path::PathBuf> {
        let entries = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries
            .filter(|path| path.extension().is_some_and(|end| end == "compiled"))
            .collect();
        files.sort();
        files
    };
    let compiled = files();
    assert_eq!(compiled.len(), 1);
    let whole = fs::read(&compiled[0]).unwrap();
    // A file that was changed is noticed and made anew.
    let mut changed = whole.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 0x40;
    fs::write(&compiled[0], &changed).unwrap();
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
    assert!(
        cluster.nodes[0].log().contains("torn, foreign or of another hostd"),
        "{}",
        cluster.nodes[0].log()
    );
    assert_eq!(
        fs::read(&compiled[0]).unwrap(),
        whole,
        "compiled anew, to the same bytes"
    );
    // Left alone it is used: were it compiled again, it would be written again.
    let written = fs::metadata(&compiled[0]).unwrap().ino();
    cluster.nodes[0].stop(false).unwrap();
    cluster.nodes[0].start().unwrap();
    cluster.load("tenant-isolation").unwrap();
    assert_eq!(fs::metadata(&compiled[0]).unwrap().ino(), written);
}

#[test]
fn a_module_can_not_flood_the_log() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    let hostile = test_policy("hostile").unwrap().display().to_string();
    let flood = deed(&cluster, "flood");
    load(&cluster, &hostile, &["--config", &flood]);
    let log = cluster.nodes[0].log();
    let lines = log.lines().filter(|line| line.contains("flood")).count();
    assert!((1..200).contains(&lines), "{lines} lines");
}

#[test]
fn limits_of_one_module_are_its_own() {
    kernel_test!();
    let (cluster, _listeners) = two_tenants();
    let file = module("tenant-isolation");
    let refusal = cluster.nodes[0]
        .refusal(&["load-policy", &file, "--limit", "fuel_per_call=1000"])
        .unwrap();
    assert!(refusal.contains("used up its fuel of 1000"), "{refusal}");
    load(
        &cluster,
        &file,
        &["--limit", "memory_mib=8", "--limit", "evaluate_ms=500"],
    );
    let inspected = cluster.nodes[1].json(&["policy", "inspect", "default"]).unwrap();
    assert_eq!(inspected["limits"][1], 500);
    assert_eq!(inspected["limits"][2], 8 << 20);
}

#[test]
fn what_a_tenants_module_may_take_of_others_room_is_bounded() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    load(&cluster, &module("tenant-isolation"), &[]);
    let hostile = test_policy("hostile").unwrap().display().to_string();
    for (what, expected) in [
        ("scattered ports", "a tenant's module may have 256 and 2048"),
        ("many tenants blocks", "a tenant's module may name 64 of them"),
    ] {
        let config = deed(&cluster, what);
        let arguments = [
            "load-policy",
            &hostile,
            "--name",
            "red",
            "--tenant",
            "red",
            "--config",
            &config,
        ];
        let refusal = cluster.nodes[0].refusal(&arguments).unwrap();
        assert!(refusal.contains(expected), "{what}: {refusal}");
    }
    // Every pod an identity of its own: of its own pods it may, of others' it is not asked.
    let explode = deed(&cluster, "explode");
    load(
        &cluster,
        &hostile,
        &["--name", "red", "--tenant", "red", "--config", &explode],
    );
    for number in 0..5 {
        cluster.add_pod(0, &format!("blue/pod-{number}"), &[]).unwrap();
        cluster.add_pod(0, &format!("red/pod-{number}"), &[]).unwrap();
    }
    let count = |tenant: &str| {
        let identities = cluster_identities(&cluster, 0).into_iter();
        identities.filter(|name| name.starts_with(tenant)).count()
    };
    assert_eq!(
        (count("blue"), count("red")),
        (1, 7),
        "red's five, its first with and without a class"
    );
}
