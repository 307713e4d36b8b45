//! Array maps in memory: a cell is written by a store, not by a system call.

use super::DatapathError;
use aya::maps::{Array, Map, MapData};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::{
    os::fd::AsFd,
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU16, AtomicU64, Ordering},
};

/// An mmapable array of 8-byte elements.
pub struct Mapped {
    memory: NonNull<u64>,
    elements: usize,
    bytes: usize,
}

// SAFETY: the memory is shared with the kernel, and is only ever accessed by atomic operations.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps a pinned array.
    pub fn open(pin: &Path) -> Result<Self, DatapathError> {
        let what = || format!("mapping {} into memory", pin.display());
        let data = MapData::from_pin(pin).map_err(|error| DatapathError::Load(format!("{}: {error}", what())))?;
        let fd = data
            .fd()
            .as_fd()
            .try_clone_to_owned()
            .map_err(DatapathError::io(what()))?;
        let array = Array::<MapData, u64>::try_from(Map::Array(data))
            .map_err(|error| DatapathError::Load(format!("{}: {error}", what())))?;
        let elements = array.len() as usize;
        // The kernel maps whole pages (`array_map_mmap`, `kernel/bpf/arraymap.c`).
        let page = rustix::param::page_size();
        let bytes = (elements * size_of::<u64>()).next_multiple_of(page);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that anybody uses.
        let memory = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(|error| DatapathError::io(what())(error.into()))?;
        let memory =
            NonNull::new(memory.cast()).ok_or_else(|| DatapathError::Load(format!("{}: at address 0", what())))?;
        Ok(Self {
            memory,
            elements,
            bytes,
        })
    }

    /// Elements.
    pub const fn len(&self) -> usize {
        self.elements
    }

    /// Writes one element. Everything written before is seen by a program that sees this.
    pub fn store_u64(&self, index: usize, value: u64) {
        assert!(index < self.elements, "element {index} of {}", self.elements);
        // SAFETY: the index is within the mapping, which is aligned to a page and lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.memory.add(index).as_ptr()) }.store(value, Ordering::Release);
    }

    /// Reads one element.
    pub fn load_u64(&self, index: usize) -> u64 {
        assert!(index < self.elements, "element {index} of {}", self.elements);
        // SAFETY: as in `store_u64`.
        unsafe { AtomicU64::from_ptr(self.memory.add(index).as_ptr()) }.load(Ordering::Acquire)
    }

    /// Writes one of the four 16-bit cells of an element.
    pub fn store_u16(&self, index: usize, value: u16) {
        let cells = self.elements * (size_of::<u64>() / size_of::<u16>());
        assert!(index < cells, "cell {index} of {cells}");
        // SAFETY: as in `store_u64`; a cell is aligned to its size.
        unsafe { AtomicU16::from_ptr(self.memory.cast::<u16>().add(index).as_ptr()) }.store(value, Ordering::Release);
    }

    /// Reads one of the four cells of an element.
    pub fn load_u16(&self, index: usize) -> u16 {
        let cells = self.elements * (size_of::<u64>() / size_of::<u16>());
        assert!(index < cells, "cell {index} of {cells}");
        // SAFETY: as in `store_u16`.
        unsafe { AtomicU16::from_ptr(self.memory.cast::<u16>().add(index).as_ptr()) }.load(Ordering::Acquire)
    }

    /// Makes all elements zero.
    pub fn zero(&self) {
        for index in 0..self.elements {
            self.store_u64(index, 0);
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of that length, and nothing refers to it any more.
        let unmapped = unsafe { munmap(self.memory.as_ptr().cast(), self.bytes) };
        if let Err(error) = unmapped {
            tracing::error!("unmapping a policy array: {error}");
        }
    }
}
