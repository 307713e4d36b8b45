//! The policy map: two rectangles of 16-bit cells, egress and ingress, local identities by all identities.
//!
//! There are two copies of it, and of the identities in the endpoint map and the ipcache. The parity of the generation
//! word selects the copy in force. A policy load fills the other one aside and then raises the word by one; a packet
//! reads the word once, so it never sees one generation's policy with another one's identities.

/// Which end of a flow a cell speaks for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// What leaves a pod of this node: row of the sender, column of the receiver.
    Egress = 0,
    /// What enters a pod of this node: row of the receiver, column of the sender.
    Ingress = 1,
}

/// Cell: no traffic. What a fresh map holds, so that what nobody decided is denied.
pub const CELL_DENY: u16 = 0;
/// Cell: all traffic.
pub const CELL_ALLOW: u16 = 1;
/// The first cell that names a port set; cell `CELL_PORT_SET + n` names set `n`.
pub const CELL_PORT_SET: u16 = 2;

/// Cells in one element of the policy arrays: the kernel rounds an element up to 8 bytes (`kernel/bpf/arraymap.c`).
pub const CELLS_PER_ELEMENT: u32 = 4;

/// Row and column that stay empty: what has no place in the matrix is denied.
pub const UNPLACED: u32 = 0;
/// First column that is free for pods' identities; a reserved identity's column is its number.
pub const FIRST_POD_COLUMN: u32 = 16;
/// In place of a row: this end's policy is enforced elsewhere (a remote pod, the node itself).
pub const NOT_ENFORCED: u32 = u32::MAX;

/// Offset of a cell, in cells, in a matrix of `rows` x `columns`.
#[inline(always)]
#[must_use]
pub const fn cell_index(direction: Direction, row: u32, column: u32, rows: u32, columns: u32) -> u32 {
    (direction as u32 * rows + row) * columns + column
}

/// Protocol numbers (IANA) of what the datapath carries.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;
/// SCTP.
pub const SCTP: u8 = 132;

/// Where a packet stands on the line that port sets cut into pieces: the protocol in the high bits, then 16 bits of
/// destination port, in host byte order. ICMP has its type in place of the port.
#[inline(always)]
#[must_use]
pub const fn port_key(protocol: u8, port: u16) -> u32 {
    (protocol as u32) << 16 | port as u32
}

/// End of the line: one more than the highest [`port_key`].
pub const PORT_KEYS: u32 = 1 << 24;

/// A port set, for a cell that is neither everything nor nothing: a run of breakpoints in the pool, by rising key. The
/// first one has key 0. What a packet meets is what the last breakpoint says that is not above its [`port_key`]: a
/// range takes two breakpoints at the most, as a single port does, and a set with `n` of them takes `log2 n` steps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortSet {
    /// Number of the first breakpoint in the pool.
    pub first: u32,
    /// Breakpoints, at most [`MAX_BREAKPOINTS`].
    pub len: u32,
}

/// Breakpoints in one port set at the most.
pub const MAX_BREAKPOINTS: u32 = 1 << SEARCH_STEPS;
/// Steps that a search through the longest port set takes.
pub const SEARCH_STEPS: u32 = 16;

/// A breakpoint as the pool holds it: key in the low half, 1 in the high half where what follows is allowed.
#[inline(always)]
#[must_use]
pub const fn breakpoint(key: u32, allow: bool) -> u64 {
    (allow as u64) << 32 | key as u64
}

/// Key of a breakpoint.
#[inline(always)]
#[must_use]
pub const fn breakpoint_key(breakpoint: u64) -> u32 {
    (breakpoint & 0xffff_ffff) as u32
}

/// Whether what follows a breakpoint is allowed.
#[inline(always)]
#[must_use]
pub const fn breakpoint_allows(breakpoint: u64) -> bool {
    breakpoint >> 32 != 0
}

const _: () = assert!(size_of::<PortSet>() == 8);
