//! What the stages learn of a packet, in the order in which they learn it.

use abi::{DropReason, Identity, address::Address};

/// Whether a packet is whole.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// It is.
    None,
    /// The first piece of a packet.
    First,
    /// Another piece, which has no ports of its own.
    Later,
    /// Another piece, whose first one has not been here yet.
    Ahead,
}

/// A packet's flow, and what is reported of it.
#[derive(Clone, Copy)]
pub struct Flow {
    /// Generation in force when the packet arrived; selects policy and identities for its whole way.
    pub generation: u32,
    /// Source and destination, as in the packet. An ICMP error has those of the flow that it is about, turned round:
    /// it travels as that flow's replies do.
    pub source: Address,
    pub destination: Address,
    /// In network byte order; an ICMP echo has its identifier at the end that asks, and zero at the other.
    pub source_port: u16,
    pub destination_port: u16,
    pub family: u8,
    pub protocol: u8,
    /// TCP flags, or zero.
    pub tcp_flags: u8,
    /// An ICMP error: it passes only with the flow that it is about.
    pub related: bool,
    /// Whom the packet that an ICMP error quotes was for.
    pub about: Address,
    /// An echo reply: it opens no flow.
    pub answer: bool,
    /// Type of an ICMPv6 message that stays on the link, or zero.
    pub link: u8,
    /// Where the packet is one piece of a larger one.
    pub fragment: Fragment,
    /// Offset of the piece in the larger packet, its length, both in bytes, and the larger packet's identification.
    pub fragment_offset: u32,
    pub fragment_length: u32,
    pub identification: u32,
    /// The packet opened a flow.
    pub opened: bool,
    pub from: Identity,
    pub to: Identity,
}

pub const TCP_FIN: u8 = 0x01;
pub const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;
pub const TCP_ACK: u8 = 0x10;

pub use abi::policy::{SCTP, TCP, UDP};

impl Flow {
    /// The flow of the packet that this CPU works on.
    #[inline(always)]
    pub fn begin() -> Option<&'static mut Self> {
        let scratch = crate::maps::scratch()?;
        // SAFETY: an element of a per-CPU array is there as long as the program, and tc programs do not interrupt each
        // other on a CPU: they run with bottom halves disabled. Nothing else refers to this part of it.
        let flow = unsafe { &mut (*scratch).flow };
        *flow = Self::new();
        Some(flow)
    }

    #[inline(always)]
    fn new() -> Self {
        Self {
            generation: crate::maps::generation(),
            source: Address::NONE,
            destination: Address::NONE,
            source_port: 0,
            destination_port: 0,
            family: 0,
            protocol: 0,
            tcp_flags: 0,
            related: false,
            about: Address::NONE,
            answer: false,
            link: 0,
            fragment: Fragment::None,
            fragment_offset: 0,
            fragment_length: 0,
            identification: 0,
            opened: false,
            from: Identity::NONE,
            to: Identity::NONE,
        }
    }

    /// Notes which piece of a packet this is; `length` is of what the pieces are put together from. A packet in one
    /// piece (RFC 6946) is whole.
    #[inline(always)]
    pub fn set_fragment(
        &mut self,
        identification: u32,
        offset: u32,
        more: bool,
        length: u32,
    ) -> Result<(), DropReason> {
        if offset == 0 && !more {
            return Ok(());
        }
        if length == 0 || (more && !length.is_multiple_of(8)) || offset + length > 0xffff {
            return Err(DropReason::InvalidHeader);
        }
        self.fragment = if offset == 0 { Fragment::First } else { Fragment::Later };
        self.identification = identification;
        self.fragment_offset = offset;
        self.fragment_length = length;
        Ok(())
    }

    /// Which element of a pair is in force.
    #[inline(always)]
    pub fn parity(&self) -> usize {
        (self.generation & 1) as usize
    }

    /// A TCP packet that asks for a new connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.protocol == TCP && self.tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST) == TCP_SYN
    }
}
