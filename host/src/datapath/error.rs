//! What can go wrong in the datapath.

use aya::maps::MapError;

/// Why the datapath could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// A map took no more entries.
    #[error("map {map} is full; raise `{setting}` and restart hostd")]
    Full {
        /// The map.
        map: &'static str,
        /// The key in the configuration.
        setting: &'static str,
    },
    /// More than a map has room for; nothing was written.
    #[error(transparent)]
    TooMany(#[from] crate::plan::Full),
    /// A map operation failed.
    #[error("map {map}: {source}")]
    Map {
        /// The map.
        map: String,
        /// Why.
        source: Box<MapError>,
    },
    /// The object could not be loaded.
    #[error("loading the tc programs: {0}")]
    Load(String),
    /// A program could not be attached.
    #[error("attaching {program} to {interface}: {problem}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface.
        interface: String,
        /// Why.
        problem: String,
    },
    /// The guard of the tunnel could not be attached.
    #[error(
        "the node's own processes are not kept from the tunnel port: cgroup {}: {problem} (`cgroup` in the configuration)",
        cgroup.display()
    )]
    Guard {
        /// The cgroup.
        cgroup: std::path::PathBuf,
        /// Why.
        problem: String,
    },
    /// A pin, a mount or a memory map failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl DatapathError {
    pub(super) fn map(name: &str) -> impl FnOnce(MapError) -> Self {
        let map = name.to_owned();
        move |source| Self::Map {
            map,
            source: Box::new(source),
        }
    }

    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
