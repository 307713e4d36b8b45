//! Building for BPF and wasm.

use crate::{
    Error,
    find::{find_bpf, find_wasm},
    target_dir, workspace_root,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Builds the tc programs; the answer is the folder with the objects `datapath` and `packet_table`.
///
/// # Errors
///
/// Where there is no compiler, or the programs do not compile.
pub fn build_ebpf() -> Result<PathBuf, Error> {
    let bpf = find_bpf()?;
    let target = target_dir().join("bpf");
    let mut command = bpf.compiler.cargo();
    command
        .current_dir(workspace_root().join("ebpf"))
        .args(["build", "--release", "--target", "bpfel-unknown-none", "--target-dir"])
        .arg(&target)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            [
                &format!("-Clinker={}", bpf.linker.display()),
                "-Clink-arg=--btf",
                // With it, LLVM clears memory by calls of a loop over bytes, a dozen of them at times.
                "-Clink-arg=--disable-expand-memcpy-in-order",
                "-Cdebuginfo=2",
            ]
            .join("\u{1f}"),
        );
    if bpf.build_std {
        command.args(["-Z", "build-std=core"]);
    }
    run(command)?;
    Ok(target.join("bpfel-unknown-none/release"))
}

/// Builds every policy under `policies/`; the answer is the folder with one `NAME.wasm` for each, named as its folder.
///
/// # Errors
///
/// Where there is no compiler, or a policy does not compile.
pub fn build_policies() -> Result<PathBuf, Error> {
    build_modules(&policies(), "policies")
}

/// Builds the modules that only tests load, into a folder of their own.
///
/// # Errors
///
/// As [`build_policies`].
pub fn build_test_policies() -> Result<PathBuf, Error> {
    build_modules(&["hostile".to_owned()], "test-policies")
}

fn build_modules(names: &[String], folder: &str) -> Result<PathBuf, Error> {
    let wasm = find_wasm()?;
    let target = target_dir().join("wasm");
    let mut command = wasm.compiler.cargo();
    command
        .current_dir(workspace_root())
        .args(["build", "--profile", "policy", "--lib"])
        .args(["--target", "wasm32-unknown-unknown", "--target-dir"])
        .arg(&target);
    for name in names {
        command.args(["--package", name]);
    }
    if wasm.build_std {
        command.args(["-Z", "build-std=std,panic_abort"]);
    }
    if let Some(linker) = &wasm.linker {
        command.env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
    }
    run(command)?;

    let built = target.join("wasm32-unknown-unknown/policy");
    let folder = target_dir().join(folder);
    fs::create_dir_all(&folder).map_err(|source| Error::Write {
        path: folder.clone(),
        source,
    })?;
    for name in names {
        let from = built.join(format!("{}.wasm", name.replace('-', "_")));
        let to = folder.join(format!("{name}.wasm"));
        replace(&from, &to).map_err(|source| Error::Write { path: to, source })?;
    }
    Ok(folder)
}

/// Two builds may run at once; neither may see half a file.
fn replace(from: &Path, to: &Path) -> std::io::Result<()> {
    let aside = to.with_extension(format!("{}.new", std::process::id()));
    fs::copy(from, &aside)?;
    fs::rename(&aside, to)
}

/// Names of the policies: the folders under `policies/`.
fn policies() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(workspace_root().join("policies"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path().join("Cargo.toml").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn run(mut command: Command) -> Result<(), Error> {
    let text = format!("{command:?}");
    let output = command.output().map_err(|source| Error::Start {
        command: text.clone(),
        source,
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        command: text,
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
