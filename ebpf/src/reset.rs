//! Resets (RFC 9293, section 3.10.7.1): what a client is told whose connection goes nowhere.

use crate::{
    packet::{Flow, Fragment, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
    parse::{self, IPV4_LEN, IPV6_LEN},
    tell::{self, Message, add, fold},
};
use abi::{Family, policy::TCP};
use aya_ebpf::programs::TcContext;

const TCP_LEN: usize = 20;
/// A header of five words.
const HEADER_WORDS: u8 = 5 << 4;

/// Turns a packet of TCP into the reset that answers it, from whom it was for. `None` for what is a reset itself, and
/// for a later fragment, which has no header.
#[inline(never)]
pub fn tell_sender(ctx: &TcContext, flow: &Flow) -> Option<()> {
    if flow.tcp_flags & TCP_RST != 0 || matches!(flow.fragment, Fragment::Later | Fragment::Ahead) {
        return None;
    }
    let v6 = flow.family == Family::V6 as u8;
    // Ports, sequence number, number that is acknowledged.
    let [source_port, destination_port]: [u16; 2] = parse::load(ctx, usize::from(flow.transport)).ok()?;
    let [sequence, acknowledged]: [u32; 2] = parse::load(ctx, usize::from(flow.transport) + 4).ok()?;
    // What opens or closes a connection counts as one byte.
    let counts = u32::from(flow.tcp_flags & TCP_SYN != 0) + u32::from(flow.tcp_flags & TCP_FIN != 0);
    let (sequence, answered, flags) = if flow.tcp_flags & TCP_ACK != 0 {
        (acknowledged, 0, TCP_RST)
    } else {
        (
            0,
            u32::from_be(sequence).wrapping_add(counts).to_be(),
            TCP_RST | TCP_ACK,
        )
    };
    let message: &mut Message = tell::message()?;
    let words = &mut message.words;
    let (from, to) = (flow.addressee(), flow.sender());
    let start = if v6 { IPV6_LEN / 4 } else { IPV4_LEN / 4 };
    let ports = u32::from(u16::from_be(destination_port)) << 16 | u32::from(u16::from_be(source_port));
    let mut header = [
        ports.to_be(),
        sequence,
        answered,
        u32::from_be_bytes([HEADER_WORDS, flags, 0, 0]).to_be(),
        0,
    ];
    let sum = if v6 {
        tell::header6(words, from, to, TCP, TCP_LEN);
        tell::pseudo_header6(from, to, TCP, TCP_LEN as u32)
    } else {
        tell::header4(words, from.words()[0], to.words()[0], TCP, IPV4_LEN + TCP_LEN);
        let rest = [
            from.words()[0],
            to.words()[0],
            (u32::from(TCP) << 16 | TCP_LEN as u32).to_be(),
        ];
        add(rest.as_ptr(), size_of_val(&rest), 0)
    };
    let [high, low] = fold(add(header.as_ptr(), TCP_LEN, sum));
    header[4] = u32::from_be_bytes([high, low, 0, 0]).to_be();
    words[start..start + header.len()].copy_from_slice(&header);
    tell::send_back(ctx, message, if v6 { IPV6_LEN + TCP_LEN } else { IPV4_LEN + TCP_LEN })
}
