//! Fragments: only the first one of a packet says which flow it belongs to.

use crate::address::Address;

/// Key of a packet in pieces: one of the few places that its sender has. So nobody can push out what others' packets need.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Which of the [`SLOTS`] places of the sender: by the hash of what else the packet is known by.
    pub slot: u32,
    /// Scope of the address.
    pub scope: u16,
    /// [`Family`](crate::Family) of the address.
    pub family: u8,
    /// Zero.
    pub zero: u8,
}

/// Packets in pieces of one sender that are remembered at a time, at the most.
pub const SLOTS: u32 = 64;

/// What the first fragment said.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentEntry {
    /// Hash of what the packet is known by (RFC 791, section 3.2; RFC 8200, section 4.5): addresses, identification,
    /// and protocol for IPv4. As in [`ConntrackEntry`](crate::ConntrackEntry).
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

const _: () = assert!(size_of::<FragmentKey>() == 24);
const _: () = assert!(size_of::<FragmentEntry>() == 32);
