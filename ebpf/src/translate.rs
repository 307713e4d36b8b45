//! Translation: writes a service's addresses and ports into a packet, with the checksums that cover them (RFC 1624).

use crate::{
    packet::{Flow, Fragment, Service, TCP, UDP},
    parse::{self, L3},
};
use abi::{DropReason, Family, address::Address};
use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::generated::{bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes},
    programs::TcContext,
};

// Offsets into IP headers (RFC 791, section 3.1; RFC 8200, section 3).
const SOURCE4: usize = 12;
const DESTINATION4: usize = 16;
const CHECKSUM4: usize = 10;
const SOURCE6: usize = 8;
const DESTINATION6: usize = 24;

// Offsets into transport headers: ports of TCP and UDP, and checksums (RFC 9293, section 3.1; RFC 768; RFC 792).
const SOURCE_PORT: usize = 0;
const DESTINATION_PORT: usize = 2;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const ICMP_CHECKSUM: usize = 2;

/// What of a packet is written.
#[derive(Clone, Copy)]
struct Header<'a> {
    ctx: &'a TcContext,
    v6: bool,
    /// Where the IP header begins.
    ip: usize,
    /// Where the checksum is that covers a pseudo-header of it, or zero.
    checksum: usize,
    flags: u64,
    /// What an error quotes: the checksum of ICMP makes up for all of its changes.
    quoted: bool,
}

/// Writes what a service makes of the packet, where one takes part.
#[inline(never)]
pub fn rewrite(ctx: &TcContext, flow: &Flow) -> Result<(), DropReason> {
    if flow.service == Service::None {
        return Ok(());
    }
    if flow.related {
        return about(ctx, flow);
    }
    let transport = usize::from(flow.transport);
    let has_ports = !matches!(flow.fragment, Fragment::Later | Fragment::Ahead);
    let (checksum, flags) = match flow.protocol {
        _ if !has_ports => (0, 0),
        TCP => (transport + TCP_CHECKSUM, 0),
        UDP => (transport + UDP_CHECKSUM, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => (0, 0),
    };
    let header = Header {
        ctx,
        v6: flow.family == Family::V6 as u8,
        ip: L3,
        checksum,
        flags,
        quoted: false,
    };
    let (seen, becomes) = (&flow.seen, &flow.becomes);
    header.address(false, &seen.source, &becomes.source)?;
    header.address(true, &seen.destination, &becomes.destination)?;
    if has_ports {
        header.port(transport + SOURCE_PORT, seen.source_port, becomes.source_port)?;
        header.port(
            transport + DESTINATION_PORT,
            seen.destination_port,
            becomes.destination_port,
        )?;
    }
    Ok(())
}

/// An ICMP error: itself, and what it quotes, which travelled the other way (RFC 5508, section 4).
#[inline(always)]
fn about(ctx: &TcContext, flow: &Flow) -> Result<(), DropReason> {
    let v6 = flow.family == Family::V6 as u8;
    let icmp = usize::from(flow.transport) + ICMP_CHECKSUM;
    let outer = Header {
        ctx,
        v6,
        ip: L3,
        checksum: if v6 { icmp } else { 0 },
        flags: 0,
        quoted: false,
    };
    let (seen, becomes) = (&flow.seen, &flow.becomes);
    // A router's has an address of its own.
    if outer.source()? == seen.source {
        outer.address(false, &seen.source, &becomes.source)?;
    }
    outer.address(true, &seen.destination, &becomes.destination)?;

    let transport = usize::from(flow.quoted_transport);
    let checksum = transport
        + if flow.protocol == TCP {
            TCP_CHECKSUM
        } else {
            UDP_CHECKSUM
        };
    // Of TCP's headers seldom so much is quoted.
    let before = parse::load::<u16>(ctx, checksum).unwrap_or(0);
    let inner = Header {
        ctx,
        v6,
        ip: usize::from(flow.quoted),
        checksum: if before == 0 { 0 } else { checksum },
        flags: 0,
        quoted: true,
    };
    // IPv4's own checksum makes up for the address; ICMP's has to make up for everything else.
    inner.address(true, &seen.source, &becomes.source)?;
    inner.address(false, &seen.destination, &becomes.destination)?;
    inner.port(transport + DESTINATION_PORT, seen.source_port, becomes.source_port)?;
    inner.port(transport + SOURCE_PORT, seen.destination_port, becomes.destination_port)?;
    let after = parse::load::<u16>(ctx, checksum).unwrap_or(0);
    if before != 0 {
        adjust(ctx, icmp, u64::from(before), u64::from(after), 2)?;
    }
    for (old, new) in [
        (seen.source_port, becomes.source_port),
        (seen.destination_port, becomes.destination_port),
    ] {
        adjust(ctx, icmp, u64::from(old), u64::from(new), 2)?;
    }
    if v6 {
        for (old, new) in [
            (&seen.source, &becomes.source),
            (&seen.destination, &becomes.destination),
        ] {
            adjust(ctx, icmp, 0, difference(old, new), 0)?;
        }
    }
    Ok(())
}

impl Header<'_> {
    /// The source address in the packet.
    #[inline(always)]
    fn source(&self) -> Result<Address, DropReason> {
        if self.v6 {
            parse::load(self.ctx, self.ip + SOURCE6)
        } else {
            let source: [u8; 4] = parse::load(self.ctx, self.ip + SOURCE4)?;
            Ok(Address::v4(source))
        }
    }

    /// Writes the source or destination address, where it changes.
    #[inline(always)]
    fn address(&self, destination: bool, old: &Address, new: &Address) -> Result<(), DropReason> {
        if old == new {
            return Ok(());
        }
        // A sum that a device has made of the packet changes where no checksum in the packet makes up for the address.
        let (flags, recompute) = if self.quoted {
            (self.flags, 0)
        } else {
            (
                self.flags | u64::from(BPF_F_PSEUDO_HDR),
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        };
        if self.v6 {
            if self.checksum != 0 {
                adjust(self.ctx, self.checksum, 0, difference(old, new), flags)?;
            }
            let offset = self.ip + if destination { DESTINATION6 } else { SOURCE6 };
            return store(self.ctx, offset, &new.0, recompute);
        }
        let (old, new) = (u64::from(old.words()[0]), new.words()[0]);
        if self.checksum != 0 {
            adjust(self.ctx, self.checksum, old, u64::from(new), flags | 4)?;
        }
        // SAFETY: the context is valid; the helper checks the packet's bounds.
        let failed =
            unsafe { bpf_l3_csum_replace(self.ctx.skb.skb, (self.ip + CHECKSUM4) as u32, old, u64::from(new), 4) };
        if failed != 0 {
            return Err(DropReason::Truncated);
        }
        let offset = self.ip + if destination { DESTINATION4 } else { SOURCE4 };
        store(self.ctx, offset, &new.to_ne_bytes(), 0)
    }

    /// Writes a port, where it changes.
    #[inline(always)]
    fn port(&self, offset: usize, old: u16, new: u16) -> Result<(), DropReason> {
        if old == new {
            return Ok(());
        }
        if self.checksum != 0 {
            adjust(self.ctx, self.checksum, u64::from(old), u64::from(new), self.flags | 2)?;
        }
        store(self.ctx, offset, &new.to_ne_bytes(), 0)
    }
}

/// Sum of what changes in a checksum when one address takes another's place.
#[inline(always)]
#[expect(
    clippy::cast_sign_loss,
    reason = "the helper answers with a sum of 32 bits; it fails for no such length"
)]
fn difference(old: &Address, new: &Address) -> u64 {
    const LEN: u32 = size_of::<Address>() as u32;
    let pointer = |address: &Address| core::ptr::from_ref(address).cast_mut().cast::<u32>();
    // SAFETY: the helper reads both addresses and writes nothing.
    unsafe { bpf_csum_diff(pointer(old), LEN, pointer(new), LEN, 0) as u64 }
}

/// Mends a transport checksum. The low bits of the flags are the bytes that change, or zero for a difference.
#[inline(never)]
fn adjust(ctx: &TcContext, offset: usize, old: u64, new: u64, flags: u64) -> Result<(), DropReason> {
    // SAFETY: the context is valid; the helper checks the packet's bounds.
    match unsafe { bpf_l4_csum_replace(ctx.skb.skb, offset as u32, old, new, flags) } {
        0 => Ok(()),
        _ => Err(DropReason::Truncated),
    }
}

/// Writes bytes of the packet, wherever it has them.
#[inline(always)]
pub fn store(ctx: &TcContext, offset: usize, bytes: &[u8], flags: u64) -> Result<(), DropReason> {
    // SAFETY: the context is valid, and so are the bytes; the helper checks the packet's bounds.
    let failed = unsafe {
        bpf_skb_store_bytes(
            ctx.skb.skb,
            offset as u32,
            bytes.as_ptr().cast(),
            bytes.len() as u32,
            flags,
        )
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(DropReason::Truncated)
    }
}
