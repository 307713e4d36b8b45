//! The eBPF object: its constants, its map sizes, and the folder of its pins.

use super::{DatapathError, attach::CLOSED, chain, guard::GUARD};
use crate::{
    config::Maps,
    plan::{Numbers, Shape},
};
use abi::{Kept, Service, ServiceKey, map, policy::CELLS_PER_ELEMENT};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Array, Map, MapData, MapError, of_maps::HashOfMaps},
    programs::{CgroupSkb, ProgramError, SchedClassifier},
};
use rustix::{
    fs::statfs,
    mount::{MountFlags, mount},
};
use std::{
    collections::BTreeMap,
    ffi::CStr,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/datapath.o"));

/// Constants of the programs, fixed when they are loaded.
#[derive(Clone, Copy, Debug)]
pub struct Constants {
    /// Shape of the policy matrix.
    pub shape: Shape,
    /// Leave path and target of each packet in `skb->cb`: for the packet table tests.
    pub record_action: bool,
}

/// Loads the object into the kernel, with the maps that are pinned at the paths in `reuse` in place of new ones.
///
/// # Errors
///
/// Where the kernel refuses a map or a program; with the verifier's last words.
pub fn load_programs(maps: &Maps, constants: &Constants, reuse: &[(&str, PathBuf)]) -> Result<Ebpf, DatapathError> {
    let shape = constants.shape;
    let elements = u32::try_from(shape.cells().div_ceil(u64::from(CELLS_PER_ELEMENT))).map_err(|_| {
        DatapathError::Load("`maps.identities` times `maps.local_identities` is too large for a policy map".to_owned())
    })?;
    let record = u32::from(constants.record_action);
    let mut loader = EbpfLoader::new();
    loader
        .override_global("POLICY_ROWS", &shape.rows, true)
        .override_global("POLICY_COLUMNS", &shape.columns, true)
        .override_global("RECORD_ACTION", &record, true)
        .map_max_entries(map::POLICY[0], elements)
        .map_max_entries(map::POLICY[1], elements)
        .map_max_entries(map::PORT_SETS[0], shape.port_sets)
        .map_max_entries(map::PORT_SETS[1], shape.port_sets)
        .map_max_entries(map::PORT_POOL[0], shape.breakpoints)
        .map_max_entries(map::PORT_POOL[1], shape.breakpoints)
        .map_max_entries(map::NETWORKS, 2 * maps.networks + 1)
        // A pod may have an address of each family, and others while it comes and goes.
        .map_max_entries(map::ENDPOINTS, 2 * maps.endpoints)
        .map_max_entries(map::ACCOUNTS, 4 * maps.endpoints + 1)
        .map_max_entries(map::IPCACHE, maps.addresses)
        .map_max_entries(map::STAMPS, maps.addresses + 1)
        .map_max_entries(map::CONNTRACK, maps.conntrack)
        .map_max_entries(map::FRAGMENTS, maps.fragments)
        .map_max_entries(map::SERVICES, maps.services)
        .map_max_entries(map::AFFINITY[0], maps.affinity)
        .map_max_entries(map::AFFINITY[1], maps.affinity);
    for (name, pin) in reuse {
        loader.map_pin_path(name, pin.clone());
    }
    let mut ebpf = loader
        .load(OBJECT)
        .map_err(|error| DatapathError::Load(chain(&error)))?;
    for name in abi::Hook::ALL.map(abi::Hook::name).into_iter().chain([CLOSED]) {
        let program: &mut SchedClassifier = ebpf
            .program_mut(name)
            .ok_or_else(|| DatapathError::Load(format!("the object has no program {name}")))?
            .try_into()
            .map_err(|error| DatapathError::Load(chain(&error)))?;
        patiently(|| program.load()).map_err(|error| DatapathError::Load(format!("{name}: {}", chain(&error))))?;
    }
    let guard: &mut CgroupSkb = ebpf
        .program_mut(GUARD)
        .ok_or_else(|| DatapathError::Load(format!("the object has no program {GUARD}")))?
        .try_into()
        .map_err(|error| DatapathError::Load(chain(&error)))?;
    patiently(|| guard.load()).map_err(|error| DatapathError::Load(format!("{GUARD}: {}", chain(&error))))?;
    Ok(ebpf)
}

/// The verifier gives up with `EAGAIN` when a signal is waiting for the thread (`do_check` in `kernel/bpf/verifier.c`):
/// then it is asked again.
fn patiently(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    const ATTEMPTS: usize = 20;
    for _ in 1..ATTEMPTS {
        match load() {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
    load()
}

/// The part of the generation word that the programs use.
#[expect(clippy::cast_possible_truncation, reason = "the high half is not used")]
pub const fn low_half(word: u64) -> u32 {
    word as u32
}

/// What an earlier hostd left.
pub struct Leftovers {
    /// Names and pins of the maps that can be used again: what is remembered of flows and clients.
    pub reuse: Vec<(&'static str, PathBuf)>,
    /// Numbers of backends, which are remembered, too.
    pub numbers: BTreeMap<ServiceKey, Numbers>,
    /// The generation that was in force.
    pub generation: u32,
}

/// What an earlier hostd's maps are used again, with what they hold.
const KEPT: [(&str, Kept); 5] = [
    (map::CONNTRACK, Kept::Conntrack),
    (map::AFFINITY[0], Kept::Affinity),
    (map::AFFINITY[1], Kept::Affinity),
    (map::SERVICES, Kept::Services),
    (map::GENERATION, Kept::Generation),
];

/// A bpffs holds folders and pins, no files: a folder's name says which layout a map has.
fn layout_marker(name: &str, kept: Kept) -> String {
    format!("layout-{name}-{}", abi::layout(kept))
}

/// Looks at the pins of an earlier hostd, perhaps of another build. What has another layout or size is not used again: flows
/// are then judged as if they were new.
pub fn leftovers(bpffs: &Path, maps: &Maps) -> Leftovers {
    let pins = bpffs.join("maps");
    let same_layout = |(name, kept): &(&'static str, Kept)| pins.join(layout_marker(name, *kept)).exists();
    let readable: Vec<&str> = KEPT
        .iter()
        .filter(|map| same_layout(map))
        .map(|(name, _)| *name)
        .collect();
    let generation = MapData::from_pin(pins.join(map::GENERATION))
        .and_then(|data| Array::<MapData, u64>::try_from(Map::Array(data)))
        .and_then(|array| array.get(&0, 0))
        .map(low_half)
        .ok()
        .filter(|_| readable.contains(&map::GENERATION));
    let mut reuse = Vec::new();
    for (name, size, what) in [
        (map::CONNTRACK, maps.conntrack, "flows are judged as if they were new"),
        (map::AFFINITY[0], maps.affinity, "clients may get other backends"),
        (map::AFFINITY[1], maps.affinity, "clients may get other backends"),
    ] {
        let pin = pins.join(name);
        if !pin.exists() {
            continue;
        }
        let same_size = MapData::from_pin(&pin)
            .and_then(|data| data.info())
            .is_ok_and(|info| info.max_entries() == size);
        // Without the generation nobody could tell old verdicts from new ones.
        if same_size && generation.is_some() && readable.contains(&name) {
            reuse.push((name, pin));
        } else {
            let why = if same_size { "layout" } else { "size" };
            tracing::warn!("the map {name} that was left has another {why} and is made anew: {what}");
        }
    }
    Leftovers {
        numbers: if reuse.is_empty() || !readable.contains(&map::SERVICES) {
            BTreeMap::new()
        } else {
            backend_numbers(&pins.join(map::SERVICES)).unwrap_or_default()
        },
        reuse,
        generation: generation.unwrap_or(0),
    }
}

/// The numbers that backends have in a map of services.
fn backend_numbers(pin: &Path) -> Result<BTreeMap<ServiceKey, Numbers>, MapError> {
    let services = Map::HashOfMaps(MapData::from_pin(pin)?);
    let services: HashOfMaps<MapData, ServiceKey, Array<MapData, Service>> = services.try_into()?;
    let keys: Vec<ServiceKey> = services.keys().collect::<Result<_, _>>()?;
    keys.into_iter()
        .map(|key| Ok((key, Numbers::of(&services.get(&key, 0)?.get(&0, 0)?))))
        .collect()
}

/// Makes a folder without pins, in place of what is there.
pub fn remake(folder: &Path) -> Result<(), DatapathError> {
    remove_folder(folder)?;
    for (name, kept) in KEPT {
        let marker = folder.join(layout_marker(name, kept));
        fs::create_dir_all(&marker).map_err(DatapathError::io(format!("create {}", marker.display())))?;
    }
    Ok(())
}

/// Puts `maps-new` in the place of `maps`, so that at any moment there is one of them whole.
pub fn swap_pins(bpffs: &Path) -> Result<(), DatapathError> {
    let [old, new, oldest] = ["maps", "maps-new", "maps-old"].map(|name| bpffs.join(name));
    remove_folder(&oldest)?;
    match fs::rename(&old, &oldest) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(DatapathError::io(format!("rename {}", old.display()))(error));
        }
        _ => {}
    }
    fs::rename(&new, &old).map_err(DatapathError::io(format!("rename {}", new.display())))?;
    remove_folder(&oldest)
}

fn remove_folder(folder: &Path) -> Result<(), DatapathError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::io(format!("remove {}", folder.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Removes all pins of a node.
pub fn remove_all(bpffs: &Path) -> Result<(), DatapathError> {
    for folder in ["guard", "links", "maps", "maps-new", "maps-old"] {
        remove_folder(&bpffs.join(folder))?;
    }
    // Unless something else is in it, or mounted on it.
    let _ = fs::remove_dir(bpffs);
    Ok(())
}

/// `BPF_FS_MAGIC` (`include/uapi/linux/magic.h`).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Makes the folder, and mounts a bpffs on it unless it is inside one.
pub fn mount_bpffs(folder: &Path) -> Result<(), DatapathError> {
    let failed = |what: &str| DatapathError::io(format!("{what} {}", folder.display()));
    // Beneath a bpffs that is mounted already, this makes a folder of it.
    let standard = Path::new("/sys/fs/bpf");
    if folder.starts_with(standard) && !is_bpffs(standard).map_err(failed("look at"))? {
        mount_on(standard).map_err(failed("mount a bpffs for"))?;
    }
    fs::create_dir_all(folder).map_err(failed("create"))?;
    if !is_bpffs(folder).map_err(failed("look at"))? {
        mount_on(folder).map_err(failed("mount a bpffs on"))?;
    }
    let metadata = fs::metadata(folder).map_err(failed("look at"))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        let problem = io::Error::other("it belongs to another user, who could remove the pins in it");
        return Err(failed("use")(problem));
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed("close to others"))?;
    let links = folder.join("links");
    fs::create_dir_all(&links).map_err(failed("create links in"))
}

fn is_bpffs(folder: &Path) -> io::Result<bool> {
    Ok(statfs(folder)?.f_type == BPF_FS_MAGIC)
}

fn mount_on(folder: &Path) -> io::Result<()> {
    // Pins are root's: whoever can remove a link's pin detaches a program.
    const DATA: Option<&CStr> = Some(c"mode=0700");
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
    let parent = rustix::process::Pid::as_raw(rustix::process::getppid());
    if namespace("self") != namespace(&parent.to_string()) {
        tracing::warn!(
            "{}: this bpffs is mounted in a mount namespace of hostd's own, as under `ip netns exec`: programs and policy end with hostd; \
             mount one there before it starts, or use `nsenter --net`",
            folder.display()
        );
    }
    Ok(mount(
        "bpf",
        folder,
        "bpf",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        DATA,
    )?)
}
