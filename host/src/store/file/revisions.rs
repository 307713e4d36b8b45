//! Revisions of a store in a folder. Whoever uses them holds the folder's lock.

use super::{Context, Durability, encode, replace};
use crate::{codec, store::StoreError};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

const FILE: &str = ".revision";
/// Revisions that are reserved at once.
const RESERVE: u64 = 1000;

/// The file is written in place, and to the disk only once for many revisions, which are reserved by that: what a crash takes
/// back of it are numbers that nobody gives again, since whoever opens the store goes on behind all that were reserved.
pub struct Revisions {
    file: PathBuf,
}

/// The next revision, and up to which they are reserved.
#[derive(Clone, Copy)]
struct Counter {
    next: u64,
    reserved: u64,
}

impl Counter {
    /// Nothing is reserved.
    const fn behind(last: u64) -> Self {
        Self {
            next: last + 1,
            reserved: last + 1,
        }
    }

    /// As in the file: as long for all numbers.
    const fn bytes(self) -> [[u8; 8]; 2] {
        [self.next.to_le_bytes(), self.reserved.to_le_bytes()]
    }
}

impl From<[[u8; 8]; 2]> for Counter {
    fn from([next, reserved]: [[u8; 8]; 2]) -> Self {
        Self {
            next: u64::from_le_bytes(next),
            reserved: u64::from_le_bytes(reserved),
        }
    }
}

impl Revisions {
    pub fn of(folder: &Path) -> Self {
        Self {
            file: folder.join(FILE),
        }
    }

    /// Goes on behind all revisions that were given, or behind the `last` one that is there, where the file is not.
    pub fn open(&self, last: impl FnOnce() -> Result<u64, StoreError>) -> Result<(), StoreError> {
        let behind = if self.file.exists() {
            self.read()?.reserved
        } else {
            last()? + 1
        };
        self.reserve(behind).map(|_| ())
    }

    /// The revision of the next change.
    pub fn next(&self) -> Result<u64, StoreError> {
        let Counter { next, reserved } = self.read()?;
        if next == reserved {
            return self.reserve(next);
        }
        self.write(Counter {
            next: next + 1,
            reserved,
        })?;
        Ok(next)
    }

    /// Takes a revision, and reserves more behind it.
    fn reserve(&self, revision: u64) -> Result<u64, StoreError> {
        let counter = Counter {
            next: revision + 1,
            reserved: revision + 1 + RESERVE,
        };
        replace(&self.file, &encode(&self.file, &counter.bytes())?, Durability::Disk)?;
        Ok(revision)
    }

    fn read(&self) -> Result<Counter, StoreError> {
        let bytes = fs::read(&self.file).context("read", &self.file)?;
        let counter = codec::decode::<[[u8; 8]; 2]>(&bytes).map(Counter::from);
        // Earlier versions have written the last revision alone, to the disk each time.
        let earlier = |error| codec::decode::<u64>(&bytes).map(Counter::behind).map_err(|_| error);
        counter.or_else(earlier).map_err(|source| StoreError::Content {
            file: self.file.display().to_string(),
            source,
        })
    }

    fn write(&self, counter: Counter) -> Result<(), StoreError> {
        let bytes = encode(&self.file, &counter.bytes())?;
        let written = File::options().write(true).open(&self.file);
        let written = written.and_then(|mut file| file.write_all(&bytes));
        written.context("write", &self.file)
    }
}
