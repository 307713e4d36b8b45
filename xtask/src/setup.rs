//! Setting up: finds what building and testing need, and installs what is missing.

use anyhow::{Context, bail, ensure};
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use toolchain::{BPF_LINKER_VERSION, DISTRO_LLVM, Error, find_bpf, find_program, find_wasm};

/// A program that is needed, and Debian's package that has it.
const PROGRAMS: [(&str, &str); 16] = [
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nsenter", "util-linux"),
    ("iperf3", "iperf3"),
    ("tcpdump", "tcpdump"),
    ("bpftool", "bpftool"),
    ("ping", "iputils-ping"),
    ("nft", "nftables"),
    // etcd's client library translates etcd's protocol buffers when it is built.
    ("protoc", "protobuf-compiler"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    ("podman", "podman"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("conmon", "conmon"),
    ("busybox", "busybox-static"),
];

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
    cargo_deny: bool,
}

/// Finds what is missing and installs it; with `check`, only says so.
pub fn run(check: bool, dev: bool) -> anyhow::Result<()> {
    let missing = find(dev, true);
    if missing == Missing::default() {
        println!("set up: nothing is missing");
        return Ok(());
    }
    if check {
        bail!("missing: {}; `cargo xtask setup` installs it", describe(&missing));
    }
    install(&missing)?;
    let still = find(dev, false);
    ensure!(
        still == Missing::default(),
        "still missing after the installation: {}",
        describe(&still)
    );
    println!("set up: everything is there");
    Ok(())
}

/// The same before another task: says nothing where there is nothing to do.
pub fn quietly() -> anyhow::Result<()> {
    match find(false, false) {
        missing if missing == Missing::default() => Ok(()),
        _ => run(false, false),
    }
}

/// A program, also where only root's path has it.
pub fn path_of(program: &str) -> Option<PathBuf> {
    let sbin = ["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(program));
    find_program(program).or_else(|| sbin.into_iter().find(|path| path.is_file()))
}

/// Installs those of these programs that are missing, each from its package.
pub fn programs(needed: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing: Vec<String> = needed
        .iter()
        .filter(|(program, _)| path_of(program).is_none())
        .map(|(_, package)| (*package).to_owned())
        .collect();
    if missing.is_empty() { Ok(()) } else { apt(&missing) }
}

fn describe(missing: &Missing) -> String {
    let mut parts = missing.packages.clone();
    if missing.bpf_linker {
        parts.push("bpf-linker".to_owned());
    }
    if missing.cargo_deny {
        parts.push("cargo-deny".to_owned());
    }
    parts.join(", ")
}

fn find(dev: bool, say: bool) -> Missing {
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
    for (program, package) in PROGRAMS {
        if path_of(program).is_none() {
            need(package);
        }
    }
    if !has_protobuf_types() {
        need("libprotobuf-dev");
    }
    if dev && has_distro_bpf(no_bpf_compiler) && !Path::new("/usr/bin/cargo-clippy").exists() {
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
    missing.cargo_deny = dev && find_program("cargo-deny").is_none();
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

fn install(missing: &Missing) -> anyhow::Result<()> {
    let packages = &missing.packages;
    if !packages.is_empty() && !rustup_way(packages)? {
        apt(packages)?;
    }
    if missing.bpf_linker {
        install_bpf_linker()?;
    }
    if missing.cargo_deny {
        println!("installing cargo-deny from crates.io (some minutes)");
        crate::run(Command::new("cargo").args(["install", "--locked", "cargo-deny"]))?;
    }
    Ok(())
}

/// Where the distribution has no second Rust, rustup downloads what is missing. True where that was all.
fn rustup_way(packages: &[String]) -> anyhow::Result<bool> {
    let wants_rust = packages.iter().any(|package| package == DISTRO_RUST[0]);
    if !wants_rust || apt_has(DISTRO_RUST[0]) {
        return Ok(false);
    }
    println!("installing a nightly with rust-src, and the wasm target, by rustup");
    for arguments in [
        &[
            "toolchain",
            "install",
            "nightly",
            "--component",
            "rust-src",
            "--component",
            "clippy",
        ][..],
        &["target", "add", "--toolchain", "stable", "wasm32-unknown-unknown"],
    ] {
        crate::run(Command::new("rustup").args(arguments))
            .context("neither apt nor rustup has a compiler for BPF and wasm")?;
    }
    let others: Vec<String> = packages.iter().filter(|package| !is_rust(package)).cloned().collect();
    if !others.is_empty() {
        apt(&others)?;
    }
    Ok(true)
}

fn is_rust(package: &str) -> bool {
    DISTRO_RUST.contains(&package)
        || ["lld-", "llvm-", "libpolly-"]
            .iter()
            .any(|start| package.starts_with(start))
}

fn apt_has(package: &str) -> bool {
    let known = || {
        let output = Command::new("apt-cache").args(["show", package]).output();
        output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
    };
    if known() {
        return true;
    }
    // Perhaps it only has an old list.
    rustix::process::geteuid().is_root() && apt_get(&["update", "-qq"]).is_ok() && known()
}

fn apt(packages: &[String]) -> anyhow::Result<()> {
    let list = packages.join(" ");
    ensure!(
        find_program("apt-get").is_some(),
        "missing: {list} (Debian's names); this machine has no apt-get: install them with its own package manager"
    );
    ensure!(
        rustix::process::geteuid().is_root(),
        "missing: {list}; installing packages takes root: run `sudo apt-get install {list}`, or this task as root"
    );
    println!("installing {list} by apt-get");
    apt_get(&["update", "-qq"])?;
    let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
    arguments.extend(packages.iter().map(String::as_str));
    apt_get(&arguments)
}

fn apt_get(arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("apt-get");
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(Stdio::null());
    crate::run(&mut command)
}

/// bpf-linker must be built on the LLVM of the compiler whose output it links.
fn install_bpf_linker() -> anyhow::Result<()> {
    println!("installing bpf-linker {BPF_LINKER_VERSION} from crates.io (some minutes)");
    let mut command = Command::new("cargo");
    command.args(["install", "--locked", "bpf-linker", "--version", BPF_LINKER_VERSION]);
    let prefix = format!("/usr/lib/llvm-{DISTRO_LLVM}");
    if has_distro_bpf(false) {
        command
            .args(["--no-default-features", "--features", &format!("llvm-{DISTRO_LLVM}")])
            .env("RUSTC", "/usr/bin/rustc")
            .env("LLVM_PREFIX", &prefix)
            .env(format!("LLVM_SYS_{DISTRO_LLVM}1_PREFIX"), &prefix);
    } else {
        command.env("RUSTUP_TOOLCHAIN", "nightly");
    }
    crate::run(&mut command)
}
