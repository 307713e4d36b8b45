//! The control socket and the configuration: who may ask, and what is not understood.

use aya::programs::{SchedClassifier, TcAttachType};
use harness::{Cluster, Options, kernel_test, run, wait_until};
use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::Command,
    time::Duration,
};

const LONG: Duration = Duration::from_secs(90);

#[test]
fn only_root_may_control_hostd() {
    kernel_test!();
    let cluster = Cluster::one_node().unwrap();
    let node = &cluster.nodes[0];
    let mode = fs::metadata(node.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Loosened by hand: the socket itself and all folders above it. The caller's credentials still tell.
    fs::set_permissions(node.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    for folder in [cluster.folder(), node.socket().parent().unwrap()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    // A copy, since root's folder is closed to others.
    let hostd = cluster.folder().join("hostd");
    fs::copy(harness::hostd().unwrap(), &hostd).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&hostd)
        .arg("--socket")
        .arg(node.socket())
        .arg("status")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("user 65534 may not control hostd"), "{said}");
}

#[test]
fn hostile_frames_are_refused_and_hostd_goes_on() {
    kernel_test!();
    let cluster = Cluster::one_node().unwrap();
    let node = &cluster.nodes[0];
    let good = hostd::codec::encode(&hostd::api::Request::Status).unwrap();
    let mut long = good.clone();
    long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut foreign = good.clone();
    foreign[4] = 99;
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 0xff;
    let unknown = hostd::codec::encode(&200_u32).unwrap();
    let frames: [(&[u8], &str); 8] = [
        (b"", ""),
        (b"GET / HTTP/1.1\r\n\r\n", "not a Wasmgate"),
        (&good[..10], "could not be read"),
        (&good[..good.len() - 1], "could not be read"),
        (&long, "at most"),
        (&foreign, "format version 99"),
        (&damaged, "checksum"),
        (&unknown, "content"),
    ];
    for (frame, expected) in frames {
        let mut stream = UnixStream::connect(node.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // hostd may have closed the connection already.
        let _ = stream.write_all(frame);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        // A connection that is closed with bytes of ours unread ends in a reset, behind the answer.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains(expected), "{expected}: {answer}");
        node.json(&["status"]).unwrap();
    }
}

#[test]
fn a_second_hostd_for_the_same_node_does_not_start() {
    kernel_test!();
    let cluster = Cluster::one_node().unwrap();
    let node = &cluster.nodes[0];
    let output = node
        .netns
        .command(harness::hostd().unwrap())
        .args(["run", "--config"])
        .arg(node.config())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another hostd uses this `state_dir`"), "{said}");
    node.json(&["status"]).unwrap();
}

#[test]
fn a_node_that_contradicts_the_cluster_does_not_start() {
    kernel_test!();
    for (keys, tables, cidr, expected) in [
        (
            "",
            "[vni]\ntenant_bits = 4",
            "10.{n}.0.0/24",
            "`vni.tenant_bits` is 4 here but 8 in this cluster",
        ),
        ("", "", "10.1.0.128/25", "overlaps 10.1.0.0/24 of node node1"),
        ("unknown = 1", "", "10.{n}.0.0/24", "unknown field `unknown`"),
        ("attach = 7", "", "10.{n}.0.0/24", "node.toml"),
    ] {
        let mut cluster = Cluster::without_hostd(&Options::default()).unwrap();
        cluster.nodes[0].start().unwrap();
        let config = cluster.nodes[1].config();
        let text = fs::read_to_string(&config).unwrap();
        let cidr = cidr.replace("{n}", "2");
        let text = text.replace("10.2.0.0/24", &cidr);
        fs::write(&config, format!("{keys}\n{text}\n{tables}")).unwrap();
        let error = cluster.nodes[1].start().unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        let links = cluster.nodes[1].netns.ip(&["-o", "link", "show"]).unwrap();
        assert!(!links.contains("vxlan"), "nothing was made: {links}");
    }
}

#[test]
fn what_hostd_says_of_itself_others_see_from_outside() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    cluster.load("allow-all").unwrap();
    for name in ["red/a", "red/b"] {
        cluster.add_pod(0, name, &[]).unwrap();
    }
    let node = &cluster.nodes[0];
    let maps = node.bpffs().join("maps");
    let dump = |map: &str| -> serde_json::Value {
        let pin = maps.join(map).display().to_string();
        serde_json::from_str(&run("bpftool", &["-j", "map", "dump", "pinned", &pin]).unwrap()).unwrap()
    };
    let listed = node.json(&["ipcache", "list"]).unwrap();
    assert_eq!(
        dump("IPCACHE").as_array().unwrap().len(),
        listed.as_array().unwrap().len()
    );
    assert_eq!(dump("ENDPOINTS").as_array().unwrap().len(), 2);
    let generation = dump("GENERATION")[0]["formatted"]["value"].as_u64().unwrap();
    assert_eq!(
        node.json(&["status"]).unwrap()["generation"].as_u64().unwrap(),
        generation
    );
    let interface = node.json(&["endpoint", "list"]).unwrap()[0]["interface"]
        .as_str()
        .unwrap()
        .to_owned();
    for (hook, program) in [(TcAttachType::Ingress, "from_pod"), (TcAttachType::Egress, "to_pod")] {
        let query = || SchedClassifier::query_tcx(&interface, hook).unwrap();
        let names = || -> Vec<String> {
            let (_, attached) = harness::in_netns(node.netns.name(), query).unwrap();
            let names = attached.iter().map(|program| program.name_as_str().unwrap().to_owned());
            names.collect()
        };
        assert!(wait_until(LONG, || names() == [program]), "{:?}", names());
    }
    let vxlan = node.netns.ip(&["-d", "link", "show", "wasmgate_vxlan"]).unwrap();
    assert!(vxlan.contains("external") && vxlan.contains("dstport 8472"), "{vxlan}");
}
