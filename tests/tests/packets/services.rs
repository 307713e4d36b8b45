//! Services: what goes to a frontend, and what comes back.

use super::{
    bench::{BLUE_PLACE, Bench, GREEN, RED_PLACE},
    frame::{
        ACK, FIN, Frame, GATEWAY_A, GATEWAY_B, NOBODY, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC, POD_B6,
        REMOTE, REMOTE6, RST, SYN,
    },
    run::{Arrival, Outcome},
};
use abi::{
    AddressKey, DropReason, Hook, Path, ServiceKey,
    address::SHARED_SCOPE,
    node::{GATEWAY_V4, GATEWAY_V6},
    policy::{TCP, UDP},
};
use harness::{in_netns, kernel_test};
use std::net::IpAddr;

pub const VIP: [u8; 4] = [172, 16, 0, 1];
const VIP6: [u8; 16] = [0xfd, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
pub const SYN_ACK: u8 = SYN | ACK;

/// What services drop packets for, as shown here.
pub const REASONS: [DropReason; 4] = [
    DropReason::NoService,
    DropReason::NoBackends,
    DropReason::BackendGone,
    DropReason::ServicePorts,
];

pub fn frontend(address: impl Into<IpAddr>, protocol: u8, port: u16) -> ServiceKey {
    let address = AddressKey::from(address.into());
    ServiceKey {
        address: address.address,
        port: port.to_be(),
        scope: SHARED_SCOPE,
        family: address.family,
        protocol,
        zero: 0,
    }
}

/// TCP port 80 and UDP port 53 of the service, which are 8080 and 5353 of these.
pub fn bench_with(backends: &[IpAddr]) -> Bench {
    let mut bench = Bench::new();
    serve(&mut bench, backends);
    bench
}

pub fn serve(bench: &mut Bench, backends: &[IpAddr]) {
    for vip in [IpAddr::from(VIP), IpAddr::from(VIP6)] {
        let of_family: Vec<IpAddr> = backends
            .iter()
            .filter(|one| one.is_ipv4() == vip.is_ipv4())
            .copied()
            .collect();
        let at = |port| -> Vec<(IpAddr, u16)> { of_family.iter().map(|address| (*address, port)).collect() };
        bench.put_service(frontend(vip, TCP, 80), &at(8080), 0);
        bench.put_service(frontend(vip, UDP, 53), &at(5353), 0);
    }
}

pub fn frame_of(outcome: Outcome) -> Frame {
    match outcome {
        Outcome::Sent { frame, .. } => frame,
        other => panic!("{other:?}"),
    }
}

/// Who gets a packet.
pub fn receiver(outcome: Outcome) -> [u8; 4] {
    frame_of(outcome).0[30..34].try_into().unwrap()
}

#[test]
fn a_connection_goes_to_a_backend_and_its_answers_come_from_the_service() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into(), POD_B6.into()]);
    let into_b = |frame: Frame| frame.summed().after_hop(POD_B_MAC, GATEWAY_B);
    let into_a = |frame: Frame| frame.summed().after_hop(POD_A_MAC, GATEWAY_A);
    for (asked, got, answer, seen) in [
        (
            Frame::tcp(POD_A, 4000, VIP, 80, SYN),
            Frame::tcp(POD_A, 4000, POD_B, 8080, SYN),
            Frame::tcp(POD_B, 8080, POD_A, 4000, SYN_ACK),
            Frame::tcp(VIP, 80, POD_A, 4000, SYN_ACK),
        ),
        (
            Frame::udp(POD_A, 4000, VIP, 53),
            Frame::udp(POD_A, 4000, POD_B, 5353),
            Frame::udp(POD_B, 5353, POD_A, 4000),
            Frame::udp(VIP, 53, POD_A, 4000),
        ),
        (
            Frame::tcp6(POD_A6, 4000, VIP6, 80, SYN),
            Frame::tcp6(POD_A6, 4000, POD_B6, 8080, SYN),
            Frame::tcp6(POD_B6, 8080, POD_A6, 4000, SYN_ACK),
            Frame::tcp6(VIP6, 80, POD_A6, 4000, SYN_ACK),
        ),
        (
            Frame::udp6(POD_A6, 4000, VIP6, 53),
            Frame::udp6(POD_A6, 4000, POD_B6, 5353),
            Frame::udp6(POD_B6, 5353, POD_A6, 4000),
            Frame::udp6(VIP6, 53, POD_A6, 4000),
        ),
    ] {
        for _ in 0..2 {
            let sent = bench.from_pod_a(&asked.clone().summed());
            assert_eq!(sent.path(), Path::Local);
            assert_eq!(frame_of(sent), into_b(got.clone()));
            let answered = bench.from_pod_b(&answer.clone().summed());
            assert_eq!(frame_of(answered), into_a(seen.clone()));
        }
    }
}

#[test]
fn a_checksum_that_is_left_out_stays_left_out() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    let sent = frame_of(bench.from_pod_a(&Frame::udp(POD_A, 4000, VIP, 53)));
    assert_eq!(
        sent,
        Frame::udp(POD_A, 4000, POD_B, 5353).after_hop(POD_B_MAC, GATEWAY_B)
    );
}

#[test]
fn a_backend_on_another_node_is_reached_through_the_tunnel() {
    kernel_test!();
    let mut bench = bench_with(&[REMOTE.into(), REMOTE6.into()]);
    let asked = Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed();
    let sent = bench.from_pod_a(&asked);
    let Outcome::Sent {
        path, tunnel, frame, ..
    } = sent
    else {
        panic!("{sent:?}")
    };
    assert_eq!((path, tunnel.unwrap().1), (Path::Encap, OTHER_NODE));
    let macs = (asked.0[..6].try_into().unwrap(), asked.0[6..12].try_into().unwrap());
    let expected = Frame::tcp(POD_A, 4000, REMOTE, 8080, SYN).summed();
    assert_eq!(frame, expected.after_hop(macs.0, macs.1));
    let answer = Frame::tcp(REMOTE, 8080, POD_A, 4000, SYN_ACK).summed();
    let seen = Frame::tcp(VIP, 80, POD_A, 4000, SYN_ACK).summed();
    assert_eq!(
        frame_of(bench.from_overlay(&answer, OTHER_NODE, GREEN)),
        seen.delivered(POD_A_MAC, GATEWAY_A)
    );
    let asked = Frame::udp6(POD_A6, 4000, VIP6, 53).summed();
    assert_eq!(bench.from_pod_a(&asked).path(), Path::Encap);
    let answer = Frame::udp6(REMOTE6, 5353, POD_A6, 4000).summed();
    let seen = Frame::udp6(VIP6, 53, POD_A6, 4000).summed();
    assert_eq!(
        frame_of(bench.from_overlay(&answer, OTHER_NODE, GREEN)),
        seen.delivered(POD_A_MAC, GATEWAY_A)
    );
}

#[test]
fn policy_is_that_of_the_backend() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    let asked = Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed();
    bench.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
    assert_eq!(bench.from_pod_a(&asked).reason(), DropReason::EgressDenied);
    // By the backend's port, not the service's.
    bench.set_port_set(1, &[(Some(TCP), 80, 80)]);
    bench.set_cell(abi::Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, 3);
    assert_eq!(bench.from_pod_a(&asked).reason(), DropReason::EgressDenied);
    bench.set_port_set(1, &[(Some(TCP), 8080, 8080)]);
    assert_eq!(bench.from_pod_a(&asked).path(), Path::Local);
    // What was allowed and is no longer stops in both directions.
    bench.flip();
    bench.set_cell(abi::Direction::Egress, RED_PLACE.0, BLUE_PLACE.1, 0);
    assert_eq!(
        bench
            .from_pod_a(&Frame::tcp(POD_A, 4000, VIP, 80, ACK).summed())
            .reason(),
        DropReason::EgressDenied
    );
    assert!(matches!(
        bench.from_pod_b(&Frame::tcp(POD_B, 8080, POD_A, 4000, ACK)).reason(),
        DropReason::MidStream
    ));
}

#[test]
fn errors_are_translated_back_both_ways() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into(), POD_B6.into(), REMOTE.into()]);
    serve(&mut bench, &[POD_B.into(), POD_B6.into()]);
    let into_b = |frame: Frame| frame.summed().after_hop(POD_B_MAC, GATEWAY_B);
    let into_a = |frame: Frame| frame.summed().after_hop(POD_A_MAC, GATEWAY_A);
    // The backend says that nobody listens there: the client reads that of the service.
    let asked = Frame::udp(POD_A, 4000, VIP, 53).summed();
    let got = Frame::udp(POD_A, 4000, POD_B, 5353).summed();
    bench.from_pod_a(&asked);
    let refused = bench.from_pod_b(&Frame::unreachable(POD_B, &got).summed());
    assert_eq!(frame_of(refused), into_a(Frame::unreachable(VIP, &asked)));
    // The client says so of an answer: the backend reads that of its own packet.
    let answer = Frame::udp(POD_B, 5353, POD_A, 4000).summed();
    let seen = Frame::udp(VIP, 53, POD_A, 4000).summed();
    let refused = bench.from_pod_a(&Frame::unreachable(POD_A, &seen).summed());
    assert_eq!(frame_of(refused), into_b(Frame::unreachable(POD_A, &answer)));
    // A TCP header of which only the ports are quoted, and IPv6.
    let asked = Frame::tcp(POD_A, 4001, VIP, 80, SYN).summed();
    let got = Frame::tcp(POD_A, 4001, POD_B, 8080, SYN).summed();
    bench.from_pod_a(&asked);
    let refused = bench.from_pod_b(&Frame::unreachable(POD_B, &got).summed());
    assert_eq!(frame_of(refused), into_a(Frame::unreachable(VIP, &asked)));
    for (asked, got) in [
        (
            Frame::udp6(POD_A6, 4000, VIP6, 53).summed(),
            Frame::udp6(POD_A6, 4000, POD_B6, 5353).summed(),
        ),
        (
            Frame::tcp6(POD_A6, 4000, VIP6, 80, SYN).summed(),
            Frame::tcp6(POD_A6, 4000, POD_B6, 8080, SYN).summed(),
        ),
    ] {
        bench.from_pod_a(&asked);
        let refused = bench.from_pod_b(&Frame::error6(POD_B6, 1, &got).summed());
        assert_eq!(frame_of(refused), into_a(Frame::error6(VIP6, 1, &asked)));
    }
    // A router between the client and a backend outside speaks for itself.
    bench.forward();
    serve(&mut bench, &[NOBODY.into()]);
    let asked = Frame::udp(POD_A, 4002, VIP, 53).summed();
    let got = frame_of(bench.from_pod_a(&asked));
    let router = [198, 51, 100, 7];
    let told = bench.to_pod(&Frame::unreachable(router, &got).summed(), bench.underlay);
    let asked_there = asked.clone().with(22, &got.0[22..23]);
    assert_eq!(frame_of(told), Frame::unreachable(router, &asked_there).summed());
    // About nothing that was ever sent.
    let stray = Frame::unreachable(POD_A, &Frame::udp(VIP, 53, POD_A, 4999)).summed();
    assert_eq!(bench.from_pod_a(&stray).reason(), DropReason::IcmpUnrelated);
}

#[test]
fn a_pod_reaches_itself() {
    kernel_test!();
    let mut bench = bench_with(&[POD_A.into(), POD_A6.into()]);
    // Nobody forbids it.
    bench.deny_egress(RED_PLACE.0, RED_PLACE.1);
    let gateway = GATEWAY_V4;
    for (asked, got, answer, seen) in [
        (
            Frame::tcp(POD_A, 4000, VIP, 80, SYN),
            Frame::tcp(gateway, 4000, POD_A, 8080, SYN),
            Frame::tcp(POD_A, 8080, gateway, 4000, SYN_ACK),
            Frame::tcp(VIP, 80, POD_A, 4000, SYN_ACK),
        ),
        (
            Frame::udp6(POD_A6, 4000, VIP6, 53),
            Frame::udp6(GATEWAY_V6.0, 4000, POD_A6, 5353),
            Frame::udp6(POD_A6, 5353, GATEWAY_V6.0, 4000),
            Frame::udp6(VIP6, 53, POD_A6, 4000),
        ),
    ] {
        for _ in 0..2 {
            let sent = bench.from_pod_a(&asked.clone().summed());
            assert_eq!(frame_of(sent), got.clone().summed().after_hop(POD_A_MAC, GATEWAY_A));
            let answered = bench.from_pod_a(&answer.clone().summed());
            assert_eq!(
                frame_of(answered),
                seen.clone().summed().after_hop(POD_A_MAC, GATEWAY_A)
            );
        }
    }
    let got = Frame::tcp(gateway, 4000, POD_A, 8080, SYN).summed();
    let refused = bench.from_pod_a(&Frame::unreachable(POD_A, &got).summed());
    let asked = Frame::tcp(POD_A, 4000, VIP, 80, SYN).summed();
    let expected = Frame::unreachable(VIP, &asked).summed();
    assert_eq!(frame_of(refused), expected.after_hop(POD_A_MAC, GATEWAY_A));
    // Nobody else's words reach it that way, and the gateway is no host.
    for stray in [
        Frame::tcp(POD_A, 8080, gateway, 4001, SYN_ACK),
        Frame::tcp(POD_A, 5000, gateway, 80, SYN),
        Frame::udp(POD_A, 5000, gateway, 53),
    ] {
        assert_eq!(bench.from_pod_a(&stray).reason(), DropReason::UnknownDestination);
    }
    let other = Frame::tcp(POD_B, 8080, gateway, 4000, SYN_ACK);
    assert_eq!(bench.from_pod_b(&other).reason(), DropReason::UnknownDestination);
}

#[test]
fn who_asks_for_what_is_not_there_is_told() {
    kernel_test!();
    let mut bench = bench_with(&[]);
    let mut told = |sent: &Frame| match bench.from_pod_a(sent) {
        Outcome::Told(reason, frame) => (reason, frame),
        other => panic!("{sent:?}: {other:?}"),
    };
    let numbered = |frame: Frame, sequence: u32, acknowledged: u32| {
        let at = if frame.0[12] == 0x86 { 58 } else { 38 };
        frame
            .with(at, &sequence.to_be_bytes())
            .with(at + 4, &acknowledged.to_be_bytes())
    };
    let as_told = |frame: Frame| {
        let v4 = frame.0[12] == 8;
        let frame = if v4 { frame.with(18, &[0, 0, 0, 0]) } else { frame };
        frame.summed().delivered(POD_A_MAC, GATEWAY_A)
    };
    for (port, reason) in [(80, DropReason::NoBackends), (81, DropReason::NoService)] {
        for (sent, answer) in [
            (
                numbered(Frame::tcp(POD_A, 4000, VIP, port, SYN), 1000, 0),
                numbered(Frame::tcp(VIP, port, POD_A, 4000, RST | ACK), 0, 1001),
            ),
            (
                numbered(Frame::tcp(POD_A, 4000, VIP, port, FIN), 1000, 0),
                numbered(Frame::tcp(VIP, port, POD_A, 4000, RST | ACK), 0, 1001),
            ),
            (
                numbered(Frame::tcp6(POD_A6, 4000, VIP6, port, ACK), 1000, 77),
                numbered(Frame::tcp6(VIP6, port, POD_A6, 4000, RST), 77, 0),
            ),
        ] {
            assert_eq!(told(&sent.summed()), (reason, as_told(answer)));
        }
    }
    for (port, reason) in [(53, DropReason::NoBackends), (54, DropReason::NoService)] {
        let sent = Frame::udp(POD_A, 4000, VIP, port).summed();
        let (reason_told, frame) = told(&sent);
        assert_eq!(reason_told, reason);
        assert_eq!(frame.0[34..36], [3, 3], "port unreachable");
        let sent = Frame::udp6(POD_A6, 4000, VIP6, port).summed();
        let (reason_told, frame) = told(&sent);
        assert_eq!(reason_told, reason);
        assert_eq!(frame.0[54..56], [1, 4], "port unreachable");
    }
    let reset = Frame::tcp(POD_A, 4000, VIP, 80, RST).summed();
    assert_eq!(
        bench.from_pod_a(&reset),
        Outcome::Dropped(DropReason::NoBackends),
        "a reset is not answered"
    );
    assert_eq!(
        bench.from_pod_a(&Frame::echo(POD_A, VIP, false, 1)).reason(),
        DropReason::NoService
    );
    assert_eq!(
        bench.from_pod_a(&Frame::ipv4(POD_A, VIP, 132, &[0; 12])).reason(),
        DropReason::NoService
    );
}

#[test]
fn pieces_of_a_datagram_go_together() {
    kernel_test!();
    let mut bench = bench_with(&[POD_B.into()]);
    let into_b = |frame: Frame| frame.after_hop(POD_B_MAC, GATEWAY_B);
    let first = Frame::udp(POD_A, 4000, VIP, 53).with(40, &[0, 0]);
    let payload = [0; 16];
    let later = |from, to| Frame::ipv4(from, to, 17, &payload).piece(7, 16, false);
    // Without the first nobody knows whose it is.
    assert_eq!(
        bench.from_pod_a(&later(POD_A, VIP)).reason(),
        DropReason::FragmentUnknown
    );
    let first = Frame::ipv4(POD_A, VIP, 17, &[&first.0[34..42], &[0; 8]].concat()).piece(7, 0, true);
    assert_eq!(receiver(bench.from_pod_a(&first)), POD_B);
    assert_eq!(
        frame_of(bench.from_pod_a(&later(POD_A, VIP))),
        into_b(later(POD_A, POD_B))
    );
}

#[test]
fn no_pod_makes_the_programs_forget_anothers_pieces() {
    kernel_test!();
    let mut bench = bench_with(&[REMOTE.into()]);
    let first = |source, identification| {
        let whole = Frame::udp(source, 4000, VIP, 53);
        Frame::ipv4(source, VIP, 17, &[&whole.0[34..42], &[0; 8]].concat()).piece(identification, 0, true)
    };
    bench.from_pod_b(&first(POD_B, 7));
    let netns = bench.netns.name().to_owned();
    in_netns(&netns, || {
        for identification in 0..20_000 {
            bench.run_here(&Arrival::new(Hook::FromPod, &first(POD_A, identification), bench.pod_a));
        }
    })
    .unwrap();
    let later = Frame::ipv4(POD_B, VIP, 17, &[0; 16]).piece(7, 16, false);
    assert_eq!(receiver(bench.from_pod_b(&later)), REMOTE);
}
