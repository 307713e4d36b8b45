//! With `attach = "auto"` a pod has filters at first, and links take over from them.

use super::{LONG, Stage, WAIT, attach_to, foreign, tcx};
use aya::programs::{LinkOrder, TcAttachType, tc::TcAttachOptions};
use harness::{Cluster, Listener, Node, Options, TcpOutcome, Traffic, kernel_test, tcp_exchange, wait_until};
use hostd::endpoint::interface_name;
use rustix::process::{Pid, Signal, kill_process};
use std::{net::IpAddr, time::Duration};

/// Whether the programs of a pod of namespace red are links, or filters; the one takes over from the other under the eyes of whoever
/// looks.
fn by_links_or_filters(node: &Node, pod: &str) -> (usize, usize) {
    let interface = interface_name("red", pod);
    let hooks = [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")];
    let links = hooks.map(|(hook, _)| tcx(node, &interface, hook).len());
    let filters = hooks.map(|(_, hook)| {
        let shown = node
            .netns
            .command("tc")
            .args(["filter", "show", "dev", &interface, hook])
            .output();
        String::from_utf8(shown.unwrap().stdout)
            .unwrap()
            .matches("direct-action")
            .count()
    });
    (links.iter().sum(), filters.iter().sum())
}

/// Packets whose addresses a service translates would be strangers to a second program on the same hook.
#[test]
fn links_take_over_from_the_filters_of_new_pods_and_no_packet_is_lost() {
    kernel_test!();
    // By the address that it answers from.
    let outside: IpAddr = "192.0.2.254".parse().unwrap();
    let mut cluster = Cluster::with(&Options {
        nodes: 1,
        externals: vec!["203.0.113.1".parse().unwrap()],
        ..Options::default()
    })
    .unwrap();
    cluster.load("allow-all").unwrap();
    let service: IpAddr = "172.16.0.1".parse().unwrap();
    let options = "--address 172.16.0.1 --port udp/80 --backend 192.0.2.254";
    cluster.add_service("red/far", options).unwrap();
    let _far = Listener::new(cluster.external.as_ref().unwrap().name(), 80).unwrap();
    let mut filters_seen = 0;
    for number in 0..8 {
        let name = format!("pod{number}");
        cluster.add_pod(0, &format!("red/{name}"), &[]).unwrap();
        let node = &cluster.nodes[0];
        let pod = cluster.pod(&format!("red/{name}"));
        let (netns, address) = (pod.netns.name().to_owned(), pod.address);
        let _listener = Listener::new(&netns, 80).unwrap();
        let pause = Duration::from_millis(1);
        let traffic = [
            Traffic::paced(&netns, service, 80, LONG, pause),
            Traffic::paced(&netns, outside, 80, LONG, pause),
            Traffic::paced(node.netns.name(), address, 80, LONG, pause),
        ];
        filters_seen += usize::from(by_links_or_filters(node, &name).1 > 0);
        assert!(
            wait_until(LONG, || by_links_or_filters(node, &name) == (2, 0)),
            "{:?}",
            by_links_or_filters(node, &name)
        );
        std::thread::sleep(Duration::from_millis(200));
        for (one, to) in traffic.into_iter().zip(["the service", "the outside", "the pod"]) {
            let counts = one.stop().unwrap();
            assert!(counts.lost == 0 && counts.answered > 50, "{to}: {counts:?}");
        }
    }
    assert!(filters_seen > 0, "a pod does not wait for links");
    assert_eq!(cluster.nodes[0].json(&["status"]).unwrap()["repairs"], 0);
}

#[test]
fn a_hostd_that_is_killed_before_links_take_over_goes_on_from_there() {
    kernel_test!();
    let mut stage = Stage::new("auto");
    let mut killed_before = 0;
    for number in 0..5 {
        let name = format!("late{number}");
        stage.cluster.add_pod(0, &format!("red/{name}"), &[]).unwrap();
        let late = stage.cluster.pod(&format!("red/{name}")).netns.name().to_owned();
        let (b, c) = (stage.cluster.pod("red/b").address, stage.cluster.pod("blue/c").address);
        let traffic = Traffic::paced(&late, b, 80, LONG, Duration::from_millis(1));
        stage.cluster.nodes[0].stop(true).unwrap();
        killed_before += usize::from(by_links_or_filters(stage.node(), &name).1 > 0);
        let denied = || tcp_exchange(&late, c, 80, WAIT).unwrap() == TcpOutcome::Silence;
        assert!(denied());
        stage.cluster.nodes[0].start().unwrap();
        assert!(denied());
        let node = stage.node();
        assert!(
            wait_until(LONG, || by_links_or_filters(node, &name) == (2, 0)),
            "{:?}",
            by_links_or_filters(node, &name)
        );
        assert!(denied());
        traffic.lost_nothing();
    }
    assert!(killed_before > 0, "links were always there before");
}

#[test]
fn a_tcx_program_that_comes_before_links_take_over_is_overtaken() {
    kernel_test!();
    let mut stage = Stage::new("auto");
    let mut came_before = 0;
    for number in 0..20 {
        let name = format!("late{number}");
        let interface = interface_name("red", &name);
        let mut other = foreign();
        stage.cluster.add_pod(0, &format!("red/{name}"), &[]).unwrap();
        // Links come a tenth of a second later, unless hostd is held up.
        let hostd = Pid::from_raw(stage.node().pid().unwrap().cast_signed()).unwrap();
        kill_process(hostd, Signal::STOP).unwrap();
        attach_to(
            &stage,
            &interface,
            &mut other,
            TcAttachOptions::TcxOrder(LinkOrder::last()),
        );
        let attached = || tcx(stage.node(), &interface, TcAttachType::Ingress);
        came_before += usize::from(attached() == ["packet_table"]);
        kill_process(hostd, Signal::CONT).unwrap();
        let expected = ["from_pod", "packet_table"];
        assert!(wait_until(LONG, || attached() == expected), "{:?}", attached());
        let late = stage.cluster.pod(&format!("red/{name}")).netns.name();
        let reaches = |to| tcp_exchange(late, stage.cluster.pod(to).address, 80, WAIT).unwrap() == TcpOutcome::Open;
        assert!(reaches("red/b") && !reaches("blue/c"));
        if came_before == 3 {
            return;
        }
    }
    panic!("links were there before {} times", 20 - came_before);
}
