//! Protocols and port ranges.

/// Protocol of a [`PortRange`].
///
/// ```
/// use policy_sdk::Protocol;
///
/// assert!(Protocol::Udp.has_ports() && !Protocol::Icmp.has_ports());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// All of them, where all ports are meant; otherwise those that have ports.
    Any,
    /// ICMP. It has types in place of ports.
    Icmp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
    /// ICMP for IPv6. It has types in place of ports.
    Icmpv6,
}

impl Protocol {
    /// Whether it has ports.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }
}

/// Destination ports of one protocol, both ends included.
///
/// ```
/// use policy_sdk::{PortRange, Protocol, udp};
///
/// assert_eq!(PortRange::new(Protocol::Udp, 5000, 5010), udp(5000).to(5010));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// The protocol.
    pub protocol: Protocol,
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}

impl PortRange {
    /// A range of any protocol.
    #[must_use]
    pub const fn new(protocol: Protocol, first: u16, last: u16) -> Self {
        Self { protocol, first, last }
    }

    /// The same protocol up to this port.
    ///
    /// ```
    /// use policy_sdk::tcp;
    ///
    /// assert!(tcp(8000).to(8080).contains(tcp(8042)));
    /// ```
    #[must_use]
    pub const fn to(mut self, last: u16) -> Self {
        self.last = last;
        self
    }

    /// Whether a packet to `other`, a single port, is in the range.
    #[must_use]
    pub const fn contains(&self, other: Self) -> bool {
        let protocol = match self.protocol {
            Protocol::Any => other.protocol.has_ports() || (self.first == 0 && self.last == u16::MAX),
            own => own as u8 == other.protocol as u8,
        };
        protocol && self.first <= other.first && other.last <= self.last
    }
}

/// A TCP port; `tcp(8000).to(8080)` is a range.
///
/// ```
/// assert!(!policy_sdk::tcp(80).contains(policy_sdk::udp(80)));
/// ```
#[must_use]
pub const fn tcp(port: u16) -> PortRange {
    PortRange::new(Protocol::Tcp, port, port)
}

/// A UDP port.
///
/// ```
/// assert!(policy_sdk::udp(53).contains(policy_sdk::udp(53)));
/// ```
#[must_use]
pub const fn udp(port: u16) -> PortRange {
    PortRange::new(Protocol::Udp, port, port)
}

/// An SCTP port.
///
/// ```
/// assert_eq!(policy_sdk::sctp(7).protocol, policy_sdk::Protocol::Sctp);
/// ```
#[must_use]
pub const fn sctp(port: u16) -> PortRange {
    PortRange::new(Protocol::Sctp, port, port)
}

/// ICMP of every type, such as ping.
///
/// ```
/// use policy_sdk::{icmp, icmp_type};
///
/// assert!(icmp().contains(icmp_type(8)));
/// ```
#[must_use]
pub const fn icmp() -> PortRange {
    PortRange::new(Protocol::Icmp, 0, 255)
}

/// ICMP of one type; 8 is the echo request that ping sends (RFC 792).
///
/// ```
/// assert_eq!(policy_sdk::icmp_type(8).first, 8);
/// ```
#[must_use]
pub const fn icmp_type(kind: u8) -> PortRange {
    PortRange::new(Protocol::Icmp, kind as u16, kind as u16)
}

/// Every port of every protocol.
///
/// ```
/// use policy_sdk::{any, icmp_type, tcp};
///
/// assert!(any().contains(tcp(1)) && any().contains(icmp_type(8)));
/// ```
#[must_use]
pub const fn any() -> PortRange {
    PortRange::new(Protocol::Any, 0, u16::MAX)
}
