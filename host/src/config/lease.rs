//! How long a node may be silent: the `[lease]` table.

use serde::Deserialize;
use std::time::Duration;

/// When a node is stale, and when it is gone.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct Lease {
    /// A node that has not renewed its lease for this many seconds is shown as stale.
    pub ttl_seconds: u64,
    /// A node that has been stale for this many seconds is removed with its pods. 0: never.
    pub grace_seconds: u64,
    /// A policy load waits so many seconds for all nodes to prepare, and as many for them to switch. The same on all nodes.
    pub load_seconds: u32,
}

impl Default for Lease {
    fn default() -> Self {
        Self {
            ttl_seconds: 15,
            grace_seconds: 86400,
            load_seconds: 10,
        }
    }
}

impl Lease {
    /// Time to live of the lease.
    #[must_use]
    pub const fn ttl(&self) -> Duration {
        Duration::from_secs(self.ttl_seconds)
    }

    /// Time for each phase of a policy load.
    #[must_use]
    pub const fn phase(&self) -> Duration {
        Duration::from_secs(self.load_seconds as u64)
    }
}
