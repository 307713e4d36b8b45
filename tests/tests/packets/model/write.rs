//! What is written into packets, and what their senders are told, over plain bytes.

use super::{
    flows::Rewrite,
    packet::{ACK, FIN, Fragment, L3, Packet, RST, SYN, address, word},
};
use abi::{
    DropReason,
    policy::{ICMP, ICMPV6, TCP, UDP},
};
use std::net::IpAddr;

pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
        .sum()
}

/// RFC 1624, equation 3.
fn adjust(frame: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
    let before = u16::from_be_bytes([frame[at], frame[at + 1]]);
    let padding = &[0][..old.len() % 2];
    let old: Vec<u8> = old.iter().chain(padding).map(|byte| !byte).collect();
    let after = !fold(u64::from(!before) + sum(&old) + sum(new));
    frame[at..at + 2].copy_from_slice(&after.to_be_bytes());
}

/// Writes bytes, and mends the checksums that cover them.
fn put(frame: &mut [u8], at: usize, new: &[u8], checksums: &[usize]) {
    let old = frame[at..at + new.len()].to_vec();
    if old == new {
        return;
    }
    frame[at..at + new.len()].copy_from_slice(new);
    for checksum in checksums {
        adjust(frame, *checksum, &old, new);
    }
}

pub fn macs(frame: &mut [u8], destination: [u8; 6], source: [u8; 6]) {
    frame[..6].copy_from_slice(&destination);
    frame[6..12].copy_from_slice(&source);
}

pub fn one_hop(frame: &mut [u8], v6: bool) -> Result<(), DropReason> {
    let at = L3 + if v6 { 7 } else { 8 };
    if frame[at] <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let (hops, next) = (frame[at] - 1, frame[at + 1]);
    if v6 {
        frame[at] = hops;
    } else {
        put(frame, at, &[hops, next], &[L3 + 10]);
    }
    Ok(())
}

pub fn fits(frame: &[u8], v6: bool, mtu: usize) -> Result<(), DropReason> {
    let may_be_cut = !v6 && frame[L3 + 6] & 0x40 == 0;
    if frame.len() - L3 <= mtu || may_be_cut {
        Ok(())
    } else {
        Err(DropReason::TooBig)
    }
}

fn put_address(frame: &mut [u8], v6: bool, ip: usize, destination: bool, to: IpAddr, checksums: &[usize]) {
    let at = ip
        + match (v6, destination) {
            (false, false) => 12,
            (false, true) => 16,
            (true, false) => 8,
            (true, true) => 24,
        };
    let mut covering = checksums.to_vec();
    if !v6 {
        covering.push(ip + 10);
    }
    put(frame, at, &octets(to), &covering);
}

/// Turns an echo request into the reply to it.
pub fn pong(frame: &mut [u8], packet: &Packet) {
    let (source, destination) = (packet.source.0, packet.destination.0);
    let (to, from): ([u8; 6], [u8; 6]) = (frame[6..12].try_into().unwrap(), frame[..6].try_into().unwrap());
    macs(frame, to, from);
    put_address(frame, packet.v6, L3, false, destination, &[]);
    put_address(frame, packet.v6, L3, true, source, &[]);
    let (kind, code) = (if packet.v6 { 129 } else { 0 }, frame[packet.transport + 1]);
    put(frame, packet.transport, &[kind, code], &[packet.transport + 2]);
}

/// Writes what a service makes of a packet.
pub fn rewrite(frame: &mut [u8], packet: &Packet, rewrite: &Rewrite) {
    let Rewrite { seen, becomes } = rewrite;
    if packet.related {
        return rewrite_error(frame, packet, rewrite);
    }
    let has_ports = !matches!(packet.fragment, Fragment::Later | Fragment::Ahead);
    let at = packet.transport;
    let checksum = match packet.protocol {
        _ if !has_ports => None,
        TCP => Some(at + 16),
        UDP if word(frame, at + 6) == Ok(0) => None,
        UDP => Some(at + 6),
        _ => None,
    };
    let covering: Vec<usize> = checksum.into_iter().collect();
    put_address(frame, packet.v6, L3, false, becomes[0].0, &covering);
    put_address(frame, packet.v6, L3, true, becomes[1].0, &covering);
    if has_ports {
        put(frame, at, &becomes[0].1.to_be_bytes(), &covering);
        put(frame, at + 2, &becomes[1].1.to_be_bytes(), &covering);
    }
    if packet.protocol == UDP
        && let Some(at) = checksum
        && seen != becomes
        && frame[at..at + 2] == [0, 0]
    {
        frame[at..at + 2].fill(0xff);
    }
}

fn rewrite_error(frame: &mut [u8], packet: &Packet, rewrite: &Rewrite) {
    let Rewrite { seen, becomes } = rewrite;
    let v6 = packet.v6;
    let icmp = packet.transport + 2;
    let pseudo: &[usize] = if v6 { &[icmp] } else { &[] };
    if address(frame, L3 + if v6 { 8 } else { 12 }, v6) == Ok(seen[0].0) {
        put_address(frame, v6, L3, false, becomes[0].0, pseudo);
    }
    put_address(frame, v6, L3, true, becomes[1].0, pseudo);
    let before = frame[packet.quoted..].to_vec();
    let transport = packet.quoted_transport;
    let inner = transport + if packet.protocol == TCP { 16 } else { 6 };
    let covering: Vec<usize> = match word(frame, inner) {
        Ok(0) | Err(_) => Vec::new(),
        Ok(_) => vec![inner],
    };
    put_address(frame, v6, packet.quoted, true, becomes[0].0, &covering);
    put_address(frame, v6, packet.quoted, false, becomes[1].0, &covering);
    put(frame, transport, &becomes[1].1.to_be_bytes(), &covering);
    put(frame, transport + 2, &becomes[0].1.to_be_bytes(), &covering);
    let after = frame[packet.quoted..].to_vec();
    if before != after {
        adjust(frame, icmp, &before, &after);
    }
}

fn message(
    frame: &[u8],
    v6: bool,
    protocol: u8,
    from: IpAddr,
    to: IpAddr,
    mut body: Vec<u8>,
    checksum: usize,
) -> Vec<u8> {
    let mut covered = Vec::new();
    if protocol != ICMP {
        covered.extend([octets(from), octets(to)].concat());
        covered.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        covered.extend([0, 0, 0, protocol]);
    }
    covered.extend(&body);
    let value = !fold(sum(&covered));
    body[checksum..checksum + 2].copy_from_slice(&value.to_be_bytes());
    let length = u16::try_from(body.len() + if v6 { 0 } else { 20 })
        .unwrap()
        .to_be_bytes();
    let mut header = if v6 {
        vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64]
    } else {
        vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0]
    };
    header.extend([octets(from), octets(to)].concat());
    if !v6 {
        let value = !fold(sum(&header));
        header[10..12].copy_from_slice(&value.to_be_bytes());
    }
    [&frame[6..12], &frame[..6], &frame[12..14], &header, &body].concat()
}

/// What the sender of a dropped packet is told, if anything. `from` and `to` are the ends that are in the packet, and
/// `gateway` is who tells of what is no reset; of a connection that is `lost` a pod hears.
pub fn told(
    frame: &[u8],
    packet: &Packet,
    reason: DropReason,
    ends: (IpAddr, IpAddr),
    gateway: IpAddr,
    lost: bool,
    mtu: usize,
) -> Option<Vec<u8>> {
    let (sender, addressee) = ends;
    let refused = matches!(
        reason,
        DropReason::NoService | DropReason::NoBackends | DropReason::BackendGone
    );
    if packet.related || matches!(packet.fragment, Fragment::Later | Fragment::Ahead) {
        return None;
    }
    let denied = matches!(
        reason,
        DropReason::MidStream | DropReason::ServicePorts | DropReason::EgressDenied | DropReason::IngressDenied
    );
    if (refused || (denied && lost)) && packet.protocol == TCP {
        return reset(frame, packet, sender, addressee);
    }
    let (kind, code, value) = match (reason, packet.v6) {
        (DropReason::TooBig, false) => (3, 4, mtu),
        (DropReason::TooBig, true) => (2, 0, mtu),
        (DropReason::TtlExceeded, false) => (11, 0, 0),
        (DropReason::TtlExceeded, true) => (3, 0, 0),
        _ if refused && packet.v6 => (1, 4, 0),
        _ if refused => (3, 3, 0),
        _ => return None,
    };
    let quote = match (packet.v6, frame.len() - L3) {
        (false, _) => 28,
        (true, 88..) => 88,
        (true, _) => 48,
    };
    let mut body = vec![kind, code, 0, 0];
    body.extend(u32::try_from(value).unwrap().to_be_bytes());
    body.extend(&frame[L3..L3 + quote]);
    let protocol = if packet.v6 { ICMPV6 } else { ICMP };
    Some(message(frame, packet.v6, protocol, gateway, sender, body, 2))
}

fn reset(frame: &[u8], packet: &Packet, sender: IpAddr, addressee: IpAddr) -> Option<Vec<u8>> {
    if packet.flags & RST != 0 {
        return None;
    }
    let at = packet.transport;
    let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    let counts = u32::from(packet.flags & SYN != 0) + u32::from(packet.flags & FIN != 0);
    let (sequence, answered, flags) = if packet.flags & ACK != 0 {
        (number(at + 8), 0, RST)
    } else {
        (0, number(at + 4).wrapping_add(counts), RST | ACK)
    };
    let mut body = [&frame[at + 2..at + 4], &frame[at..at + 2]].concat();
    body.extend(sequence.to_be_bytes());
    body.extend(answered.to_be_bytes());
    body.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    Some(message(frame, packet.v6, TCP, addressee, sender, body, 16))
}
