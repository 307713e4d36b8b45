//! The plan: what the kernel should hold, worked out without any I/O.
//!
//! A [`Generation`] is one policy with one identity for each address, compiled into the policy matrix. The daemon has
//! one in force and, during a policy load, a second one aside. [`entry()`] puts the two together into the map entries of
//! an address, which hold both of them by parity.

mod entry;
mod generation;
mod index;
mod survey;

pub use entry::{Desired, Facts, Stance, entry};
pub use generation::{CellWrite, Change, Generation, Oracle, Place, PlanError, Shape};
pub use index::Full;
pub use survey::{Verdict, protocol_name, survey};

use abi::PortRule;

/// What a policy says of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// All traffic.
    Allow,
    /// No traffic.
    Deny,
    /// Left to who decides next.
    Pass,
    /// These ports; the rest is left to who decides next.
    Ports(Vec<PortRule>),
}

/// Decisions for one sender and many receivers: each cell is an index into `decisions`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The different decisions.
    pub decisions: Vec<Decision>,
    /// One for each receiver.
    pub cells: Vec<u16>,
}
