//! Programs on the hooks: ours come first and stay, others are left alone.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

mod settle;

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{NlOptions, TcAttachOptions, TcHandle},
    },
};
use harness::{
    Cluster, Listener, Namespace, Node, Options, TcpOutcome, in_netns, kernel_test, run, tcp_exchange, wait_until,
};
use std::{net::IpAddr, time::Duration};

const WAIT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(90);

/// Two pods that may talk, and one that may not, on one node.
struct Stage {
    cluster: Cluster,
    _listeners: Vec<Listener>,
}

impl Stage {
    fn new(attach: &str) -> Self {
        let mut cluster = Cluster::with(&Options {
            nodes: 1,
            keys: format!("attach = \"{attach}\""),
            ..Options::default()
        })
        .unwrap();
        for name in ["red/a", "red/b", "blue/c"] {
            cluster.add_pod(0, name, &[]).unwrap();
        }
        cluster.load("tenant-isolation").unwrap();
        let listeners = cluster
            .pods
            .iter()
            .map(|pod| Listener::new(pod.netns.name(), 80).unwrap());
        Self {
            _listeners: listeners.collect(),
            cluster,
        }
    }

    fn node(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    /// The host's end of the first pod's veth pair.
    fn interface(&self) -> String {
        let listed = self.node().json(&["endpoint", "list"]).unwrap();
        let its = listed.as_array().unwrap().iter().find(|one| one["pod"]["name"] == "a");
        its.unwrap()["interface"].as_str().unwrap().to_owned()
    }

    fn reaches(&self, to: &str) -> bool {
        let address: IpAddr = self.cluster.pod(to).address;
        let from = self.cluster.pod("red/a").netns.name();
        tcp_exchange(from, address, 80, WAIT).unwrap() == TcpOutcome::Open
    }

    /// Policy holds as it did.
    fn is_right(&self) -> bool {
        self.reaches("red/b") && !self.reaches("blue/c")
    }

    fn repairs(&self) -> u64 {
        self.node().json(&["status"]).unwrap()["repairs"].as_u64().unwrap()
    }
}

/// A program of somebody else's: it drops whatever it sees.
fn foreign() -> Ebpf {
    let object = toolchain::target_dir().join("bpf/bpfel-unknown-none/release/packet_table");
    let mut ebpf = EbpfLoader::new().load_file(object).unwrap();
    program(&mut ebpf).load().unwrap();
    ebpf
}

fn program(ebpf: &mut Ebpf) -> &mut SchedClassifier {
    ebpf.program_mut("packet_table").unwrap().try_into().unwrap()
}

fn attach(stage: &Stage, ebpf: &mut Ebpf, options: TcAttachOptions) {
    attach_to(stage, &stage.interface(), ebpf, options);
}

fn attach_to(stage: &Stage, interface: &str, ebpf: &mut Ebpf, options: TcAttachOptions) {
    in_netns(stage.node().netns.name(), || {
        program(ebpf)
            .attach_with_options(interface, TcAttachType::Ingress, options)
            .unwrap();
    })
    .unwrap();
}

/// Names of the tcx programs on the hook, in order.
fn attached(stage: &Stage) -> Vec<String> {
    tcx(stage.node(), &stage.interface(), TcAttachType::Ingress)
}

fn tcx(node: &Node, interface: &str, hook: TcAttachType) -> Vec<String> {
    let query = || SchedClassifier::query_tcx(interface, hook).unwrap().1;
    let programs = in_netns(node.netns.name(), query).unwrap();
    programs
        .iter()
        .map(|one| one.name_as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_tcx_program_in_front_of_ours_is_overtaken_and_left_alone() {
    kernel_test!();
    let stage = Stage::new("tcx");
    let mut behind = foreign();
    attach(&stage, &mut behind, TcAttachOptions::TcxOrder(LinkOrder::last()));
    assert!(stage.is_right());
    assert_eq!(stage.repairs(), 0);
    let mut before = foreign();
    attach(&stage, &mut before, TcAttachOptions::TcxOrder(LinkOrder::first()));
    assert!(wait_until(LONG, || stage.repairs() == 1));
    assert!(stage.is_right());
    assert_eq!(attached(&stage), ["from_pod", "packet_table", "packet_table"]);
    let log = stage.node().log();
    assert!(
        log.contains("another program was in front of it; it is first again"),
        "{log}"
    );
}

#[test]
fn a_tcx_link_that_somebody_has_detached_is_made_again() {
    kernel_test!();
    let stage = Stage::new("tcx");
    let links = stage.node().bpffs().join("links");
    let pin = links.join(format!("{}-from_pod", stage.interface()));
    let pin = pin.display().to_string();
    let detached: [&dyn Fn(); 2] = [
        &|| {
            run("bpftool", &["link", "detach", "pinned", &pin]).unwrap();
        },
        &|| std::fs::remove_file(&pin).unwrap(),
    ];
    for (times, detach) in (1..).zip(detached) {
        detach();
        assert!(wait_until(LONG, || stage.repairs() == times));
        assert!(stage.is_right());
        assert_eq!(attached(&stage), ["from_pod"]);
    }
}

/// As with a bpffs that goes with hostd's mount namespace.
#[test]
fn where_all_programs_are_gone_and_hostd_too_pods_do_not_reach_each_other_by_the_stack() {
    kernel_test!();
    let mut stage = Stage::new("tcx");
    assert!(stage.is_right());
    let interface = stage.interface();
    stage.cluster.nodes[0].stop(true).unwrap();
    assert!(stage.is_right());
    let links = stage.node().bpffs().join("links");
    for link in std::fs::read_dir(&links).unwrap() {
        std::fs::remove_file(link.unwrap().path()).unwrap();
    }
    let gone = || tcx(stage.node(), &interface, TcAttachType::Ingress).is_empty();
    assert!(wait_until(LONG, gone));
    // Whoever has resolved its gateway sends on.
    assert!(!stage.reaches("blue/c"));
    assert!(!stage.reaches("red/b"));
}

/// As of a `WireGuard` network.
#[test]
fn interfaces_of_others_whose_names_look_like_hostds_are_the_outside() {
    kernel_test!();
    let mut cluster = Cluster::one_node().unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.load("allow-all").unwrap();
    let office = Namespace::new("office").unwrap();
    let ours = &cluster.nodes[0].netns;
    ours.connect("wg-office", &office, "eth0").unwrap();
    for arguments in [
        &["address", "add", "198.51.100.1/24", "dev", "wg-office"][..],
        &["link", "set", "wg-office", "up"],
    ] {
        ours.ip(arguments).unwrap();
    }
    office
        .ip(&["address", "add", "198.51.100.2/24", "dev", "eth0"])
        .unwrap();
    office.ip(&["link", "set", "eth0", "up"]).unwrap();
    // It has no route to pods: they have to come by the node's address.
    let _listener = Listener::new(office.name(), 80).unwrap();
    let from = cluster.pod("red/a").netns.name();
    let to = "198.51.100.2".parse().unwrap();
    assert_eq!(tcp_exchange(from, to, 80, WAIT).unwrap(), TcpOutcome::Open);
}

#[test]
fn a_filter_that_somebody_has_removed_replaced_or_overtaken_is_put_back() {
    kernel_test!();
    let stage = Stage::new("clsact");
    assert!(stage.is_right());
    let tc = |arguments: &[&str]| {
        let output = stage.node().netns.command("tc").args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let interface = stage.interface();
    tc(&["filter", "del", "dev", &interface, "ingress"]);
    assert!(wait_until(LONG, || stage.repairs() == 1));
    assert!(stage.is_right());
    tc(&["qdisc", "del", "dev", &interface, "clsact"]);
    // Both of its hooks.
    assert!(wait_until(LONG, || stage.repairs() == 3));
    assert!(stage.is_right());
    // At the same priority the last one that is added runs first.
    let options = |priority, handle| {
        TcAttachOptions::Netlink(NlOptions {
            priority,
            handle: TcHandle::new(0, handle),
            classid: None,
        })
    };
    let mut before = foreign();
    attach(&stage, &mut before, options(1, 7));
    assert!(wait_until(LONG, || stage.repairs() == 4));
    assert!(stage.is_right());
    let mut after = foreign();
    attach(&stage, &mut after, options(2, 1));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(stage.repairs(), 4, "what comes after is nobody's business");
    let shown = tc(&["filter", "show", "dev", &interface, "ingress"]);
    let order: Vec<&str> = shown.lines().filter_map(|line| line.split(" handle ").nth(1)).collect();
    assert_eq!(order.len(), 3, "{shown}");
    assert!(order[0].starts_with("0x1 from_pod"), "{shown}");
    assert!(stage.is_right());
}

/// With filters nothing can be done about a tcx program in front of them: that is said.
#[test]
fn what_can_not_be_put_right_is_said_once() {
    kernel_test!();
    let stage = Stage::new("clsact");
    let mut before = foreign();
    attach(&stage, &mut before, TcAttachOptions::TcxOrder(LinkOrder::first()));
    let said = || stage.node().log().matches("another program is in front").count();
    assert!(wait_until(LONG, || said() > 0));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(said(), 1, "{}", stage.node().log());
    assert_eq!(stage.repairs(), 0);
}

#[test]
fn what_the_stack_has_for_pods_is_put_right() {
    kernel_test!();
    let outside: IpAddr = "203.0.113.1".parse().unwrap();
    let mut cluster = Cluster::with(&Options {
        externals: vec![outside],
        ..Options::default()
    })
    .unwrap();
    cluster.add_pod(0, "red/a", &[]).unwrap();
    cluster.add_pod(1, "red/b", &[]).unwrap();
    cluster.settle().unwrap();
    cluster.load("allow-all").unwrap();
    let node = &cluster.nodes[0];
    let external = cluster.external.as_ref().unwrap();
    let _listener = Listener::new(external.name(), 80).unwrap();
    let _other = Listener::new(cluster.pod("red/b").netns.name(), 80).unwrap();
    // Without masquerade nobody outside would know the way back.
    external.ip(&["route", "del", "10.1.0.0/24"]).unwrap();
    let out = || tcp_exchange(cluster.pod("red/a").netns.name(), outside, 80, WAIT).unwrap() == TcpOutcome::Open;
    let over = || tcp_exchange(node.netns.name(), cluster.pod("red/b").address, 80, WAIT).unwrap() == TcpOutcome::Open;
    let repairs = || node.json(&["status"]).unwrap()["repairs"].as_u64().unwrap();
    assert!(out() && over());
    let netns = node.netns.name();
    run("ip", &["netns", "exec", netns, "nft", "flush", "ruleset"]).unwrap();
    assert!(!out());
    assert!(wait_until(LONG, || repairs() == 1) && out(), "{}", node.log());
    run(
        "ip",
        &[
            "netns",
            "exec",
            netns,
            "nft",
            "flush",
            "chain",
            "inet",
            "wasmgate",
            "postrouting",
        ],
    )
    .unwrap();
    assert!(wait_until(LONG, || repairs() == 2) && out(), "{}", node.log());
    node.netns.ip(&["route", "flush", "dev", "wasmgate_vxlan"]).unwrap();
    assert!(!over());
    assert!(wait_until(LONG, || repairs() == 3) && over(), "{}", node.log());
}

#[test]
fn on_the_nodes_own_interface_others_may_come_first() {
    kernel_test!();
    for attach in ["tcx", "clsact"] {
        let stage = Stage::new(attach);
        let names = || -> Vec<String> {
            if attach == "tcx" {
                let query = || SchedClassifier::query_tcx("underlay", TcAttachType::Ingress).unwrap().1;
                let programs = in_netns(stage.node().netns.name(), query).unwrap();
                return programs
                    .iter()
                    .map(|one| one.name_as_str().unwrap().to_owned())
                    .collect();
            }
            let arguments = ["filter", "show", "dev", "underlay", "ingress"];
            let output = stage.node().netns.command("tc").args(arguments).output().unwrap();
            let shown = String::from_utf8_lossy(&output.stdout).into_owned();
            let known = ["from_netdev", "packet_table"]
                .into_iter()
                .filter(|name| shown.contains(name));
            known.map(str::to_owned).collect()
        };
        assert!(names().is_empty());
        let service = "--port tcp/80@30080 --selector app=web";
        stage.cluster.add_service("red/web", service).unwrap();
        assert_eq!(names(), ["from_netdev"]);
        let mut other = foreign();
        let options = if attach == "tcx" {
            TcAttachOptions::TcxOrder(LinkOrder::first())
        } else {
            TcAttachOptions::Netlink(NlOptions {
                priority: 1,
                handle: TcHandle::new(0, 1),
                classid: None,
            })
        };
        in_netns(stage.node().netns.name(), || {
            program(&mut other)
                .attach_with_options("underlay", TcAttachType::Ingress, options)
                .unwrap();
        })
        .unwrap();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(stage.repairs(), 0);
        let mut both = names();
        both.sort();
        assert_eq!(both, ["from_netdev", "packet_table"]);
        // Ours goes with the last node port, and theirs stays.
        stage.cluster.delete_service("red/web").unwrap();
        assert!(wait_until(LONG, || names() == ["packet_table"]), "{:?}", names());
        stage.cluster.add_service("red/web", service).unwrap();
        assert!(names().contains(&"from_netdev".to_owned()));
    }
}
