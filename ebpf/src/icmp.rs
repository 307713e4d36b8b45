//! ICMP errors (RFC 792, RFC 4443): what the gateway tells a pod whose packet goes no farther.

use crate::{
    maps,
    packet::{Flow, Fragment},
    parse::{IPV4_LEN, IPV6_LEN, L3},
    service,
    tell::{self, Message, add, fold},
};
use abi::{
    DropReason, Family,
    address::Address,
    policy::{ICMP, ICMPV6},
};
use aya_ebpf::{helpers::generated::bpf_skb_load_bytes, programs::TcContext};

const ICMP_LEN: usize = 8;
/// What an error quotes: the IP header and the ports behind it.
const QUOTE4: usize = IPV4_LEN + 8;
const QUOTE6: usize = IPV6_LEN + 8;
/// The same where the packet is long enough: extension headers may be in front of the ports.
const LONG_QUOTE6: usize = QUOTE6 + 40;
const LEN4: usize = IPV4_LEN + ICMP_LEN + QUOTE4;
const START6: usize = IPV6_LEN + ICMP_LEN;
const _: () = assert!(START6 + LONG_QUOTE6 == size_of::<Message>());

/// Type, code, and the word behind the checksum, for what a pod is told of.
#[inline(always)]
fn about(reason: DropReason, v6: bool, mtu: u32) -> Option<(u8, u8, u32)> {
    match (reason, v6) {
        // "Fragmentation needed" with the next hop's MTU (RFC 1191, section 4), and "packet too big".
        (DropReason::TooBig, false) => Some((3, 4, mtu)),
        (DropReason::TooBig, true) => Some((2, 0, mtu)),
        (DropReason::TtlExceeded, false) => Some((11, 0, 0)),
        (DropReason::TtlExceeded, true) => Some((3, 0, 0)),
        // "Port unreachable".
        (DropReason::NoService | DropReason::NoBackends | DropReason::BackendGone, false) => Some((3, 3, 0)),
        (DropReason::NoService | DropReason::NoBackends | DropReason::BackendGone, true) => Some((1, 4, 0)),
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
    let message = tell::message()?;
    let sender = flow.sender();
    // The gateway is the pods' only.
    let from = if flow.from_outside {
        *flow.addressee()
    } else {
        service::gateway(flow)
    };
    let words = &mut message.words;
    let quoted = if ctx.len() as usize >= L3 + LONG_QUOTE6 {
        LONG_QUOTE6
    } else {
        QUOTE6
    };
    let (start, len) = if v6 { (10, START6 + quoted) } else { (5, LEN4) };
    if v6 {
        if quoted == LONG_QUOTE6 {
            quote::<START6, LONG_QUOTE6>(ctx, words)?;
        } else {
            quote::<START6, QUOTE6>(ctx, words)?;
        }
        tell::header6(words, &from, sender, ICMPV6, ICMP_LEN + quoted);
    } else {
        quote::<{ LEN4 - QUOTE4 }, QUOTE4>(ctx, words)?;
        tell::header4(words, from.words()[0], sender.words()[0], ICMP, LEN4);
    }
    words[start] = u32::from_be_bytes([number, code, 0, 0]).to_be();
    words[start + 1] = word.to_be();
    let [high, low] = if v6 {
        let sum = pseudo_header(&from, sender, (ICMP_LEN + quoted) as u32);
        fold(add(words[10..].as_ptr(), ICMP_LEN + quoted, sum))
    } else {
        fold(add(words[5..].as_ptr(), ICMP_LEN + QUOTE4, 0))
    };
    words[start] = u32::from_be_bytes([number, code, high, low]).to_be();
    tell::send_back(ctx, message, len)
}

/// Copies the beginning of the packet, from its IP header on, to `AT` of the message.
#[inline(always)]
fn quote<const AT: usize, const LEN: usize>(ctx: &TcContext, words: &mut [u32; tell::WORDS]) -> Option<()> {
    let to = words[AT / 4..].as_mut_ptr();
    // SAFETY: the message has `LEN` bytes behind `AT`, for either family; the helper checks the packet's bounds.
    let failed = unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), L3 as u32, to.cast(), LEN as u32) };
    (failed == 0).then_some(())
}

/// Sum over the pseudo-header of ICMPv6 (RFC 8200, section 8.1).
#[inline(always)]
pub fn pseudo_header(source: &Address, destination: &Address, length: u32) -> u32 {
    tell::pseudo_header6(source, destination, ICMPV6, length)
}

/// The checksum of `value`, whose own field is zero, on top of `sum`.
#[inline(always)]
pub fn checksum<T: Copy>(value: &T, sum: u32) -> [u8; 2] {
    fold(add(core::ptr::from_ref(value).cast(), size_of::<T>(), sum))
}
