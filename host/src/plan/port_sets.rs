//! The port sets of a generation: numbers, and room in the pool of breakpoints.

use super::{index::Full, ports::Ruling};
use abi::{
    PortSet,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET, MAX_BREAKPOINTS},
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A port set to write, before any cell names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSetWrite {
    /// Its number.
    pub number: u32,
    /// Where it is in the pool.
    pub set: PortSet,
    /// Its breakpoints.
    pub breakpoints: Vec<u64>,
}

/// Port sets in use.
#[derive(Clone, Debug)]
pub struct PortSets {
    sets: u32,
    pool: u32,
    by_ruling: HashMap<Ruling, u32>,
    taken: BTreeMap<u32, (Ruling, PortSet)>,
    /// Free runs of the pool: start to length, never side by side.
    free: BTreeMap<u32, u32>,
    /// Numbers that were given back, and the first one that never was in use.
    free_numbers: BTreeSet<u32>,
    next: u32,
}

impl PortSets {
    pub fn new(sets: u32, pool: u32) -> Self {
        Self {
            sets,
            pool,
            by_ruling: HashMap::new(),
            taken: BTreeMap::new(),
            free: BTreeMap::from([(0, pool)]),
            free_numbers: BTreeSet::new(),
            next: 0,
        }
    }

    /// The cell for a ruling, with a new port set where it needs one.
    pub fn cell(&mut self, ruling: &Ruling, writes: &mut Vec<PortSetWrite>) -> Result<u16, Full> {
        match ruling.constant() {
            Some(true) => return Ok(CELL_ALLOW),
            Some(false) => return Ok(CELL_DENY),
            None => {}
        }
        if let Some(number) = self.by_ruling.get(ruling) {
            return Ok(to_cell(*number));
        }
        let breakpoints = ruling.breakpoints();
        let len = u32::try_from(breakpoints.len()).unwrap_or(u32::MAX);
        if len > MAX_BREAKPOINTS {
            return Err(Full {
                what: "breakpoints in one set of ports",
                setting: "a policy map",
                needed: breakpoints.len(),
                capacity: MAX_BREAKPOINTS as usize,
            });
        }
        let unused = Some(self.next).filter(|next| *next < self.sets);
        let number = self.free_numbers.first().copied().or(unused).ok_or(Full {
            what: "different sets of ports",
            setting: "maps.port_sets",
            needed: self.taken.len() + 1,
            capacity: self.sets as usize,
        })?;
        let run = self.free.iter().find(|(_, length)| **length >= len);
        let (first, length) = run.map(|(first, length)| (*first, *length)).ok_or(Full {
            what: "breakpoints of sets of ports",
            setting: "maps.breakpoints",
            needed: self.breakpoints() + breakpoints.len(),
            capacity: self.pool as usize,
        })?;
        self.free.remove(&first);
        if length > len {
            self.free.insert(first + len, length - len);
        }
        if !self.free_numbers.remove(&number) {
            self.next += 1;
        }
        let set = PortSet { first, len };
        self.by_ruling.insert(ruling.clone(), number);
        self.taken.insert(number, (ruling.clone(), set));
        writes.push(PortSetWrite {
            number,
            set,
            breakpoints,
        });
        Ok(to_cell(number))
    }

    /// Gives back every set that no cell names.
    pub fn retain(&mut self, named: impl Fn(u32) -> bool) -> usize {
        let unused: Vec<u32> = self.taken.keys().copied().filter(|number| !named(*number)).collect();
        for number in &unused {
            if let Some((ruling, set)) = self.taken.remove(number) {
                self.by_ruling.remove(&ruling);
                self.free_numbers.insert(*number);
                self.give_back(set);
            }
        }
        unused.len()
    }

    fn give_back(&mut self, set: PortSet) {
        let (mut first, mut length) = (set.first, set.len);
        if let Some((before, size)) = self.free.range(..first).next_back()
            && before + size == first
        {
            (first, length) = (*before, size + length);
        }
        if let Some(size) = self.free.remove(&(set.first + set.len)) {
            length += size;
        }
        self.free.insert(first, length);
    }

    /// Port sets in use.
    pub fn len(&self) -> usize {
        self.taken.len()
    }

    /// Breakpoints in use.
    pub fn breakpoints(&self) -> usize {
        self.taken.values().map(|(_, set)| set.len as usize).sum()
    }
}

fn to_cell(number: u32) -> u16 {
    // The configuration allows no more sets than cells can name.
    u16::try_from(number).map_or(CELL_DENY, |number| CELL_PORT_SET + number)
}

#[cfg(test)]
mod tests {
    use super::PortSets;
    use crate::plan::{Action, Decision, Ports, Rule, ports::Ruling};
    use abi::policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET};

    fn ruling(ports: &[u16]) -> Ruling {
        let rules = ports
            .iter()
            .map(|port| Rule {
                ports: Ports {
                    protocol: Some(6),
                    first: *port,
                    last: *port,
                },
                action: Action::Allow,
                reason: String::new(),
            })
            .collect();
        Decision {
            rules,
            otherwise: Action::Deny,
            reason: String::new(),
        }
        .line()
        .settle(false)
    }

    #[test]
    fn a_set_that_nobody_names_makes_room_for_another() {
        let mut sets = PortSets::new(3, 9);
        let mut writes = Vec::new();
        assert_eq!(sets.cell(&Ruling::all(true), &mut writes), Ok(CELL_ALLOW));
        assert_eq!(sets.cell(&Ruling::all(false), &mut writes), Ok(CELL_DENY));
        let cells = [80, 443, 8080].map(|port| sets.cell(&ruling(&[port]), &mut writes).unwrap());
        assert_eq!(cells, [CELL_PORT_SET, CELL_PORT_SET + 1, CELL_PORT_SET + 2]);
        assert_eq!(sets.cell(&ruling(&[443]), &mut writes), Ok(CELL_PORT_SET + 1), "known");
        assert_eq!((writes.len(), sets.breakpoints()), (3, 9));

        let full = sets.cell(&ruling(&[22]), &mut writes).unwrap_err().to_string();
        assert!(
            full.contains("4 different sets of ports, but `maps.port_sets` allows 3"),
            "{full}"
        );
        assert_eq!(sets.retain(|number| number == 2), 2);
        let full = sets.cell(&ruling(&[1, 3, 5, 7]), &mut writes).unwrap_err().to_string();
        assert!(full.contains("`maps.breakpoints` allows 9"), "{full}");
        assert_eq!(
            sets.cell(&ruling(&[1, 3]), &mut writes),
            Ok(CELL_PORT_SET),
            "both runs put together"
        );
    }
}
