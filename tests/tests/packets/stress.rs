//! Very many packets on established flows, while what they were let open by changes.

use super::{
    bench::{BLUE, BLUE_PLACE, Bench, GREEN, RED_PLACE, Setup},
    frame::{ACK, Frame, POD_A, POD_A_MAC, POD_B, POD_B_MAC},
    stage::{Replay, Stage, Watch, Watched},
};
use abi::{Direction, Hook};
use harness::{Stop, amount, in_netns, kernel_test};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Packets from A, in all; some 100 million in a soak.
fn packets_wanted() -> u64 {
    amount("WASMGATE_STRESS_PACKETS", 10_000_000, 100_000_000)
}

/// Packets in a row.
const ROW: u32 = 6000;
/// First port, and flows that take turns, on each CPU that forwards: some that stay, and more than the map of flows has room
/// for, so that its elements go from one flow to another all the time.
const FLOWS: [(u16, u32); 2] = [(10_000, 100), (20_000, 3000)];
const ROOM: u32 = 1024;
/// Ports of flows to C are so much higher.
const TO_C: u16 = 20_000;
/// Row and column of the pod that nobody may talk to.
const GREEN_PLACE: (u32, u32) = (3, 18);
/// How long a program may run that has begun before a change.
const GRACE: Duration = Duration::from_millis(1);

const POD_C: [u8; 4] = [10, 1, 0, 4];
/// The interface behind which somebody else has B's address at times: any that exists.
const OTHER: u32 = 1;

/// Ways that packets may go.
const A_TO_B: u32 = 0;
const B_TO_A: u32 = 1;
const A_TO_C: u32 = 2;
const C_TO_A: u32 = 3;

/// Who has B's address, in turn: B, nobody, another pod, which A must not reach, nobody again.
struct Owner {
    bench: Bench,
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
        let epoch = self.epoch;
        self.bench.put_pod(POD_B, [GREEN; 2], GREEN_PLACE, epoch, OTHER);
    }
}

fn packets(watches: &[Watch], way: u32) -> u64 {
    watches.iter().map(|watch| watch.packets(way)).sum()
}

/// What somebody sends, with many source or destination ports in turn.
struct Row {
    ifindex: u32,
    replay: Replay,
    from_a: bool,
}

/// To B and C and back.
fn rows([a, b, c]: [u32; 3], (first, flows): (u16, u32)) -> Vec<Row> {
    let ends = [(b, POD_B, first), (c, POD_C, first + TO_C)];
    let both_ways = ends.into_iter().flat_map(|(ifindex, pod, port)| {
        [
            (a, Frame::tcp(POD_A, port, pod, 80, ACK), true),
            (ifindex, Frame::tcp(pod, 80, POD_A, port, ACK), false),
        ]
    });
    both_ways
        .map(|(ifindex, frame, from_a)| {
            let mut replay = Replay::of(&frame);
            replay.watch = 1;
            if from_a {
                replay.source_ports = flows;
            } else {
                replay.destination_ports = flows;
            }
            Row {
                ifindex,
                replay,
                from_a,
            }
        })
        .collect()
}

/// Sends all rows in turn, until it is told to stop.
fn forward(stage: &mut Stage, rows: &mut [Row], stop: &AtomicBool, sent: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        for row in &mut *rows {
            stage.make(&row.replay).unwrap();
            stage.run_any("replay", row.ifindex, ROW).unwrap();
            row.replay = stage.made().unwrap();
            if row.from_a {
                sent.fetch_add(u64::from(ROW), Ordering::Relaxed);
            }
        }
    }
}

#[test]
fn no_packet_goes_to_a_wrong_pod() {
    kernel_test!();
    let wanted = packets_wanted();
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
    let (a, b, c) = (bench.pod_a, bench.pod_b, bench.underlay);
    bench.owner = 5;
    bench.put_pod(POD_C, [BLUE; 2], BLUE_PLACE, 1, c);
    let program = bench.program(Hook::FromPod);
    let netns = bench.netns.name().to_owned();
    // Of all pods of the bench, B alone has another MAC.
    let ways = [
        Watched::new(b, POD_B_MAC, POD_A, POD_B),
        Watched::new(a, POD_A_MAC, POD_B, POD_A),
        Watched::new(c, POD_A_MAC, POD_A, POD_C),
        Watched::new(a, POD_A_MAC, POD_C, POD_A),
    ];
    let mut stages = [(); FLOWS.len()].map(|()| Stage::new().unwrap());
    let watches = stages.each_mut().map(|stage| {
        stage.target(&program).unwrap();
        stage.watch(ways).unwrap()
    });
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut owner = Owner { bench, epoch: 1 };
    let mut turns = 0_u64;
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        for (stage, flows) in stages.iter_mut().zip(FLOWS) {
            let (netns, stop, sent) = (&netns, &stop, &sent);
            let mut rows = rows([a, b, c], flows);
            scope.spawn(move || in_netns(netns, || forward(stage, &mut rows, stop, sent)).unwrap());
        }
        let began = Instant::now();
        while sent.load(Ordering::Relaxed) < wanted && began.elapsed() < Duration::from_mins(5) {
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
            if turns.is_multiple_of(4) {
                continue;
            }
            // B has the address no more: what has not begun by now neither reaches it nor comes from it.
            thread::sleep(GRACE);
            let before = [A_TO_B, B_TO_A].map(|way| packets(&watches, way));
            thread::sleep(GRACE);
            let after = [A_TO_B, B_TO_A].map(|way| packets(&watches, way));
            // A packet is counted when its CPU goes on to the next one.
            let late = after[0] - before[0] + after[1] - before[1];
            assert!(late <= FLOWS.len() as u64, "{late} packets after change {turns}");
        }
        owner.b();
        let seen = packets(&watches, A_TO_B);
        // Until all flows have come round again.
        while packets(&watches, A_TO_B) < seen + 20 * u64::from(ROW) && began.elapsed() < Duration::from_mins(6) {
            thread::sleep(GRACE);
        }
    });
    let sent = sent.into_inner();
    let arrived = [A_TO_B, B_TO_A, A_TO_C, C_TO_A].map(|way| packets(&watches, way));
    println!("{sent} packets from A, {arrived:?} arrived, through {turns} changes");
    assert!(sent >= wanted, "only {sent} packets in time");
    assert_eq!(
        watches.each_ref().map(Watch::stray),
        [0, 0],
        "went where nobody should get them"
    );
    // Else nothing was tried: flows went on for a good part of the time, and took the fast path in it.
    assert!(arrived[0] > wanted / 20 && arrived[2] > wanted / 5, "{arrived:?}");
    assert!(turns > wanted / 100_000, "{turns} changes");
    let armed = owner
        .bench
        .flows()
        .into_iter()
        .filter(|(_, entry)| entry.links[0].slot != 0);
    assert!(armed.count() > 50);
}
