//! The plan: what the kernel should hold, worked out without any I/O.
//!
//! A [`Generation`] is one policy with one identity for each address, compiled into the policy matrix. The daemon has
//! one in force and, during a policy load, a second one aside. [`entry()`] puts the two together into the map entries of
//! an address, which hold both of them by parity; [`network_entries`] does the same for prefixes.

mod change;
mod entry;
mod generation;
mod index;
mod maglev;
mod networks;
mod nodes;
mod port_sets;
mod ports;
mod service;

pub use change::{Block, Change};
pub use entry::{Desired, Facts, NetworkSide, Stance, entry, network_entries};
pub use generation::{Generation, Oracle, Place, PlanError, Shape};
pub use index::Full;
pub use networks::{Membership, Network, Partition};
pub use nodes::{Announced, node_addresses, node_entry};
pub use port_sets::PortSetWrite;
pub use ports::{Action, CARRIED, Decision, Line, Ports, Rule, Ruling, protocol_name};
pub use service::{Frontend, Numbers, frontends, keys as frontend_keys, service_address};
