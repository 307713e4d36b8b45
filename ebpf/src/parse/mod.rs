//! Parsing: frames and headers, checked before anything is believed.
//!
//! Whatever a header says of lengths is held against the packet before a byte behind it is read.

mod icmp;
mod ipv4;
pub mod ipv6;

use crate::packet::{Flow, Fragment, SCTP, TCP, UDP};
use abi::{
    DropReason,
    policy::{ICMP, ICMPV6},
};
use aya_ebpf::programs::TcContext;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

pub const ETHERNET_LEN: usize = 14;
/// Offset of the IP header.
pub const L3: usize = ETHERNET_LEN;
pub const IPV4_LEN: usize = 20;
pub const IPV6_LEN: usize = 40;

/// Bytes of IPv6 extension headers that are carried at the most.
const MAX_EXTENSIONS: usize = 256;
/// The farthest that a transport header begins.
const MAX_L4: usize = L3 + IPV6_LEN + MAX_EXTENSIONS;

/// An ethernet header.
pub struct Frame {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
}

/// What an IP header says of what follows it.
struct Upper {
    protocol: u8,
    /// Where it begins in the frame; [`MAX_L4`] at the most.
    offset: usize,
    /// Its bytes in this packet.
    length: u32,
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

/// Copies `T` from `offset` of the frame, wherever the packet has those bytes: for what is seldom read.
#[inline(always)]
pub fn load<T: Copy>(ctx: &TcContext, offset: usize) -> Result<T, DropReason> {
    ctx.load(offset).map_err(|_| DropReason::Truncated)
}

/// Makes the first `len` bytes of the frame directly readable, where the packet has so many.
#[inline(always)]
fn pull(ctx: &TcContext, len: usize) {
    if ctx.data() + len > ctx.data_end() {
        // Where this fails the reads that follow find too few bytes, and the packet is dropped as truncated.
        let _ = ctx.pull_data((len as u32).min(ctx.len()));
    }
}

/// Bytes of an IPv4 packet whose header says `length`. What stands for several packets of more than 65,535 bytes together has
/// no length of its own (BIG TCP; `iph_set_totlen` in `include/linux/ip.h`, Linux 6.3).
#[inline(always)]
pub fn total(ctx: &TcContext, length: u32) -> u32 {
    // SAFETY: the context is the kernel's `__sk_buff`, valid as long as the program runs.
    let is_many = unsafe { (*ctx.skb.skb).gso_size } != 0;
    if length == 0 && is_many {
        ctx.len() - ETHERNET_LEN as u32
    } else {
        length
    }
}

/// The ethernet header. Answers only for ethertypes that are carried.
#[inline(always)]
pub fn frame(ctx: &TcContext) -> Result<Frame, DropReason> {
    pull(ctx, L3 + IPV6_LEN + 20);
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
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 | ETHERTYPE_ARP => Ok(frame),
        ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => Err(DropReason::VlanTag),
        _ => Err(DropReason::UnknownEthertype),
    }
}

/// The IP header, and what identifies the flow behind it. A later fragment has nothing of that: see
/// [`crate::fragment`].
#[inline(never)]
pub fn packet(ctx: &TcContext, frame: &Frame, flow: &mut Flow) -> Result<(), DropReason> {
    let upper = match frame.ethertype {
        ETHERTYPE_IPV4 => ipv4::header(ctx, flow)?,
        ETHERTYPE_IPV6 => ipv6::header(ctx, flow)?,
        _ => return Err(DropReason::UnknownEthertype),
    };
    flow.protocol = upper.protocol;
    if flow.fragment == Fragment::Later {
        // A TCP header in two pieces would hide its flags (RFC 1858, section 3).
        if flow.fragment_offset == 8 && flow.protocol == TCP {
            return Err(DropReason::FragmentTiny);
        }
        return Ok(());
    }
    transport(ctx, flow, &upper).map_err(|reason| match (flow.fragment, reason) {
        (Fragment::First, DropReason::Truncated) => DropReason::FragmentTiny,
        _ => reason,
    })
}

#[inline(always)]
fn transport(ctx: &TcContext, flow: &mut Flow, upper: &Upper) -> Result<(), DropReason> {
    let least = match flow.protocol {
        TCP => 20,
        UDP | SCTP | ICMP | ICMPV6 => 8,
        _ => 0,
    };
    if upper.length < least {
        return Err(DropReason::Truncated);
    }
    let offset = upper.offset;
    if offset > MAX_L4 {
        return Err(DropReason::ExtensionHeaders);
    }
    pull(ctx, offset + 20);
    flow.transport = offset as u16;
    match flow.protocol {
        TCP => {
            // Ports, sequence numbers, then the length of the header and the flags.
            let header: [u8; 14] = read(ctx, offset)?;
            if header[12] >> 4 < 5 {
                return Err(DropReason::InvalidHeader);
            }
            flow.tcp_flags = header[13];
            flow.ends.source_port = u16::from_ne_bytes([header[0], header[1]]);
            flow.ends.destination_port = u16::from_ne_bytes([header[2], header[3]]);
            Ok(())
        }
        UDP | SCTP => {
            let ports: [u16; 2] = read(ctx, offset)?;
            flow.ends.source_port = ports[0];
            flow.ends.destination_port = ports[1];
            Ok(())
        }
        ICMP | ICMPV6 => icmp::message(ctx, flow, offset),
        // Without ports: decided by what policy says of every port of every protocol.
        _ => Ok(()),
    }
}
