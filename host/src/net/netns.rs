//! Network namespaces.

use super::NetError;
use rustix::{
    fs::OFlags,
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
};

/// A network namespace, held open.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

impl Netns {
    /// Opens a namespace by its path, or by its name among those of `ip netns`.
    ///
    /// # Errors
    ///
    /// Where there is none.
    pub fn open(name_or_path: &str) -> Result<Self, NetError> {
        let path = if name_or_path.contains('/') {
            PathBuf::from(name_or_path)
        } else {
            Path::new("/run/netns").join(name_or_path)
        };
        Self::open_path(&path)
    }

    /// Opens a namespace by its path.
    ///
    /// # Errors
    ///
    /// Where there is none.
    pub fn open_path(path: &Path) -> Result<Self, NetError> {
        let failed = |problem: String| NetError::Netns {
            path: path.to_owned(),
            problem,
        };
        // Without O_NONBLOCK a path to a FIFO would hold hostd up for ever.
        let file = File::options()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(|error| match Errno::from_io_error(&error) {
                // That says nothing of the namespace.
                Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => {
                    NetError::kernel(format!("opening {}", path.display()))(error)
                }
                _ => failed(error.to_string()),
            })?;
        let netns = Self {
            file,
            path: path.to_owned(),
        };
        // Only a network namespace lets a thread in.
        in_netns(&netns, || ()).map_err(|_| failed("this is not a network namespace".to_owned()))?;
        Ok(netns)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) const fn file(&self) -> &File {
        &self.file
    }
}

/// Runs `work` in a network namespace, on a thread of its own that ends with it.
///
/// # Errors
///
/// Where the thread can't enter the namespace.
///
/// # Panics
///
/// Where `work` does.
pub fn in_netns<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> Result<T, NetError> {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_link_name_space(netns.file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(NetError::kernel(format!("entering {}", netns.path.display())))?;
            Ok(work())
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
