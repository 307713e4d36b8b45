//! Flows: replies, revocation, and everything that must not outlive what it was about.

use super::{
    bench::{BLUE, BLUE_PLACE, Bench, FULL, GREEN, GREEN_COLUMN, RED, RED_PLACE},
    frame::{ACK, FIN, Frame, NODE, OTHER_NODE, POD_A, POD_B, REMOTE, RST, SYN},
    run::Outcome,
};
use abi::{AddressKey, Direction, DropReason, Endpoint, Identity, Path, map};
use harness::kernel_test;

pub fn there(flags: u8) -> Frame {
    Frame::tcp(POD_A, 40000, POD_B, 80, flags)
}

pub fn back(flags: u8) -> Frame {
    Frame::tcp(POD_B, 80, POD_A, 40000, flags)
}

/// Red may open connections to blue, and not the other way round.
pub fn one_way() -> Bench {
    let mut bench = Bench::new();
    bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
    bench
}

/// The same with a connection open.
fn connected() -> Bench {
    let mut bench = one_way();
    assert_eq!(bench.from_pod_a(&there(SYN)).path(), Path::Local);
    assert_eq!(bench.from_pod_b(&back(SYN | ACK)).path(), Path::Local);
    assert_eq!(bench.from_pod_a(&there(ACK)).path(), Path::Local);
    bench
}

#[test]
fn replies_pass_and_nothing_else_does() {
    kernel_test!();
    let mut bench = connected();
    assert_eq!(bench.from_pod_b(&back(ACK)).path(), Path::Local);
    let other_port = Frame::tcp(POD_B, 81, POD_A, 40000, ACK);
    assert_eq!(bench.from_pod_b(&other_port).reason(), DropReason::EgressDenied);
}

#[test]
fn udp_and_echo_replies_pass() {
    kernel_test!();
    let mut bench = one_way();
    assert_eq!(
        bench.from_pod_b(&Frame::udp(POD_B, 53, POD_A, 9)).reason(),
        DropReason::EgressDenied
    );
    assert_eq!(bench.from_pod_a(&Frame::udp(POD_A, 9, POD_B, 53)).path(), Path::Local);
    assert_eq!(bench.from_pod_b(&Frame::udp(POD_B, 53, POD_A, 9)).path(), Path::Local);
    assert_eq!(
        bench.from_pod_a(&Frame::echo(POD_A, POD_B, false, 7)).path(),
        Path::Local
    );
    assert_eq!(
        bench.from_pod_b(&Frame::echo(POD_B, POD_A, true, 7)).path(),
        Path::Local
    );
    assert_eq!(
        bench.from_pod_b(&Frame::echo(POD_B, POD_A, true, 8)).reason(),
        DropReason::IcmpUnrelated
    );
}

#[test]
fn a_reply_across_nodes_passes() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.deny_egress(RED_PLACE.0, GREEN_COLUMN);
    let reply = Frame::tcp(POD_A, 80, REMOTE, 40000, SYN | ACK);
    assert_eq!(bench.from_pod_a(&reply).reason(), DropReason::EgressDenied);
    let syn = Frame::tcp(REMOTE, 40000, POD_A, 80, SYN);
    assert_eq!(bench.from_overlay(&syn, OTHER_NODE, GREEN).path(), Path::Overlay);
    assert_eq!(bench.from_pod_a(&reply).path(), Path::Encap);
}

#[test]
fn an_icmp_error_passes_with_its_flow_only() {
    kernel_test!();
    let mut bench = one_way();
    let datagram = Frame::udp(POD_A, 9, POD_B, 53);
    let error = Frame::unreachable(POD_B, &datagram);
    assert_eq!(bench.from_pod_b(&error).reason(), DropReason::IcmpUnrelated);
    assert_eq!(bench.from_pod_a(&datagram).path(), Path::Local);
    assert_eq!(bench.from_pod_b(&error).path(), Path::Local);
}

#[test]
fn a_revoked_flow_stops_in_both_directions() {
    kernel_test!();
    for reply_first in [true, false] {
        let mut bench = connected();
        bench.allow_everything(1);
        bench.flip();
        bench.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
        bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
        if reply_first {
            assert_eq!(bench.from_pod_b(&back(ACK)).reason(), DropReason::EgressDenied);
            assert_eq!(bench.from_pod_a(&there(ACK)).reason(), DropReason::EgressDenied);
        } else {
            assert_eq!(bench.from_pod_a(&there(ACK)).reason(), DropReason::EgressDenied);
            assert_eq!(bench.from_pod_b(&back(ACK)).reason(), DropReason::EgressDenied);
        }
    }
}

#[test]
fn a_flow_that_stays_allowed_goes_on_under_the_next_generation() {
    kernel_test!();
    let mut bench = connected();
    bench.allow_everything(1);
    bench.flip();
    bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
    // The first packet after the flip may be a reply, which no policy allows by itself.
    assert_eq!(bench.from_pod_b(&back(ACK)).path(), Path::Local);
    assert_eq!(bench.from_pod_a(&there(ACK)).path(), Path::Local);
    bench.flip();
    bench.deny_egress(BLUE_PLACE.0, RED_PLACE.1);
    assert_eq!(bench.from_pod_a(&there(ACK)).path(), Path::Local);
    assert_eq!(bench.from_pod_b(&back(ACK)).path(), Path::Local);
}

#[test]
fn a_relabelled_pod_has_its_flows_judged_again() {
    kernel_test!();
    let mut bench = connected();
    let (va, next_epoch) = (bench.pod_a, 2);
    bench.put_pod(POD_A, [GREEN; 2], (3, GREEN_COLUMN), next_epoch, va);
    bench.deny_egress(3, BLUE_PLACE.1);
    assert_eq!(bench.from_pod_a(&there(ACK)).reason(), DropReason::EgressDenied);
    // Blue may open connections to what the pod is now, but this flow was not opened by blue.
    assert_eq!(bench.from_pod_b(&back(ACK)).reason(), DropReason::MidStream);
}

#[test]
fn an_address_used_again_inherits_nothing() {
    kernel_test!();
    let mut bench = connected();
    bench.remove_pod(POD_B);
    assert_eq!(bench.from_pod_a(&there(ACK)).reason(), DropReason::UnknownDestination);
    // Another pod gets the address, and policy does not let red reach it.
    let vb = bench.pod_b;
    bench.owner = 2;
    bench.put_pod(POD_B, [BLUE; 2], (3, BLUE_PLACE.1), 1, vb);
    bench.set_cell(Direction::Ingress, 3, RED_PLACE.1, 0);
    assert_eq!(bench.from_pod_a(&there(ACK)).reason(), DropReason::IngressDenied);
    assert_eq!(bench.from_pod_b(&back(ACK)).reason(), DropReason::MidStream);
}

#[test]
fn a_reply_to_the_former_owner_of_an_address_is_none_to_the_next_one() {
    kernel_test!();
    let mut bench = one_way();
    assert_eq!(bench.from_pod_a(&Frame::udp(POD_A, 9, POD_B, 53)).path(), Path::Local);
    let answer = Frame::udp(POD_B, 53, POD_A, 9);
    assert_eq!(bench.from_pod_b(&answer).path(), Path::Local);
    let va = bench.pod_a;
    bench.owner = 2;
    bench.put_pod(POD_A, [RED; 2], RED_PLACE, 1, va);
    assert_eq!(bench.from_pod_b(&answer).reason(), DropReason::EgressDenied);
}

#[test]
fn an_entry_that_is_another_ones_or_half_written_is_not_believed() {
    kernel_test!();
    for damage in [
        |endpoint: &mut Endpoint| endpoint.last_stamp += 1,
        |endpoint: &mut Endpoint| endpoint.address.0[3] += 1,
    ] {
        let mut bench = Bench::new();
        let key = AddressKey::v4(POD_B);
        let mut endpoints = bench.hash::<Endpoint>(map::ENDPOINTS);
        let mut endpoint = endpoints.get(&key, 0).unwrap();
        damage(&mut endpoint);
        endpoints.insert(key, endpoint, 0).unwrap();
        assert_eq!(bench.from_pod_a(&there(SYN)).reason(), DropReason::UnknownDestination);
    }
}

#[test]
fn a_syn_against_the_direction_of_a_flow_is_judged_by_itself() {
    kernel_test!();
    let mut bench = connected();
    assert_eq!(bench.from_pod_b(&back(SYN)).reason(), DropReason::EgressDenied);
    assert_eq!(
        bench.from_pod_a(&there(ACK)).path(),
        Path::Local,
        "the flow itself is as it was"
    );
}

#[test]
fn a_closed_flow_may_be_opened_again_by_the_same_ports() {
    kernel_test!();
    for closing in [
        vec![there(FIN | ACK), back(FIN | ACK)],
        vec![there(RST)],
        vec![back(RST)],
    ] {
        let mut bench = connected();
        for frame in closing {
            let from_a = frame.0[26..30] == POD_A;
            let sent = if from_a {
                bench.from_pod_a(&frame)
            } else {
                bench.from_pod_b(&frame)
            };
            assert_eq!(sent.path(), Path::Local);
        }
        assert_eq!(bench.from_pod_a(&there(SYN)).path(), Path::Local);
        assert_eq!(bench.from_pod_b(&back(SYN | ACK)).path(), Path::Local);
    }
}

#[test]
fn a_denied_packet_takes_no_entry() {
    kernel_test!();
    let mut bench = one_way();
    assert_eq!(bench.from_pod_b(&back(SYN)).reason(), DropReason::EgressDenied);
    // With an entry this would pass as a reply to it.
    bench.set_cell(Direction::Ingress, BLUE_PLACE.0, RED_PLACE.1, 0);
    assert_eq!(bench.from_pod_a(&there(SYN | ACK)).reason(), DropReason::IngressDenied);
}

#[test]
fn the_node_gets_its_answers() {
    kernel_test!();
    let mut bench = Bench::new();
    bench.deny_egress(RED_PLACE.0, Identity::HOST.0);
    let answer = Frame::tcp(POD_A, 80, NODE, 40000, SYN | ACK);
    assert_eq!(bench.from_pod_a(&answer).reason(), DropReason::EgressDenied);
    assert_eq!(
        bench.to_pod(&Frame::tcp(NODE, 40000, POD_A, 80, SYN), 0).path(),
        Path::FromHost
    );
    assert_eq!(bench.from_pod_a(&answer).path(), Path::ToHost);
}

#[test]
fn each_half_of_a_pair_of_identities_serves_its_own_generation() {
    kernel_test!();
    let mut bench = Bench::new();
    let va = bench.pod_a;
    bench.put_pod(POD_A, [RED, BLUE], RED_PLACE, 1, va);
    let tunnel = |bench: &mut Bench, port| match bench.from_pod_a(&Frame::udp(POD_A, port, REMOTE, 53)) {
        Outcome::Sent { tunnel, .. } => tunnel.map(|(vni, _)| vni),
        other => panic!("{}", other.reason().name()),
    };
    assert_eq!(tunnel(&mut bench, 1), Some(RED));
    bench.flip();
    assert_eq!(tunnel(&mut bench, 1), Some(BLUE));
}

/// A packet, how long the flow lives after it with the default time-outs in seconds, and what it is then.
type Step = (fn() -> Frame, u64, &'static str);

#[test]
fn a_flow_is_remembered_as_long_as_its_state_deserves() {
    kernel_test!();
    let cases: [&[Step]; 5] = [
        &[
            (|| there(SYN), 60, "asked for"),
            (|| back(SYN | ACK), 60, "half open"),
            (|| there(ACK), 8000, "established"),
            (|| back(ACK), 8000, "in use"),
            (|| there(FIN | ACK), 3600, "half closed"),
            (|| back(ACK), 3600, "half closed, in use"),
            (|| back(FIN | ACK), 10, "closed"),
            (|| there(ACK), 10, "the last packet"),
        ],
        &[
            (|| there(SYN), 60, "asked for"),
            (|| back(RST | ACK), 10, "refused"),
            (|| there(SYN), 60, "asked for again"),
        ],
        &[
            (|| there(SYN), 60, "asked for"),
            (|| back(SYN | ACK), 60, "half open"),
            (|| there(ACK), 8000, "established"),
            (|| back(RST), 10, "reset, or so somebody says"),
            (|| there(ACK), 8000, "but it goes on"),
        ],
        &[
            (|| Frame::udp(POD_A, 1, POD_B, 2), 30, "no answer yet"),
            (|| Frame::udp(POD_B, 2, POD_A, 1), 120, "answered"),
            (|| Frame::udp(POD_A, 1, POD_B, 2), 120, "going on"),
        ],
        &[
            (|| Frame::echo(POD_A, POD_B, false, 1), 30, "asked"),
            (|| Frame::echo(POD_B, POD_A, true, 1), 120, "answered"),
        ],
    ];
    for steps in cases {
        let mut bench = Bench::new();
        for (frame, seconds, what) in steps {
            let frame = frame();
            let from_a = frame.0[26..30] == POD_A;
            let sent = if from_a {
                bench.from_pod_a(&frame)
            } else {
                bench.from_pod_b(&frame)
            };
            assert_eq!(sent.path(), Path::Local, "{what}");
            assert_eq!(bench.lifetime(), *seconds, "{what}");
        }
    }
}

#[test]
fn when_the_map_is_nearly_full_each_pod_has_its_share() {
    kernel_test!();
    let mut bench = Bench::new();
    let (a, b) = (bench.owner, bench.owner + 1);
    let vb = bench.pod_b;
    bench.owner = b;
    bench.put_pod(POD_B, [BLUE; 2], BLUE_PLACE, 2, vb);
    bench.set_account(a, 0);
    bench.set_account(b, 0);
    let open = |bench: &mut Bench, port| bench.from_pod_a(&Frame::udp(POD_A, port, POD_B, 53));
    for port in 1..=6 {
        assert_eq!(
            open(&mut bench, port).path(),
            Path::Local,
            "there is room for everybody"
        );
    }
    assert_eq!(bench.tracked(), 6);
    bench.set_tracked(FULL.into());
    assert_eq!(open(&mut bench, 7).reason(), DropReason::ConntrackShare);
    // What is open goes on, and the other pod has its own share.
    assert_eq!(open(&mut bench, 6).path(), Path::Local);
    for port in 1..=4 {
        let frame = Frame::udp(POD_B, port, REMOTE, 53);
        assert_eq!(bench.from_pod_b(&frame).path(), Path::Encap, "{port}");
    }
    let fifth = Frame::udp(POD_B, 5, REMOTE, 53);
    assert_eq!(bench.from_pod_b(&fifth).reason(), DropReason::ConntrackShare);
    // Who floods a pod from elsewhere takes that pod's share, and nobody else's.
    bench.set_account(a, 4);
    let flood = Frame::udp(REMOTE, 9, POD_A, 53);
    assert_eq!(
        bench.from_overlay(&flood, OTHER_NODE, GREEN).reason(),
        DropReason::ConntrackShare
    );
    bench.set_tracked(u64::from(FULL) - 1);
    assert_eq!(open(&mut bench, 7).path(), Path::Local);
    // A flow that policy ends gives its place back.
    let before = bench.tracked();
    bench.flip();
    bench.deny_egress(RED_PLACE.0, BLUE_PLACE.1);
    assert_eq!(open(&mut bench, 7).reason(), DropReason::EgressDenied);
    assert_eq!(bench.tracked(), before - 1);
}
