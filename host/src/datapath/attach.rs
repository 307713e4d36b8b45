//! Attaching the programs: tcx links where the kernel has them, filters on the clsact qdisc elsewhere.
//!
//! For a link the kernel waits for an RCU grace period with all network configuration locked (`tcx_entry_sync` in
//! `include/net/tcx.h`, Linux 6.18), some 10 ms; a filter is there at once. So a pod that comes gets filters, and links take
//! over when the node is calm: nobody can take those away by chance, and nobody's programs come in front of them.

use super::{DatapathError, chain};
use crate::{config::Attach, net};
use abi::Hook;
use aya::{
    Ebpf,
    programs::{
        LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType,
        links::{FdLink, Link as _, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A clsact filter has no link that could be pinned: it is known by its priority and handle, which are always these.
/// Priority 1 is the first.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 1);
/// On the node's own interface, where others may have filters, these are none that anybody else chooses: behind theirs.
const OWN_PRIORITY: u16 = 0x5747;
const OWN_HANDLE: TcHandle = TcHandle::new(0, 0x5747);
/// For a moment only.
const SECOND_HANDLE: TcHandle = TcHandle::new(0, 2);

/// The program that lets nothing pass.
pub const CLOSED: &str = "closed";

/// Milliseconds that a link may take to leave its hook.
const LEAVING: u32 = 500;

/// Attaches the programs of one object.
pub struct Attacher {
    ebpf: Ebpf,
    tcx: bool,
    /// Whether pods get filters first.
    filters_first: bool,
    /// Hooks that have a filter until a link takes over, and since when.
    unsettled: BTreeMap<(String, Hook), Instant>,
    links: PathBuf,
    /// Hooks that nothing passes, for a program could not be put there.
    gates: BTreeMap<(String, &'static str), SchedClassifierLink>,
}

pub fn failed(hook: Hook, interface: &str) -> impl Fn(String) -> DatapathError + use<> {
    let interface = interface.to_owned();
    move |problem| DatapathError::Attach {
        program: hook.name(),
        interface: interface.clone(),
        problem,
    }
}

fn attach_type(hook: Hook) -> TcAttachType {
    match hook {
        Hook::FromPod | Hook::FromOverlay | Hook::FromNetdev => TcAttachType::Ingress,
        Hook::ToPod => TcAttachType::Egress,
    }
}

impl Attacher {
    pub fn new(ebpf: Ebpf, attach: Attach, bpffs: &Path) -> Result<Self, DatapathError> {
        let kernel = KernelVersion::current().map_err(|error| DatapathError::Load(error.to_string()))?;
        let has_tcx = kernel >= KernelVersion::new(6, 6, 0);
        if attach == Attach::Tcx && !has_tcx {
            return Err(DatapathError::Load(
                "`attach = \"tcx\"`, but tcx needs Linux 6.6; use \"auto\" or \"clsact\"".to_owned(),
            ));
        }
        Ok(Self {
            ebpf,
            tcx: has_tcx && attach != Attach::Clsact,
            filters_first: has_tcx && attach == Attach::Auto,
            unsettled: BTreeMap::new(),
            links: bpffs.join("links"),
            gates: BTreeMap::new(),
        })
    }

    pub const fn mode(&self) -> &'static str {
        if self.tcx { "tcx" } else { "clsact" }
    }

    fn pin(&self, interface: &str, hook: Hook) -> PathBuf {
        self.links.join(format!("{interface}-{}", hook.name()))
    }

    pub fn attach(&mut self, hook: Hook, interface: &str) -> Result<(), DatapathError> {
        let place = (interface.to_owned(), hook);
        let waited = self.unsettled.remove(&place);
        let attached = self.try_attach(hook, interface).map_err(failed(hook, interface));
        if attached.is_err() && waited.is_some() {
            // Again, after all others.
            self.unsettled.insert(place, Instant::now());
        }
        attached
    }

    /// Attaches a program to a pod's interface by a filter, until a link takes over: in place of the filter that is there, or of none.
    /// False where it has to be a link.
    pub fn attach_filter(&mut self, hook: Hook, interface: &str) -> Result<bool, DatapathError> {
        if !self.filters_first || self.pin(interface, hook).exists() {
            return Ok(false);
        }
        let program = self.program(hook.name()).map_err(failed(hook, interface))?;
        if let Err(problem) = attach_clsact(program, interface, hook) {
            tracing::warn!(
                "{} gets a link on {interface}, for it gets no filter: {problem}",
                hook.name()
            );
            return Ok(false);
        }
        self.unsettled.insert((interface.to_owned(), hook), Instant::now());
        // Somebody who waits for new interfaces may have put a tcx program there.
        Ok(self.wrong(hook, interface)?.is_none())
    }

    /// The hook that has waited longest for a link to take over from its filter, and since when.
    pub fn unsettled(&self) -> Option<(&str, Hook, Instant)> {
        let oldest = self.unsettled.iter().min_by_key(|(_, since)| **since);
        oldest.map(|((interface, hook), since)| (interface.as_str(), *hook, *since))
    }

    /// Whether there is a link and a filter for a time while this attaches, before it removes the one that was there.
    pub fn meets_another(&self, hook: Hook, interface: &str) -> bool {
        if hook == Hook::FromNetdev {
            return false;
        }
        if !self.tcx {
            return self.pin(interface, hook).exists();
        }
        let ingress = attach_type(hook) == TcAttachType::Ingress;
        net::filters(interface, ingress).is_ok_and(|filters| !filters.is_empty())
    }

    fn try_attach(&mut self, hook: Hook, interface: &str) -> Result<(), String> {
        let (tcx, pin) = (self.tcx, self.pin(interface, hook));
        let program = self.program(hook.name())?;
        let linked = pin.exists();
        if linked && let Err(problem) = swap(program, &pin) {
            tracing::info!("the link pinned at {} is of no use: {problem}", pin.display());
        }
        if !tcx {
            attach_clsact(program, interface, hook)?;
            remove_pin(&pin).map_err(|error| error.to_string())?;
            return if linked {
                self.until_unlinked(hook, interface)
            } else {
                Ok(())
            };
        }
        if hook == Hook::FromNetdev {
            return attach_beside(program, interface, hook, &pin);
        }
        match standing_tcx(program, interface, hook)? {
            Standing::First if pin.exists() => {}
            Standing::Missing => attach_first(program, interface, hook, &pin)?,
            Standing::First | Standing::Behind => self.go_in_front(hook, interface, &pin)?,
        }
        self.gates.remove(&(interface.to_owned(), hook.name()));
        // What a hostd that was configured otherwise has left would go on with its own maps.
        remove_clsact(interface, hook)
    }

    /// The kernel takes no program twice on one hook, so it has to leave before it can come in front. Meanwhile nothing
    /// passes, and nothing does where it can't come back.
    fn go_in_front(&mut self, hook: Hook, interface: &str, pin: &Path) -> Result<(), String> {
        tracing::warn!("{} is not first on {interface}; going in front", hook.name());
        let place = (interface.to_owned(), hook.name());
        if !self.gates.contains_key(&place) {
            let gate = self.program(CLOSED)?;
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = gate
                .attach_with_options(interface, attach_type(hook), options)
                .map_err(|error| chain(&error))?;
            let gate = gate.take_link(id).map_err(|error| error.to_string())?;
            self.gates.insert(place, gate);
        }
        remove_pin(pin).map_err(|error| error.to_string())?;
        self.until_unlinked(hook, interface)?;
        attach_first(self.program(hook.name())?, interface, hook, pin)
    }

    /// The kernel takes a link away a little later than its pin (`bpf_link_put_deferred` in `kernel/bpf/syscall.c`, Linux 6.18).
    fn until_unlinked(&mut self, hook: Hook, interface: &str) -> Result<(), String> {
        let program = self.program(hook.name())?;
        for _ in 0..LEAVING {
            if standing_tcx(program, interface, hook)? == Standing::Missing {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// A program of any type.
    pub fn program_of(&mut self, name: &str) -> Option<&mut Program> {
        self.ebpf.program_mut(name)
    }

    fn program(&mut self, name: &str) -> Result<&mut SchedClassifier, String> {
        let program = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| format!("no program {name}"))?;
        program.try_into().map_err(|error: ProgramError| error.to_string())
    }

    /// What is wrong with a program on its hook, if anything is.
    pub fn wrong(&mut self, hook: Hook, interface: &str) -> Result<Option<&'static str>, DatapathError> {
        Ok(match self.standing(hook, interface).map_err(failed(hook, interface))? {
            Standing::First => None,
            // It guards nothing but what it serves.
            Standing::Behind if hook == Hook::FromNetdev => None,
            Standing::Behind => Some("another program was in front of it"),
            Standing::Missing => Some("it was gone"),
        })
    }

    fn standing(&mut self, hook: Hook, interface: &str) -> Result<Standing, String> {
        let by_link = self.tcx && !self.unsettled.contains_key(&(interface.to_owned(), hook));
        let program = self.program(hook.name())?;
        if by_link {
            return standing_tcx(program, interface, hook);
        }
        // Where the kernel has tcx its programs run before all filters.
        match SchedClassifier::query_tcx(interface, attach_type(hook)) {
            Ok((_, attached)) if !attached.is_empty() && hook != Hook::FromNetdev => Ok(Standing::Behind),
            _ => standing_clsact(program, interface, hook),
        }
    }

    /// Whether this object's program is on its hook.
    pub fn is_attached(&mut self, hook: Hook, interface: &str) -> bool {
        matches!(self.standing(hook, interface), Ok(Standing::First | Standing::Behind))
    }

    /// Takes a program away from an interface that stays.
    pub fn take_away(&mut self, hook: Hook, interface: &str) -> Result<(), DatapathError> {
        self.gates.remove(&(interface.to_owned(), hook.name()));
        remove_pin(&self.pin(interface, hook))?;
        remove_filter(hook, interface)
    }

    pub fn detach(&mut self, interface: &str) -> Result<(), DatapathError> {
        self.gates.retain(|(name, _), _| name != interface);
        self.unsettled.retain(|(name, _), _| name != interface);
        for hook in Hook::ALL {
            remove_pin(&self.pin(interface, hook))?;
        }
        Ok(())
    }

    pub fn forget_except(&mut self, known: &[&str]) -> Result<(), DatapathError> {
        let listed = fs::read_dir(&self.links).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for pin in listed.map_err(DatapathError::io(format!("list {}", self.links.display())))? {
            let name = pin.file_name();
            let name = name.to_string_lossy();
            let is_known = |interface: &&str| {
                Hook::ALL
                    .iter()
                    .any(|hook| name == format!("{interface}-{}", hook.name()))
            };
            if !known.iter().any(is_known) {
                remove_pin(&pin.path())?;
            }
        }
        Ok(())
    }
}

/// Where a program is among those on its hook.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    First,
    Behind,
    Missing,
}

impl Standing {
    fn of(ours: u32, attached: impl Iterator<Item = Option<u32>>) -> Self {
        match attached.into_iter().position(|id| id == Some(ours)) {
            Some(0) => Self::First,
            Some(_) => Self::Behind,
            None => Self::Missing,
        }
    }
}

fn id(program: &SchedClassifier) -> Result<u32, String> {
    Ok(program.info().map_err(|error| chain(&error))?.id())
}

fn standing_tcx(program: &SchedClassifier, interface: &str, hook: Hook) -> Result<Standing, String> {
    let (_, attached) = SchedClassifier::query_tcx(interface, attach_type(hook)).map_err(|error| chain(&error))?;
    Ok(Standing::of(id(program)?, attached.iter().map(|info| Some(info.id()))))
}

fn standing_clsact(program: &SchedClassifier, interface: &str, hook: Hook) -> Result<Standing, String> {
    let ingress = attach_type(hook) == TcAttachType::Ingress;
    let filters = net::filters(interface, ingress).map_err(|error| error.to_string())?;
    Ok(Standing::of(id(program)?, filters.into_iter()))
}

fn remove_pin(pin: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::io(format!("remove {}", pin.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Makes a link in front of all others, and pins it.
fn attach_first(program: &mut SchedClassifier, interface: &str, hook: Hook, pin: &Path) -> Result<(), String> {
    pin_link(
        program,
        interface,
        hook,
        pin,
        TcAttachOptions::TcxOrder(LinkOrder::first()),
    )?;
    match standing_tcx(program, interface, hook)? {
        Standing::First => Ok(()),
        _ => Err(IN_FRONT.to_owned()),
    }
}

/// Makes a link on the node's own interface, wherever there is room, where it is not there yet. Nothing else may suffer: one
/// that is about to go, when node ports come back at once, is waited for.
fn attach_beside(program: &mut SchedClassifier, interface: &str, hook: Hook, pin: &Path) -> Result<(), String> {
    for _ in 0..LEAVING {
        match standing_tcx(program, interface, hook)? {
            Standing::Missing => {
                let options = TcAttachOptions::TcxOrder(LinkOrder::first());
                pin_link(program, interface, hook, pin, options)?;
                return remove_clsact(interface, hook);
            }
            _ if pin.exists() => return remove_clsact(interface, hook),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Err("a link that was given up does not go".to_owned())
}

fn pin_link(
    program: &mut SchedClassifier,
    interface: &str,
    hook: Hook,
    pin: &Path,
    options: TcAttachOptions,
) -> Result<(), String> {
    let id = program
        .attach_with_options(interface, attach_type(hook), options)
        .map_err(|error| chain(&error))?;
    let link = program.take_link(id).map_err(|error| error.to_string())?;
    let link: FdLink = link
        .try_into()
        .map_err(|error: aya::programs::links::LinkError| error.to_string())?;
    remove_pin(pin).map_err(|error| error.to_string())?;
    link.pin(pin).map_err(|error| chain(&error))?;
    Ok(())
}

pub const IN_FRONT: &str = "another program is in front, which could let packets past";

/// Swaps the program into the pinned link.
fn swap(program: &mut SchedClassifier, pin: &Path) -> Result<(), String> {
    let link = PinnedLink::from_pin(pin).map_err(|error| error.to_string())?;
    let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(|error| error.to_string())?;
    let id = program.attach_to_link(link).map_err(|error| chain(&error))?;
    // The pin holds the link; our descriptor of it may be closed.
    drop(program.take_link(id).map_err(|error| error.to_string())?);
    Ok(())
}

/// Removes the filter of a hostd that used clsact; that there is none is no error.
fn remove_clsact(interface: &str, hook: Hook) -> Result<(), String> {
    match tc::qdisc_detach_program(interface, attach_type(hook), hook.name()) {
        Ok(()) => Ok(()),
        Err(error)
            if chain(&error).contains("No such file")
                || matches!(&error, tc::TcError::IoError(error) if error.kind() == io::ErrorKind::NotFound) =>
        {
            Ok(())
        }
        // An interface that never had the qdisc.
        Err(error) if chain(&error).contains("Invalid argument") => Ok(()),
        Err(error) => Err(chain(&error)),
    }
}

fn remove_filter(hook: Hook, interface: &str) -> Result<(), DatapathError> {
    remove_clsact(interface, hook).map_err(failed(hook, interface))
}

/// Takes the filter for node ports away from the underlay's interface, which stays when hostd leaves the node.
///
/// # Errors
///
/// Where the kernel refuses.
pub fn detach_node_ports(interface: &str) -> Result<(), DatapathError> {
    remove_filter(Hook::FromNetdev, interface)
}

/// Replaces our filter, or adds it. Where another is in front of it at the same priority, it goes there by way of a
/// second one, so that there is always one: the last that is added is the first that runs (`cls_bpf_change` in
/// `net/sched/cls_bpf.c`).
fn attach_clsact(program: &mut SchedClassifier, interface: &str, hook: Hook) -> Result<(), String> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => {}
        // It is there already.
        Err(error) if chain(&error).contains("File exists") => {}
        Err(error) => return Err(chain(&error)),
    }
    if hook == Hook::FromNetdev {
        let link = SchedClassifierLink::attached(interface, attach_type(hook), OWN_PRIORITY, OWN_HANDLE, None)
            .map_err(|error| error.to_string())?;
        let id = match program.attach_to_link(link) {
            Ok(id) => id,
            Err(_) => add_filter(program, interface, hook, OWN_PRIORITY, OWN_HANDLE)?,
        };
        return keep_filter(program, id);
    }
    let filter = |handle| {
        SchedClassifierLink::attached(interface, attach_type(hook), PRIORITY, handle, None)
            .map_err(|error| error.to_string())
    };
    let id = match program.attach_to_link(filter(HANDLE)?) {
        Ok(id) => id,
        Err(_) => add_filter(program, interface, hook, PRIORITY, HANDLE)?,
    };
    keep_filter(program, id)?;
    // What a hostd that was ended in between has left; mostly there is none.
    match filter(SECOND_HANDLE)?.detach().map_err(|error| chain(&error)) {
        Err(problem) if !problem.contains("No such file") => return Err(problem),
        _ => {}
    }
    if standing_clsact(program, interface, hook)? == Standing::First {
        return Ok(());
    }
    for (new, old) in [(SECOND_HANDLE, HANDLE), (HANDLE, SECOND_HANDLE)] {
        let id = add_filter(program, interface, hook, PRIORITY, new)?;
        keep_filter(program, id)?;
        filter(old)?.detach().map_err(|error| chain(&error))?;
    }
    match standing_clsact(program, interface, hook)? {
        Standing::First => Ok(()),
        _ => Err(IN_FRONT.to_owned()),
    }
}

fn add_filter(
    program: &mut SchedClassifier,
    interface: &str,
    hook: Hook,
    priority: u16,
    handle: TcHandle,
) -> Result<SchedClassifierLinkId, String> {
    let options = TcAttachOptions::Netlink(NlOptions {
        priority,
        handle,
        classid: None,
    });
    program
        .attach_with_options(interface, attach_type(hook), options)
        .map_err(|error| chain(&error))
}

/// Dropping the link would detach the filter, which has to outlive hostd.
fn keep_filter(program: &mut SchedClassifier, id: SchedClassifierLinkId) -> Result<(), String> {
    std::mem::forget(program.take_link(id).map_err(|error| error.to_string())?);
    Ok(())
}
