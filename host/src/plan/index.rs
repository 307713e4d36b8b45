//! Dense indexes: which row or column of the matrix an identity has.

use abi::Identity;
use std::collections::{BTreeMap, VecDeque};

/// Indexes of identities, stable while they are in use.
#[derive(Clone, Debug)]
pub struct Index {
    what: &'static str,
    setting: &'static str,
    next: u32,
    end: u32,
    /// Indexes that were given back, the longest free first: a program that still reads an old map entry has the most
    /// time to finish.
    free: VecDeque<u32>,
    taken: BTreeMap<Identity, u32>,
}

/// A limit was reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{needed} {what}, but `{setting}` allows {capacity}; raise it and restart hostd, or have the policy make fewer"
)]
pub struct Full {
    /// What there are too many of.
    pub what: &'static str,
    /// The key in the configuration.
    pub setting: &'static str,
    /// How many there would be.
    pub needed: usize,
    /// How many there can be.
    pub capacity: usize,
}

impl Index {
    /// Indexes from `first` up to but not including `end`.
    pub fn new(what: &'static str, setting: &'static str, first: u32, end: u32) -> Self {
        Self {
            what,
            setting,
            next: first,
            end,
            free: VecDeque::new(),
            taken: BTreeMap::new(),
        }
    }

    pub fn get(&self, identity: Identity) -> Option<u32> {
        self.taken.get(&identity).copied()
    }

    /// Whether there is room for so many identities in all.
    pub fn check_room(&self, needed: usize) -> Result<(), Full> {
        let capacity = self.taken.len() + self.free.len() + (self.end - self.next) as usize;
        if needed <= capacity {
            return Ok(());
        }
        Err(Full {
            what: self.what,
            setting: self.setting,
            needed,
            capacity,
        })
    }

    /// The identity's index, a new one if it has none.
    pub fn take(&mut self, identity: Identity) -> Result<u32, Full> {
        if let Some(index) = self.get(identity) {
            return Ok(index);
        }
        let index = if self.next < self.end {
            self.next += 1;
            self.next - 1
        } else {
            self.free.pop_front().ok_or_else(|| Full {
                what: self.what,
                setting: self.setting,
                needed: self.taken.len() + 1,
                capacity: self.taken.len(),
            })?
        };
        self.taken.insert(identity, index);
        Ok(index)
    }

    /// Gives an identity's index back.
    pub fn release(&mut self, identity: Identity) -> Option<u32> {
        let index = self.taken.remove(&identity)?;
        self.free.push_back(index);
        Some(index)
    }

    pub fn iter(&self) -> impl Iterator<Item = (Identity, u32)> {
        self.taken.iter().map(|(identity, index)| (*identity, *index))
    }

    pub fn len(&self) -> usize {
        self.taken.len()
    }
}
