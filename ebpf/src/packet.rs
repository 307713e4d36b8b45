//! What the stages learn of a packet, in the order in which they learn it.

use abi::{DropReason, Identity, address::Address, conntrack::Translation};

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

/// Both ends of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    pub source: Address,
    pub destination: Address,
    /// In network byte order. A request of ICMP has its identifier at the end that asks, and its type at the other: zero for an
    /// echo. Protocols without ports have zero.
    pub source_port: u16,
    pub destination_port: u16,
}

impl Ends {
    pub const NONE: Self = Self {
        source: Address::NONE,
        destination: Address::NONE,
        source_port: 0,
        destination_port: 0,
    };
}

/// What a service has to do with a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Nothing.
    None,
    /// It goes to a frontend.
    Asked,
    /// It comes back from a backend.
    Answered,
}

/// A packet's flow, and what is reported of it.
#[derive(Clone, Copy)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one thing that a stage has learnt; together they are no state"
)]
pub struct Flow {
    /// Generation in force when the packet arrived; selects policy and identities for its whole way.
    pub generation: u32,
    /// As in the packet, and where that goes to a service's frontend, as to its backend: what policy judges. An ICMP error
    /// has those of the flow that it is about, turned round: it travels as that flow's replies do.
    pub ends: Ends,
    pub family: u8,
    pub protocol: u8,
    /// TCP flags, or zero.
    pub tcp_flags: u8,
    /// An ICMP error: it passes only with the flow that it is about.
    pub related: bool,
    /// Whom the packet that an ICMP error quotes was for.
    pub about: Address,
    /// A request of ICMP: it is never a reply; and a reply to one: it opens no flow.
    pub request: bool,
    pub answer: bool,
    /// Type of an ICMPv6 message that stays on the link, or zero.
    pub link: u8,
    /// Where the packet is one piece of a larger one.
    pub fragment: Fragment,
    /// Offset of the piece in the larger packet, its length, both in bytes, and the larger packet's identification.
    pub fragment_offset: u32,
    pub fragment_length: u32,
    pub identification: u32,
    /// Where the transport header begins in the frame; and in what an ICMP error quotes, the IP header and the transport
    /// header.
    pub transport: u16,
    pub quoted: u16,
    pub quoted_transport: u16,
    pub service: Service,
    /// With a service: the ends that are in the packet, and those that it leaves with.
    pub seen: Ends,
    pub becomes: Ends,
    /// With [`Service::Asked`]: what the backend's entry has to say of the frontend, or [`HAIRPIN`](abi::conntrack::HAIRPIN).
    pub translation: Translation,
    pub hairpin: bool,
    /// The packet goes to a node's own address, by way of a node port perhaps.
    pub at_node: bool,
    /// It came in from outside, at a node port of this node.
    pub from_outside: bool,
    /// It came through the tunnel and goes to nobody here: it must be an answer to what came in at a node port.
    pub in_transit: bool,
    /// It is such an answer, and leaves with the node's address.
    pub leaves: bool,
    /// It came from elsewhere with the node's own address: it must be an answer to what a pod has sent there.
    pub must_answer: bool,
    /// The node by way of which the other end asks or is answered, which is outside; or none.
    pub via: Address,
    /// It is in the middle of a connection of TCP that nobody knows, or that somebody else's looks like.
    pub is_lost: bool,
    /// The packet is of a connection that is open, whose entry says who its backend was.
    pub is_open: bool,
    pub backend_owner: u32,
    /// Seconds for which the client keeps the backend that was chosen for it.
    pub affinity: u32,
    /// When the frontend's entry runs out, or zero where there is none yet; and the flow's own entry.
    pub frontend_expires: u64,
    pub expires: u64,
    /// The flow's state after this packet; zero where it has none.
    pub state: u32,
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
            ends: Ends::NONE,
            family: 0,
            protocol: 0,
            tcp_flags: 0,
            related: false,
            about: Address::NONE,
            request: false,
            answer: false,
            link: 0,
            fragment: Fragment::None,
            fragment_offset: 0,
            fragment_length: 0,
            identification: 0,
            transport: 0,
            quoted: 0,
            quoted_transport: 0,
            service: Service::None,
            seen: Ends::NONE,
            becomes: Ends::NONE,
            translation: Translation::NONE,
            hairpin: false,
            at_node: false,
            from_outside: false,
            in_transit: false,
            must_answer: false,
            leaves: false,
            via: Address::NONE,
            is_lost: false,
            is_open: false,
            backend_owner: 0,
            affinity: 0,
            frontend_expires: 0,
            expires: 0,
            state: 0,
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

    /// Who sent the packet, as it says itself.
    #[inline(always)]
    pub fn sender(&self) -> &Address {
        if self.service == Service::None {
            &self.ends.source
        } else {
            &self.seen.source
        }
    }

    /// Whom the packet is for, as it says itself.
    #[inline(always)]
    pub fn addressee(&self) -> &Address {
        if self.service == Service::None {
            &self.ends.destination
        } else {
            &self.seen.destination
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
