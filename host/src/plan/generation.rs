//! A generation: one policy, one identity for each address, and the matrix that they compile into.

use super::{
    Decision, Row,
    index::{Full, Index},
};
use abi::{
    AddressKey, Direction, Identity, PortRule, PortSet,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET, FIRST_POD_COLUMN, PORT_RULES, UNPLACED, cell_index},
};
use std::collections::{BTreeMap, HashMap};

/// Who is asked what the policy says: a wasm module, or the word `pass` where there is none.
pub trait Oracle {
    /// Its own errors.
    type Error;

    /// What the policy says of `from` and each of `to`.
    ///
    /// # Errors
    ///
    /// Its own.
    fn decide(&mut self, from: Identity, to: &[Identity]) -> Result<Row, Self::Error>;
}

/// Size of the matrix, and of the table of port sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of one direction; row 0 is never used.
    pub rows: u32,
    /// Columns; the first 16 are for reserved identities.
    pub columns: u32,
    /// Port sets.
    pub port_sets: u32,
}

impl Shape {
    /// Cells of both directions.
    #[must_use]
    pub const fn cells(&self) -> u64 {
        2 * self.rows as u64 * self.columns as u64
    }
}

/// Why a plan was refused. Nothing was changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError<E> {
    /// It does not fit.
    #[error("the policy does not fit: {0}")]
    Full(#[from] Full),
    /// The policy could not be asked.
    #[error("{0}")]
    Oracle(E),
}

/// One cell of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CellWrite {
    /// Offset in cells.
    pub index: u32,
    /// Its new value.
    pub cell: u16,
}

/// What a change of the generation means for the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Cells to write.
    pub cells: Vec<CellWrite>,
    /// Port sets to write, with their numbers. They come before the cells that name them.
    pub port_sets: Vec<(u32, PortSet)>,
}

/// Where an address stands in the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its identity.
    pub identity: Identity,
    /// Row of the identity, or [`UNPLACED`] where no pod of this node has it.
    pub row: u32,
    /// Column of the identity.
    pub column: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    identity: Identity,
    local: bool,
}

/// Addresses that share an identity.
#[derive(Clone, Copy, Debug, Default)]
struct Users {
    all: usize,
    local: usize,
}

/// One policy with one identity for each address, compiled.
#[derive(Clone, Debug)]
pub struct Generation {
    shape: Shape,
    members: BTreeMap<AddressKey, Member>,
    users: BTreeMap<Identity, Users>,
    rows: Index,
    columns: Index,
    port_sets: HashMap<PortSet, u32>,
}

impl Generation {
    /// A generation without addresses. The reserved identities have their columns from the start.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            members: BTreeMap::new(),
            users: BTreeMap::new(),
            rows: Index::new(
                "identities on this node",
                "maps.local_identities",
                UNPLACED + 1,
                shape.rows,
            ),
            columns: Index::new("identities", "maps.identities", FIRST_POD_COLUMN, shape.columns),
            port_sets: HashMap::new(),
        }
    }

    /// Where an address stands.
    #[must_use]
    pub fn place(&self, address: &AddressKey) -> Option<Place> {
        let member = self.members.get(address)?;
        Some(Place {
            identity: member.identity,
            row: self.rows.get(member.identity).unwrap_or(UNPLACED),
            column: self.column(member.identity).unwrap_or(UNPLACED),
        })
    }

    /// Column of an identity.
    fn column(&self, identity: Identity) -> Option<u32> {
        if identity.is_pod() {
            self.columns.get(identity)
        } else {
            Some(identity.0)
        }
    }

    /// Identities of pods in use, and those of them that pods of this node have.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.users.len(), self.rows.len())
    }

    /// Different port sets in use.
    #[must_use]
    pub fn port_set_count(&self) -> usize {
        self.port_sets.len()
    }

    /// Cells that were decided.
    #[must_use]
    pub fn cell_count(&self) -> u64 {
        2 * self.rows.len() as u64 * self.known().count() as u64
    }

    /// How many addresses have an identity.
    #[must_use]
    pub fn users(&self, identity: Identity) -> usize {
        self.users.get(&identity).map_or(0, |users| users.all)
    }

    /// All identities that a decision can be about: the reserved ones, and those in use.
    fn known(&self) -> impl Iterator<Item = Identity> {
        let reserved = Identity::RESERVED.iter().map(|(identity, _)| *identity);
        reserved.chain(self.columns.iter().map(|(identity, _)| identity))
    }

    /// Gives an address its identity, and compiles what that adds. An address that has another identity keeps it in
    /// the kernel until its map entries are replaced; [`Self::release`] then takes the old one away.
    ///
    /// # Errors
    ///
    /// Where it does not fit or the policy can't be asked. The generation is as it was.
    pub fn assign<O: Oracle>(
        &mut self,
        address: AddressKey,
        identity: Identity,
        local: bool,
        oracle: &mut O,
    ) -> Result<Change, PlanError<O::Error>> {
        let mut next = self.clone();
        let change = next.assign_in_place(address, identity, local, oracle)?;
        *self = next;
        Ok(change)
    }

    fn assign_in_place<O: Oracle>(
        &mut self,
        address: AddressKey,
        identity: Identity,
        local: bool,
        oracle: &mut O,
    ) -> Result<Change, PlanError<O::Error>> {
        let mut new_columns = Vec::new();
        let mut new_rows = Vec::new();
        if identity.is_pod() && self.columns.get(identity).is_none() {
            self.columns.take(identity)?;
            new_columns.push(identity);
        }
        if local && self.rows.get(identity).is_none() {
            self.rows.take(identity)?;
            new_rows.push(identity);
        }
        let users = self.users.entry(identity).or_default();
        users.all += 1;
        users.local += usize::from(local);
        if let Some(before) = self.members.insert(address, Member { identity, local }) {
            self.leave(before);
        }
        self.compile(&new_rows, &new_columns, oracle)
    }

    /// Compiles all addresses at once.
    ///
    /// # Errors
    ///
    /// Where they do not fit or the policy can't be asked.
    pub fn compile_all<O: Oracle>(
        shape: Shape,
        addresses: impl IntoIterator<Item = (AddressKey, Identity, bool)>,
        oracle: &mut O,
    ) -> Result<(Self, Change), PlanError<O::Error>> {
        let mut generation = Self::new(shape);
        for (address, identity, local) in addresses {
            let users = generation.users.entry(identity).or_default();
            users.all += 1;
            users.local += usize::from(local);
            generation.members.insert(address, Member { identity, local });
        }
        let users: Vec<_> = generation
            .users
            .iter()
            .map(|(identity, users)| (*identity, users.local > 0))
            .collect();
        let fits = |needed: usize, capacity: u32, what, setting| {
            let capacity = capacity as usize;
            (needed <= capacity).then_some(()).ok_or(Full {
                what,
                setting,
                needed,
                capacity,
            })
        };
        let columns = users.iter().filter(|(identity, _)| identity.is_pod()).count();
        fits(
            columns,
            shape.columns - FIRST_POD_COLUMN,
            "identities",
            "maps.identities",
        )?;
        let rows = users.iter().filter(|(_, local)| *local).count();
        fits(rows, shape.rows - 1, "identities on this node", "maps.local_identities")?;
        for (identity, local) in &users {
            if identity.is_pod() {
                generation.columns.take(*identity)?;
            }
            if *local {
                generation.rows.take(*identity)?;
            }
        }
        let new_rows: Vec<_> = generation.rows.iter().map(|(identity, _)| identity).collect();
        let change = generation.compile(&new_rows, &[], oracle)?;
        Ok((generation, change))
    }

    /// Cells of new rows with every column, and of new columns with the rows that were there before.
    fn compile<O: Oracle>(
        &mut self,
        new_rows: &[Identity],
        new_columns: &[Identity],
        oracle: &mut O,
    ) -> Result<Change, PlanError<O::Error>> {
        let mut change = Change::default();
        let known: Vec<Identity> = self.known().collect();
        for row in new_rows {
            self.decide(Direction::Egress, *row, &known, oracle, &mut change)?;
        }
        if !new_rows.is_empty() {
            for sender in &known {
                self.decide(Direction::Ingress, *sender, new_rows, oracle, &mut change)?;
            }
        }
        let old_rows: Vec<Identity> = self
            .rows
            .iter()
            .map(|(identity, _)| identity)
            .filter(|identity| !new_rows.contains(identity))
            .collect();
        if !new_columns.is_empty() && !old_rows.is_empty() {
            for row in &old_rows {
                self.decide(Direction::Egress, *row, new_columns, oracle, &mut change)?;
            }
            for column in new_columns {
                self.decide(Direction::Ingress, *column, &old_rows, oracle, &mut change)?;
            }
        }
        Ok(change)
    }

    /// Asks for one sender and many receivers, and writes the cells of one direction: for egress the sender has the
    /// row, for ingress the receivers have.
    fn decide<O: Oracle>(
        &mut self,
        direction: Direction,
        from: Identity,
        to: &[Identity],
        oracle: &mut O,
        change: &mut Change,
    ) -> Result<(), PlanError<O::Error>> {
        let row = oracle.decide(from, to).map_err(PlanError::Oracle)?;
        let cells = row
            .decisions
            .iter()
            .map(|decision| self.cell(&with_baseline(from, decision), change))
            .collect::<Result<Vec<_>, _>>()?;
        for (to, cell) in to.iter().zip(&row.cells) {
            let (row, column) = match direction {
                Direction::Egress => (self.rows.get(from), self.column(*to)),
                Direction::Ingress => (self.rows.get(*to), self.column(from)),
            };
            if let (Some(row), Some(column)) = (row, column) {
                change.cells.push(CellWrite {
                    index: cell_index(direction, row, column, self.shape.rows, self.shape.columns),
                    cell: cells[usize::from(*cell)],
                });
            }
        }
        Ok(())
    }

    fn cell(&mut self, decision: &Decision, change: &mut Change) -> Result<u16, Full> {
        let rules = match decision {
            Decision::Allow => return Ok(CELL_ALLOW),
            Decision::Deny | Decision::Pass => return Ok(CELL_DENY),
            Decision::Ports(rules) => rules,
        };
        let set = port_set(rules);
        if let Some(number) = self.port_sets.get(&set) {
            return Ok(CELL_PORT_SET + u16::try_from(*number).unwrap_or(0));
        }
        let number = u32::try_from(self.port_sets.len()).unwrap_or(u32::MAX);
        let cell = u16::try_from(number)
            .ok()
            .and_then(|number| number.checked_add(CELL_PORT_SET));
        let Some(cell) = cell.filter(|_| number < self.shape.port_sets) else {
            return Err(Full {
                what: "different sets of ports",
                setting: "maps.port_sets",
                needed: self.port_sets.len() + 1,
                capacity: self.shape.port_sets as usize,
            });
        };
        self.port_sets.insert(set, number);
        change.port_sets.push((number, set));
        Ok(cell)
    }

    /// Takes an address away. Its identity keeps its place until [`Self::release`].
    pub fn remove(&mut self, address: &AddressKey) -> Option<Identity> {
        let member = self.members.remove(address)?;
        self.leave(member);
        Some(member.identity)
    }

    fn leave(&mut self, member: Member) {
        if let Some(users) = self.users.get_mut(&member.identity) {
            users.all -= 1;
            users.local -= usize::from(member.local);
        }
    }

    /// Gives back rows and columns that nobody uses any more, and clears their cells. To be called once no map entry
    /// names them.
    pub fn release(&mut self) -> Change {
        let mut change = Change::default();
        let unused_rows: Vec<Identity> = self
            .rows
            .iter()
            .map(|(identity, _)| identity)
            .filter(|identity| self.users.get(identity).is_none_or(|users| users.local == 0))
            .collect();
        for identity in unused_rows {
            if let Some(row) = self.rows.release(identity) {
                for column in 0..self.shape.columns {
                    self.clear(row, column, &mut change);
                }
            }
        }
        let unused: Vec<Identity> = self
            .users
            .iter()
            .filter(|(_, users)| users.all == 0)
            .map(|(id, _)| *id)
            .collect();
        for identity in unused {
            self.users.remove(&identity);
            if let Some(column) = self.columns.release(identity) {
                for row in 0..self.shape.rows {
                    self.clear(row, column, &mut change);
                }
            }
        }
        change
    }

    fn clear(&self, row: u32, column: u32, change: &mut Change) {
        for direction in [Direction::Egress, Direction::Ingress] {
            change.cells.push(CellWrite {
                index: cell_index(direction, row, column, self.shape.rows, self.shape.columns),
                cell: CELL_DENY,
            });
        }
    }
}

/// The last tier: a node may reach its own pods, so that their health can be checked. All else that the policy passes
/// is denied.
pub(super) fn with_baseline(from: Identity, decision: &Decision) -> Decision {
    match decision {
        Decision::Pass | Decision::Ports(_) if from == Identity::HOST => Decision::Allow,
        Decision::Pass => Decision::Deny,
        other => other.clone(),
    }
}

/// Rules in one form, however the author wrote them: sorted, overlapping and adjoining ranges merged.
fn port_set(rules: &[PortRule]) -> PortSet {
    let mut sorted = rules.to_vec();
    sorted.sort_by_key(|rule| (rule.protocol, rule.first, rule.last));
    let mut merged: Vec<PortRule> = Vec::new();
    for rule in sorted {
        match merged.last_mut() {
            Some(last) if last.protocol == rule.protocol && u32::from(rule.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(rule.last);
            }
            _ => merged.push(rule),
        }
    }
    // Never longer than what a module may answer, which is checked there.
    merged.truncate(PORT_RULES);
    let mut set = PortSet {
        len: u32::try_from(merged.len()).unwrap_or(0),
        rules: [PortRule::EMPTY; PORT_RULES],
    };
    set.rules[..merged.len()].copy_from_slice(&merged);
    set
}

#[cfg(test)]
#[path = "generation_tests.rs"]
mod tests;
