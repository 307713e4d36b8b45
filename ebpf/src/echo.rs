//! Echo (RFC 792; RFC 4443, section 4): a pod may ask whether its gateway is there, and the datapath answers for it.

use crate::{
    forward,
    packet::{Flow, Fragment},
    parse::{self, Frame, L3},
    service,
    translate::store,
};
use abi::{DropReason, Family};
use aya_ebpf::programs::TcContext;

// Offsets into IP headers (RFC 791, section 3.1; RFC 8200, section 3).
const SOURCE4: usize = L3 + 12;
const SOURCE6: usize = L3 + 8;
/// Types of the replies.
const REPLY: u8 = 0;
const REPLY6: u8 = 129;
/// What a request's type and its reply's differ by, in the first word of the checksum: 8 less, or one more.
const LESS: u32 = 0x0800;
const MORE: u32 = 0x0100;

/// Whether a pod asks for its gateway, in one piece.
#[inline(always)]
pub fn is_for_gateway(flow: &Flow) -> bool {
    let is_echo = flow.request && flow.ends.destination_port == 0;
    is_echo && flow.fragment == Fragment::None && flow.ends.destination == service::gateway(flow)
}

/// Turns the request into the reply, and sends it back.
#[inline(never)]
pub fn answer(ctx: &TcContext, frame: &Frame, flow: &Flow) -> Result<(), DropReason> {
    let offset = usize::from(flow.transport);
    let [_, code, high, low]: [u8; 4] = parse::load(ctx, offset)?;
    let sum = u32::from(u16::from_be_bytes([high, low]));
    let (number, sum) = if flow.family == Family::V6 as u8 {
        parse::write(ctx, SOURCE6, [flow.ends.destination, flow.ends.source])?;
        // One more in the type is one less in the checksum (RFC 1624), whose complement that is.
        (REPLY6, sum + (0xffff - MORE))
    } else {
        let [source, ..] = flow.ends.source.words();
        let [destination, ..] = flow.ends.destination.words();
        parse::write(ctx, SOURCE4, [destination, source])?;
        (REPLY, sum + LESS)
    };
    let folded = (sum & 0xffff) + (sum >> 16);
    let [high, low] = (folded as u16).to_be_bytes();
    store(ctx, offset, &[number, code, high, low], 0)?;
    parse::write(ctx, 0, frame.source)?;
    parse::write(ctx, 6, frame.destination)?;
    forward::for_host(ctx)
}
