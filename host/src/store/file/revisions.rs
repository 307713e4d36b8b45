//! Revisions of a store in a folder. Whoever uses them holds the folder's lock.

use super::{Context, Durability, encode, replace};
use crate::{codec, store::StoreError};
use std::{
    fs::{self, File},
    io::{self, Write},
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
        let behind = match self.read()? {
            Some(counter) => counter.reserved,
            None => last()? + 1,
        };
        self.reserve(behind).map(|_| ())
    }

    /// The revision of the next change.
    pub fn next(&self, last: impl FnOnce() -> Result<u64, StoreError>) -> Result<u64, StoreError> {
        let Some(Counter { next, reserved }) = self.read()? else {
            return self.reserve(last()? + 1);
        };
        // The file of an earlier version is shorter, and written anew here, too.
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

    /// None where nothing has been written yet.
    fn read(&self) -> Result<Option<Counter>, StoreError> {
        match fs::read(&self.file) {
            // Earlier versions have written the last revision alone, to the disk each time.
            Ok(bytes) => codec::decode::<[[u8; 8]; 2]>(&bytes)
                .map(Counter::from)
                .or_else(|error| match codec::decode::<u64>(&bytes) {
                    Ok(last) => Ok(Counter {
                        next: last + 1,
                        reserved: last + 1,
                    }),
                    Err(_) => Err(error),
                })
                .map(Some)
                .map_err(|source| StoreError::Content {
                    file: self.file.display().to_string(),
                    source,
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("read", &self.file),
        }
    }

    fn write(&self, counter: Counter) -> Result<(), StoreError> {
        let bytes = encode(&self.file, &counter.bytes())?;
        let written = File::options().write(true).open(&self.file);
        let written = written.and_then(|mut file| file.write_all(&bytes));
        written.context("write", &self.file)
    }
}
