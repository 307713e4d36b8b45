//! Fragments: only the first one of a packet says which flow it belongs to.

use crate::address::Address;

/// Key of a packet in pieces (RFC 791, section 3.2; RFC 8200, section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Identification, in network byte order; IPv4's has 16 bits.
    pub identification: u32,
    /// Scope of both addresses.
    pub scope: u16,
    /// [`Family`](crate::Family) of both addresses.
    pub family: u8,
    /// IP protocol number for IPv4; zero for IPv6, where it is no part of the identity.
    pub protocol: u8,
}

/// What the first fragment said.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentEntry {
    /// Hash of the packet's own key, as in [`ConntrackEntry`](crate::ConntrackEntry).
    pub cookie: u64,
    /// When the entry ends, in nanoseconds of `CLOCK_MONOTONIC`.
    pub expires: u64,
    /// Bytes of the first fragment behind the headers that every fragment repeats: where the second one may begin.
    pub length: u32,
    /// Source port, in network byte order; for an echo as in [`ConntrackKey`](crate::ConntrackKey).
    pub source_port: u16,
    /// Destination port, likewise.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// 1 where it is an echo reply.
    pub answer: u8,
    /// Zero.
    pub zero: [u8; 6],
}

/// Fragments of one packet have to arrive within this time: the kernel's `ipfrag_time`.
pub const REASSEMBLY_NS: u64 = 30 * crate::conntrack::SECOND;

const _: () = assert!(size_of::<FragmentKey>() == 40);
const _: () = assert!(size_of::<FragmentEntry>() == 32);
