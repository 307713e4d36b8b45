//! ICMP (RFC 792) and ICMPv6 (RFC 4443): requests with their replies (echo, timestamp, extended echo of RFC 8335), and errors
//! about other flows.

use super::{
    IPV4_LEN, IPV6_LEN,
    ipv6::{DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ROUTING},
    load,
};
use crate::packet::{Flow, Fragment, SCTP, TCP, UDP};
use abi::{
    DropReason, Family,
    address::Address,
    policy::{ICMP, ICMPV6},
};
use aya_ebpf::programs::TcContext;

// Types of ICMP.
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO: u8 = 8;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;
const TIMESTAMP: u8 = 13;
const TIMESTAMP_REPLY: u8 = 14;
const EXTENDED_ECHO: u8 = 42;
const EXTENDED_ECHO_REPLY: u8 = 43;

// Types of ICMPv6: errors are 1 to 4; then what stays on the link (RFC 2710, 3810, 4861).
const LAST_ERROR6: u8 = 4;
const ECHO6: u8 = 128;
const ECHO_REPLY6: u8 = 129;
const EXTENDED_ECHO6: u8 = 160;
const EXTENDED_ECHO_REPLY6: u8 = 161;
const FIRST_LINK: u8 = 130;
const LAST_LINK: u8 = 137;
const MULTICAST_LISTENER_REPORT: u8 = 143;

/// Extension headers that a quoted packet may have.
const MAX_QUOTED: usize = 4;
/// Bytes of an ICMP header; an error quotes a packet behind it.
const ICMP_LEN: usize = 8;

/// What the message belongs to.
enum Kind {
    /// A request or its reply: the request's type, or zero for a plain echo's.
    Request(u8),
    Reply(u8),
    Error,
    Link,
}

#[inline(always)]
fn kind(protocol: u8, number: u8) -> Option<Kind> {
    match (protocol, number) {
        (ICMP, ECHO) | (ICMPV6, ECHO6) => Some(Kind::Request(0)),
        (ICMP, TIMESTAMP | EXTENDED_ECHO) | (ICMPV6, EXTENDED_ECHO6) => Some(Kind::Request(number)),
        (ICMP, ECHO_REPLY) | (ICMPV6, ECHO_REPLY6) => Some(Kind::Reply(0)),
        (ICMP, TIMESTAMP_REPLY) => Some(Kind::Reply(TIMESTAMP)),
        (ICMP, EXTENDED_ECHO_REPLY) => Some(Kind::Reply(EXTENDED_ECHO)),
        (ICMPV6, EXTENDED_ECHO_REPLY6) => Some(Kind::Reply(EXTENDED_ECHO6)),
        (ICMP, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM) | (ICMPV6, 1..=LAST_ERROR6) => Some(Kind::Error),
        (ICMPV6, FIRST_LINK..=LAST_LINK | MULTICAST_LISTENER_REPORT) => Some(Kind::Link),
        _ => None,
    }
}

#[inline(always)]
pub fn message(ctx: &TcContext, flow: &mut Flow, offset: usize) -> Result<(), DropReason> {
    let header: [u8; 8] = super::read(ctx, offset)?;
    let identifier = u16::from_ne_bytes([header[4], header[5]]);
    match kind(flow.protocol, header[0]) {
        Some(Kind::Request(of)) => {
            flow.request = true;
            flow.ends.source_port = identifier;
            flow.ends.destination_port = u16::from(of).to_be();
        }
        Some(Kind::Reply(of)) => {
            flow.answer = true;
            flow.ends.source_port = u16::from(of).to_be();
            flow.ends.destination_port = identifier;
        }
        Some(Kind::Error) if flow.fragment == Fragment::None => return quoted(ctx, flow, offset + ICMP_LEN),
        Some(Kind::Error) => return Err(DropReason::IcmpUnrelated),
        Some(Kind::Link) => flow.link = header[0],
        None => return Err(DropReason::IcmpType),
    }
    Ok(())
}

/// Steps over the extension headers of a quoted packet to its transport header, which only a first fragment has.
#[inline(always)]
fn quoted_extensions(ctx: &TcContext, flow: &mut Flow, first: u8, start: usize) -> Result<usize, DropReason> {
    let (mut next, mut offset) = (first, start);
    for _ in 0..MAX_QUOTED {
        let header: [u8; 4] = load(ctx, offset)?;
        offset += match next {
            FRAGMENT if u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0 => {
                return Err(DropReason::IcmpUnrelated);
            }
            FRAGMENT => 8,
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(header[1]) + 1) * 8,
            _ => break,
        };
        next = header[0];
    }
    flow.protocol = next;
    Ok(offset)
}

/// An ICMP error takes the flow that it quotes, turned round: it belongs to that flow and travels against it. What it
/// quotes must have been sent by the one whom the error is for; to whom that went is not always who sends the error.
#[inline(never)]
fn quoted(ctx: &TcContext, flow: &mut Flow, offset: usize) -> Result<(), DropReason> {
    let (sender, transport);
    if flow.family == Family::V6 as u8 {
        let start: [u8; 8] = load(ctx, offset)?;
        sender = load::<Address>(ctx, offset + 8)?;
        flow.about = load(ctx, offset + 24)?;
        if start[0] >> 4 != 6 {
            return Err(DropReason::IcmpUnrelated);
        }
        transport = quoted_extensions(ctx, flow, start[6], offset + IPV6_LEN)?;
    } else {
        let header: [u8; IPV4_LEN] = load(ctx, offset)?;
        // Without options, and the first fragment if it is one: the others have no ports.
        if header[0] != 0x45 || header[6] & 0x1f != 0 || header[7] != 0 {
            return Err(DropReason::IcmpUnrelated);
        }
        sender = Address::v4([header[12], header[13], header[14], header[15]]);
        flow.about = Address::v4([header[16], header[17], header[18], header[19]]);
        flow.protocol = header[9];
        transport = offset + IPV4_LEN;
    }
    if sender != flow.ends.destination {
        return Err(DropReason::IcmpUnrelated);
    }
    flow.related = true;
    flow.quoted = offset as u16;
    flow.quoted_transport = transport as u16;
    let ports: [u16; 4] = load(ctx, transport)?;
    match flow.protocol {
        TCP | UDP | SCTP => {
            flow.ends.destination_port = ports[0];
            flow.ends.source_port = ports[1];
        }
        ICMP | ICMPV6 => match kind(flow.protocol, (ports[0].to_ne_bytes())[0]) {
            Some(Kind::Request(of)) => {
                flow.ends.destination_port = ports[2];
                flow.ends.source_port = u16::from(of).to_be();
            }
            Some(Kind::Reply(of)) => {
                flow.ends.source_port = ports[2];
                flow.ends.destination_port = u16::from(of).to_be();
            }
            _ => return Err(DropReason::IcmpUnrelated),
        },
        _ => return Err(DropReason::IcmpUnrelated),
    }
    Ok(())
}
