//! What a pod is told of packets that go no farther.

use super::{
    bench::{Bench, RED_PLACE, TUNNEL_MTU},
    flows::{back, one_way, there},
    frame::{
        ACK, Frame, GATEWAY_A, NOBODY, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B6, REMOTE, REMOTE6, RST, SYN, checksum,
        checksum6,
    },
    run::{Arrival, Outcome},
};
use abi::{
    DropReason, Hook, Identity, Path,
    node::{GATEWAY_V4, GATEWAY_V6},
};
use harness::kernel_test;

/// The error about `frame`, as it should be: type, code, and the word behind the checksum.
fn error(frame: &Frame, kind: u8, code: u8, word: u32) -> Frame {
    let v6 = frame.0[12] == 0x86;
    let quote = match (v6, frame.0.len()) {
        (true, 102..) => 88,
        (true, _) => 48,
        _ => 28,
    };
    let mut payload = vec![kind, code, 0, 0];
    payload.extend(word.to_be_bytes());
    payload.extend(&frame.0[14..14 + quote]);
    let mut answer = if v6 {
        Frame::ipv6(GATEWAY_V6.0, POD_A6, 58, &payload)
    } else {
        Frame::ipv4(GATEWAY_V4, POD_A, 1, &payload).with(18, &[0, 0, 0, 0])
    };
    let sum = if v6 {
        checksum6(&answer)
    } else {
        checksum(&answer.0[34..])
    };
    let at = if v6 { 56 } else { 36 };
    answer = answer.with(at, &sum.to_be_bytes());
    answer.delivered(POD_A_MAC, GATEWAY_A)
}

#[test]
fn that_its_time_to_live_ran_out() {
    kernel_test!();
    let mut bench = Bench::new();
    for (frame, kind) in [
        (Frame::udp(POD_A, 1, POD_B, 33434).ttl(1), 11),
        (Frame::tcp(POD_A, 1, REMOTE, 80, SYN).ttl(1), 11),
        (Frame::udp(POD_A, 2, POD_B, 33434).ttl(0), 11),
        (Frame::udp6(POD_A6, 1, POD_B6, 33434).with(21, &[1]), 3),
        (Frame::udp6(POD_A6, 1, REMOTE6, 33434).with(21, &[1]), 3),
    ] {
        let expected = Outcome::Told(DropReason::TtlExceeded, error(&frame, kind, 0, 0));
        assert_eq!(bench.from_pod_a(&frame), expected, "{frame:?}");
    }
}

fn sized(frame: &Frame, length: usize) -> Frame {
    let mut frame = frame.clone();
    frame.0.resize(14 + length, 0);
    let length = u16::try_from(length).unwrap();
    if frame.0[12] == 0x86 {
        frame.with(18, &(length - 40).to_be_bytes())
    } else {
        frame.with(16, &length.to_be_bytes())
    }
}

#[test]
fn that_its_packet_is_too_big_for_the_tunnel() {
    kernel_test!();
    let mut bench = Bench::new();
    let mtu = TUNNEL_MTU as usize;
    let v4 = Frame::udp(POD_A, 1, REMOTE, 53).with(20, &[0x40, 0]);
    let v6 = Frame::udp6(POD_A6, 1, REMOTE6, 53);
    assert_eq!(bench.from_pod_a(&sized(&v4, mtu)).path(), Path::Encap);
    assert_eq!(bench.from_pod_a(&sized(&v6, mtu)).path(), Path::Encap);
    let (long4, long6) = (sized(&v4, mtu + 1), sized(&v6, mtu + 1));
    // What is quoted was on its way already.
    let on_the_way = |frame: &Frame, offset: usize| frame.clone().with(offset, &[63]);
    let expected = Outcome::Told(DropReason::TooBig, error(&on_the_way(&long4, 22), 3, 4, TUNNEL_MTU));
    assert_eq!(bench.from_pod_a(&long4), expected);
    let expected = Outcome::Told(DropReason::TooBig, error(&on_the_way(&long6, 21), 2, 0, TUNNEL_MTU));
    assert_eq!(bench.from_pod_a(&long6), expected);
    // Where it may be cut, the tunnel cuts it.
    let may_be_cut = long4.with(20, &[0, 0]);
    assert_eq!(bench.from_pod_a(&may_be_cut).path(), Path::Encap);
    // What stands for many packets is as large as one of them with its headers.
    let header = &Frame::tcp(POD_A, 1, REMOTE, 80, SYN).0[34..];
    let many = Frame::ipv4(POD_A, REMOTE, 6, &[header, &[0; 2000]].concat());
    let mut arrival = Arrival::new(Hook::FromPod, &many, bench.pod_a);
    arrival.segment = TUNNEL_MTU - 40;
    assert_eq!(bench.run(&arrival).path(), Path::Encap);
    arrival.segment += 1;
    assert_eq!(bench.run(&arrival).reason(), DropReason::TooBig);
    // Datagrams have smaller headers: each may be as large as one that is sent alone (QUIC finds out by such ones).
    for (header, v6) in [
        (&Frame::udp(POD_A, 1, REMOTE, 443).0[34..], false),
        (&Frame::udp6(POD_A6, 1, REMOTE6, 443).0[54..], true),
    ] {
        let many = [header, &[0; 2000]].concat();
        let (many, headers) = if v6 {
            (Frame::ipv6(POD_A6, REMOTE6, 17, &many), 48)
        } else {
            (Frame::ipv4(POD_A, REMOTE, 17, &many).with(20, &[0x40, 0]), 28)
        };
        let mut arrival = Arrival::new(Hook::FromPod, &many, bench.pod_a);
        arrival.segment = TUNNEL_MTU - headers;
        assert_eq!(bench.run(&arrival).path(), Path::Encap, "{v6}");
        arrival.segment += 1;
        assert_eq!(bench.run(&arrival).reason(), DropReason::TooBig, "{v6}");
    }
    // On the same node nothing is in the way.
    let local = sized(&Frame::udp(POD_A, 1, POD_B, 53).with(20, &[0x40, 0]), 1900);
    assert_eq!(bench.from_pod_a(&local).path(), Path::Local);
}

#[test]
fn that_nobody_knows_its_connection_any_more() {
    kernel_test!();
    let mut bench = one_way();
    let lost = back(ACK).with(38, &7_u32.to_be_bytes()).with(42, &9_u32.to_be_bytes());
    let Outcome::Told(DropReason::EgressDenied, told) = bench.from_pod_b(&lost) else {
        panic!("it is told");
    };
    let (there, back) = (there(RST), back(RST));
    // From the other end, with the number that it expects.
    assert_eq!((&told.0[26..38], told.0[47]), (&there.0[26..38], RST));
    assert_eq!(
        (&told.0[38..42], &told.0[42..46]),
        (&9_u32.to_be_bytes()[..], &[0; 4][..])
    );
    // A reset is not answered, and nobody else is told whose address nobody has checked.
    assert_eq!(bench.from_pod_b(&back), Outcome::Dropped(DropReason::EgressDenied));
    // So does who has opened it.
    let outcome = bench.from_pod_a(&Frame::tcp(POD_A, 40000, POD_B, 80, ACK));
    assert!(
        matches!(outcome, Outcome::Told(DropReason::MidStream, _)),
        "{outcome:?}"
    );
    let mut bench = Bench::new();
    bench.deny_egress(RED_PLACE.0, Identity::WORLD.0);
    let stray = Frame::tcp(NOBODY, 80, POD_A, 5000, ACK);
    let by = bench.underlay;
    assert_eq!(bench.to_pod(&stray, by), Outcome::Dropped(DropReason::MidStream));
}
