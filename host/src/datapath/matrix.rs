//! The policy matrix with its port sets, by parity, and the flip from one side to the other.

use super::{Datapath, DatapathError};
use crate::plan::{Change, Ruling};
use abi::{
    map,
    policy::{CELL_ALLOW, CELL_DENY, CELL_PORT_SET},
};
use aya::maps::{Array, MapData};

impl Datapath {
    /// Writes port sets and cells of one side of the policy matrix.
    ///
    /// # Errors
    ///
    /// Where a map can't be written.
    pub fn write(&mut self, parity: usize, change: &Change) -> Result<(), DatapathError> {
        for write in &change.port_sets {
            for (index, breakpoint) in (write.set.first as usize..).zip(&write.breakpoints) {
                self.port_pool[parity].store_u64(index, *breakpoint);
            }
            self.port_sets[parity]
                .set(write.number, write.set, 0)
                .map_err(DatapathError::map(map::PORT_SETS[parity]))?;
        }
        for block in &change.blocks {
            for (row, cells) in block
                .rows
                .iter()
                .zip(block.cells.chunks_exact(block.columns.len().max(1)))
            {
                let start = self.shape.index(block.direction, *row, 0) as usize;
                for (column, cell) in block.columns.iter().zip(cells) {
                    self.cells[parity].store_u16(start + *column as usize, *cell);
                }
            }
        }
        Ok(())
    }

    /// What the kernel has in one cell, by its offset.
    #[must_use]
    pub fn cell(&self, parity: usize, index: u32) -> u16 {
        self.cells[parity].load_u16(index as usize)
    }

    /// What a cell lets pass, read from the kernel's port sets and their breakpoints.
    ///
    /// # Errors
    ///
    /// Where a map can't be read.
    pub fn ruling(&self, parity: usize, cell: u16) -> Result<Ruling, DatapathError> {
        match cell {
            CELL_DENY => return Ok(Ruling::all(false)),
            CELL_ALLOW => return Ok(Ruling::all(true)),
            _ => {}
        }
        let set = self.port_sets[parity]
            .get(&u32::from(cell - CELL_PORT_SET), 0)
            .map_err(DatapathError::map(map::PORT_SETS[parity]))?;
        let breakpoints: Vec<u64> = (set.first..set.first + set.len)
            .map(|index| self.port_pool[parity].load_u64(index as usize))
            .collect();
        Ok(Ruling::from_breakpoints(&breakpoints))
    }

    /// Makes one side of the policy matrix deny everything.
    pub fn clear(&mut self, parity: usize) {
        self.cells[parity].zero();
    }

    /// Puts the other side in force, and returns once no packet is on its way under the old one.
    ///
    /// # Errors
    ///
    /// Where waiting fails; the other side is in force all the same.
    pub fn flip(&mut self) -> Result<(), DatapathError> {
        self.generation.store_u64(0, u64::from(self.generation()) + 1);
        self.grace()
    }

    /// Waits until no program runs that began before the call. Replacing a map in a map makes the kernel wait for an
    /// RCU grace period before it returns (`maybe_wait_bpf_programs`, `kernel/bpf/syscall.c`), and a tc program runs
    /// inside one.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn grace(&mut self) -> Result<(), DatapathError> {
        let inner = Array::<MapData, u32>::create(1, 0).map_err(DatapathError::map(map::GRACE))?;
        self.grace.set(0, &inner, 0).map_err(DatapathError::map(map::GRACE))
    }
}
