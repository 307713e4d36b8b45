//! Maglev's table: which backend each slot of a hash belongs to (Eisenbud et al., "Maglev: A Fast and Reliable Software
//! Network Load Balancer", NSDI 2016, section 3.4).
//!
//! Every backend goes through the slots in an order of its own, and takes the next one that is free when it is its turn.
//! The orders depend on nothing but the backend's address and port: all nodes make the same table, and a backend that
//! comes or goes moves few of the others' slots.

use abi::service::{Backend, SLOTS};
use sha2::{Digest, Sha256};

const SLOT_COUNT: usize = SLOTS as usize;

/// A backend's way through the slots: where it begins, and how far it steps.
struct Walk {
    next: usize,
    step: usize,
}

impl Walk {
    fn new(backend: &Backend) -> Self {
        let mut hash = Sha256::new();
        hash.update(backend.address.0);
        hash.update(backend.port.to_ne_bytes());
        let hash = hash.finalize();
        let word = |at: usize| {
            let bytes = [hash[at], hash[at + 1], hash[at + 2], hash[at + 3]];
            u32::from_be_bytes(bytes) as usize
        };
        Self {
            next: word(0) % SLOT_COUNT,
            // The number of slots is a prime: any step goes through all of them.
            step: word(4) % (SLOT_COUNT - 1) + 1,
        }
    }

    fn go_on(&mut self) -> usize {
        let slot = self.next;
        self.next = (self.next + self.step) % SLOT_COUNT;
        slot
    }
}

/// The backend of each slot, as its place among `backends`, which must be in order; none without backends.
pub fn table(backends: &[Backend]) -> Vec<usize> {
    let mut walks: Vec<Walk> = backends.iter().map(Walk::new).collect();
    let mut slots: Vec<Option<usize>> = vec![None; SLOT_COUNT];
    let mut left = if walks.is_empty() { 0 } else { SLOT_COUNT };
    while left > 0 {
        for (backend, walk) in walks.iter_mut().enumerate() {
            if left == 0 {
                break;
            }
            let mut slot = walk.go_on();
            while slots[slot].is_some() {
                slot = walk.go_on();
            }
            slots[slot] = Some(backend);
            left -= 1;
        }
    }
    slots.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::{SLOT_COUNT, table};
    use abi::{address::Address, service::Backend};

    fn backends(count: u8) -> Vec<Backend> {
        let backend = |last| Backend {
            address: Address::v4([10, 1, 0, last]),
            port: 80_u16.to_be(),
            zero: 0,
        };
        (1..=count).map(backend).collect()
    }

    fn shares(slots: &[usize], backends: usize) -> Vec<usize> {
        let count = |backend| slots.iter().filter(|slot| **slot == backend).count();
        (0..backends).map(count).collect()
    }

    #[test]
    fn every_backend_has_its_share() {
        assert!(table(&[]).is_empty());
        for count in [1, 2, 3, 7, 100] {
            let slots = table(&backends(count));
            assert_eq!(slots.len(), SLOT_COUNT);
            let shares = shares(&slots, count.into());
            let fair = SLOT_COUNT / usize::from(count);
            assert!(shares.iter().all(|share| share.abs_diff(fair) <= 1), "{shares:?}");
        }
    }

    #[test]
    fn one_backend_less_moves_few_of_the_others_slots() {
        let before = backends(20);
        let mut after = before.clone();
        let gone = after.remove(7);
        let (old, new) = (table(&before), table(&after));
        let kept = old.iter().zip(&new).filter(|(old, _)| before[**old] != gone);
        let (stay, all) = kept.fold((0, 0), |(stay, all), (old, new)| {
            (stay + usize::from(before[*old] == after[*new]), all + 1)
        });
        // The paper's figure 12: one in twenty gone leaves all but a few in a hundred where they were.
        assert!(stay * 100 >= all * 95, "{stay} of {all}");
    }
}
