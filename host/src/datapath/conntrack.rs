//! The conntrack map from hostd's side: what flows are tracked, who has how many of them, and which have run out.

use super::{Datapath, DatapathError};
use abi::{
    ConntrackEntry, ConntrackKey,
    conntrack::{Account, OUTSIDE, SECOND},
    map,
};
use aya::maps::{HashMap, Map, MapData, MapError};
use std::{
    collections::HashMap as StdHashMap,
    path::Path,
    time::{Duration, Instant},
};

/// From this part of the map on a pod gets no more than its share of what is left, in percent.
const LIMIT: u64 = 70;
/// What all shares together may fill the map to, in percent.
const FULL: u64 = 95;

/// An entry that ran out so long ago is taken away. The programs take one that has just run out for none, and may be
/// entering the same flow anew.
const GRACE_NS: u64 = 5 * SECOND;

/// The least time between two counts, in general and under pressure.
const COUNT: Duration = Duration::from_secs(30);
const COUNT_SOON: Duration = Duration::from_secs(2);

type ConntrackMap = HashMap<MapData, ConntrackKey, ConntrackEntry>;

/// When the entries were counted last, and how long that took.
#[derive(Debug)]
pub struct Counted {
    at: Instant,
    took: Duration,
}

impl Default for Counted {
    fn default() -> Self {
        Self {
            at: Instant::now(),
            took: Duration::ZERO,
        }
    }
}

/// The map that the programs use.
pub fn open(bpffs: &Path) -> Result<ConntrackMap, DatapathError> {
    let pin = bpffs.join("maps").join(map::CONNTRACK);
    let data = MapData::from_pin(&pin).map_err(DatapathError::map(map::CONNTRACK))?;
    HashMap::try_from(Map::LruHashMap(data)).map_err(DatapathError::map(map::CONNTRACK))
}

/// Now, in nanoseconds of `CLOCK_MONOTONIC`, as entries have it.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let part = |part: i64| u64::try_from(part).unwrap_or(0);
    part(now.tv_sec) * SECOND + part(now.tv_nsec)
}

impl Datapath {
    /// Entries of the map, about.
    ///
    /// # Errors
    ///
    /// Where the map can't be read.
    pub fn tracked(&self) -> Result<u64, DatapathError> {
        self.tracked.get(&0, 0).map_err(DatapathError::map(map::TRACKED))
    }

    /// Flows of each account, about.
    fn accounts(&self) -> Result<StdHashMap<u32, u64>, DatapathError> {
        let accounts = self
            .accounts
            .iter()
            .map(|account| account.map(|(owner, account)| (owner, account.flows)));
        accounts
            .collect::<Result<_, _>>()
            .map_err(DatapathError::map(map::ACCOUNTS))
    }

    /// Opens the account of a pod of this node.
    ///
    /// # Errors
    ///
    /// Where the map is full.
    pub(super) fn open_account(&mut self, owner: u32) -> Result<(), DatapathError> {
        /// `BPF_NOEXIST` (`include/uapi/linux/bpf.h`).
        const ONLY_NEW: u64 = 1;
        match self.accounts.insert(owner, Account { flows: 0 }, ONLY_NEW) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            result => result.map_err(DatapathError::map(map::ACCOUNTS)),
        }
    }

    /// Says how many pods share the map.
    ///
    /// # Errors
    ///
    /// Where the map can't be written.
    pub fn set_pods(&mut self, pods: usize) -> Result<(), DatapathError> {
        let capacity = u64::from(self.conntrack_capacity);
        let limit = capacity * LIMIT / 100;
        // The kernel begins to give entries away a little before the map is full (`kernel/bpf/bpf_lru_list.c`).
        // One more for clients outside.
        let share = (capacity * FULL / 100 - limit) / u64::try_from(pods + 1).unwrap_or(u64::MAX);
        self.node_config.conntrack_limit = u32::try_from(limit).unwrap_or(u32::MAX);
        self.node_config.conntrack_share = u32::try_from(share).unwrap_or(u32::MAX);
        self.write_config()
    }

    /// Counts the entries and takes away those that have run out, if that is due: the fuller the map, the sooner.
    ///
    /// # Errors
    ///
    /// Where a map can't be read or written.
    pub fn collect_flows(&mut self) -> Result<(), DatapathError> {
        let pressed = self.tracked()? >= u64::from(self.node_config.conntrack_limit) / 2;
        let least = if pressed { COUNT_SOON } else { COUNT };
        if self.counted.at.elapsed() < least.max(10 * self.counted.took) {
            return Ok(());
        }
        self.count_flows()
    }

    /// The same at once.
    ///
    /// # Errors
    ///
    /// Where a map can't be read or written.
    pub fn count_flows(&mut self) -> Result<(), DatapathError> {
        let began = Instant::now();
        let mut conntrack = open(&self.bpffs)?;
        let (all_before, before) = (self.tracked()?, self.accounts()?);
        let now = now();
        let mut gone = Vec::new();
        let mut all = 0_u64;
        let mut accounts: StdHashMap<u32, u64> = StdHashMap::new();
        // One that is replaced while it is read is left out.
        for (key, entry) in conntrack.iter().flatten() {
            if entry.expires + GRACE_NS < now {
                gone.push(key);
            } else {
                all += 1;
                *accounts.entry(entry.account).or_default() += 1;
            }
        }
        for key in gone {
            // Unless the flow was opened anew meanwhile.
            if !conntrack.get(&key, 0).is_ok_and(|entry| entry.expires + GRACE_NS < now) {
                continue;
            }
            match conntrack.remove(&key) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(DatapathError::map(map::CONNTRACK)(error)),
            }
        }
        // What was entered while the entries were read may not have been among them.
        let all = all + self.tracked()?.saturating_sub(all_before);
        let after = self.accounts()?;
        self.tracked.set(0, all, 0).map_err(DatapathError::map(map::TRACKED))?;
        let used: std::collections::HashSet<u32> = self
            .placed
            .values()
            .filter_map(|desired| Some(desired.endpoint.as_ref()?.owner))
            .chain([OUTSIDE])
            .collect();
        for (owner, flows) in after {
            if used.contains(&owner) {
                let entered = flows.saturating_sub(before.get(&owner).copied().unwrap_or(0));
                let flows = accounts.get(&owner).copied().unwrap_or(0) + entered;
                self.accounts
                    .insert(owner, Account { flows }, 0)
                    .map_err(DatapathError::map(map::ACCOUNTS))?;
            } else {
                self.accounts
                    .remove(&owner)
                    .map_err(DatapathError::map(map::ACCOUNTS))?;
            }
        }
        self.counted = Counted {
            at: Instant::now(),
            took: began.elapsed(),
        };
        Ok(())
    }
}
