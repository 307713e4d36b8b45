//! Setting up: finds what building and testing need, and installs what is missing.

mod install;
mod needs;

pub use install::Linker;
pub use needs::Purpose;

use anyhow::{bail, ensure};
use needs::CargoCommand;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use toolchain::{DISTRO_LLVM, Error, find_bpf, find_program, find_wasm};

/// Debian's second Rust, for the targets that rustup would have to download.
const DISTRO_RUST: [&str; 5] = [
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "libstd-rust-web-dev-bpf",
    "rust-web-clippy",
];

/// What is missing.
#[derive(Debug, Default, PartialEq, Eq)]
struct Missing {
    packages: Vec<String>,
    bpf_linker: bool,
    cargo_commands: Vec<&'static CargoCommand>,
}

/// Finds what is missing and installs it; with `check`, only says so.
pub fn run(check: bool, purpose: Purpose) -> anyhow::Result<()> {
    let missing = find(purpose, true);
    if missing == Missing::default() {
        println!("set up: nothing is missing");
        return Ok(());
    }
    if check {
        bail!("missing: {}; `cargo xtask setup` installs it", describe(&missing));
    }
    install::install(&missing)?.wait()?;
    let still = find(purpose, false);
    ensure!(
        still == Missing::default(),
        "still missing after the installation: {}",
        describe(&still)
    );
    println!("set up: everything is there");
    Ok(())
}

/// The same before another task, which begins while the linker for BPF is made; says nothing where there is nothing to do.
pub fn begin(purpose: Purpose) -> anyhow::Result<Linker> {
    install::install(&find(purpose, false))
}

/// A program, also where only root's path has it.
pub fn path_of(program: &str) -> Option<PathBuf> {
    let sbin = ["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(program));
    find_program(program).or_else(|| sbin.into_iter().find(|path| path.is_file()))
}

fn describe(missing: &Missing) -> String {
    let mut parts = missing.packages.clone();
    if missing.bpf_linker {
        parts.push("bpf-linker".to_owned());
    }
    parts.extend(missing.cargo_commands.iter().map(|command| command.name.to_owned()));
    parts.join(", ")
}

fn find(purpose: Purpose, say: bool) -> Missing {
    let mut missing = Missing::default();
    let mut need = |package: &str| {
        if !missing.packages.iter().any(|known| known == package) {
            missing.packages.push(package.to_owned());
        }
    };
    let bpf = find_bpf();
    let no_bpf_compiler = matches!(bpf, Err(Error::NoCompiler { .. }));
    let wasm = find_wasm();
    if no_bpf_compiler || wasm.is_err() {
        for package in DISTRO_RUST {
            need(package);
        }
        need(&format!("lld-{DISTRO_LLVM}"));
    }
    let no_linker = find_program("bpf-linker").is_none();
    if no_linker && has_distro_bpf(no_bpf_compiler) {
        for package in [format!("llvm-{DISTRO_LLVM}-dev"), format!("libpolly-{DISTRO_LLVM}-dev")] {
            if !installed(&package) {
                need(&package);
            }
        }
    }
    for (program, package) in purpose.programs() {
        if path_of(program).is_none() {
            need(package);
        }
    }
    if !has_protobuf_types() {
        need("libprotobuf-dev");
    }
    if purpose == Purpose::Check && has_distro_bpf(no_bpf_compiler) && !Path::new("/usr/bin/cargo-clippy").exists() {
        need("rust-web-clippy");
    }
    if say {
        match &bpf {
            Ok(bpf) => println!("BPF: {}, linker {}", bpf.compiler.describe(), bpf.linker.display()),
            Err(error) => println!("BPF: {error}"),
        }
        match &wasm {
            Ok(wasm) => println!("wasm: {}", wasm.compiler.describe()),
            Err(error) => println!("wasm: {error}"),
        }
    }
    missing.bpf_linker = no_linker;
    let commands = purpose.cargo_commands().iter();
    missing.cargo_commands = commands.filter(|command| !command.is_there()).collect();
    missing
}

/// Whether protoc finds its own types, which etcd's protocol buffers include: in `include` beside its folder.
fn has_protobuf_types() -> bool {
    let types = |protoc: PathBuf| protoc.with_file_name("../include/google/protobuf/descriptor.proto");
    path_of("protoc").map(types).is_some_and(|file| file.is_file())
}

/// Whether the distribution's compiler is used for BPF, or is about to be.
fn has_distro_bpf(no_bpf_compiler: bool) -> bool {
    no_bpf_compiler || Path::new("/usr/lib/rustlib/bpfel-unknown-none").is_dir()
}

fn installed(package: &str) -> bool {
    Command::new("dpkg")
        .args(["-s", package])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
