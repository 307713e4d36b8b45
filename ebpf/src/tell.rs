//! Telling the sender of a packet that goes no farther: by an ICMP error, or by a reset.

use crate::{
    forward, icmp, maps,
    packet::{Flow, TCP},
    parse::{self, IPV6_LEN, L3},
    reset,
};
use abi::{DropReason, address::Address};
use aya_ebpf::{
    helpers::generated::{bpf_csum_diff, bpf_skb_change_tail, bpf_skb_store_bytes},
    programs::TcContext,
};

const HOP_LIMIT: u8 = 64;

/// Words of the longest message: an ICMPv6 error with the headers that it quotes.
pub const WORDS: usize = (IPV6_LEN + 8 + IPV6_LEN + 48) / 4;

/// Where a message is put together, without its ethernet header: words in network byte order.
#[repr(C)]
pub struct Message {
    pub words: [u32; WORDS],
}

/// This CPU's message.
#[inline(always)]
pub fn message() -> Option<&'static mut Message> {
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; this part is taken once a packet, for the one message about it.
    Some(unsafe { &mut (*scratch).message })
}

/// Turns a packet into what its sender is told of it. `None` where that is nothing.
#[inline(always)]
pub fn sender(ctx: &TcContext, flow: &Flow, reason: DropReason) -> Option<()> {
    let refused = matches!(
        reason,
        DropReason::NoService | DropReason::NoBackends | DropReason::BackendGone
    );
    // A pod hears when nobody knows its connection any more; who is outside does not, whose address nobody has checked.
    let denied = matches!(
        reason,
        DropReason::MidStream | DropReason::ServicePorts | DropReason::EgressDenied | DropReason::IngressDenied
    );
    let is_lost = denied && flow.is_lost && !flow.from_outside;
    if (refused || is_lost) && flow.protocol == TCP && !flow.related {
        return reset::tell_sender(ctx, flow);
    }
    icmp::tell_sender(ctx, flow, reason)
}

/// An IPv4 header of a packet of `len` bytes. Addresses are in network byte order.
#[inline(always)]
pub fn header4(words: &mut [u32; WORDS], source: u32, destination: u32, protocol: u8, len: usize) {
    words[0] = u32::from_be_bytes([0x45, 0, 0, len as u8]).to_be();
    words[1] = 0;
    words[2] = u32::from_be_bytes([HOP_LIMIT, protocol, 0, 0]).to_be();
    words[3] = source;
    words[4] = destination;
    let [high, low] = fold(add(words.as_ptr(), parse::IPV4_LEN, 0));
    words[2] = u32::from_be_bytes([HOP_LIMIT, protocol, high, low]).to_be();
}

/// An IPv6 header of a packet with `len` bytes behind it.
#[inline(always)]
pub fn header6(words: &mut [u32; WORDS], source: &Address, destination: &Address, protocol: u8, len: usize) {
    words[0] = u32::to_be(6 << 28);
    words[1] = u32::from_be_bytes([0, len as u8, protocol, HOP_LIMIT]).to_be();
    words[2..6].copy_from_slice(&source.words());
    words[6..10].copy_from_slice(&destination.words());
}

/// Puts the first `len` bytes of the message in the packet's place, on its way back.
#[inline(always)]
pub fn send_back(ctx: &TcContext, message: &Message, len: usize) -> Option<()> {
    let (source, destination): ([u8; 6], [u8; 6]) = (parse::read(ctx, 6).ok()?, parse::read(ctx, 0).ok()?);
    // SAFETY: the context is valid. The helper shortens the packet, and gives up its segments where it has some.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, (L3 + len) as u32, 0) } != 0 {
        return None;
    }
    // SAFETY: `len` bytes of the message were written; the helper checks the packet's bounds.
    if unsafe { bpf_skb_store_bytes(ctx.skb.skb, L3 as u32, message.words.as_ptr().cast(), len as u32, 0) } != 0 {
        return None;
    }
    parse::write(ctx, 0, source).ok()?;
    parse::write(ctx, 6, destination).ok()?;
    forward::for_host(ctx).ok()
}

/// Sum over the pseudo-header of a protocol above IPv6 (RFC 8200, section 8.1).
#[inline(always)]
pub fn pseudo_header6(source: &Address, destination: &Address, protocol: u8, length: u32) -> u32 {
    let rest = [length.to_be(), u32::from(protocol).to_be()];
    let sum = add(core::ptr::from_ref(source).cast(), size_of::<Address>(), 0);
    let sum = add(core::ptr::from_ref(destination).cast(), size_of::<Address>(), sum);
    add(rest.as_ptr(), size_of_val(&rest), sum)
}

/// Adds so many bytes, a multiple of four, to a sum (RFC 1071).
#[inline(always)]
#[expect(
    clippy::cast_sign_loss,
    reason = "the helper answers with a sum of 32 bits; it fails for no such length"
)]
pub fn add(from: *const u32, length: usize, sum: u32) -> u32 {
    // SAFETY: the helper reads the bytes and writes nothing; the verifier knows how many there are.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, from.cast_mut(), length as u32, sum) as u32 }
}

/// The checksum that a sum stands for, as it goes into a packet.
#[inline(always)]
pub fn fold(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}
