//! What runtimes leave on a machine when their containers are gone: folders that were not there before are removed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where runtimes keep state, whatever they are told.
const FOLDERS: [&str; 5] = [
    "/run/libpod",
    "/run/runc",
    "/run/crun",
    "/run/containerd",
    "/var/lib/cni",
];
/// Parents of containers' control groups: podman's, and that of containerd's namespace.
const GROUPS: [&str; 2] = ["libpod_parent", "default"];

/// Those that were not there.
pub struct Leftovers {
    folders: Vec<PathBuf>,
    groups: Vec<PathBuf>,
}

impl Leftovers {
    /// Looks at what is there.
    pub fn watch() -> Self {
        let mut groups: Vec<PathBuf> = GROUPS.map(|name| Path::new("/sys/fs/cgroup").join(name)).into();
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            groups.extend(GROUPS.map(|name| hierarchy.path().join(name)));
        }
        let mut folders: Vec<PathBuf> = FOLDERS.map(PathBuf::from).into();
        for paths in [&mut groups, &mut folders] {
            paths.retain(|path| !path.exists());
        }
        Self { folders, groups }
    }
}

/// Removes a control group with those in it: they have files, but none that could be removed.
fn remove_group(path: &Path) -> io::Result<()> {
    for child in fs::read_dir(path)?.flatten() {
        if child.file_type()?.is_dir() {
            remove_group(&child.path())?;
        }
    }
    fs::remove_dir(path)
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        let groups = self.groups.iter().map(|path| (path, remove_group(path)));
        let folders = self.folders.iter().map(|path| (path, fs::remove_dir_all(path)));
        for (path, removed) in groups.chain(folders) {
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    eprintln!("removing {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }
}
