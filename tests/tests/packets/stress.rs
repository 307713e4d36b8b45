//! Very many packets on established flows, while another CPU changes what they were let open by.

use super::{
    bench::{BLUE, BLUE_PLACE, Bench, GREEN, RED_PLACE, Setup},
    frame::{ACK, Frame, POD_A, POD_A_MAC, POD_B, POD_B_MAC},
    stage::{Replay, Stage, Watched},
};
use abi::{Direction, Hook};
use aya::maps::{Array, MapData};
use harness::{in_netns, kernel_test};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Packets from A, in all.
const PACKETS: u64 = 100_000_000;
/// Packets in a row.
const ROW: u32 = 6000;
/// First port, and flows that take turns, on each CPU that forwards: some that stay, and more than the map of flows has room
/// for, so that its elements go from one flow to another all the time.
const FLOWS: [(u16, u32); 2] = [(10_000, 100), (20_000, 3000)];
const ROOM: u32 = 1024;
/// Row and column of the pod that nobody may talk to.
const GREEN_PLACE: (u32, u32) = (3, 18);
/// How long a program may run that has begun before a change.
const GRACE: Duration = Duration::from_millis(1);
/// Ends the others whatever happens.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Who has B's address, in turn: B, nobody, another pod, which A must not reach, nobody again.
struct Owner {
    bench: Bench,
    /// A third interface, for the other pod.
    other: u32,
    epoch: u32,
}

impl Owner {
    fn b(&mut self) {
        self.epoch += 1;
        self.bench.owner = 1;
        let (epoch, ifindex) = (self.epoch, self.bench.pod_b);
        self.bench.put_pod(POD_B, [BLUE; 2], BLUE_PLACE, epoch, ifindex);
    }

    fn other(&mut self) {
        self.epoch += 1;
        self.bench.owner = 7;
        let (epoch, ifindex) = (self.epoch, self.other);
        self.bench.put_pod(POD_B, [GREEN; 2], GREEN_PLACE, epoch, ifindex);
    }
}

/// What went to B, and to the other pod, from one of the CPUs.
fn delivered(watched: &[Array<MapData, Watched>]) -> [u64; 2] {
    let of = |index| watched.iter().map(|map| map.get(&index, 0).unwrap().delivered).sum();
    [of(0), of(1)]
}

fn mac(mac: [u8; 6]) -> u32 {
    u32::from_ne_bytes([mac[0], mac[1], mac[2], mac[3]])
}

/// Sends there and back in turn, until it is told to stop.
fn forward(
    stage: &mut Stage,
    [there, back]: [(u32, Frame); 2],
    (first_port, flows): (u16, u32),
    stop: &AtomicBool,
    sent: &AtomicU64,
) {
    let replay = |frame: &Frame, replies: bool| {
        let mut replay = Replay::of(frame);
        replay.watch = 1;
        if replies {
            replay.destination_ports = flows;
        } else {
            replay.source_ports = flows;
        }
        replay
    };
    let port = first_port.to_be_bytes();
    let mut turns = [
        (there.0, replay(&there.1.with(34, &port), false)),
        (back.0, replay(&back.1.with(36, &port), true)),
    ];
    while !stop.load(Ordering::Relaxed) {
        for (index, (ifindex, replay)) in turns.iter_mut().enumerate() {
            stage.make(replay).unwrap();
            stage.run_any("replay", *ifindex, ROW).unwrap();
            *replay = stage.made().unwrap();
            if index == 0 {
                sent.fetch_add(u64::from(ROW), Ordering::Relaxed);
            }
        }
    }
}

#[test]
fn no_packet_of_a_hundred_million_goes_to_a_wrong_pod() {
    kernel_test!();
    let mut bench = Bench::with(Setup {
        conntrack: ROOM,
        conntrack_limit: u32::MAX,
        ..Setup::default()
    });
    bench.configure(|config| config.report = 0);
    for direction in [Direction::Egress, Direction::Ingress] {
        bench.set_cell(direction, RED_PLACE.0, GREEN_PLACE.1, 0);
        bench.set_cell(direction, GREEN_PLACE.0, RED_PLACE.1, 0);
    }
    let program = bench.program(Hook::FromPod);
    let netns = bench.netns.name().to_owned();
    let (a, b, other) = (bench.pod_a, bench.pod_b, bench.vxlan);
    let watch = [(b, POD_B_MAC), (other, POD_A_MAC)].map(|(ifindex, pod)| Watched {
        ifindex,
        mac: mac(pod),
        ..Watched::default()
    });
    let mut stages = [(); FLOWS.len()].map(|()| Stage::new().unwrap());
    let watched: Vec<_> = stages
        .iter_mut()
        .map(|stage| {
            stage.target(&program).unwrap();
            stage.watch(watch).unwrap()
        })
        .collect();
    let frames = [
        (a, Frame::tcp(POD_A, 0, POD_B, 80, ACK)),
        (b, Frame::tcp(POD_B, 80, POD_A, 0, ACK)),
    ];
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut owner = Owner { bench, other, epoch: 1 };
    let mut turns = 0_u64;
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for (stage, flows) in stages.iter_mut().zip(FLOWS) {
            let (frames, netns, stop, sent) = (frames.clone(), &netns, &stop, &sent);
            scope.spawn(move || in_netns(netns, || forward(stage, frames, flows, stop, sent)).unwrap());
        }
        let began = Instant::now();
        while sent.load(Ordering::Relaxed) < PACKETS && began.elapsed() < Duration::from_mins(5) {
            let has_it = turns.is_multiple_of(4);
            let long = Duration::from_micros(500 + turns % 7 * 700);
            thread::sleep(if has_it { 4 * long } else { long });
            let change: fn(&mut Owner) = match turns % 4 {
                0 | 2 => |owner| owner.bench.remove_pod(POD_B),
                1 => Owner::other,
                _ => Owner::b,
            };
            change(&mut owner);
            turns += 1;
            if !turns.is_multiple_of(4) {
                // B has the address no more: what has not begun by now does not reach it.
                thread::sleep(GRACE);
                let before = delivered(&watched);
                thread::sleep(GRACE);
                let after = delivered(&watched);
                // A packet is counted when its CPU goes on to the next one.
                let late = after[0] - before[0];
                assert!(late <= FLOWS.len() as u64, "{late} packets after change {turns}");
            }
        }
    });
    let sent = sent.into_inner();
    let [to_b, to_other] = delivered(&watched);
    println!("{sent} packets, {to_b} of them to B, through {turns} changes");
    assert!(sent >= PACKETS, "only {sent} packets in time");
    assert_eq!(to_other, 0);
    for map in &watched {
        let torn = [0, 1].map(|index| map.get(&index, 0).unwrap().torn);
        assert_eq!(torn, [0, 0], "with another pod's MAC");
    }
    // Else nothing was tried: B had its address for a good part of the time, and flows were armed in it.
    assert!(to_b > PACKETS / 10 && turns > 1000, "{to_b} to B, {turns} changes");
}
