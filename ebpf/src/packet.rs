//! What the stages learn of a packet, in the order in which they learn it.

use abi::{Identity, address::Address};

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
    /// An echo reply: it opens no flow.
    pub answer: bool,
    /// The packet opened a flow.
    pub opened: bool,
    pub from: Identity,
    pub to: Identity,
}

pub const TCP_FIN: u8 = 0x01;
pub const TCP_SYN: u8 = 0x02;
pub const TCP_RST: u8 = 0x04;
pub const TCP_ACK: u8 = 0x10;

pub use abi::policy::{ICMP, SCTP, TCP, UDP};

/// Type of an ICMP echo request (RFC 792).
pub const ICMP_ECHO: u8 = 8;

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
            source: [0; 16],
            destination: [0; 16],
            source_port: 0,
            destination_port: 0,
            family: 0,
            protocol: 0,
            tcp_flags: 0,
            related: false,
            answer: false,
            opened: false,
            from: Identity::NONE,
            to: Identity::NONE,
        }
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
