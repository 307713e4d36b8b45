//! The guard of the tunnel: what the node's own processes send meets a program as well, by their cgroup.

use super::{Datapath, DatapathError, chain};
use aya::programs::{
    CgroupAttachMode, CgroupSkb, CgroupSkbAttachType,
    links::{FdLink, PinnedLink},
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// The program.
pub const GUARD: &str = "guard_tunnel";

/// Where the hierarchy of cgroups is mounted (version 2, `Documentation/admin-guide/cgroup-v2.rst`), of which all processes are members.
///
/// # Errors
///
/// Where there is none.
pub fn cgroup_root() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mut found = fields.filter(|fields| fields.get(2) == Some(&"cgroup2"));
    let path = found.next().map(|fields| PathBuf::from(fields[1]));
    path.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system is mounted"))
}

impl Datapath {
    /// Lets processes of this cgroup, and of those below, send nothing from the underlay address to a tunnel port, but for root's. It
    /// takes the place of an earlier hostd's guard, and stays.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses.
    pub fn guard_tunnel(&mut self, cgroup: &Path) -> Result<(), DatapathError> {
        let folder = self.bpffs.join("guard");
        let failed = |problem: String| DatapathError::Guard {
            cgroup: cgroup.to_owned(),
            problem,
        };
        let place = File::open(cgroup).map_err(|error| failed(error.to_string()))?;
        let program: &mut CgroupSkb = self
            .attacher
            .program_of(GUARD)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| failed(format!("the object has no program {GUARD}")))?;
        fs::create_dir_all(&folder).map_err(|error| failed(error.to_string()))?;
        let (pin, new) = (folder.join("link"), folder.join("new"));
        // Beside the earlier one for a moment: they say the same.
        remove(&new).map_err(|error| failed(error.to_string()))?;
        let attached = program
            .attach(&place, CgroupSkbAttachType::Egress, CgroupAttachMode::Single)
            .and_then(|id| program.take_link(id));
        let link: FdLink = attached
            .map_err(|error| chain(&error))
            .and_then(|link| link.try_into().map_err(|error| chain(&error)))
            .map_err(failed)?;
        let pinned: PinnedLink = link.pin(&new).map_err(|error| failed(chain(&error)))?;
        drop(pinned);
        fs::rename(&new, &pin).map_err(|error| failed(error.to_string()))
    }

    /// Whether the guard is where it was put.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        PinnedLink::from_pin(self.bpffs.join("guard/link")).is_ok()
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
