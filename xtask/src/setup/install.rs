//! Installing what is missing.

use super::{DISTRO_RUST, Missing, has_distro_bpf, needs::CargoCommand};
use anyhow::{Context, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};
use toolchain::{BPF_LINKER_VERSION, DISTRO_LLVM, find_program};

/// The linker for BPF, which takes minutes to compile: other things are compiled beside it, and hostd's build script waits for it.
#[must_use]
pub struct Linker(Option<thread::JoinHandle<anyhow::Result<()>>>);

impl Linker {
    /// Waits until it is there.
    pub fn wait(self) -> anyhow::Result<()> {
        match self.0 {
            None => Ok(()),
            Some(installing) => installing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    }
}

/// Installs it all; only the linker for BPF may come later than this returns.
pub fn install(missing: &Missing) -> anyhow::Result<Linker> {
    let packages = &missing.packages;
    if !packages.is_empty() && !rustup_way(packages)? {
        apt(packages)?;
    }
    let linker = if missing.bpf_linker {
        install_bpf_linker()?
    } else {
        Linker(None)
    };
    for command in &missing.cargo_commands {
        install_cargo_command(command)?;
    }
    Ok(linker)
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
fn install_bpf_linker() -> anyhow::Result<Linker> {
    println!("installing bpf-linker {BPF_LINKER_VERSION} from crates.io (a minute or two)");
    let mut command = Command::new("cargo");
    command.args([
        "install",
        "--quiet",
        "--locked",
        "bpf-linker",
        "--version",
        BPF_LINKER_VERSION,
    ]);
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
    // Not where the project is built: cargo would wait for that, and the build for the linker.
    let target = tempfile::tempdir()?;
    command.arg("--target-dir").arg(target.path());
    let lock = toolchain::announce_linker()?;
    Ok(Linker(Some(thread::spawn(move || {
        let installed = crate::run(&mut command);
        drop(target);
        drop(lock);
        installed
    }))))
}

/// Compiled by others where this machine can take that, else from its source.
fn install_cargo_command(command: &CargoCommand) -> anyhow::Result<()> {
    let CargoCommand { name, version, .. } = command;
    println!("installing {name} {version}");
    match install_wheel(command) {
        Ok(()) => return Ok(()),
        Err(error) => println!("  not as a wheel of Python's: {error:#}\n  from crates.io, then (some minutes)"),
    }
    crate::run(Command::new("cargo").args(["install", "--locked", "--force", name, "--version", version]))
}

/// pip compares the wheel with its checksum before it unpacks it.
fn install_wheel(command: &CargoCommand) -> anyhow::Result<()> {
    ensure!(
        cfg!(all(target_arch = "x86_64", target_env = "gnu")),
        "there is none for this machine"
    );
    let CargoCommand {
        name,
        version,
        wheel,
        sha256,
        ..
    } = command;
    let folder = tempfile::tempdir()?;
    let wanted = folder.path().join("requirements");
    fs::write(&wanted, format!("{wheel}=={version} --hash=sha256:{sha256}\n"))?;
    let output = Command::new("python3")
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ])
        .args(["--only-binary", ":all:", "--require-hashes", "--target"])
        .arg(folder.path())
        .arg("--requirement")
        .arg(&wanted)
        .output()
        .context("python3")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}",
        said.lines().last().unwrap_or("pip failed")
    );
    let program = folder.path().join("bin").join(name);
    let works = Command::new(&program)
        .args([command.subcommand(), "--version"])
        .output();
    ensure!(
        works.is_ok_and(|output| output.status.success()),
        "it does not run here"
    );
    let place = cargo_bin().context("no home folder")?.join(name);
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    // It may run, or be looked for, at this moment.
    let aside = place.with_extension(format!("{}.new", std::process::id()));
    let put = fs::copy(&program, &aside).and_then(|_| fs::rename(&aside, &place));
    put.with_context(|| place.display().to_string())
}

/// Where cargo installs programs.
fn cargo_bin() -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
    Some(cargo_home.or_else(home)?.join("bin"))
}
