//! A generation: one policy, one identity for each address, and the matrix that they compile into.
//!
//! A new identity costs one column, and one row where a pod of this node has it; nothing else is decided again.

use super::{
    change::{Block, Change},
    index::{Full, Index},
    port_sets::{PortSetWrite, PortSets},
    ports::Ruling,
};
use abi::{
    AddressKey, Direction, Identity,
    policy::{CELL_PORT_SET, FIRST_POD_COLUMN, UNPLACED, cell_index},
};
use std::collections::{BTreeMap, BTreeSet};

/// Who is asked what the policy says. Rulings have numbers, which keep their meaning.
pub trait Oracle {
    /// Its own errors.
    type Error;

    /// What the policy says for each of `subjects`, at that end, with each of `peers`: numbers of rulings, subject by
    /// subject.
    ///
    /// # Errors
    ///
    /// Its own.
    fn decide(&mut self, side: Direction, subjects: &[Identity], peers: &[Identity]) -> Result<Vec<u32>, Self::Error>;

    /// The ruling with this number.
    fn ruling(&self, number: u32) -> &Ruling;
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
    /// Breakpoints of all port sets together.
    pub breakpoints: u32,
}

impl Shape {
    /// Cells of both directions.
    #[must_use]
    pub const fn cells(&self) -> u64 {
        2 * self.rows as u64 * self.columns as u64
    }

    /// Offset of a cell.
    #[must_use]
    pub const fn index(&self, direction: Direction, row: u32, column: u32) -> u32 {
        cell_index(direction, row, column, self.rows, self.columns)
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
    /// A network has it.
    network: bool,
}

impl Users {
    const fn is_unused(&self) -> bool {
        self.all == 0 && !self.network
    }
}

/// Cells that the policy is asked for at once, about: bounds what an answer takes.
const CELLS_AT_ONCE: usize = 1 << 18;

/// One policy with one identity for each address, compiled.
#[derive(Clone, Debug)]
pub struct Generation {
    shape: Shape,
    members: BTreeMap<AddressKey, Member>,
    users: BTreeMap<Identity, Users>,
    rows: Index,
    columns: Index,
    port_sets: PortSets,
    /// Cell of each of the oracle's rulings, as far as they were met.
    cells: Vec<Option<u16>>,
    /// Identities that may have lost their last address.
    leaving: BTreeSet<Identity>,
    /// Port sets that no change has carried to the kernel yet.
    unwritten: Vec<PortSetWrite>,
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
            port_sets: PortSets::new(shape.port_sets, shape.breakpoints),
            cells: Vec::new(),
            leaving: BTreeSet::new(),
            unwritten: Vec::new(),
        }
    }

    /// Where an address stands.
    #[must_use]
    pub fn place(&self, address: &AddressKey) -> Option<Place> {
        let member = self.members.get(address)?;
        Some(Place {
            identity: member.identity,
            row: self.row(member.identity).unwrap_or(UNPLACED),
            column: self.column(member.identity).unwrap_or(UNPLACED),
        })
    }

    /// Row of an identity; none where no pod of this node has it.
    #[must_use]
    pub fn row(&self, identity: Identity) -> Option<u32> {
        self.rows.get(identity)
    }

    /// Column of an identity.
    #[must_use]
    pub fn column(&self, identity: Identity) -> Option<u32> {
        if identity.is_allocated() {
            self.columns.get(identity)
        } else {
            Some(identity.0)
        }
    }

    /// Identities in use, networks' included, and those of them that pods of this node have.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.columns.len(), self.rows.len())
    }

    /// Port sets in use, and their breakpoints.
    #[must_use]
    pub fn port_set_counts(&self) -> (usize, usize) {
        (self.port_sets.len(), self.port_sets.breakpoints())
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

    /// Whether anything here still has an identity.
    #[must_use]
    pub fn holds(&self, identity: Identity) -> bool {
        self.users.contains_key(&identity)
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
        let new_column = identity.is_allocated() && self.columns.get(identity).is_none();
        let new_row = local && self.rows.get(identity).is_none();
        if new_column {
            self.columns.take(identity)?;
        }
        let change = self.add_places(identity, new_row, new_column, oracle);
        match change {
            Ok(mut change) => {
                self.join(address, Member { identity, local });
                change.port_sets = std::mem::take(&mut self.unwritten);
                Ok(change)
            }
            Err(error) => {
                if new_column {
                    self.columns.release(identity);
                }
                if new_row {
                    self.rows.release(identity);
                }
                Err(error)
            }
        }
    }

    fn add_places<O: Oracle>(
        &mut self,
        identity: Identity,
        new_row: bool,
        new_column: bool,
        oracle: &mut O,
    ) -> Result<Change, PlanError<O::Error>> {
        let mut change = Change::default();
        if new_column {
            let rows: Vec<Identity> = self.rows.iter().map(|(row, _)| row).collect();
            self.compile(&rows, &[identity], oracle, &mut change)?;
        }
        if new_row {
            self.rows.take(identity)?;
            let known: Vec<Identity> = self.known().collect();
            self.compile(&[identity], &known, oracle, &mut change)?;
        }
        Ok(change)
    }

    fn join(&mut self, address: AddressKey, member: Member) {
        let users = self.users.entry(member.identity).or_default();
        users.all += 1;
        users.local += usize::from(member.local);
        if let Some(before) = self.members.insert(address, member) {
            self.leave(before);
        }
    }

    /// Compiles all addresses at once. `networks` are the identities of networks; they keep their columns.
    ///
    /// # Errors
    ///
    /// Where they do not fit or the policy can't be asked.
    pub fn compile_all<O: Oracle>(
        shape: Shape,
        addresses: impl IntoIterator<Item = (AddressKey, Identity, bool)>,
        networks: impl IntoIterator<Item = Identity>,
        oracle: &mut O,
    ) -> Result<(Self, Change), PlanError<O::Error>> {
        let mut generation = Self::new(shape);
        for (address, identity, local) in addresses {
            generation.join(address, Member { identity, local });
        }
        for identity in networks {
            generation.users.entry(identity).or_default().network = true;
        }
        generation.take_places()?;
        let rows: Vec<Identity> = generation.rows.iter().map(|(identity, _)| identity).collect();
        let known: Vec<Identity> = generation.known().collect();
        let mut change = Change::default();
        generation.compile(&rows, &known, oracle, &mut change)?;
        change.port_sets = std::mem::take(&mut generation.unwritten);
        Ok((generation, change))
    }

    /// Rows and columns for all identities: all of them are counted before the first one is refused.
    fn take_places(&mut self) -> Result<(), Full> {
        let users: Vec<_> = self
            .users
            .iter()
            .map(|(identity, users)| (*identity, users.local > 0))
            .collect();
        let columns = users.iter().filter(|(identity, _)| identity.is_allocated()).count();
        self.columns.check_room(columns)?;
        self.rows.check_room(users.iter().filter(|(_, local)| *local).count())?;
        for (identity, local) in users {
            if identity.is_allocated() {
                self.columns.take(identity)?;
            }
            if local {
                self.rows.take(identity)?;
            }
        }
        Ok(())
    }

    /// Asks for both ends of each of `subjects`, which have rows, with each of `peers`, which have columns.
    fn compile<O: Oracle>(
        &mut self,
        subjects: &[Identity],
        peers: &[Identity],
        oracle: &mut O,
        change: &mut Change,
    ) -> Result<(), PlanError<O::Error>> {
        if peers.is_empty() {
            return Ok(());
        }
        let columns: Vec<u32> = peers
            .iter()
            .map(|peer| self.column(*peer).unwrap_or(UNPLACED))
            .collect();
        let at_once = (CELLS_AT_ONCE / peers.len()).max(1);
        for direction in [Direction::Egress, Direction::Ingress] {
            for subjects in subjects.chunks(at_once) {
                let rulings = oracle.decide(direction, subjects, peers).map_err(PlanError::Oracle)?;
                let cells = rulings
                    .into_iter()
                    .map(|ruling| self.cell(ruling, oracle))
                    .collect::<Result<Vec<u16>, Full>>()?;
                change.blocks.push(Block {
                    direction,
                    rows: subjects
                        .iter()
                        .map(|subject| self.row(*subject).unwrap_or(UNPLACED))
                        .collect(),
                    columns: columns.clone(),
                    cells,
                });
            }
        }
        Ok(())
    }

    fn cell<O: Oracle>(&mut self, ruling: u32, oracle: &O) -> Result<u16, Full> {
        let index = ruling as usize;
        if let Some(Some(cell)) = self.cells.get(index) {
            return Ok(*cell);
        }
        let cell = self.port_sets.cell(oracle.ruling(ruling), &mut self.unwritten)?;
        if self.cells.len() <= index {
            self.cells.resize(index + 1, None);
        }
        self.cells[index] = Some(cell);
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
            self.leaving.insert(member.identity);
        }
    }

    /// Gives back rows and columns that nobody uses any more, and clears their cells. To be called once no map entry
    /// names them.
    pub fn release(&mut self) -> Change {
        let mut change = Change::default();
        for identity in std::mem::take(&mut self.leaving) {
            let Some(users) = self.users.get(&identity).copied() else {
                continue;
            };
            if users.local == 0
                && let Some(row) = self.rows.release(identity)
            {
                change.clear(&[row], &(0..self.shape.columns).collect::<Vec<_>>());
            }
            if users.is_unused() {
                self.users.remove(&identity);
                if let Some(column) = self.columns.release(identity) {
                    change.clear(&(0..self.shape.rows).collect::<Vec<_>>(), &[column]);
                }
            }
        }
        change
    }

    /// Identities that pods of this node have.
    pub fn local(&self) -> impl Iterator<Item = Identity> {
        self.rows.iter().map(|(identity, _)| identity)
    }

    /// Asks again about some identities of this node, with all peers.
    ///
    /// # Errors
    ///
    /// Where it does not fit or the policy can't be asked. The cells are as they were.
    pub fn recompile<O: Oracle>(&mut self, rows: &[Identity], oracle: &mut O) -> Result<Change, PlanError<O::Error>> {
        let known: Vec<Identity> = self.known().collect();
        let mut change = Change::default();
        self.compile(rows, &known, oracle, &mut change)?;
        change.port_sets = std::mem::take(&mut self.unwritten);
        Ok(change)
    }

    /// The oracle has forgotten the numbers of its rulings.
    pub fn forget_rulings(&mut self) {
        self.cells.clear();
    }

    /// Gives back port sets that no cell names any more, given what the kernel's cells hold by their offset. To be
    /// called where a plan did not fit; the answer is how many sets that made room for.
    pub fn sweep(&mut self, cell: impl Fn(u32) -> u16) -> usize {
        let columns: Vec<u32> = self.known().filter_map(|identity| self.column(identity)).collect();
        let mut named = BTreeSet::new();
        for (_, row) in self.rows.iter() {
            for direction in [Direction::Egress, Direction::Ingress] {
                named.extend(
                    columns
                        .iter()
                        .map(|column| cell(self.shape.index(direction, row, *column)))
                        .filter(|cell| *cell >= CELL_PORT_SET)
                        .map(|cell| u32::from(cell - CELL_PORT_SET)),
                );
            }
        }
        let freed = self.port_sets.retain(|number| named.contains(&number));
        if freed > 0 {
            // Their writes are still to come, or of no use any more: whoever needs them asks again.
            self.unwritten.clear();
            self.cells.clear();
        }
        freed
    }
}

#[cfg(test)]
#[path = "generation_tests.rs"]
mod tests;
