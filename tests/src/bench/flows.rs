//! What the programs remember of flows, and time, which does not pass while a test looks at it.

use super::Bench;
use abi::{
    AffinityEntry, AffinityKey, ConntrackEntry, ConntrackKey, FragmentEntry, FragmentKey,
    conntrack::{Account, SECOND},
    map,
};
use aya::maps::HashMap;

/// Now, in nanoseconds of `CLOCK_MONOTONIC`.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * SECOND + u64::try_from(now.tv_nsec).unwrap()
}

impl Bench {
    /// Forgets all flows.
    pub fn forget(&mut self) {
        self.loaded.clear::<ConntrackKey, ConntrackEntry>(map::CONNTRACK);
        self.loaded.clear::<FragmentKey, FragmentEntry>(map::FRAGMENTS);
        for name in map::AFFINITY {
            self.loaded.clear::<AffinityKey, AffinityEntry>(name);
        }
    }

    /// The flows that are tracked, and what is remembered of each.
    pub fn flows(&mut self) -> Vec<(ConntrackKey, ConntrackEntry)> {
        let tracked: HashMap<_, ConntrackKey, ConntrackEntry> =
            HashMap::try_from(self.loaded.ebpf.map_mut(map::CONNTRACK).unwrap()).unwrap();
        tracked.iter().map(Result::unwrap).collect()
    }

    /// Forgets one of them.
    pub fn forget_flow(&mut self, key: &ConntrackKey) {
        let mut tracked: HashMap<_, ConntrackKey, ConntrackEntry> =
            HashMap::try_from(self.loaded.ebpf.map_mut(map::CONNTRACK).unwrap()).unwrap();
        tracked.remove(key).unwrap();
    }

    /// How long the one flow that is tracked lives from now on, in seconds.
    pub fn lifetime(&mut self) -> u64 {
        let entries = self.flows();
        assert_eq!(entries.len(), 1);
        (entries[0].1.expires - now()).div_ceil(SECOND)
    }

    /// Changes what is remembered of all flows.
    pub fn change_flows(&mut self, mut change: impl FnMut(&mut ConntrackEntry)) {
        let flows = self.flows();
        let mut tracked: HashMap<_, ConntrackKey, ConntrackEntry> =
            HashMap::try_from(self.loaded.ebpf.map_mut(map::CONNTRACK).unwrap()).unwrap();
        for (key, mut entry) in flows {
            change(&mut entry);
            tracked.insert(key, entry, 0).unwrap();
        }
    }

    /// Makes the clients of pods' services as old as this, in nanoseconds of `CLOCK_MONOTONIC`; the answer is how old they
    /// were.
    pub fn age_clients(&mut self, expires: u64) -> Vec<u64> {
        let mut clients: HashMap<_, AffinityKey, AffinityEntry> =
            HashMap::try_from(self.loaded.ebpf.map_mut(map::AFFINITY[0]).unwrap()).unwrap();
        let known: Vec<(AffinityKey, AffinityEntry)> = clients.iter().map(Result::unwrap).collect();
        for (key, entry) in &known {
            clients.insert(key, AffinityEntry { expires, ..*entry }, 0).unwrap();
        }
        known.iter().map(|(_, entry)| entry.expires).collect()
    }

    /// Says how many flows are tracked in all.
    pub fn set_tracked(&mut self, flows: u64) {
        self.array::<u64>(map::TRACKED).set(0, flows, 0).unwrap();
    }

    pub fn tracked(&mut self) -> u64 {
        self.array::<u64>(map::TRACKED).get(&0, 0).unwrap()
    }

    /// Opens an account with so many flows on it.
    pub fn set_account(&mut self, owner: u32, flows: u64) {
        let mut accounts: HashMap<_, u32, Account> =
            HashMap::try_from(self.loaded.ebpf.map_mut(map::ACCOUNTS).unwrap()).unwrap();
        accounts.insert(owner, Account { flows }, 0).unwrap();
    }
}
