//! ICMP errors (RFC 792, RFC 4443): what the gateway tells a pod whose packet goes no farther.

use crate::{
    forward, maps,
    packet::{Flow, Fragment},
    parse::{self, IPV4_LEN, IPV6_LEN, L3},
};
use abi::{
    DropReason, Family,
    address::Address,
    node::{GATEWAY_V4, GATEWAY_V6},
    policy::{ICMP, ICMPV6},
};
use aya_ebpf::{
    helpers::generated::{bpf_csum_diff, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes},
    programs::TcContext,
};

const ICMP_LEN: usize = 8;
/// What an error quotes: the IP header and the ports behind it.
const QUOTE4: usize = IPV4_LEN + 8;
const QUOTE6: usize = IPV6_LEN + 8;
const LEN4: usize = IPV4_LEN + ICMP_LEN + QUOTE4;
const LEN6: usize = IPV6_LEN + ICMP_LEN + QUOTE6;
const HOP_LIMIT: u8 = 64;

/// Where an error is put together, without its ethernet header: words in network byte order.
#[repr(C)]
pub struct Message {
    words: [u32; LEN6 / 4],
}

/// Type, code, and the word behind the checksum, for what a pod is told of.
#[inline(always)]
fn about(reason: DropReason, v6: bool, mtu: u32) -> Option<(u8, u8, u32)> {
    match (reason, v6) {
        // "Fragmentation needed" with the next hop's MTU (RFC 1191, section 4), and "packet too big".
        (DropReason::TooBig, false) => Some((3, 4, mtu)),
        (DropReason::TooBig, true) => Some((2, 0, mtu)),
        (DropReason::TtlExceeded, false) => Some((11, 0, 0)),
        (DropReason::TtlExceeded, true) => Some((3, 0, 0)),
        _ => None,
    }
}

/// Turns a pod's packet into the error about it. `None` where it is not to be told: never about an error, and never
/// about a later fragment (RFC 1122, section 3.2.2).
#[inline(never)]
pub fn tell_sender(ctx: &TcContext, flow: &Flow, reason: DropReason) -> Option<()> {
    let config = maps::config()?;
    let v6 = flow.family == Family::V6 as u8;
    let (number, code, word) = about(reason, v6, config.tunnel_mtu)?;
    if flow.related || !matches!(flow.fragment, Fragment::None | Fragment::First) {
        return None;
    }
    let scratch = maps::scratch()?;
    // SAFETY: as in `Flow::begin`; this part is taken once a packet, here.
    let message = unsafe { &mut (*scratch).icmp };
    let (pod_mac, gateway_mac): ([u8; 6], [u8; 6]) = (parse::read(ctx, 6).ok()?, parse::read(ctx, 0).ok()?);
    let words = &mut message.words;
    let (start, len) = if v6 { (10, LEN6) } else { (5, LEN4) };
    if v6 {
        quote::<{ LEN6 - QUOTE6 }, QUOTE6>(ctx, words)?;
        words[0] = u32::to_be(6 << 28);
        words[1] = u32::from_be_bytes([0, (ICMP_LEN + QUOTE6) as u8, ICMPV6, HOP_LIMIT]).to_be();
        words[2..6].copy_from_slice(&GATEWAY_V6.words());
        words[6..10].copy_from_slice(&flow.source.words());
    } else {
        quote::<{ LEN4 - QUOTE4 }, QUOTE4>(ctx, words)?;
        words[0] = u32::from_be_bytes([0x45, 0, 0, LEN4 as u8]).to_be();
        words[1] = 0;
        words[2] = u32::from_be_bytes([HOP_LIMIT, ICMP, 0, 0]).to_be();
        words[3] = u32::from_ne_bytes(GATEWAY_V4);
        words[4] = flow.source.words()[0];
        let [high, low] = fold(add(words.as_ptr(), IPV4_LEN, 0));
        words[2] = u32::from_be_bytes([HOP_LIMIT, ICMP, high, low]).to_be();
    }
    words[start] = u32::from_be_bytes([number, code, 0, 0]).to_be();
    words[start + 1] = word.to_be();
    let [high, low] = if v6 {
        let sum = pseudo_header(&GATEWAY_V6, &flow.source, (ICMP_LEN + QUOTE6) as u32);
        fold(add(words[10..].as_ptr(), ICMP_LEN + QUOTE6, sum))
    } else {
        fold(add(words[5..].as_ptr(), ICMP_LEN + QUOTE4, 0))
    };
    words[start] = u32::from_be_bytes([number, code, high, low]).to_be();
    // SAFETY: the context is valid. The helper shortens the packet, and gives up its segments where it has some.
    if unsafe { bpf_skb_change_tail(ctx.skb.skb, (L3 + len) as u32, 0) } != 0 {
        return None;
    }
    // SAFETY: `len` bytes of the message were written above; the helper checks the packet's bounds.
    if unsafe { bpf_skb_store_bytes(ctx.skb.skb, L3 as u32, message.words.as_ptr().cast(), len as u32, 0) } != 0 {
        return None;
    }
    parse::write(ctx, 0, pod_mac).ok()?;
    parse::write(ctx, 6, gateway_mac).ok()?;
    forward::for_host(ctx).ok()
}

/// Copies the beginning of the packet, from its IP header on, to `AT` of the message.
#[inline(always)]
fn quote<const AT: usize, const LEN: usize>(ctx: &TcContext, words: &mut [u32; LEN6 / 4]) -> Option<()> {
    let to = words[AT / 4..].as_mut_ptr();
    // SAFETY: the message has `LEN` bytes behind `AT`, for either family; the helper checks the packet's bounds.
    let failed = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), L3 as u32, to.cast(), LEN as u32) };
    (failed == 0).then_some(())
}

/// Sum over the pseudo-header of ICMPv6 (RFC 8200, section 8.1).
#[inline(always)]
pub fn pseudo_header(source: &Address, destination: &Address, length: u32) -> u32 {
    let rest = [length.to_be(), u32::from(ICMPV6).to_be()];
    let sum = add(core::ptr::from_ref(source).cast(), size_of::<Address>(), 0);
    let sum = add(core::ptr::from_ref(destination).cast(), size_of::<Address>(), sum);
    add(rest.as_ptr(), size_of_val(&rest), sum)
}

/// The checksum of `value`, whose own field is zero, on top of `sum`.
#[inline(always)]
pub fn checksum<T: Copy>(value: &T, sum: u32) -> [u8; 2] {
    fold(add(core::ptr::from_ref(value).cast(), size_of::<T>(), sum))
}

/// Adds so many bytes, a multiple of four, to a sum (RFC 1071).
#[inline(always)]
#[expect(
    clippy::cast_sign_loss,
    reason = "the helper answers with a sum of 32 bits; it fails for no such length"
)]
fn add(from: *const u32, length: usize, sum: u32) -> u32 {
    // SAFETY: the helper reads the bytes and writes nothing; the verifier knows how many there are.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, from.cast_mut(), length as u32, sum) as u32 }
}

/// The checksum that a sum stands for, as it goes into a packet.
#[inline(always)]
fn fold(sum: u32) -> [u8; 2] {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}
