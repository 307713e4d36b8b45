//! Parsing: frames and headers, checked before anything is believed. Without IPv4 options every offset is a constant,
//! which keeps the verifier's work small.

use crate::packet::{Flow, ICMP, ICMP_ECHO, SCTP, TCP, UDP};
use abi::{DropReason, Family};
use aya_ebpf::programs::TcContext;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

pub const ETHERNET_LEN: usize = 14;
const IPV4_LEN: usize = 20;

// Offsets into the frame (RFC 791, section 3.1).
pub const IPV4: usize = ETHERNET_LEN;
pub const IPV4_TTL: usize = IPV4 + 8;
pub const IPV4_CHECKSUM: usize = IPV4 + 10;
const L4: usize = IPV4 + IPV4_LEN;

const MORE_FRAGMENTS_OR_OFFSET: u16 = 0x3fff;

// ICMP types (RFC 792).
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO: u8 = ICMP_ECHO;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;

/// Offset of the packet that an ICMP error is about.
const QUOTED: usize = L4 + 8;

/// An ethernet header.
pub struct Frame {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

/// Reads `T` at `offset` of the frame, if it is in the part of the packet that can be read directly.
#[inline(always)]
pub fn read<T: Copy>(ctx: &TcContext, offset: usize) -> Result<T, DropReason> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return Err(DropReason::Truncated);
    }
    // SAFETY: the bounds were just checked; the verifier holds us to it. `T` is an integer or an array of bytes, for
    // which any bytes are a value.
    Ok(unsafe { core::ptr::read_unaligned(start as *const T) })
}

/// Writes `value` at `offset` of the frame.
#[inline(always)]
pub fn write<T: Copy>(ctx: &TcContext, offset: usize, value: T) -> Result<(), DropReason> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return Err(DropReason::Truncated);
    }
    // SAFETY: the bounds were just checked, and no reference into the packet is ever held.
    unsafe { core::ptr::write_unaligned(start as *mut T, value) };
    Ok(())
}

/// Makes the first `len` bytes of the frame directly readable, where the packet has so many.
#[inline(always)]
fn pull(ctx: &TcContext, len: usize) {
    if ctx.data() + len > ctx.data_end() {
        // Where this fails the reads that follow find too few bytes, and the packet is dropped as truncated.
        let _ = ctx.pull_data((len as u32).min(ctx.len()));
    }
}

/// The ethernet header. Answers only for ethertypes that are carried.
#[inline(always)]
pub fn frame(ctx: &TcContext) -> Result<Frame, DropReason> {
    pull(ctx, L4 + 20);
    // The kernel takes the outermost tag out of the frame before the hook; more stay in it.
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Err(DropReason::VlanTag);
    }
    let frame = Frame {
        destination: read(ctx, 0)?,
        source: read(ctx, 6)?,
        ethertype: u16::from_be(read(ctx, 12)?),
    };
    match frame.ethertype {
        ETHERTYPE_IPV4 | ETHERTYPE_ARP => Ok(frame),
        ETHERTYPE_IPV6 => Err(DropReason::Ipv6),
        ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => Err(DropReason::VlanTag),
        _ => Err(DropReason::UnknownEthertype),
    }
}

/// The IPv4 header and what identifies the flow behind it.
#[inline(always)]
pub fn ipv4(ctx: &TcContext, frame: &Frame, flow: &mut Flow) -> Result<(), DropReason> {
    if frame.ethertype != ETHERTYPE_IPV4 {
        return Err(DropReason::UnknownEthertype);
    }
    let header: [u8; IPV4_LEN] = read(ctx, IPV4)?;
    flow.family = Family::V4 as u8;
    flow.protocol = header[9];
    flow.source[..4].copy_from_slice(&header[12..16]);
    flow.destination[..4].copy_from_slice(&header[16..20]);

    let (version, words) = (header[0] >> 4, header[0] & 0x0f);
    let total = u32::from(u16::from_be_bytes([header[2], header[3]]));
    if version != 4 || words < 5 || total < IPV4_LEN as u32 {
        return Err(DropReason::InvalidHeader);
    }
    if words > 5 {
        return Err(DropReason::IpOptions);
    }
    if total + ETHERNET_LEN as u32 > ctx.len() {
        return Err(DropReason::Truncated);
    }
    if u16::from_be_bytes([header[6], header[7]]) & MORE_FRAGMENTS_OR_OFFSET != 0 {
        return Err(DropReason::Fragment);
    }
    match flow.protocol {
        TCP if total < IPV4_LEN as u32 + 20 => Err(DropReason::Truncated),
        TCP => {
            flow.tcp_flags = read(ctx, L4 + 13)?;
            ports(ctx, L4, flow)
        }
        UDP | SCTP | ICMP if total < IPV4_LEN as u32 + 8 => Err(DropReason::Truncated),
        UDP | SCTP => ports(ctx, L4, flow),
        ICMP => icmp(ctx, flow),
        _ => Err(DropReason::UnknownProtocol),
    }
}

#[inline(always)]
fn ports(ctx: &TcContext, offset: usize, flow: &mut Flow) -> Result<(), DropReason> {
    flow.source_port = read(ctx, offset)?;
    flow.destination_port = read(ctx, offset + 2)?;
    Ok(())
}

#[inline(always)]
fn icmp(ctx: &TcContext, flow: &mut Flow) -> Result<(), DropReason> {
    match read::<u8>(ctx, L4)? {
        ECHO => {
            flow.source_port = read(ctx, L4 + 4)?;
            Ok(())
        }
        ECHO_REPLY => {
            flow.answer = true;
            flow.destination_port = read(ctx, L4 + 4)?;
            Ok(())
        }
        UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM => icmp_error(ctx, flow),
        _ => Err(DropReason::IcmpType),
    }
}

/// An ICMP error takes the flow that it quotes, turned round: it belongs to that flow and travels against it.
#[inline(always)]
fn icmp_error(ctx: &TcContext, flow: &mut Flow) -> Result<(), DropReason> {
    pull(ctx, QUOTED + IPV4_LEN + 8);
    let quoted: [u8; IPV4_LEN] = read(ctx, QUOTED)?;
    // Only an error to the sender of what it quotes, from the receiver of that, is about a flow between the two.
    if quoted[0] != 0x45 || quoted[12..16] != flow.destination[..4] || quoted[16..20] != flow.source[..4] {
        return Err(DropReason::IcmpUnrelated);
    }
    flow.related = true;
    flow.protocol = quoted[9];
    match flow.protocol {
        TCP | UDP | SCTP => {
            flow.destination_port = read(ctx, QUOTED + IPV4_LEN)?;
            flow.source_port = read(ctx, QUOTED + IPV4_LEN + 2)?;
        }
        ICMP => match read::<u8>(ctx, QUOTED + IPV4_LEN)? {
            ECHO => flow.destination_port = read(ctx, QUOTED + IPV4_LEN + 4)?,
            ECHO_REPLY => flow.source_port = read(ctx, QUOTED + IPV4_LEN + 4)?,
            _ => return Err(DropReason::IcmpUnrelated),
        },
        _ => return Err(DropReason::IcmpUnrelated),
    }
    Ok(())
}
