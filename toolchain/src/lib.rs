//! Finds the compilers for the BPF and wasm targets, and builds with them. Used by the build scripts and by xtask.
//!
//! There are two ways to either target. With rustup: a nightly with `rust-src` for BPF, and the target
//! `wasm32-unknown-unknown`. Without what rustup would have to download: Debian's second Rust (`rustc-web` and its
//! companions), a stable compiler that has `core` for BPF prebuilt and the sources of `std`.

mod build;
mod find;

pub use build::{build_ebpf, build_policies, build_test_policies};
pub use find::{Bpf, Compiler, Wasm, announce_linker, find_bpf, find_program, find_wasm};

use std::path::PathBuf;

/// What can go wrong in finding a compiler or building with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing on this machine compiles for the target.
    #[error("no compiler for {target} found ({looked}): run `cargo xtask setup`")]
    NoCompiler {
        /// The target.
        target: &'static str,
        /// Where it was looked for.
        looked: &'static str,
    },
    /// The linker for BPF is missing.
    #[error("bpf-linker is neither in PATH nor in cargo's bin folder: run `cargo xtask setup`")]
    NoLinker,
    /// A build command could not be started.
    #[error("cannot run {command}: {source}")]
    Start {
        /// The command.
        command: String,
        /// Why.
        source: std::io::Error,
    },
    /// A build failed; the compiler has said why.
    #[error("{command} failed:\n{output}")]
    Failed {
        /// The command.
        command: String,
        /// What it printed.
        output: String,
    },
    /// A built file could not be put in its place.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Version of bpf-linker that the set-up step installs.
pub const BPF_LINKER_VERSION: &str = "0.13.0";

/// Major version of LLVM that Debian's second Rust is built on; bpf-linker must be built on the same.
pub const DISTRO_LLVM: u32 = 22;

/// Root of the workspace.
#[must_use]
pub fn workspace_root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or_else(|| manifest.clone(), PathBuf::from)
}

/// Where nested builds put what they build: one folder for all profiles of the workspace.
#[must_use]
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}
