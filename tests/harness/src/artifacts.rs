//! What was built: hostd, and the policies.

use anyhow::{Context, ensure};
use std::{env, path::PathBuf, sync::OnceLock};

/// The folder of the profile that the running program was built with.
fn profile_folder() -> anyhow::Result<PathBuf> {
    let program = env::current_exe()?;
    let folder = program.parent().context("a program without a folder")?;
    // Tests are one level deeper.
    let folder = if folder.ends_with("deps") {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    Ok(folder.to_owned())
}

static CHOSEN: OnceLock<PathBuf> = OnceLock::new();

/// Takes the hostd of a release build, whatever this program was built as.
pub fn use_release() {
    // The first choice stays.
    let _ = CHOSEN.set(toolchain::target_dir().join("release/hostd"));
}

/// The hostd of the same build, unless another was chosen.
///
/// # Errors
///
/// Where it was not built.
pub fn hostd() -> anyhow::Result<PathBuf> {
    let path = match CHOSEN.get() {
        Some(path) => path.clone(),
        None => profile_folder()?.join("hostd"),
    };
    ensure!(path.is_file(), "{} is missing: run `cargo xtask build`", path.display());
    Ok(path)
}

/// The CNI plugin beside that.
///
/// # Errors
///
/// Where it was not built.
pub fn plugin() -> anyhow::Result<PathBuf> {
    let path = hostd()?.with_file_name("wasmgate-cni");
    ensure!(path.is_file(), "{} is missing: run `cargo xtask build`", path.display());
    Ok(path)
}

/// A policy module by name.
///
/// # Errors
///
/// Where it was not built.
pub fn policy(name: &str) -> anyhow::Result<PathBuf> {
    module("policies", name)
}

/// A module that only tests load, by name.
///
/// # Errors
///
/// Where it was not built.
pub fn test_policy(name: &str) -> anyhow::Result<PathBuf> {
    module("test-policies", name)
}

fn module(folder: &str, name: &str) -> anyhow::Result<PathBuf> {
    let path = toolchain::target_dir().join(folder).join(format!("{name}.wasm"));
    ensure!(path.is_file(), "{} is missing: run `cargo xtask build`", path.display());
    Ok(path)
}
