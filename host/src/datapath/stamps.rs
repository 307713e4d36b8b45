//! Slots and stamps of addresses, which tell the fast path whether what it has concluded from an entry still holds.

use super::cells::Mapped;
use abi::AddressKey;
use std::collections::{BTreeMap, BTreeSet};

/// Who has which slot of [`abi::map::STAMPS`]. Slots are as many as the ipcache has room for, and stamps of all addresses are
/// different.
pub struct Stamps {
    map: Mapped,
    last: u32,
    slots: BTreeMap<AddressKey, u32>,
    free: Vec<u32>,
    /// Addresses whose last stamp their entries may not have: it is being written, or that failed.
    unsettled: BTreeSet<AddressKey>,
}

impl Stamps {
    pub const fn new(map: Mapped) -> Self {
        Self {
            map,
            last: 0,
            slots: BTreeMap::new(),
            free: Vec::new(),
            unsettled: BTreeSet::new(),
        }
    }

    /// Slot and stamp for what is written next of an address. From here on the programs conclude nothing any more from what
    /// was there before.
    pub fn touch(&mut self, address: AddressKey) -> (u32, u32) {
        self.last = self.last.wrapping_add(1);
        self.unsettled.insert(address);
        let used = self.slots.len() + self.free.len();
        let slot = *self.slots.entry(address).or_insert_with(|| {
            let unused = u32::try_from(used + 1).unwrap_or(u32::MAX);
            self.free.pop().unwrap_or(unused)
        });
        // Without a slot of its own an address has no fast path.
        if (slot as usize) < self.map.len() {
            self.map.store_u64(slot as usize, u64::from(self.last));
            (slot, self.last)
        } else {
            (0, self.last)
        }
    }

    /// An address has been written whole.
    pub fn settle(&mut self, address: &AddressKey) {
        self.unsettled.remove(address);
    }

    /// Whether its entries have its last stamp.
    pub fn is_settled(&self, address: &AddressKey) -> bool {
        !self.unsettled.contains(address)
    }

    /// The maps hold nothing of it any more.
    pub fn release(&mut self, address: &AddressKey) {
        self.unsettled.remove(address);
        self.free.extend(self.slots.remove(address));
    }
}
