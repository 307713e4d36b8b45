//! IPv4 (RFC 791). Without options every offset is a constant, which keeps the verifier's work small.

use super::{ETHERNET_LEN, IPV4_LEN, L3, Upper, read, total};
use crate::packet::Flow;
use abi::{DropReason, Family, address::Address, policy::ICMPV6};
use aya_ebpf::programs::TcContext;

const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;

#[inline(always)]
pub fn header(ctx: &TcContext, flow: &mut Flow) -> Result<Upper, DropReason> {
    let header: [u8; IPV4_LEN] = read(ctx, L3)?;
    flow.family = Family::V4 as u8;
    flow.protocol = header[9];
    flow.ends.source = Address::v4([header[12], header[13], header[14], header[15]]);
    flow.ends.destination = Address::v4([header[16], header[17], header[18], header[19]]);

    let (version, words) = (header[0] >> 4, header[0] & 0x0f);
    let total = total(ctx, u32::from(u16::from_be_bytes([header[2], header[3]])));
    if version != 4 || words < 5 || total < IPV4_LEN as u32 {
        return Err(DropReason::InvalidHeader);
    }
    if words > 5 {
        return Err(DropReason::IpOptions);
    }
    if total + ETHERNET_LEN as u32 > ctx.len() {
        return Err(DropReason::Truncated);
    }
    if flow.protocol == ICMPV6 {
        return Err(DropReason::UnknownProtocol);
    }
    let length = total - IPV4_LEN as u32;
    let word = u16::from_be_bytes([header[6], header[7]]);
    let identification = u32::from(u16::from_ne_bytes([header[4], header[5]]));
    let offset = u32::from(word & OFFSET) * 8;
    flow.set_fragment(identification, offset, word & MORE_FRAGMENTS != 0, length)?;
    Ok(Upper {
        protocol: flow.protocol,
        offset: L3 + IPV4_LEN,
        length,
    })
}
