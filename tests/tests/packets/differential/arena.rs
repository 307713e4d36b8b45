//! Both sides with the same tables, and changes of these.

use super::{
    super::{
        bench::{BLUE, BLUE_PLACE, Bench, GREEN, GREEN_COLUMN, RED, RED_PLACE, TUNNEL_MTU},
        frame::{
            Frame, GATEWAY_A, GATEWAY_B, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC, POD_B6, REMOTE,
            REMOTE6,
        },
        model::{Cell, Frontend, Model, Network, Pod, Remote, Verdict},
        run::{Arrival, Outcome},
        services::frontend,
    },
    compare::{agree, comparable, difference, entry},
    generator::Dice,
};
use abi::{
    Direction, Identity,
    conntrack::Timeouts,
    network::UNROUTED,
    policy::{CELL_DENY, CELL_PORT_SET, ICMP, ICMPV6, TCP, UDP},
};
use proptest::test_runner::TestCaseError;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const OWN: [u8; 4] = [198, 51, 100, 1];
pub const ROUTER: [u8; 4] = [198, 51, 100, 7];
pub const VIP: [u8; 4] = [172, 16, 0, 1];
pub const OTHER_VIP: [u8; 4] = [172, 16, 0, 2];
pub const VIP6: [u8; 16] = [0xfd, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const NETWORK: Identity = Identity(20);

/// What stands behind the first service.
const BACKENDS: [([u8; 4], u16); 3] = [(POD_B, 8080), (REMOTE, 8080), (POD_A, 8080)];

/// The port sets that there are.
const SETS: [&[(Option<u8>, u16, u16)]; 3] = [
    &[(Some(TCP), 8080, 8080)],
    &[(Some(UDP), 0, 65535), (Some(TCP), 80, 80)],
    &[(None, 1000, 6000), (Some(ICMP), 8, 8), (Some(ICMPV6), 128, 128)],
];

/// Both sides, and what has passed.
pub struct Arena {
    pub bench: Bench,
    pub model: Model,
    /// What was sent, and what became of it.
    pub history: Vec<(Arrival, Frame)>,
    pub counted: [Vec<u64>; 2],
    pub packets: u64,
    pub changes: u64,
    /// The model's verdicts, by reason and by path.
    pub total: [Vec<u64>; 2],
    /// The first service has others than [`BACKENDS`].
    other_backends: bool,
}

pub fn ip4(octets: [u8; 4]) -> IpAddr {
    octets.into()
}

/// Other addresses of the other node, and one that several nodes have.
pub const OTHER_SECOND: [u8; 4] = [198, 51, 100, 22];
pub const OTHER_SECOND6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x22];
pub const SHARED: [u8; 4] = [198, 51, 100, 77];

impl Arena {
    pub fn new() -> Self {
        let mut bench = Bench::new();
        bench.forward();
        bench.address(OWN);
        bench.put_node(OTHER_SECOND, Some(OTHER_NODE));
        bench.put_node(OTHER_SECOND6, Some(OTHER_NODE));
        bench.put_node(SHARED, None);
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
            nodes: [
                (ip4(OTHER_NODE), Some(ip4(OTHER_NODE))),
                (ip4(OTHER_SECOND), Some(ip4(OTHER_NODE))),
                (OTHER_SECOND6.into(), Some(ip4(OTHER_NODE))),
                (ip4(SHARED), None),
            ]
            .into(),
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
        arena.furnish();
        arena.counted = arena.bench.counted();
        arena.total = arena.counted.clone().map(|counts| vec![0; counts.len()]);
        arena
    }

    fn furnish(&mut self) {
        for pod in [POD_A.into(), POD_A6.into(), POD_B.into(), POD_B6.into()] {
            self.put_pod(pod, None, 1, 1);
        }
        for remote in [IpAddr::from(REMOTE), REMOTE6.into()] {
            let entry = Remote {
                identity: GREEN,
                column: GREEN_COLUMN,
                node: ip4(OTHER_NODE),
                owner: 100,
                epoch: 1,
            };
            self.model.remotes.insert(remote, entry);
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
            self.put_service(at, protocol, port, &backends, affinity);
        }
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
    pub fn begin(&mut self) {
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

    pub fn step(&mut self, seed: u64) -> Result<(), TestCaseError> {
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
            outer_destination,
            ..
        } = &arrival;
        let expected = self.model.run(
            *hook,
            &frame.0,
            *ifindex,
            *came_in_by,
            outer.map(|(node, vni)| (ip4(node), ip4(*outer_destination), vni)),
        );
        let actual = self.bench.run_here(&arrival);
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
    pub fn compare(&mut self) -> Result<(), TestCaseError> {
        let counted = self.bench.counted();
        if counted != self.counted {
            let expected = std::mem::replace(&mut self.counted, counted.clone());
            return Err(TestCaseError::fail(format!(
                "counters\n model: {expected:?}\nkernel: {counted:?}"
            )));
        }
        let mut actual: Vec<_> = self.bench.flows().iter().map(entry).collect();
        let mut expected: Vec<_> = self
            .model
            .conntrack
            .clone()
            .into_iter()
            .map(|(key, entry)| (key, comparable(entry)))
            .collect();
        actual.sort_by_key(|(key, _)| *key);
        expected.sort_by_key(|(key, _)| *key);
        if actual != expected {
            return Err(TestCaseError::fail(difference(&expected, &actual)));
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
            11 if self.model.pods.remove(&pod).is_some() => self.bench.remove_pod(pod),
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
