//! Attaching the programs: tcx links where the kernel has them, filters on the clsact qdisc elsewhere.

use super::{DatapathError, chain};
use crate::config::Attach;
use abi::Hook;
use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
    util::KernelVersion,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A clsact filter has no link that could be pinned: it is known by its priority and handle, which are always these.
/// Priority 1 is the first.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Attaches the programs of one object.
pub struct Attacher {
    ebpf: Ebpf,
    tcx: bool,
    links: PathBuf,
}

fn attach_type(hook: Hook) -> TcAttachType {
    match hook {
        Hook::FromPod | Hook::FromOverlay => TcAttachType::Ingress,
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
            links: bpffs.join("links"),
        })
    }

    pub const fn mode(&self) -> &'static str {
        if self.tcx { "tcx" } else { "clsact" }
    }

    fn pin(&self, interface: &str, hook: Hook) -> PathBuf {
        self.links.join(format!("{interface}-{}", hook.name()))
    }

    pub fn attach(&mut self, hook: Hook, interface: &str) -> Result<(), DatapathError> {
        let pin = self.pin(interface, hook);
        let failed = |problem: String| DatapathError::Attach {
            program: hook.name(),
            interface: interface.to_owned(),
            problem,
        };
        let program: &mut SchedClassifier = self
            .ebpf
            .program_mut(hook.name())
            .ok_or_else(|| failed("no such program".to_owned()))?
            .try_into()
            .map_err(|error: aya::programs::ProgramError| failed(error.to_string()))?;
        if self.tcx {
            attach_tcx(program, interface, hook, &pin).map_err(failed)?;
            // What a hostd that was configured otherwise has left would go on with its own maps.
            remove_clsact(interface, hook).map_err(failed)
        } else {
            attach_clsact(program, interface, hook).map_err(failed)?;
            remove_pin(&pin)
        }
    }

    pub fn detach(&mut self, interface: &str) -> Result<(), DatapathError> {
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

fn remove_pin(pin: &Path) -> Result<(), DatapathError> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::io(format!("remove {}", pin.display()))(error))
        }
        _ => Ok(()),
    }
}

/// Swaps the program into the pinned link; where there is none, or it is no longer the first on its hook, makes another
/// in front of all and pins that. The old one goes last.
fn attach_tcx(program: &mut SchedClassifier, interface: &str, hook: Hook, pin: &Path) -> Result<(), String> {
    if pin.exists() {
        match swap(program, pin).and_then(|()| is_first(program, interface, hook)) {
            Ok(true) => return Ok(()),
            Ok(false) => tracing::warn!(
                "another program was before {} on {interface}; going in front",
                hook.name()
            ),
            Err(problem) => {
                tracing::info!(
                    "the link pinned at {} is of no use ({problem}); making another",
                    pin.display()
                );
            }
        }
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program
        .attach_with_options(interface, attach_type(hook), options)
        .map_err(|error| chain(&error))?;
    let link = program.take_link(id).map_err(|error| error.to_string())?;
    let link: FdLink = link
        .try_into()
        .map_err(|error: aya::programs::links::LinkError| error.to_string())?;
    remove_pin(pin).map_err(|error| error.to_string())?;
    link.pin(pin).map_err(|error| chain(&error))?;
    if is_first(program, interface, hook)? {
        return Ok(());
    }
    Err("another program is in front, which could let packets past".to_owned())
}

fn swap(program: &mut SchedClassifier, pin: &Path) -> Result<(), String> {
    let link = PinnedLink::from_pin(pin).map_err(|error| error.to_string())?;
    let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(|error| error.to_string())?;
    let id = program.attach_to_link(link).map_err(|error| chain(&error))?;
    // The pin holds the link; our descriptor of it may be closed.
    drop(program.take_link(id).map_err(|error| error.to_string())?);
    Ok(())
}

fn is_first(program: &SchedClassifier, interface: &str, hook: Hook) -> Result<bool, String> {
    let ours = program.info().map_err(|error| chain(&error))?.id();
    let (_, attached) = SchedClassifier::query_tcx(interface, attach_type(hook)).map_err(|error| chain(&error))?;
    Ok(attached.first().is_some_and(|first| first.id() == ours))
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

/// Replaces our filter, or adds it.
fn attach_clsact(program: &mut SchedClassifier, interface: &str, hook: Hook) -> Result<(), String> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => {}
        // It is there already.
        Err(error) if chain(&error).contains("File exists") => {}
        Err(error) => return Err(chain(&error)),
    }
    let ours = SchedClassifierLink::attached(interface, attach_type(hook), PRIORITY, HANDLE, None)
        .map_err(|error| error.to_string())?;
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        classid: None,
    });
    let id = match program.attach_to_link(ours) {
        Ok(id) => id,
        Err(_) => program
            .attach_with_options(interface, attach_type(hook), options)
            .map_err(|error| chain(&error))?,
    };
    let link = program.take_link(id).map_err(|error| error.to_string())?;
    // Dropping it would detach the filter, which has to outlive hostd.
    std::mem::forget(link);
    Ok(())
}
