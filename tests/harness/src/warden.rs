//! What a run leaves when it is killed is removed all the same: destructors don't run then, so a process in a session of its
//! own waits for the run's end.

use anyhow::Context;
use std::{
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

/// It gets the end of its standard input when this process is gone.
static WARDEN: OnceLock<Result<Child, String>> = OnceLock::new();

fn start() -> anyhow::Result<Child> {
    let mut command = Command::new("setsid");
    command.args(["sh", "-c", include_str!("warden.sh"), "warden"]);
    command.arg(std::process::id().to_string());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.current_dir("/").spawn().context("setsid")
}

/// Sees to it that namespaces and folders of this process go when it does.
///
/// # Errors
///
/// Where no process can be started.
pub fn watch() -> anyhow::Result<()> {
    let started = WARDEN.get_or_init(|| start().map_err(|error| format!("{error:#}")));
    started.as_ref().map(|_| ()).map_err(|error| anyhow::anyhow!("{error}"))
}

/// A folder that is removed when dropped, or else when this process ends.
///
/// # Errors
///
/// Where it can't be made.
pub fn folder() -> anyhow::Result<tempfile::TempDir> {
    watch()?;
    let prefix = format!("wasmgate-{}-", std::process::id());
    Ok(tempfile::Builder::new().prefix(&prefix).tempdir()?)
}
