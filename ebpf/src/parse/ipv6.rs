//! IPv6 (RFC 8200), with the extension headers that may stand before a transport header.

use super::{ETHERNET_LEN, IPV6_LEN, L3, MAX_EXTENSIONS, MAX_L4, Upper, load, read};
use crate::packet::{Flow, Fragment};
use abi::{DropReason, Family, address::Address, policy::ICMP};
use aya_ebpf::programs::TcContext;

/// Extension headers that are carried at the most.
const MAX_HEADERS: usize = 6;

// Next header values (IANA, "IPv6 Extension Header Types").
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const DESTINATION_OPTIONS: u8 = 60;

#[inline(always)]
pub(super) fn header(ctx: &TcContext, flow: &mut Flow) -> Result<Upper, DropReason> {
    let start: [u8; 8] = read(ctx, L3)?;
    flow.ends.source = read(ctx, L3 + 8)?;
    flow.ends.destination = read(ctx, L3 + 24)?;
    flow.family = Family::V6 as u8;
    flow.protocol = start[6];
    if start[0] >> 4 != 6 {
        return Err(DropReason::InvalidHeader);
    }
    if is_reserved(&flow.ends.destination) && !is_multicast(&flow.ends.destination) {
        return Err(DropReason::ReservedAddress);
    }
    if is_reserved(&flow.ends.source) && !(is_unspecified(&flow.ends.source) && is_multicast(&flow.ends.destination)) {
        return Err(DropReason::ReservedAddress);
    }
    let payload = u32::from(u16::from_be_bytes([start[4], start[5]]));
    if payload + (ETHERNET_LEN + IPV6_LEN) as u32 > ctx.len() {
        return Err(DropReason::Truncated);
    }
    extensions(ctx, flow, payload)
}

/// Walks the extension headers: none in nearly all packets.
#[inline(always)]
fn extensions(ctx: &TcContext, flow: &mut Flow, payload: u32) -> Result<Upper, DropReason> {
    let (mut next, mut offset, mut length) = (flow.protocol, L3 + IPV6_LEN, payload);
    for index in 0..=MAX_HEADERS {
        let size = match next {
            // Only right behind the IPv6 header (RFC 8200, section 4.1).
            HOP_BY_HOP if index > 0 => return Err(DropReason::InvalidHeader),
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let header: [u8; 4] = load(ctx, offset)?;
                // A source route that is not at its end (RFC 5095 deprecates the one that was common).
                if next == ROUTING && header[3] != 0 {
                    return Err(DropReason::ExtensionHeaders);
                }
                next = header[0];
                (usize::from(header[1]) + 1) * 8
            }
            FRAGMENT => {
                let header: [u8; 8] = load(ctx, offset)?;
                next = header[0];
                let word = u16::from_be_bytes([header[2], header[3]]);
                let identification = u32::from_ne_bytes([header[4], header[5], header[6], header[7]]);
                let rest = length.checked_sub(8).ok_or(DropReason::Truncated)?;
                flow.set_fragment(identification, u32::from(word & 0xfff8), word & 1 != 0, rest)?;
                if flow.fragment == Fragment::Later {
                    return Ok(Upper {
                        protocol: next,
                        offset,
                        length: rest,
                    });
                }
                8
            }
            ICMP => return Err(DropReason::UnknownProtocol),
            _ => {
                return Ok(Upper {
                    protocol: next,
                    offset,
                    length,
                });
            }
        };
        if size > MAX_EXTENSIONS || offset + size > MAX_L4 {
            return Err(DropReason::ExtensionHeaders);
        }
        offset += size;
        length = length.checked_sub(size as u32).ok_or(DropReason::Truncated)?;
    }
    Err(DropReason::ExtensionHeaders)
}

#[inline(always)]
fn is_multicast(address: &Address) -> bool {
    address.0[0] == 0xff
}

#[inline(always)]
fn is_unspecified(address: &Address) -> bool {
    address.words() == [0; 4]
}

/// Multicast, unspecified, loopback, or IPv4 in the form of IPv6 (RFC 4291, section 2.5): `::ffff:0:0/96`, and the
/// deprecated `::/96`.
#[inline(always)]
fn is_reserved(address: &Address) -> bool {
    let [one, two, three, _] = address.words();
    is_multicast(address) || (one | two == 0 && matches!(u32::from_be(three), 0 | 0xffff))
}
