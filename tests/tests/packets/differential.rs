//! The programs against the model: the same packets and changes of tables, and every verdict, byte, counter and entry of
//! conntrack compared. `PROPTEST_CASES` says how many sequences of up to 400 steps; seeds of those that failed are kept
//! in `proptest-regressions`, and are tried first.

use super::{
    bench::{BLUE, BLUE_PLACE, Bench, GREEN, GREEN_COLUMN, RED, RED_PLACE, TUNNEL_MTU},
    frame::{
        Frame, GATEWAY_A, GATEWAY_B, NOBODY, NOBODY6, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC,
        POD_B6, REMOTE, REMOTE6,
    },
    model::{self, Cell, Entry, Frontend, Model, Network, Pod, Remote, Translation, Verdict},
    run::{BadPacket, Outcome, every_one_is_dropped_for_its_own_reason},
    services::frontend,
};
use abi::{
    ConntrackEntry, ConntrackKey, Direction, DropReason, Hook, Identity,
    conntrack::{FRONTEND, TRANSLATED, Timeouts, VIA_NODE},
    network::UNROUTED,
    node::{GATEWAY_V4, GATEWAY_V6},
    policy::{CELL_DENY, CELL_PORT_SET, ICMP, ICMPV6, TCP, UDP},
};
use harness::{in_netns, kernel_test};
use proptest::{
    prelude::{Strategy, any},
    test_runner::{Config, FileFailurePersistence, TestCaseError, TestRunner},
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const OWN: [u8; 4] = [198, 51, 100, 1];
const ROUTER: [u8; 4] = [198, 51, 100, 7];
const VIP: [u8; 4] = [172, 16, 0, 1];
const OTHER_VIP: [u8; 4] = [172, 16, 0, 2];
const VIP6: [u8; 16] = [0xfd, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const NETWORK: Identity = Identity(20);

/// What stands behind the first service.
const BACKENDS: [([u8; 4], u16); 3] = [(POD_B, 8080), (REMOTE, 8080), (POD_A, 8080)];

/// The port sets that there are.
const SETS: [&[(Option<u8>, u16, u16)]; 3] = [
    &[(Some(TCP), 8080, 8080)],
    &[(Some(UDP), 0, 65535), (Some(TCP), 80, 80)],
    &[(None, 1000, 6000), (Some(ICMP), 8, 8), (Some(ICMPV6), 128, 128)],
];

/// A sequence of numbers that a seed stands for (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    /// True so many times in a hundred.
    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// A packet on its way into a program.
#[derive(Clone, Debug)]
struct Arrival {
    hook: Hook,
    frame: Frame,
    ifindex: u32,
    came_in_by: u32,
    outer: Option<([u8; 4], Identity)>,
}

/// Both sides, and what has passed.
struct Arena {
    bench: Bench,
    model: Model,
    /// What was sent, and what became of it.
    history: Vec<(Arrival, Frame)>,
    counted: [Vec<u64>; 2],
    packets: u64,
    changes: u64,
    /// The model's verdicts, by reason and by path.
    total: [Vec<u64>; 2],
    /// The first service has others than [`BACKENDS`].
    other_backends: bool,
}

fn ip4(octets: [u8; 4]) -> IpAddr {
    octets.into()
}

fn is_v6(frame: &Frame) -> bool {
    frame.0[12] == 0x86
}

impl Arena {
    fn new() -> Self {
        let mut bench = Bench::new();
        bench.forward();
        bench.address(OWN);
        // Time does not pass in the model, and nobody's share is spent.
        let long = 1 << 20;
        bench.configure(|config| {
            config.timeouts = Timeouts {
                tcp_syn: long,
                tcp_established: long,
                tcp_half_closed: long,
                tcp_closed: long,
                unreplied: long,
                assured: long,
            };
            config.conntrack_limit = u32::MAX;
        });
        for _ in 0..2 {
            for (number, rules) in (0..).zip(SETS) {
                bench.set_port_set(number, rules);
            }
            bench.flip();
        }
        let mut model = Model {
            own: vec![ip4(NODE), ip4(OWN)],
            nodes: vec![ip4(OTHER_NODE)],
            generation: u32::try_from(bench.generation).unwrap(),
            vxlan: bench.vxlan,
            underlay: bench.underlay,
            tunnel_mtu: TUNNEL_MTU as usize,
            ..Model::default()
        };
        for (address, length, identity) in [
            (IpAddr::from([10, 0, 0, 0]), 8, None),
            (IpAddr::from([224, 0, 0, 0]), 3, None),
            (IpAddr::from([203, 0, 113, 0]), 24, Some(NETWORK)),
            (
                IpAddr::from([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                8,
                None,
            ),
            (
                IpAddr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                10,
                None,
            ),
            (
                IpAddr::from([0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                8,
                None,
            ),
        ] {
            let known = identity.unwrap_or(Identity::WORLD);
            let flags = if identity.is_some() { 0 } else { UNROUTED };
            bench.put_network(address, length, [known; 2], [known.0; 2], flags);
            model.networks.push(Network {
                address,
                length,
                identity,
                column: known.0,
            });
        }
        let mut arena = Self {
            bench,
            model,
            history: Vec::new(),
            counted: Default::default(),
            packets: 0,
            changes: 0,
            total: Default::default(),
            other_backends: false,
        };
        for pod in [POD_A.into(), POD_A6.into(), POD_B.into(), POD_B6.into()] {
            arena.put_pod(pod, None, 1, 1);
        }
        for remote in [IpAddr::from(REMOTE), REMOTE6.into()] {
            let entry = Remote {
                identity: GREEN,
                column: GREEN_COLUMN,
                node: ip4(OTHER_NODE),
                owner: 100,
                epoch: 1,
            };
            arena.model.remotes.insert(remote, entry);
        }
        let b = ip4(POD_B);
        let (b6, remote) = (IpAddr::from(POD_B6), ip4(REMOTE));
        for (at, protocol, port, backends, affinity) in [
            (
                VIP.into(),
                TCP,
                80,
                vec![(b, 8080), (remote, 8080), (ip4(POD_A), 8080)],
                0,
            ),
            (VIP.into(), UDP, 53, vec![(b, 5353), (ip4(POD_A), 5353)], 0),
            (VIP.into(), TCP, 81, vec![], 0),
            (OTHER_VIP.into(), TCP, 80, vec![(b, 8080), (remote, 8080)], 60),
            (VIP6.into(), TCP, 80, vec![(b6, 8080), (REMOTE6.into(), 8080)], 0),
            (VIP6.into(), UDP, 53, vec![(b6, 5353), (POD_A6.into(), 5353)], 0),
            (
                Ipv4Addr::UNSPECIFIED.into(),
                TCP,
                30080,
                vec![(b, 8080), (remote, 8080)],
                0,
            ),
            (
                Ipv4Addr::UNSPECIFIED.into(),
                UDP,
                30053,
                vec![(b, 5353), (remote, 5353)],
                0,
            ),
            (Ipv6Addr::UNSPECIFIED.into(), TCP, 30080, vec![(b6, 8080)], 0),
        ] {
            arena.put_service(at, protocol, port, &backends, affinity);
        }
        arena.counted = arena.bench.counted();
        arena.total = arena.counted.clone().map(|counts| vec![0; counts.len()]);
        arena
    }

    fn put_pod(&mut self, address: IpAddr, identity: Option<Identity>, owner: u32, epoch: u32) {
        let is_a = [IpAddr::from(POD_A), POD_A6.into()].contains(&address);
        let (ifindex, macs, place, own, number) = if is_a {
            (self.bench.pod_a, (POD_A_MAC, GATEWAY_A), RED_PLACE, RED, 1)
        } else {
            (self.bench.pod_b, (POD_B_MAC, GATEWAY_B), BLUE_PLACE, BLUE, 2)
        };
        let identity = identity.unwrap_or(own);
        let place = match identity {
            RED => RED_PLACE,
            BLUE => BLUE_PLACE,
            _ => place,
        };
        let owner = owner * 10 + number;
        self.bench.owner = owner;
        self.bench.put_pod(address, [identity; 2], place, epoch, ifindex);
        let pod = Pod {
            ifindex,
            mac: macs.0,
            gateway_mac: macs.1,
            identity,
            row: place.0,
            column: place.1,
            owner,
            epoch,
        };
        self.model.pods.insert(address, pod);
    }

    fn put_service(&mut self, at: IpAddr, protocol: u8, port: u16, backends: &[(IpAddr, u16)], affinity: u32) {
        let entry = self.bench.put_service(frontend(at, protocol, port), backends, affinity);
        let number = |slot: usize| u32::try_from(entry.slots[slot / 4] >> (slot % 4 * 16) & 0xffff).unwrap();
        let family = entry.key.family;
        let known = (0_u32..).zip(&entry.backend).filter(|(_, backend)| backend.port != 0);
        let known = known.map(|(number, backend)| {
            let end = (abi::address::ip(family, backend.address), u16::from_be(backend.port));
            (number, end)
        });
        let frontend = Frontend {
            backends: known.collect(),
            slots: (0..abi::service::SLOTS as usize).map(number).collect(),
            affinity: affinity != 0,
        };
        let place = (!at.is_unspecified()).then_some(at);
        self.model
            .services
            .insert((place, at.is_ipv6(), protocol, port), frontend);
    }

    /// Nothing has happened yet.
    fn begin(&mut self) {
        self.bench.forget();
        self.model.forget();
        self.history.clear();
        self.counted = self.bench.counted();
        for pod in [POD_A.into(), POD_A6.into(), POD_B.into(), POD_B6.into()] {
            self.put_pod(pod, None, 1, 1);
        }
        for parity in 0..2 {
            self.bench.allow_everything(parity);
            self.model.cells[parity].clear();
        }
        if std::mem::take(&mut self.other_backends) {
            self.put_service(
                VIP.into(),
                TCP,
                80,
                &BACKENDS.map(|(address, port)| (address.into(), port)),
                0,
            );
        }
    }

    fn step(&mut self, seed: u64) -> Result<(), TestCaseError> {
        let mut dice = Dice(seed);
        if dice.chance(4) {
            self.change(&mut dice);
            self.changes += 1;
            return Ok(());
        }
        let arrival = self.arrival(&mut dice);
        self.packets += 1;
        let Arrival {
            hook,
            frame,
            ifindex,
            came_in_by,
            outer,
        } = &arrival;
        let expected = self.model.run(
            *hook,
            &frame.0,
            *ifindex,
            *came_in_by,
            outer.map(|(node, vni)| (ip4(node), vni)),
        );
        let actual = self.bench.run_here(*hook, frame, *ifindex, *came_in_by, *outer);
        let counter = match &expected {
            Verdict::Dropped(reason) | Verdict::Told(reason, _) => Some((0, *reason as usize)),
            Verdict::Sent { path, .. } => Some((1, *path as usize)),
            Verdict::Passed => None,
        };
        if let Some((map, index)) = counter {
            self.counted[map][index] += 1;
            self.total[map][index] += 1;
        }
        if !agree(&expected, &actual) {
            return Err(TestCaseError::fail(format!(
                "{arrival:?}\n model: {expected:?}\nkernel: {actual:?}"
            )));
        }
        if let Outcome::Sent { frame, .. } = actual {
            self.history.push((arrival, frame));
        }
        Ok(())
    }

    /// What is remembered and counted.
    fn compare(&mut self) -> Result<(), TestCaseError> {
        let counted = self.bench.counted();
        if counted != self.counted {
            let expected = std::mem::replace(&mut self.counted, counted.clone());
            return Err(TestCaseError::fail(format!(
                "counters\n model: {expected:?}\nkernel: {counted:?}"
            )));
        }
        let mut actual: Vec<(model::Key, Entry)> = self.bench.flows().iter().map(entry).collect();
        let mut expected: Vec<(model::Key, Entry)> = self
            .model
            .conntrack
            .clone()
            .into_iter()
            .map(|(key, entry)| (key, comparable(entry)))
            .collect();
        actual.sort_by_key(|(key, _)| *key);
        expected.sort_by_key(|(key, _)| *key);
        if actual != expected {
            let only = |these: &[(model::Key, Entry)], those: &[(model::Key, Entry)]| -> Vec<(model::Key, Entry)> {
                these.iter().filter(|one| !those.contains(one)).cloned().collect()
            };
            return Err(TestCaseError::fail(format!(
                "conntrack\n model: {:?}\nkernel: {:?}",
                only(&expected, &actual),
                only(&actual, &expected)
            )));
        }
        Ok(())
    }

    fn change(&mut self, dice: &mut Dice) {
        let pods: [IpAddr; 4] = [POD_A.into(), POD_B.into(), POD_A6.into(), POD_B6.into()];
        let pod = dice.pick(&pods);
        let (owner, epoch) = self
            .model
            .pods
            .get(&pod)
            .map_or((1, 1), |pod| (pod.owner / 10, pod.epoch));
        match dice.below(20) {
            // A policy comes into force: some cells of it.
            0..=6 => self.flip(dice),
            7..=8 => self.put_pod(pod, Some(dice.pick(&[RED, BLUE])), owner, epoch + 1),
            // Another pod at the address.
            9..=10 => self.put_pod(pod, None, owner + 1, 1),
            11 => {
                if self.model.pods.remove(&pod).is_some() {
                    self.bench.remove_pod(pod);
                }
            }
            12..=13 => self.put_pod(pod, None, owner, epoch),
            14..=18 => {
                let flows = self.bench.flows();
                if !flows.is_empty() {
                    let (key, known) = flows[dice.below(flows.len())];
                    self.bench.forget_flow(&key);
                    self.model.conntrack.remove(&entry(&(key, known)).0);
                }
            }
            _ if dice.chance(20) => {
                let all = BACKENDS.map(|(address, port)| (ip4(address), port));
                let some: Vec<(IpAddr, u16)> = all.into_iter().filter(|_| dice.chance(60)).collect();
                self.put_service(VIP.into(), TCP, 80, &some, 0);
                self.other_backends = true;
            }
            _ => {}
        }
    }

    /// Both generations are filled alike but for what changes.
    fn flip(&mut self, dice: &mut Dice) {
        let next = 1 - (self.model.generation & 1) as usize;
        self.bench.allow_everything(next);
        self.model.cells[next].clear();
        self.bench.flip();
        self.model.generation += 1;
        for _ in 0..dice.below(4) {
            let egress = dice.chance(50);
            let row = dice.pick(&[RED_PLACE.0, BLUE_PLACE.0]);
            let column = dice.pick(&[
                RED_PLACE.1,
                BLUE_PLACE.1,
                GREEN_COLUMN,
                Identity::HOST.0,
                Identity::WORLD.0,
                Identity::REMOTE_NODE.0,
                NETWORK.0,
            ]);
            let direction = if egress { Direction::Egress } else { Direction::Ingress };
            let (number, cell) = match dice.below(SETS.len() * 2) {
                set if set < SETS.len() => {
                    let number = CELL_PORT_SET + u16::try_from(set).unwrap();
                    (number, Cell::Ports(SETS[set].to_vec()))
                }
                _ => (CELL_DENY, Cell::Deny),
            };
            self.bench.set_cell(direction, row, column, number);
            self.model.cells[next].insert((egress, row, column), cell);
        }
    }
}

/// An entry of the kernel's as the model has it. Of a frontend's, nothing depends on the generation and the epochs.
fn entry((key, entry): &(ConntrackKey, ConntrackEntry)) -> (model::Key, Entry) {
    let end = |address, port: u16| (abi::address::ip(key.family, address), u16::from_be(port));
    let ends = [end(key.lower, key.lower_port), end(key.upper, key.upper_port)];
    let opener = entry.originator as usize;
    let peers = [entry.peers[opener], entry.peers[1 - opener]].map(|peer| (peer.owner, peer.epoch));
    let known = &entry.translation;
    let translated = entry.state & (TRANSLATED | FRONTEND) != 0;
    let model = Entry {
        state: entry.state,
        generation: entry.generation,
        peers,
        originator: ends[opener],
        account: entry.account,
        translation: translated.then(|| Translation {
            to: end(known.address, known.port),
            client_port: u16::from_be(known.client_port),
            backend: known.backend,
        }),
        via: (entry.state & VIA_NODE != 0).then(|| abi::address::ip(abi::Family::V4 as u8, known.address)),
    };
    (model::key(key.protocol, ends[0], ends[1]), comparable(model))
}

fn comparable(mut entry: Entry) -> Entry {
    if entry.state & FRONTEND != 0 {
        entry.generation = 0;
        entry.peers = entry.peers.map(|(owner, _)| (owner, 0));
    }
    entry
}

/// Whether both did the same. In a checksum all bits set are the same number as none (RFC 1624, section 3).
fn agree(expected: &Verdict, actual: &Outcome) -> bool {
    let same = |one: &[u8], other: &Frame| {
        one.len() == other.0.len()
            && one
                .chunks(2)
                .zip(other.0.chunks(2))
                .all(|(one, other)| one == other || matches!((one, other), ([0, 0], [255, 255]) | ([255, 255], [0, 0])))
    };
    match (expected, actual) {
        (Verdict::Dropped(one), Outcome::Dropped(other)) => one == other,
        (Verdict::Told(one, message), Outcome::Told(other, frame)) => one == other && same(message, frame),
        (Verdict::Passed, Outcome::Passed) => true,
        (
            Verdict::Sent {
                path,
                ifindex,
                tunnel,
                frame: expected,
            },
            Outcome::Sent {
                path: sent,
                ifindex: to,
                tunnel: key,
                frame,
            },
        ) => {
            let key = key.map(|(vni, node)| (vni, ip4(node)));
            (path, ifindex, *tunnel) == (sent, to, key) && same(expected, frame)
        }
        _ => false,
    }
}

// The generator.

const PORTS: [u16; 10] = [80, 8080, 53, 5353, 81, 30080, 30053, 8472, 4000, 4001];
const ANY4: [[u8; 4]; 14] = [
    POD_A,
    POD_B,
    POD_A,
    POD_B,
    REMOTE,
    NODE,
    OTHER_NODE,
    OWN,
    NOBODY,
    ROUTER,
    VIP,
    OTHER_VIP,
    GATEWAY_V4,
    [10, 9, 9, 9],
];
const ANY6: [[u8; 16]; 9] = [
    POD_A6,
    POD_B6,
    POD_A6,
    POD_B6,
    REMOTE6,
    NOBODY6,
    VIP6,
    GATEWAY_V6.0,
    [0xfd, 9, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9],
];

fn tcp_or_udp(dice: &mut Dice, from: u16, to: u16) -> (u8, Vec<u8>) {
    let mut header = [from.to_be_bytes(), to.to_be_bytes()].concat();
    match dice.below(20) {
        0..=10 => {
            header.extend([dice.byte(), 0, 0, 1, 0, 0, 0, dice.byte()]);
            let flags = dice.pick(&[2, 2, 2, 16, 16, 18, 17, 4, 20, 0, 24, 3]);
            header.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
            header.extend(vec![7; dice.below(8)]);
            (TCP, header)
        }
        11..=18 => {
            let payload = dice.below(24);
            header.extend(u16::try_from(8 + payload).unwrap().to_be_bytes());
            header.extend([0, 0]);
            header.extend(vec![9; payload]);
            (UDP, header)
        }
        _ => {
            header.extend([0; 12]);
            (132, header)
        }
    }
}

impl Arena {
    fn arrival(&self, dice: &mut Dice) -> Arrival {
        let recent = self.history.len().saturating_sub(12);
        let mut arrival = match dice.below(20) {
            0..=7 if !self.history.is_empty() => {
                let (sent, frame) = &self.history[recent + dice.below(self.history.len() - recent)];
                self.answer(dice, sent, frame)
            }
            8..=9 if !self.history.is_empty() => {
                let (sent, _) = &self.history[recent + dice.below(self.history.len() - recent)];
                let mut again = sent.clone();
                if dice.chance(50) && again.frame.0.len() > 48 && !is_v6(&again.frame) && again.frame.0[23] == TCP {
                    again.frame.0[47] = dice.pick(&[2, 16, 17, 4, 18]);
                    again.frame = again.frame.summed();
                }
                again
            }
            _ => self.fresh(dice),
        };
        if dice.chance(10) {
            mangle(dice, &mut arrival.frame.0);
        }
        arrival
    }

    /// Where a packet from this address comes in.
    fn enter(&self, dice: &mut Dice, frame: Frame) -> Arrival {
        let source: IpAddr = if is_v6(&frame) {
            <[u8; 16]>::try_from(&frame.0[22..38]).unwrap().into()
        } else {
            <[u8; 4]>::try_from(&frame.0[26..30]).unwrap().into()
        };
        let by_pod_b = [IpAddr::from(POD_B), POD_B6.into()].contains(&source);
        let by_pod = by_pod_b || [IpAddr::from(POD_A), POD_A6.into()].contains(&source);
        let remote = [IpAddr::from(REMOTE), REMOTE6.into()].contains(&source);
        let hook = if dice.chance(3) {
            dice.pick(&Hook::ALL)
        } else if by_pod {
            Hook::FromPod
        } else if remote {
            Hook::FromOverlay
        } else if source == ip4(OTHER_NODE) {
            dice.pick(&[Hook::FromOverlay, Hook::FromOverlay, Hook::FromNetdev])
        } else if source == ip4(NODE) || source == ip4(OWN) {
            Hook::ToPod
        } else {
            dice.pick(&[Hook::ToPod, Hook::FromNetdev, Hook::FromNetdev, Hook::FromOverlay])
        };
        let vni = if remote {
            GREEN
        } else if source == ip4(OTHER_NODE) {
            Identity::REMOTE_NODE
        } else {
            Identity::WORLD
        };
        let vni = if dice.chance(4) {
            dice.pick(&[RED, GREEN, Identity::HOST, Identity::WORLD, Identity(0)])
        } else {
            vni
        };
        let node = if dice.chance(4) {
            dice.pick(&[NODE, NOBODY])
        } else {
            OTHER_NODE
        };
        let pods = [self.bench.pod_a, self.bench.pod_b];
        let ifindex = match hook {
            Hook::FromPod if dice.chance(3) => dice.pick(&pods),
            Hook::FromPod => pods[usize::from(by_pod_b)],
            Hook::FromOverlay => self.bench.vxlan,
            Hook::FromNetdev => self.bench.underlay,
            // The one that has the destination, mostly.
            Hook::ToPod => {
                let to_b = if is_v6(&frame) {
                    frame.0[38..54] == POD_B6
                } else {
                    frame.0[30..34] == POD_B
                };
                pods[usize::from(to_b != dice.chance(5))]
            }
        };
        let own = source == ip4(NODE) || source == ip4(OWN);
        // Whether a link-local address is the node's own is for the routes of its links to say.
        let from_here = own != (dice.chance(5) && source != IpAddr::from(GATEWAY_V6.0));
        Arrival {
            hook,
            frame,
            ifindex,
            came_in_by: if hook == Hook::ToPod && from_here {
                0
            } else {
                self.bench.underlay
            },
            outer: (hook == Hook::FromOverlay && !dice.chance(2)).then_some((node, vni)),
        }
    }

    fn fresh(&self, dice: &mut Dice) -> Arrival {
        if dice.chance(3) {
            return self.link(dice);
        }
        let v6 = dice.chance(30);
        let port = |dice: &mut Dice| match dice.below(10) {
            0 => u16::try_from(dice.below(65536)).unwrap(),
            1..=3 => dice.pick(&[4000, 4001, 4002, 5000]),
            _ => dice.pick(&PORTS),
        };
        let (from, to) = (
            if dice.chance(70) {
                dice.pick(&[4000, 4001, 4002, 5000])
            } else {
                port(dice)
            },
            port(dice),
        );
        let (protocol, payload) = match dice.below(20) {
            0 => {
                let kind = dice.pick(if v6 {
                    &[128, 129, 3, 1, 130, 200][..]
                } else {
                    &[8, 0, 3, 11, 13][..]
                });
                let body = [kind, 0, 0, 0, 0, dice.pick(&[1, 2]), 0, 1];
                (if v6 { ICMPV6 } else { ICMP }, body.to_vec())
            }
            1 => (dice.pick(&[ICMP, ICMPV6, 89, 47, 50, 51]), vec![0; 24]),
            _ => tcp_or_udp(dice, from, to),
        };
        let frame = if v6 {
            let (source, destination) = (dice.pick(&ANY6), dice.pick(&ANY6));
            let plain = Frame::ipv6(source, destination, protocol, &payload);
            let plain = if dice.chance(90) {
                plain.summed_if_whole()
            } else {
                plain
            };
            if dice.chance(15) { extended(dice, &plain) } else { plain }
        } else {
            let (source, destination) = (dice.pick(&ANY4), dice.pick(&ANY4));
            let plain = Frame::ipv4(source, destination, protocol, &payload);
            let plain = if dice.chance(90) {
                plain.summed_if_whole()
            } else {
                plain
            };
            match dice.below(20) {
                0 => plain.piece(7, 0, true),
                1 => plain.piece(7, dice.pick(&[8, 16, 24, 64]), dice.chance(50)),
                2 => plain.ttl(dice.pick(&[0, 1, 2])),
                3 => {
                    let length = 1300 + dice.below(300);
                    let mut plain = plain;
                    plain.0.resize(14 + length, 0);
                    let more = u16::try_from(length).unwrap().to_be_bytes();
                    plain.with(16, &more).with(20, &[dice.pick(&[0, 0x40]), 0])
                }
                _ => plain,
            }
        };
        self.enter(dice, frame)
    }

    /// ARP and neighbour discovery.
    fn link(&self, dice: &mut Dice) -> Arrival {
        let mac = dice.pick(&[POD_A_MAC, POD_B_MAC]);
        let frame = if dice.chance(50) {
            let target = dice.pick(&[GATEWAY_V4, GATEWAY_V4, POD_B]);
            Frame::arp(dice.pick(&[1, 1, 2]), mac, dice.pick(&[POD_A, POD_B]), target)
        } else {
            let target = dice.pick(&[GATEWAY_V6.0, GATEWAY_V6.0, POD_B6]);
            Frame::solicitation(dice.pick(&[POD_A6, POD_B6]), mac, target).summed()
        };
        let frame = if dice.chance(90) { frame.with(6, &mac) } else { frame };
        Arrival {
            hook: dice.pick(&[
                Hook::FromPod,
                Hook::FromPod,
                Hook::FromPod,
                Hook::ToPod,
                Hook::FromOverlay,
            ]),
            frame,
            ifindex: if mac == POD_A_MAC {
                self.bench.pod_a
            } else {
                self.bench.pod_b
            },
            came_in_by: 0,
            outer: Some((OTHER_NODE, GREEN)),
        }
    }

    /// What whoever got a packet may say to it: an answer, or an error about it.
    fn answer(&self, dice: &mut Dice, sent: &Arrival, got: &Frame) -> Arrival {
        let _ = sent;
        let v6 = is_v6(got);
        let transport = if v6 { 54 } else { 34 };
        let protocol = if v6 { got.0[20] } else { got.0[23] };
        if got.0[12..14] == [8, 6] || got.0.len() < transport + 8 {
            return self.fresh(dice);
        }
        let body = &got.0[transport..];
        let (addresses, length) = if v6 { (22, 16) } else { (26, 4) };
        let source = &got.0[addresses..addresses + length];
        let destination = &got.0[addresses + length..addresses + 2 * length];
        if dice.chance(15) {
            let kind = if v6 {
                dice.pick(&[1, 2, 3, 4])
            } else {
                dice.pick(&[3, 11, 12])
            };
            let mut payload = vec![kind, dice.pick(&[0, 3, 4]), 0, 0, 0, 0, 5, 0];
            payload.extend(&got.0[14..got.0.len().min(14 + 28 + dice.below(80))]);
            // By who got it, or by a router on the way.
            let by_router = dice.chance(30);
            let frame = if v6 {
                let from = if by_router {
                    NOBODY6
                } else {
                    destination.try_into().unwrap()
                };
                Frame::ipv6(from, source.try_into().unwrap(), ICMPV6, &payload)
            } else {
                let from = if by_router {
                    ROUTER
                } else {
                    destination.try_into().unwrap()
                };
                Frame::ipv4(from, source.try_into().unwrap(), ICMP, &payload)
            };
            return self.enter(dice, frame.summed_if_whole());
        }
        let mut payload = body.to_vec();
        match protocol {
            TCP | UDP | 132 => {
                payload[..2].copy_from_slice(&body[2..4]);
                payload[2..4].copy_from_slice(&body[..2]);
                if protocol == TCP && payload.len() > 13 {
                    payload[13] = dice.pick(&[18, 18, 16, 16, 17, 4, 20, 2]);
                }
            }
            ICMP => payload[0] = 0,
            ICMPV6 => payload[0] = 129,
            _ => {}
        }
        let frame = if v6 {
            Frame::ipv6(
                destination.try_into().unwrap(),
                source.try_into().unwrap(),
                protocol,
                &payload,
            )
        } else {
            Frame::ipv4(
                destination.try_into().unwrap(),
                source.try_into().unwrap(),
                protocol,
                &payload,
            )
        };
        self.enter(dice, frame.summed_if_whole())
    }
}

/// With extension headers before the payload.
fn extended(dice: &mut Dice, plain: &Frame) -> Frame {
    let (source, destination) = (
        <[u8; 16]>::try_from(&plain.0[22..38]).unwrap(),
        <[u8; 16]>::try_from(&plain.0[38..54]).unwrap(),
    );
    let (mut next, mut payload) = (plain.0[20], plain.0[54..].to_vec());
    for _ in 0..=dice.below(2) {
        let number = dice.pick(&[0, 43, 44, 44, 44, 60, 51, 135]);
        let mut header = if number == 44 {
            let place = dice.pick(&[0, 1, 8, 16, 17, 24]);
            vec![next, 0, 0, place, 0, 0, 0, dice.pick(&[7, 8])]
        } else {
            let units = dice.pick(&[0, 0, 1, 40]);
            let mut header = vec![0; (usize::from(units) + 1) * 8];
            (header[0], header[1]) = (next, units);
            header
        };
        if number == 43 {
            header[3] = dice.pick(&[0, 0, 1]);
        }
        payload = [header, payload].concat();
        next = number;
    }
    Frame::ipv6(source, destination, next, &payload)
}

/// Spoils a frame.
fn mangle(dice: &mut Dice, frame: &mut Vec<u8>) {
    match dice.below(6) {
        // The kernel runs no program on a frame without a whole IP header in it.
        0 => frame.truncate(dice.below(frame.len()).max(54)),
        1 => frame.extend(vec![0; dice.below(16)]),
        // Not the addresses: those of the node the kernel's routes decide about.
        _ => {
            let at = dice.below(frame.len());
            let is_address = if frame[12] == 0x86 {
                (22..54).contains(&at)
            } else {
                (26..34).contains(&at)
            };
            let is_type = (12..14).contains(&at);
            if is_type {
                let kind: [u8; 2] = dice.pick(&[[8, 0], [0x86, 0xdd], [0x81, 0], [0x88, 0xa8], [0x12, 0x34]]);
                if !(frame[12..14] == [8, 6] || kind == [8, 0] || kind == [0x86, 0xdd]) {
                    frame[12..14].copy_from_slice(&kind);
                }
            } else if !is_address {
                frame[at] = dice.byte();
            }
        }
    }
}

/// What the programs and the model once differed over, and the model was right.
const FOUND: &[BadPacket] = &[
    (
        DropReason::NotLocal,
        "a later fragment to nobody here, whose first one is not known",
        |b| {
            b.from_overlay(
                &Frame::ipv4(REMOTE, NOBODY, 17, &[0; 24]).piece(7, 16, false),
                OTHER_NODE,
                GREEN,
            )
        },
    ),
    (DropReason::UnknownDestination, "the same to the gateway", |b| {
        b.from_pod_a(&Frame::ipv4(POD_A, GATEWAY_V4, 17, &[0; 24]).piece(7, 16, false))
    }),
    (
        DropReason::NoBackends,
        "a later fragment of TCP to a service without backends: it has no header that could be reset",
        |b| {
            b.put_service(frontend(IpAddr::from(VIP), TCP, 80), &[], 0);
            let first = Frame::tcp(POD_A, 4000, VIP, 80, 2);
            b.from_pod_a(&Frame::ipv4(POD_A, VIP, TCP, &[&first.0[34..54], &[0; 4]].concat()).piece(7, 0, true));
            b.from_pod_a(&Frame::ipv4(POD_A, VIP, TCP, &[0; 24]).piece(7, 24, false))
        },
    ),
];

#[test]
fn what_was_found_stays_found() {
    kernel_test!();
    every_one_is_dropped_for_its_own_reason(FOUND);
}

#[test]
fn the_programs_do_what_the_model_does() {
    kernel_test!();
    let mut arena = Arena::new();
    let netns = arena.bench.netns.name().to_owned();
    in_netns(&netns, || {
        let config = Config {
            cases: std::env::var("PROPTEST_CASES").map_or(400, |cases| cases.parse().unwrap()),
            failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
            source_file: Some(file!()),
            ..Config::default()
        };
        let steps = proptest::collection::vec(any::<u64>().no_shrink(), 1..400);
        let arena = std::cell::RefCell::new(&mut arena);
        let result = TestRunner::new(config).run(&steps, |seeds| {
            let mut arena = arena.borrow_mut();
            arena.begin();
            for seed in seeds {
                arena.step(seed)?;
            }
            arena.compare()
        });
        let arena = arena.into_inner();
        println!("{} packets, {} changes of tables", arena.packets, arena.changes);
        let named = |index: usize| DropReason::from_number(u8::try_from(index).unwrap()).map(DropReason::name);
        let reasons = arena.total[0]
            .iter()
            .enumerate()
            .filter_map(|(index, count)| Some((named(index)?, count)));
        let paths = abi::Path::ALL
            .iter()
            .map(|path| (path.name(), &arena.total[1][*path as usize]));
        println!("{:?}", reasons.chain(paths).collect::<Vec<_>>());
        if let Err(failure) = result {
            panic!("{failure}");
        }
    })
    .unwrap();
}
