//! ARP (RFC 826): pods know one neighbour, their gateway, and the datapath answers for it.

use crate::{
    forward, lookup,
    parse::{self, Frame},
};
use abi::{AddressKey, DropReason, node::GATEWAY_V4};
use aya_ebpf::programs::TcContext;

/// Ethernet and IPv4, with the length of their addresses; then the operation.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];

/// An ARP packet behind its ethernet header.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arp {
    kind: [u8; 8],
    sender_mac: [u8; 6],
    sender: [u8; 4],
    target_mac: [u8; 6],
    target: [u8; 4],
}

/// Turns a pod's request for its gateway into the answer, and sends it back.
#[inline(never)]
pub fn answer(ctx: &TcContext, frame: &Frame) -> Result<(), DropReason> {
    let request: Arp = parse::read(ctx, parse::ETHERNET_LEN)?;
    if request.kind != REQUEST || request.target != GATEWAY_V4 {
        return Err(DropReason::UnexpectedArp);
    }
    let pod = lookup::endpoint(&AddressKey::v4(request.sender), 0).ok_or(DropReason::SpoofedArp)?;
    let ifindex = lookup::ifindex(ctx);
    if pod.ifindex != ifindex || pod.mac() != request.sender_mac || pod.mac() != frame.source {
        return Err(DropReason::SpoofedArp);
    }
    parse::write(ctx, 0, pod.macs)?;
    let reply = Arp {
        kind: REPLY,
        sender_mac: pod.gateway_mac(),
        sender: request.target,
        target_mac: request.sender_mac,
        target: request.sender,
    };
    parse::write(ctx, parse::ETHERNET_LEN, reply)?;
    forward::for_host(ctx)
}
