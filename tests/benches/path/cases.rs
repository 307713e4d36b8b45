//! The paths.

use abi::{AddressKey, DropReason, Hook, Identity, Path, ServiceKey, address::SHARED_SCOPE, policy::FIRST_POD_COLUMN};
use anyhow::ensure;
use harness::in_netns;
use hostd::plan::Shape;
use std::{cell::RefCell, net::IpAddr, rc::Rc};
use wasmgate_tests::{
    bench::{Bench, GREEN, Setup},
    frame::{ACK, Frame, NODE, OTHER_NODE, POD_A, POD_A6, POD_B, POD_B6, REMOTE, REMOTE6, SYN},
    stage::{REPEAT, Replay, Stage},
};

/// The case that all others are told by.
pub const YARDSTICK: &str = "yardstick";

const VIP: [u8; 4] = [172, 16, 0, 1];
const DENIED: [u8; 4] = [10, 2, 255, 1];

const REDIRECT: u32 = 7;
const SHOT: u32 = 2;
const UNSPEC: u32 = u32::MAX;

/// What becomes of every packet of a case.
#[derive(Clone, Copy)]
enum Fate {
    Sent(Path),
    Dropped(DropReason),
}

/// Packets into one of the programs.
struct Packets {
    bench: Rc<RefCell<Bench>>,
    hook: Hook,
    ifindex: u32,
    replay: Replay,
    fate: Fate,
    /// Packets in a round.
    repeat: u32,
}

enum Work {
    /// One of the stage's own programs, and what it returns.
    Alone(&'static str, u32),
    /// A step that one of them does so many times.
    Step(&'static str, u32),
    Packets(Packets),
}

/// One thing that is measured.
pub struct Case {
    pub name: &'static str,
    stage: Rc<RefCell<Stage>>,
    work: Work,
}

impl Packets {
    fn new(bench: &Rc<RefCell<Bench>>, hook: Hook, frame: &Frame, fate: Fate) -> Self {
        let mut replay = Replay::of(frame);
        let known = bench.borrow();
        let is_b = frame.0[26..30] == POD_B || frame.0[22..38] == POD_B6;
        let ifindex = match hook {
            Hook::FromPod if is_b => known.pod_b,
            Hook::FromPod | Hook::ToPod => known.pod_a,
            Hook::FromOverlay => known.vxlan,
            Hook::FromNetdev => known.underlay,
        };
        if hook == Hook::FromOverlay {
            (replay.outer, replay.vni) = (u32::from_be_bytes(OTHER_NODE), GREEN.0);
            replay.outer_destination = u32::from_be_bytes(NODE);
        }
        Self {
            bench: Rc::clone(bench),
            hook,
            ifindex,
            replay,
            fate,
            repeat: REPEAT,
        }
    }

    /// Sends so many, and checks what became of them; the answer is nanoseconds for each.
    fn send(&mut self, stage: &mut Stage, repeat: u32) -> anyhow::Result<f64> {
        let mut bench = self.bench.borrow_mut();
        stage.make(&self.replay)?;
        stage.target(&bench.program(self.hook))?;
        let before = count(&bench, self.fate);
        let netns = bench.netns.name().to_owned();
        let returns = match self.fate {
            Fate::Sent(_) => REDIRECT,
            Fate::Dropped(_) => SHOT,
        };
        let ifindex = self.ifindex;
        let taken = in_netns(&netns, || stage.run("replay", ifindex, repeat, returns))??;
        let counted = count(&bench, self.fate) - before;
        ensure!(
            counted == u64::from(repeat),
            "{counted} of {repeat} packets went where they should"
        );
        // The turns go on where they have come to.
        self.replay = stage.made()?;
        bench.loaded.target = None;
        Ok(taken)
    }

    /// The time that it takes to make them.
    fn make(&self, stage: &mut Stage) -> anyhow::Result<f64> {
        stage.make(&self.replay)?;
        let empty = stage.program("empty")?.fd()?.try_clone()?;
        stage.target(&empty)?;
        let netns = self.bench.borrow().netns.name().to_owned();
        let ifindex = self.ifindex;
        let repeat = self.repeat;
        in_netns(&netns, || stage.run("replay", ifindex, repeat, UNSPEC))?
    }
}

fn count(bench: &Bench, fate: Fate) -> u64 {
    let [drops, forwarded] = bench.counted();
    match fate {
        Fate::Sent(path) => forwarded[path as usize],
        Fate::Dropped(reason) => drops[reason as usize],
    }
}

impl Case {
    /// Nanoseconds a packet.
    pub fn round(&mut self) -> anyhow::Result<f64> {
        let stage = &mut *self.stage.borrow_mut();
        match &mut self.work {
            Work::Alone(name, returns) => stage.run(name, 1, REPEAT, *returns),
            Work::Step(name, times) => {
                let taken = stage.run(name, 1, REPEAT, UNSPEC)?;
                let nothing = stage.run("empty", 1, REPEAT, UNSPEC)?;
                Ok((taken - nothing) / f64::from(*times))
            }
            Work::Packets(packets) => {
                let making = packets.make(stage)?;
                let taken = packets.send(stage, packets.repeat)?;
                let nothing = stage.run("empty", 1, REPEAT, UNSPEC)?;
                Ok(taken - making + nothing)
            }
        }
    }
}

/// TCP with data, or without where it opens a connection.
fn tcp(from: IpAddr, port: u16, to: IpAddr, to_port: u16, flags: u8) -> Frame {
    let data = [7; 14];
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = Frame::tcp(from.octets(), port, to.octets(), to_port, flags).0[34..54].to_vec();
            Frame::ipv4(from.octets(), to.octets(), 6, &[&header[..], &data].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Frame::tcp6(from.octets(), port, to.octets(), to_port, flags).0[54..74].to_vec();
            Frame::ipv6(from.octets(), to.octets(), 6, &[&header[..], &data].concat())
        }
        _ => panic!("{from} and {to} are of two families"),
    }
}

/// Where a case's packets come from, and what they are.
struct Maker {
    stage: Rc<RefCell<Stage>>,
    cases: Vec<Case>,
}

impl Maker {
    fn alone(&mut self, name: &'static str, program: &'static str, returns: u32) {
        self.cases.push(Case {
            name,
            stage: Rc::clone(&self.stage),
            work: Work::Alone(program, returns),
        });
    }

    fn step(&mut self, name: &'static str, program: &'static str, times: u32) {
        self.cases.push(Case {
            name,
            stage: Rc::clone(&self.stage),
            work: Work::Step(program, times),
        });
    }

    /// Sends packets before anything is measured.
    fn send(&self, mut packets: Packets, count: u32) -> anyhow::Result<()> {
        packets.send(&mut self.stage.borrow_mut(), count)?;
        Ok(())
    }

    fn case(&mut self, name: &'static str, packets: Packets) {
        self.cases.push(Case {
            name,
            stage: Rc::clone(&self.stage),
            work: Work::Packets(packets),
        });
    }
}

/// A flow between pod A and somebody, opened and answered: what goes there, and what comes back.
struct Talk {
    there: (Hook, Path),
    back: (Hook, Path),
    frames: [Frame; 2],
}

impl Talk {
    fn tcp(a: IpAddr, port: u16, b: IpAddr, there: (Hook, Path), back: (Hook, Path)) -> Self {
        Self {
            there,
            back,
            frames: [tcp(a, port, b, 80, ACK), tcp(b, 80, a, port, ACK)],
        }
    }

    fn with_flags(frame: &Frame, flags: u8) -> Frame {
        let at = if frame.0[12] == 0x86 { 67 } else { 47 };
        frame.clone().with(at, &[flags])
    }

    /// Opens it, so many times with one source port after the other.
    fn open(&self, maker: &Maker, bench: &Rc<RefCell<Bench>>, flows: u32) -> anyhow::Result<()> {
        for (index, flags) in [(0, SYN), (1, SYN | ACK), (0, ACK)] {
            let (hook, path) = if index == 0 { self.there } else { self.back };
            let frame = Self::with_flags(&self.frames[index], flags);
            let mut packets = Packets::new(bench, hook, &frame, Fate::Sent(path));
            if index == 0 {
                packets.replay.source_ports = flows;
            } else {
                packets.replay.destination_ports = flows;
            }
            maker.send(packets, flows)?;
        }
        Ok(())
    }

    fn there(&self, bench: &Rc<RefCell<Bench>>) -> Packets {
        Packets::new(bench, self.there.0, &self.frames[0], Fate::Sent(self.there.1))
    }

    fn back(&self, bench: &Rc<RefCell<Bench>>) -> Packets {
        Packets::new(bench, self.back.0, &self.frames[1], Fate::Sent(self.back.1))
    }
}

/// Steps that the programs are made of, without what starting a program takes: `ebpf/src/primitives.rs`.
const STEPS: [(&str, &str, u32); 10] = [
    ("step_array_lookup", "sixteen_stamps", 16),
    ("step_address_lookup", "sixteen_addresses", 16),
    ("step_address_of_60000", "address_in_turn", 1),
    ("step_flow_lookup", "sixteen_flows", 16),
    ("step_flow_insert", "flow_insert", 1),
    ("step_ktime", "sixteen_times", 16),
    ("step_jiffies", "sixteen_jiffies", 16),
    ("step_set_tunnel_key", "set_tunnel_key", 1),
    ("step_set_and_get_tunnel_key", "set_and_get_tunnel_key", 1),
    ("step_change_type", "change_type", 1),
];

const NEAR: ((Hook, Path), (Hook, Path)) = ((Hook::FromPod, Path::Local), (Hook::FromPod, Path::Local));
const FAR: ((Hook, Path), (Hook, Path)) = ((Hook::FromPod, Path::Encap), (Hook::FromOverlay, Path::Overlay));

fn bench(identities: u32) -> Rc<RefCell<Bench>> {
    let mut bench = Bench::with(Setup {
        shape: Shape {
            rows: 256,
            columns: identities + 32,
            port_sets: 16,
            breakpoints: 64,
        },
        conntrack: 131_072,
        conntrack_limit: u32::MAX,
        tells: false,
    });
    for number in 0..identities {
        let [.., high, low] = number.to_be_bytes();
        let column = FIRST_POD_COLUMN + number;
        bench.put_remote_at(
            [10, 2, high, low],
            [Identity(0x04_0000 + number); 2],
            OTHER_NODE,
            column,
        );
    }
    bench.put_remote(REMOTE, [GREEN; 2], OTHER_NODE);
    Rc::new(RefCell::new(bench))
}

/// All that is measured, made ready.
pub fn all() -> anyhow::Result<Vec<Case>> {
    let stage = Rc::new(RefCell::new(Stage::new()?));
    let mut maker = Maker {
        stage,
        cases: Vec::new(),
    };
    maker.alone("empty", "empty", UNSPEC);
    maker.alone("bare_redirect", "bare_redirect", REDIRECT);
    maker.alone(YARDSTICK, "sixteen_lookups", UNSPEC);
    for (name, program, times) in STEPS {
        maker.step(name, program, times);
    }
    // Into a map that is full.
    maker.stage.borrow().run("flow_insert", 1, 200_000, UNSPEC)?;
    let few = bench(100);
    established(&mut maker, &few)?;
    first_packets(&mut maker, &few);
    many_flows(&mut maker)?;
    let many = bench(60_000);
    many_identities(&mut maker, &few, ["encap_100_identities", "new_flow_100_identities"])?;
    many_identities(
        &mut maker,
        &many,
        ["encap_60000_identities", "new_flow_60000_identities"],
    )?;
    Ok(maker.cases)
}

fn established(maker: &mut Maker, bench: &Rc<RefCell<Bench>>) -> anyhow::Result<()> {
    let near = Talk::tcp(POD_A.into(), 4000, POD_B.into(), NEAR.0, NEAR.1);
    let near6 = Talk::tcp(POD_A6.into(), 4000, POD_B6.into(), NEAR.0, NEAR.1);
    let far = Talk::tcp(POD_A.into(), 4000, REMOTE.into(), FAR.0, FAR.1);
    let far6 = Talk::tcp(POD_A6.into(), 4000, REMOTE6.into(), FAR.0, FAR.1);
    for (talk, names) in [
        (&near, ["same_node", "reply"]),
        (&far, ["encap", "overlay"]),
        (&near6, ["same_node_ipv6", "reply_ipv6"]),
        (&far6, ["encap_ipv6", "overlay_ipv6"]),
    ] {
        talk.open(maker, bench, 1)?;
        maker.case(names[0], talk.there(bench));
        maker.case(names[1], talk.back(bench));
    }
    let udp = Talk {
        there: NEAR.0,
        back: NEAR.1,
        frames: [Frame::udp(POD_A, 4000, POD_B, 53), Frame::udp(POD_B, 53, POD_A, 4000)],
    };
    for packets in [udp.there(bench), udp.back(bench)] {
        maker.send(packets, 1)?;
    }
    maker.case("same_node_udp", udp.there(bench));
    let address = AddressKey::from(IpAddr::from(VIP));
    let frontend = ServiceKey {
        address: address.address,
        port: 80_u16.to_be(),
        scope: SHARED_SCOPE,
        family: address.family,
        protocol: 6,
        zero: 0,
    };
    bench.borrow_mut().put_service(frontend, &[(POD_B.into(), 8080)], 0);
    let service = Talk {
        there: NEAR.0,
        back: NEAR.1,
        frames: [
            tcp(POD_A.into(), 5000, VIP.into(), 80, ACK),
            tcp(POD_B.into(), 8080, POD_A.into(), 5000, ACK),
        ],
    };
    service.open(maker, bench, 1)?;
    maker.case("service", service.there(bench));
    maker.case("service_reply", service.back(bench));
    Ok(())
}

/// Every packet another flow, up to the size of the map and far beyond.
fn new_flows(mut packets: Packets) -> Packets {
    packets.replay.source_ports = 50_000;
    packets.replay.destination_ports = 30_000;
    packets
}

fn first_packets(maker: &mut Maker, bench: &Rc<RefCell<Bench>>) {
    let open = tcp(POD_A.into(), 10_000, POD_B.into(), 1000, SYN);
    let packets = Packets::new(bench, Hook::FromPod, &open, Fate::Sent(Path::Local));
    maker.case("new_flow", new_flows(packets));
    // Nobody has decided anything about it.
    bench
        .borrow_mut()
        .put_remote_at(DENIED, [Identity(0x05_0001); 2], OTHER_NODE, 0);
    bench.borrow_mut().deny_egress(1, 0);
    let denied = tcp(POD_A.into(), 10_000, DENIED.into(), 80, SYN);
    let packets = Packets::new(bench, Hook::FromPod, &denied, Fate::Dropped(DropReason::EgressDenied));
    maker.case("denied_flow", packets);
}

fn many_flows(maker: &mut Maker) -> anyhow::Result<()> {
    for (name, flows) in [("flows_1", 1), ("flows_1000", 1000), ("flows_32000", 32_000)] {
        // A map of its own: new flows push out whatever is in the other one.
        let bench = bench(1);
        let talk = Talk::tcp(POD_A.into(), 10_000, POD_B.into(), NEAR.0, NEAR.1);
        talk.open(maker, &bench, flows)?;
        let mut packets = talk.there(&bench);
        packets.replay.source_ports = flows;
        // Every flow has its turns in each round, as it would if there was nothing else.
        packets.repeat = REPEAT.max(2 * flows);
        maker.case(name, packets);
    }
    Ok(())
}

fn many_identities(maker: &mut Maker, bench: &Rc<RefCell<Bench>>, names: [&'static str; 2]) -> anyhow::Result<()> {
    let identities = if names[0].contains("60000") { 60_000 } else { 100 };
    let to = [10, 2, 0, 0];
    let talk = Talk::tcp(POD_A.into(), 9000, REMOTE.into(), FAR.0, FAR.1);
    talk.open(maker, bench, 1)?;
    maker.case(names[0], talk.there(bench));
    let open = tcp(POD_A.into(), 10_000, to.into(), 1000, SYN);
    let packets = Packets::new(bench, Hook::FromPod, &open, Fate::Sent(Path::Encap));
    let mut packets = new_flows(packets);
    packets.replay.destinations = identities;
    maker.case(names[1], packets);
    Ok(())
}
