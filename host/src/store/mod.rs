//! The cluster's state, shared by all nodes: a small key-value store with comparison, watches and leases.
//!
//! Keys are a [`Collection`] and a name. Values are opaque; [`records`] has their types. Every change takes a revision
//! that is higher than all before it.

mod etcd;
mod file;
pub mod records;

pub use etcd::{EtcdConfig, EtcdStore, SCHEME as ETCD};
pub use file::{Durability, FileStore, remove_asides, replace as replace_file};

use futures::{FutureExt, future::BoxFuture};
use std::{fmt, path::Path, sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// What a value is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Collection {
    /// What all nodes must agree on.
    Cluster,
    /// Nodes, by name.
    Nodes,
    /// Addresses of the nodes besides their underlay address, by name.
    Addresses,
    /// Leases of the nodes whose hostd is alive, by name.
    Alive,
    /// What nodes have seen, by name.
    Seen,
    /// Pods, by address.
    Pods,
    /// Namespaces, by name.
    Namespaces,
    /// Services, by namespace and name.
    Services,
    /// Tenants, by number.
    Tenants,
    /// Identities, by number.
    Identities,
    /// Policy modules, by SHA-256.
    Modules,
    /// The policy in force or on its way.
    Policy,
    /// Answers of the nodes to a policy load.
    Answers,
}

impl Collection {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Cluster,
        Self::Nodes,
        Self::Addresses,
        Self::Alive,
        Self::Seen,
        Self::Pods,
        Self::Namespaces,
        Self::Services,
        Self::Tenants,
        Self::Identities,
        Self::Modules,
        Self::Policy,
        Self::Answers,
    ];

    /// Name, as in keys.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Nodes => "nodes",
            Self::Addresses => "addresses",
            Self::Alive => "alive",
            Self::Seen => "seen",
            Self::Pods => "pods",
            Self::Namespaces => "namespaces",
            Self::Services => "services",
            Self::Tenants => "tenants",
            Self::Identities => "identities",
            Self::Modules => "modules",
            Self::Policy => "policy",
            Self::Answers => "answers",
        }
    }
}

/// Where a value is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// What it is about.
    pub collection: Collection,
    /// Its name there.
    pub name: String,
}

impl Key {
    /// A key.
    #[must_use]
    pub fn new(collection: Collection, name: impl fmt::Display) -> Self {
        Self {
            collection,
            name: name.to_string(),
        }
    }

    /// Checks its name.
    ///
    /// # Errors
    ///
    /// Where no store may hold it.
    fn check(&self) -> Result<(), StoreError> {
        let problem = if self.name.is_empty() || self.name.len() > 200 {
            "a name has 1 to 200 bytes"
        } else if self.name.starts_with('.') || self.name.contains(['/', '\0']) {
            "a name neither begins with a dot nor has a slash in it"
        } else {
            return Ok(());
        };
        Err(StoreError::Name {
            key: self.clone(),
            problem,
        })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.collection.name(), self.name)
    }
}

/// A value with the revision of its last change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// Higher than that of every change before.
    pub revision: u64,
    /// The value.
    pub value: Vec<u8>,
}

/// What must hold for a change to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Anything.
    Any,
    /// There is no value yet.
    Absent,
    /// The value's last change has this revision.
    Revision(u64),
}

/// A change, as a watch reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A value was set. The first ones are those that were there when the watch began.
    Put(Key, Versioned),
    /// A value is gone.
    Delete(Key),
    /// A value was there before the store was made anew, and nobody has entered it since.
    Missing(Key),
    /// All that was there when the watch began has been reported.
    Synced,
    /// The store was made anew, or is one of an earlier time: what it holds is reported again, and may have lower revisions
    /// than before.
    Anew,
}

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The comparison failed; with what is there instead.
    #[error("{key} was changed by somebody else")]
    Conflict {
        /// The key.
        key: Key,
        /// What is there.
        found: Option<Versioned>,
    },
    /// A key's name that the store can't hold.
    #[error("{key}: {problem}")]
    Name {
        /// The key.
        key: Key,
        /// What is wrong.
        problem: &'static str,
    },
    /// The engine failed.
    #[error("store: {what}: {source}")]
    Io {
        /// What was being done, with the file.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Nobody answers. Nothing is known of what was asked for.
    #[error("{store} has not answered for {seconds} s: {problem}")]
    Unavailable {
        /// The store.
        store: String,
        /// Since when, in seconds.
        seconds: u64,
        /// What the last try has ended with.
        problem: String,
    },
    /// The store will not.
    #[error("{store}: {problem}")]
    Refused {
        /// The store.
        store: String,
        /// Why, in its words, and what to do.
        problem: String,
    },
    /// A value in the store is torn or foreign.
    #[error("store: {file}: {source}")]
    Content {
        /// The file.
        file: String,
        /// What is wrong.
        source: crate::codec::CodecError,
    },
}

impl StoreError {
    /// Whether it is only that nobody answers.
    #[must_use]
    pub const fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }
}

/// The answer of a store call.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// A key-value store that all nodes share.
pub trait Store: Send + Sync {
    /// A value, if there is one.
    fn get<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Versioned>>;

    /// Whether there is a value, which may be large.
    fn has<'a>(&'a self, key: &'a Key) -> Answer<'a, bool> {
        async move { Ok(self.get(key).await?.is_some()) }.boxed()
    }

    /// All values of a collection.
    fn list(&self, collection: Collection) -> Answer<'_, Vec<(Key, Versioned)>>;

    /// Keys of all values of a collection, which may be large.
    fn keys(&self, collection: Collection) -> Answer<'_, Vec<Key>>;

    /// Sets a value if `expect` holds; the answer is its revision.
    fn put<'a>(&'a self, key: &'a Key, value: Vec<u8>, expect: Expect) -> Answer<'a, u64>;

    /// Sets a value that is deleted unless it is set again or [kept](Self::keep) within `ttl`.
    fn put_leased<'a>(&'a self, key: &'a Key, value: Vec<u8>, ttl: Duration) -> Answer<'a, u64>;

    /// Renews the lease of a value; false where the value is gone.
    fn keep<'a>(&'a self, key: &'a Key) -> Answer<'a, bool>;

    /// Deletes a value if `expect` holds. Deleting what is not there is no error, unless a revision was expected.
    fn delete<'a>(&'a self, key: &'a Key, expect: Expect) -> Answer<'a, ()>;

    /// Reports what is there in `collections`, and every change from then on. For a value that changes often the
    /// reports may skip all but the last state.
    fn watch(&self, collections: &[Collection]) -> Answer<'_, mpsc::Receiver<Change>>;

    /// Why it does not answer, where it did not do so last.
    fn problem(&self) -> Option<String> {
        None
    }
}

/// The folder of the store of this name, if it is in one.
#[must_use]
pub fn folder(name: &str) -> Option<&Path> {
    (!name.starts_with(ETCD)).then(|| Path::new(name.strip_prefix("file:").unwrap_or(name)))
}

/// The folder of the store of this name, if it is in one and there is none.
#[must_use]
pub fn missing(name: &str) -> Option<&Path> {
    folder(name).filter(|folder| !FileStore::is_there(folder))
}

/// Opens the store of this name: `file:` and a folder, or `etcd:` and URLs.
///
/// # Errors
///
/// Where it can't be opened. That etcd does not answer is no error yet.
pub fn open(name: &str, etcd: &EtcdConfig) -> Result<Arc<dyn Store>, StoreError> {
    Ok(match folder(name) {
        Some(folder) => Arc::new(FileStore::open(folder)?),
        None => Arc::new(EtcdStore::open(name, etcd)?),
    })
}
