//! Neighbour discovery (RFC 4861): pods know one neighbour, their gateway, and the datapath answers for it.

use crate::{
    forward, icmp, lookup,
    packet::{Flow, Fragment},
    parse::{self, Frame, IPV6_LEN, L3},
};
use abi::{AddressKey, DropReason, Family, address::Address, node::GATEWAY_V6, policy::ICMPV6};
use aya_ebpf::programs::TcContext;

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// The sender is a router; this is an answer; it replaces what was known (section 4.4).
const ROUTER_SOLICITED_OVERRIDE: u8 = 0xe0;
/// Source link-layer address, and target link-layer address, in units of 8 bytes (section 4.6.1).
const SOURCE_LINK_ADDRESS: [u8; 2] = [1, 1];
const TARGET_LINK_ADDRESS: [u8; 2] = [2, 1];
/// What no router has passed on (section 7.1.1).
const HOP_LIMIT: u8 = 255;

/// A solicitation or an advertisement with one option.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    number: u8,
    code: u8,
    checksum: [u8; 2],
    flags: [u8; 4],
    target: Address,
    option: [u8; 2],
    mac: [u8; 6],
}

const LEN: usize = size_of::<Message>();
const _: () = assert!(LEN == 32);

/// Turns a pod's solicitation for its gateway into the answer, and sends it back.
#[inline(never)]
pub fn answer(ctx: &TcContext, frame: &Frame, flow: &Flow) -> Result<(), DropReason> {
    if flow.link != SOLICITATION || flow.fragment != Fragment::None {
        return Err(DropReason::LinkControl);
    }
    let header: [u8; 8] = parse::read(ctx, L3)?;
    let [.., high, low, next, hops] = header;
    let request: Message = parse::read(ctx, L3 + IPV6_LEN)?;
    if request.target != GATEWAY_V6 {
        return Err(DropReason::LinkControl);
    }
    let whole = next == ICMPV6 && hops == HOP_LIMIT && usize::from(u16::from_be_bytes([high, low])) == LEN;
    if !whole || request.code != 0 || request.option != SOURCE_LINK_ADDRESS {
        return Err(DropReason::SpoofedNeighbour);
    }
    let ifindex = lookup::ifindex(ctx);
    let pod =
        lookup::endpoint(&AddressKey::new(Family::V6, flow.ends.source), 0).ok_or(DropReason::SpoofedNeighbour)?;
    if pod.ifindex != ifindex || pod.mac() != frame.source || pod.mac() != request.mac {
        return Err(DropReason::SpoofedNeighbour);
    }
    let mut reply = Message {
        number: ADVERTISEMENT,
        code: 0,
        checksum: [0; 2],
        flags: [ROUTER_SOLICITED_OVERRIDE, 0, 0, 0],
        target: GATEWAY_V6,
        option: TARGET_LINK_ADDRESS,
        mac: pod.gateway_mac(),
    };
    let sum = icmp::pseudo_header(&GATEWAY_V6, &flow.ends.source, LEN as u32);
    reply.checksum = icmp::checksum(&reply, sum);
    parse::write(ctx, 0, pod.macs)?;
    parse::write(ctx, L3 + 8, GATEWAY_V6)?;
    parse::write(ctx, L3 + 24, flow.ends.source)?;
    parse::write(ctx, L3 + IPV6_LEN, reply)?;
    forward::for_host(ctx)
}
