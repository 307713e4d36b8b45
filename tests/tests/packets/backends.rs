//! Which backend of a service a connection gets, for how long, and what it costs.

use super::{
    bench::{BLUE, BLUE_PLACE, Bench, FULL, RED_PLACE, now},
    frame::{ACK, Frame, GATEWAY_A, GATEWAY_B, NOBODY, POD_A, POD_A_MAC, POD_B, POD_B_MAC, REMOTE, SYN},
    run::Outcome,
    services::{SYN_ACK, VIP, bench_with, frame_of, frontend, receiver, serve},
};
use abi::{
    Direction, DropReason, Identity, Path,
    conntrack::{FRONTEND, SECOND},
    policy::TCP,
};
use harness::kernel_test;
use std::{collections::BTreeSet, net::IpAddr};

const OTHER_VIP: [u8; 4] = [172, 16, 0, 2];

#[test]
fn connections_are_spread_and_stay_where_they_are() {
    kernel_test!();
    let all: [IpAddr; 2] = [POD_B.into(), REMOTE.into()];
    let mut bench = bench_with(&all);
    let ports = 4000..4064;
    let ask = |bench: &mut Bench, port: u16, flags: u8| {
        receiver(bench.from_pod_a(&Frame::tcp(POD_A, port, VIP, 80, flags).summed()))
    };
    let first: Vec<[u8; 4]> = ports.clone().map(|port| ask(&mut bench, port, SYN)).collect();
    let to_b = first.iter().filter(|to| **to == POD_B).count();
    assert!((16..48).contains(&to_b), "{to_b} of 64 to one of two");
    // Another backend takes none that is open.
    bench.put_pod([10, 1, 0, 9], [BLUE; 2], BLUE_PLACE, 3, bench.pod_b);
    serve(&mut bench, &[POD_B.into(), REMOTE.into(), [10, 1, 0, 9].into()]);
    for (port, to) in ports.clone().zip(&first) {
        assert_eq!(ask(&mut bench, port, ACK), *to, "{port}");
    }
    // New ones are spread over all, and most go where they would have gone.
    let second: Vec<[u8; 4]> = (5000..5064).map(|port| ask(&mut bench, port, SYN)).collect();
    assert_eq!(second.iter().collect::<BTreeSet<_>>().len(), 3);
    // One that is no backend any more keeps the connections that are open, and gets no others.
    serve(&mut bench, &[REMOTE.into()]);
    for (port, to) in ports.clone().zip(&first) {
        assert_eq!(ask(&mut bench, port, ACK), *to, "{port}");
    }
    assert!((6000..6032).all(|port| ask(&mut bench, port, SYN) == REMOTE));
    // One whose pod is gone has none: the client is told at once.
    let port = ports.clone().zip(&first).find(|(_, to)| **to == POD_B).unwrap().0;
    bench.remove_pod(POD_B);
    let gone = bench.from_pod_a(&Frame::tcp(POD_A, port, VIP, 80, ACK).summed());
    assert!(matches!(gone, Outcome::Told(DropReason::BackendGone, _)), "{gone:?}");
    assert_eq!(ask(&mut bench, port, SYN), REMOTE);
}

#[test]
fn datagrams_go_to_another_backend_when_theirs_is_none_any_more() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    let ask = |bench: &mut Bench| receiver(bench.from_pod_a(&Frame::udp(POD_A, 4000, VIP, 53).summed()));
    assert_eq!(ask(&mut bench), POD_B);
    serve(&mut bench, &[POD_B.into(), REMOTE.into()]);
    assert_eq!(ask(&mut bench), POD_B);
    serve(&mut bench, &[REMOTE.into()]);
    assert_eq!(ask(&mut bench), REMOTE);
    assert_eq!(ask(&mut bench), REMOTE);
    serve(&mut bench, &[]);
    let told = bench.from_pod_a(&Frame::udp(POD_A, 4000, VIP, 53).summed());
    assert!(matches!(told, Outcome::Told(DropReason::NoBackends, _)), "{told:?}");
}

#[test]
fn a_client_keeps_its_backend_where_the_service_says_so() {
    kernel_test!();
    let mut bench = Bench::new();
    let two = [(POD_B.into(), 8080), (REMOTE.into(), 8080)];
    bench.put_service(frontend(VIP, TCP, 80), &two, 60);
    let ask =
        |bench: &mut Bench, port: u16| receiver(bench.from_pod_a(&Frame::tcp(POD_A, port, VIP, 80, SYN).summed()));
    let first = ask(&mut bench, 4000);
    assert!((4001..4032).all(|port| ask(&mut bench, port) == first));
    // Also when there are others, until its own goes.
    let more: Vec<(IpAddr, u16)> = (0..20).map(|n| (IpAddr::from([203, 0, 113, n]), 8080)).collect();
    bench.forward();
    bench.put_service(frontend(VIP, TCP, 80), &[&two[..], &more].concat(), 60);
    assert!((5000..5032).all(|port| ask(&mut bench, port) == first));
    let others: Vec<(IpAddr, u16)> = two
        .iter()
        .filter(|(one, _)| *one != IpAddr::from(first))
        .copied()
        .collect();
    bench.put_service(frontend(VIP, TCP, 80), &others, 60);
    assert!((6000..6032).all(|port| IpAddr::from(ask(&mut bench, port)) == others[0].0));
}

#[test]
fn a_client_keeps_its_backend_for_no_longer_than_the_service_says() {
    kernel_test!();
    let mut bench = Bench::new();
    let two = [(POD_B.into(), 8080), (REMOTE.into(), 8080)];
    let ask =
        |bench: &mut Bench, port: u16| receiver(bench.from_pod_a(&Frame::tcp(POD_A, port, VIP, 80, SYN).summed()));
    bench.put_service(frontend(VIP, TCP, 80), &two, 0);
    let first = ask(&mut bench, 4000);
    let other_port = (4001..5000).find(|port| ask(&mut bench, *port) != first).unwrap();
    bench.forget();
    bench.put_service(frontend(VIP, TCP, 80), &two, 60);
    assert_eq!(ask(&mut bench, 4000), first);
    assert_eq!(ask(&mut bench, other_port), first);
    for (key, _) in bench.flows() {
        bench.forget_flow(&key);
    }
    let expires = bench.age_clients(1);
    assert_eq!(expires.len(), 1);
    assert_eq!((expires[0] - now()).div_ceil(SECOND), 60);
    assert_ne!(ask(&mut bench, other_port), first);
}

#[test]
fn what_was_known_of_a_frontend_is_no_flow_of_whoever_has_its_address_next() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.forward();
    bench.put_service(frontend(VIP, TCP, 80), &[(NOBODY.into(), 8080)], 0);
    let to_vip = |flags| Frame::tcp(POD_A, 4000, VIP, 80, flags).summed();
    assert_eq!(bench.from_pod_a(&to_vip(SYN)).path(), Path::ToOutside);
    bench.remove_service(frontend(VIP, TCP, 80));
    // Outside, as its backend was: what is in the middle of something policy has to let through both ways.
    bench.set_cell(Direction::Ingress, RED_PLACE.0, Identity::WORLD.0, 0);
    assert_eq!(bench.from_pod_a(&to_vip(ACK)).reason(), DropReason::MidStream);
}

#[test]
fn one_port_of_a_client_by_way_of_two_services_is_two_connections() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    bench.put_service(frontend(OTHER_VIP, TCP, 80), &[(POD_B.into(), 8080)], 0);
    let ask =
        |bench: &mut Bench, vip, flags| frame_of(bench.from_pod_a(&Frame::tcp(POD_A, 4000, vip, 80, flags).summed()));
    let port = |frame: &Frame| u16::from_be_bytes([frame.0[34], frame.0[35]]);
    let (one, other) = (ask(&mut bench, VIP, SYN), ask(&mut bench, OTHER_VIP, SYN));
    assert_eq!(port(&one), 4000);
    assert_ne!(port(&other), 4000);
    let expected = Frame::tcp(POD_A, port(&other), POD_B, 8080, SYN).summed();
    assert_eq!(other, expected.after_hop(POD_B_MAC, GATEWAY_B));
    // Each has its own answers, and goes on as it began.
    for (vip, seen) in [(VIP, &one), (OTHER_VIP, &other)] {
        let answer = Frame::tcp(POD_B, 8080, POD_A, port(seen), SYN_ACK).summed();
        let expected = Frame::tcp(vip, 80, POD_A, 4000, SYN_ACK).summed();
        assert_eq!(
            frame_of(bench.from_pod_b(&answer)),
            expected.after_hop(POD_A_MAC, GATEWAY_A)
        );
        assert_eq!(port(&ask(&mut bench, vip, ACK)), port(seen));
    }
    // Nor may a third one have the port that was chosen, though it is the client's own.
    let taken = port(&other);
    let third = bench.from_pod_a(&Frame::tcp(POD_A, taken, OTHER_VIP, 80, SYN).summed());
    assert_ne!(port(&frame_of(third)), taken);
}

#[test]
fn a_client_has_no_more_entries_for_its_services_than_its_share() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    bench.set_account(1, 0);
    bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed());
    assert_eq!(bench.tracked(), 2, "one for the frontend, one for the flow");
    // It lives for longer from then on, and counts once.
    bench.from_pod_b(&Frame::tcp(POD_B, 8080, POD_A, 4000, SYN_ACK).summed());
    bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, ACK).summed());
    assert_eq!(bench.tracked(), 2);
    // A share of four, in a map that is full.
    bench.set_tracked(u64::from(FULL));
    bench.set_account(1, 3);
    bench.from_pod_a(&Frame::tcp(POD_A, 4001, VIP, 80, SYN).summed());
    assert_eq!(bench.tracked(), u64::from(FULL) + 1, "the flow, and no frontend");
    let refused = bench.from_pod_a(&Frame::tcp(POD_A, 4002, VIP, 80, SYN).summed());
    assert_eq!(refused.reason(), DropReason::ConntrackShare);
}

#[test]
fn a_client_whose_every_port_is_taken_is_refused() {
    kernel_test!();
    let mut bench = Bench::new();
    let mut taken = vec![4000];
    let refused = loop {
        bench.reset();
        serve(&mut bench, &[POD_B.into()]);
        for port in &taken {
            bench.from_pod_a(&Frame::tcp(POD_A, *port, POD_B, 8080, SYN).summed());
        }
        match bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed()) {
            Outcome::Sent { frame, .. } => taken.push(u16::from_be_bytes([frame.0[34], frame.0[35]])),
            other => break other,
        }
    };
    assert_eq!(refused.reason(), DropReason::ServicePorts);
    assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), 8);
    assert!(taken.iter().all(|port| *port >= 1024), "{taken:?}");
}

#[test]
fn who_has_the_address_of_a_backend_that_is_gone_gets_nothing_of_its_connections() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    assert_eq!(
        bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed()).path(),
        Path::Local
    );
    bench.owner = 9;
    bench.put_pod(POD_B, [BLUE; 2], BLUE_PLACE, 1, bench.pod_b);
    let more = bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, ACK).summed());
    assert!(matches!(more, Outcome::Told(DropReason::BackendGone, _)), "{more:?}");
    // A new connection is another matter: it is a backend still.
    assert_eq!(
        bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed()).path(),
        Path::Local
    );
    assert_eq!(
        bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, ACK).summed()).path(),
        Path::Local
    );
}

#[test]
fn who_talks_to_a_pod_directly_and_through_its_service_is_answered_as_it_asked() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    let through = Frame::udp(POD_A, 5353, VIP, 53).summed();
    let direct = Frame::udp(POD_A, 5353, POD_B, 5353).summed();
    let answer_to = |sent: &Frame| {
        let port = u16::from_be_bytes([sent.0[34], sent.0[35]]);
        Frame::udp(POD_B, 5353, POD_A, port).summed()
    };
    let mut from = |asked: &Frame| {
        let got = frame_of(bench.from_pod_a(asked));
        let answered = frame_of(bench.from_pod_b(&answer_to(&got)));
        (
            <[u8; 4]>::try_from(&answered.0[26..30]).unwrap(),
            answered.0[34..38].to_vec(),
        )
    };
    let [seen_through, seen_direct] = [(VIP, 53_u16), (POD_B, 5353)]
        .map(|(address, port)| (address, [port.to_be_bytes(), 5353_u16.to_be_bytes()].concat()));
    // One after the other, and then in turn: each has its own port at the backend by then.
    for (asked, seen) in [(&through, &seen_through), (&direct, &seen_direct)].repeat(3) {
        assert_eq!(from(asked), *seen);
    }
    // A connection can't be both.
    let mut bench = bench_with(&[POD_B.into()]);
    bench.from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed());
    let other = bench.from_pod_a(&Frame::tcp(POD_A, 4000, POD_B, 8080, SYN).summed());
    assert_eq!(other.reason(), DropReason::ServicePorts);
}

#[test]
fn a_connection_goes_on_from_another_port_where_its_own_was_taken_meanwhile() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    bench.put_service(frontend(OTHER_VIP, TCP, 80), &[(POD_B.into(), 8080)], 0);
    let port = |frame: &Frame| u16::from_be_bytes([frame.0[34], frame.0[35]]);
    let ask = |bench: &mut Bench, vip| frame_of(bench.from_pod_a(&Frame::tcp(POD_A, 4000, vip, 80, SYN).summed()));
    let first = ask(&mut bench, VIP);
    // The flow is forgotten before what says of its frontend is.
    let flows = bench.flows();
    let (flow, _) = flows
        .iter()
        .find(|(_, entry)| entry.state & FRONTEND == 0)
        .copied()
        .unwrap();
    bench.forget_flow(&flow);
    let other = ask(&mut bench, OTHER_VIP);
    assert_eq!(port(&other), port(&first));
    let again = ask(&mut bench, VIP);
    assert_ne!(port(&again), port(&other));
    for (vip, seen) in [(VIP, &again), (OTHER_VIP, &other)] {
        let answer = Frame::tcp(POD_B, 8080, POD_A, port(seen), SYN_ACK).summed();
        let expected = Frame::tcp(vip, 80, POD_A, 4000, SYN_ACK).summed();
        assert_eq!(
            frame_of(bench.from_pod_b(&answer)),
            expected.after_hop(POD_A_MAC, GATEWAY_A)
        );
    }
}
