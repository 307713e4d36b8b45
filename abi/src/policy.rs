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

/// Protocol of a rule that holds for every protocol.
pub const ANY_PROTOCOL: u8 = 0;

/// One range of destination ports that a port set allows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRule {
    /// First port.
    pub first: u16,
    /// Last port, inclusive.
    pub last: u16,
    /// IP protocol number, or [`ANY_PROTOCOL`].
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

/// Rules in one port set at the most.
pub const PORT_RULES: usize = 32;

/// What a cell allows where it is neither everything nor nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortSet {
    /// Rules in use.
    pub len: u32,
    /// The rules; those past `len` are zero.
    pub rules: [PortRule; PORT_RULES],
}

impl PortRule {
    /// Fills the places of a [`PortSet`] that are not in use.
    pub const EMPTY: Self = Self {
        first: 0,
        last: 0,
        protocol: 0,
        zero: 0,
    };

    /// Whether a packet to `port` by `protocol` is in the range. Protocols without ports have port 0.
    #[inline(always)]
    #[must_use]
    pub const fn contains(&self, protocol: u8, port: u16) -> bool {
        (self.protocol == protocol || self.protocol == ANY_PROTOCOL) && self.first <= port && port <= self.last
    }
}

const _: () = assert!(size_of::<PortRule>() == 6);
const _: () = assert!(size_of::<PortSet>() == 4 + 6 * PORT_RULES);
