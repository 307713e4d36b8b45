//! What a change of the plan means for the kernel.

use super::port_sets::PortSetWrite;
use abi::{Direction, policy::CELL_DENY};

/// Cells of some rows and some columns, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Which half of the matrix.
    pub direction: Direction,
    /// The rows.
    pub rows: Vec<u32>,
    /// The columns.
    pub columns: Vec<u32>,
    /// One cell for each row and column.
    pub cells: Vec<u16>,
}

/// What a change of the generation means for the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Port sets to write, before the cells that name them.
    pub port_sets: Vec<PortSetWrite>,
    /// Cells to write.
    pub blocks: Vec<Block>,
}

impl Change {
    /// Nothing passes in these cells, at either end.
    pub(super) fn clear(&mut self, rows: &[u32], columns: &[u32]) {
        for direction in [Direction::Egress, Direction::Ingress] {
            self.blocks.push(Block {
                direction,
                rows: rows.to_vec(),
                columns: columns.to_vec(),
                cells: vec![CELL_DENY; rows.len() * columns.len()],
            });
        }
    }

    /// Nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.port_sets.is_empty() && self.blocks.is_empty()
    }

    /// Cells to write.
    #[must_use]
    pub fn cells(&self) -> usize {
        self.blocks.iter().map(|block| block.cells.len()).sum()
    }
}
