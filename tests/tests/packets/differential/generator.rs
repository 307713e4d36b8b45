//! What comes in: packets that somebody has a reason to send, answers to what was sent, and anything else.

use super::{
    super::bench::{GREEN, RED},
    super::frame::{
        Frame, NOBODY, NOBODY6, NODE, OTHER_NODE, POD_A, POD_A_MAC, POD_A6, POD_B, POD_B_MAC, POD_B6, REMOTE, REMOTE6,
    },
    super::run::Arrival,
    arena::{Arena, OTHER_SECOND, OTHER_SECOND6, OTHER_VIP, OWN, ROUTER, SHARED, VIP, VIP6, ip4},
};
use abi::{
    Hook, Identity,
    node::{GATEWAY_V4, GATEWAY_V6},
    policy::{ICMP, ICMPV6, TCP, UDP},
};
use std::net::IpAddr;

/// A sequence of numbers that a seed stands for (`SplitMix64`).
pub struct Dice(pub u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    /// True so many times in a hundred.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

fn is_v6(frame: &Frame) -> bool {
    frame.0[12] == 0x86
}

const PORTS: [u16; 10] = [80, 8080, 53, 5353, 81, 30080, 30053, 8472, 4000, 4001];
const ANY4: [[u8; 4]; 16] = [
    POD_A,
    POD_B,
    POD_A,
    POD_B,
    REMOTE,
    NODE,
    OTHER_NODE,
    OTHER_SECOND,
    SHARED,
    OWN,
    NOBODY,
    ROUTER,
    VIP,
    OTHER_VIP,
    GATEWAY_V4,
    [10, 9, 9, 9],
];
const ANY6: [[u8; 16]; 10] = [
    OTHER_SECOND6,
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

/// `::ffff:10.1.0.2`.
const RESERVED6: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 0, 2];

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
    pub fn arrival(&self, dice: &mut Dice) -> Arrival {
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
        let other_node = [ip4(OTHER_NODE), ip4(OTHER_SECOND), OTHER_SECOND6.into()].contains(&source);
        let hook = if dice.chance(3) {
            dice.pick(&Hook::ALL)
        } else if by_pod {
            Hook::FromPod
        } else if remote {
            Hook::FromOverlay
        } else if other_node {
            dice.pick(&[Hook::FromOverlay, Hook::FromOverlay, Hook::FromNetdev])
        } else if source == ip4(NODE) || source == ip4(OWN) {
            Hook::ToPod
        } else {
            dice.pick(&[Hook::ToPod, Hook::FromNetdev, Hook::FromNetdev, Hook::FromOverlay])
        };
        let vni = if remote {
            GREEN
        } else if other_node {
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
            dice.pick(&[NODE, NOBODY, OTHER_SECOND])
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
            outer_destination: if dice.chance(2) { OWN } else { NODE },
            segment: 0,
        }
    }

    fn fresh(&self, dice: &mut Dice) -> Arrival {
        if dice.chance(3) {
            return self.link(dice);
        }
        if dice.chance(40) {
            return self.sensible(dice);
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
                    &[128, 129, 3, 1, 130, 160, 161, 200][..]
                } else {
                    &[8, 0, 3, 11, 13, 14, 42, 43, 5][..]
                });
                let body = [kind, 0, 0, 0, 0, dice.pick(&[0, 1, 2, 13]), 0, dice.pick(&[0, 1, 13])];
                (if v6 { ICMPV6 } else { ICMP }, body.to_vec())
            }
            1 => (dice.pick(&[ICMP, ICMPV6, 89, 47, 50, 51]), vec![0; 24]),
            _ => tcp_or_udp(dice, from, to),
        };
        let frame = if v6 {
            let (source, destination) = (dice.pick(&ANY6), dice.pick(&ANY6));
            let destination = if dice.chance(2) { RESERVED6 } else { destination };
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

    /// What somebody has a reason to send.
    fn sensible(&self, dice: &mut Dice) -> Arrival {
        let from = dice.pick(&[4000, 4001, 4002, 4003, 4004]);
        let syn = dice.pick(&[2, 2, 2, 16, 17, 4]);
        let frame = match dice.below(14) {
            0 | 1 => Frame::tcp(dice.pick(&[POD_A, POD_B]), from, dice.pick(&[VIP, OTHER_VIP]), 80, syn),
            2 => Frame::udp(dice.pick(&[POD_A, POD_B]), from, VIP, 53),
            3 => Frame::tcp6(dice.pick(&[POD_A6, POD_B6]), from, VIP6, 80, syn),
            4 => Frame::udp6(dice.pick(&[POD_A6, POD_B6]), from, VIP6, 53),
            5 | 6 => Frame::tcp(dice.pick(&[NOBODY, ROUTER]), from, NODE, 30080, syn),
            7 => Frame::udp(dice.pick(&[NOBODY, ROUTER]), from, NODE, 30053),
            8 => Frame::tcp(
                dice.pick(&[POD_A, POD_B]),
                from,
                dice.pick(&[NODE, OTHER_NODE]),
                30080,
                syn,
            ),
            // As another node sends on what came in by a node port of its own.
            9 => Frame::tcp(NOBODY, from, dice.pick(&[POD_A, POD_B]), 8080, syn),
            // Into the middle of what goes through a service.
            10 => Frame::tcp(
                dice.pick(&[POD_B, POD_A]),
                8080,
                dice.pick(&[POD_A, POD_B]),
                from,
                dice.pick(&[2, 18, 16]),
            ),
            11 => Frame::tcp(dice.pick(&[POD_B, POD_A]), from, dice.pick(&[POD_A, POD_B]), 8080, syn),
            12 => Frame::tcp(dice.pick(&[POD_A, POD_B]), 8080, GATEWAY_V4, from, dice.pick(&[18, 16])),
            _ => {
                let to = dice.pick(&[VIP, NODE, POD_B, REMOTE]);
                let (port, source) = match to {
                    NODE => (30053, NOBODY),
                    _ => (53, POD_A),
                };
                let whole = Frame::udp(source, from, to, port);
                let piece = Frame::ipv4(source, to, UDP, &[&whole.0[34..42], &[0; 24]].concat());
                let (offset, more) =
                    dice.pick(&[(0, true), (0, true), (32, true), (32, false), (64, false), (16, false)]);
                piece.piece(dice.pick(&[7, 8]), offset, more)
            }
        };
        let whole = frame.0[12] == 0x86 || frame.0[20..22] == [0x40, 0];
        self.enter(dice, if whole { frame.summed() } else { frame })
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
            outer_destination: NODE,
            segment: 0,
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
