//! Network namespaces, by the `ip` command.

use crate::warden;
use anyhow::{Context, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::{
    fs::File,
    os::fd::AsFd,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

/// Runs a command; the answer is what it printed.
///
/// # Errors
///
/// Where it can't be run, or ends with another status than 0; with what it said.
pub fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("running {program}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {}", arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A network namespace that is removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Namespace {
    /// Makes a namespace; `label` is only part of its name.
    ///
    /// # Errors
    ///
    /// Where it can't be made.
    pub fn new(label: &str) -> anyhow::Result<Self> {
        warden::watch()?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("wg{}-{number}-{label}", std::process::id());
        run("ip", &["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Connects an interface of it to one of another namespace, by a veth pair. Both are down.
    ///
    /// # Errors
    ///
    /// Where it can't be made.
    pub fn connect(&self, here: &str, other: &Self, there: &str) -> anyhow::Result<()> {
        let pair = [
            "link",
            "add",
            here,
            "type",
            "veth",
            "peer",
            "name",
            there,
            "netns",
            &other.name,
        ];
        self.ip(&pair).map(drop)
    }

    /// Runs `ip` in it.
    ///
    /// # Errors
    ///
    /// As [`run`].
    pub fn ip(&self, arguments: &[&str]) -> anyhow::Result<String> {
        run("ip", &[&["-n", &self.name], arguments].concat())
    }

    /// A command that runs in it, with the mounts of the caller (`ip netns exec` would have its own).
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.path().display()))
            .arg("--")
            .arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["netns", "del", &self.name]) {
            eprintln!("removing a namespace: {error:#}");
        }
    }
}

/// Runs `work` in a network namespace, on a thread of its own.
///
/// # Errors
///
/// Where there is no such namespace.
///
/// # Panics
///
/// Where `work` does.
pub fn in_netns<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
    let path = PathBuf::from("/run/netns").join(namespace);
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .with_context(|| path.display().to_string())?;
            Ok(work())
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
