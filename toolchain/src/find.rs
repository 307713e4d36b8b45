//! Finding compilers.

use crate::{DISTRO_LLVM, Error, target_dir};
use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

/// A compiler and how to call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// Debian's second Rust, under `/usr/bin`.
    Distro,
    /// A rustup toolchain of this name.
    Rustup(String),
}

/// How to build for BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bpf {
    /// The compiler.
    pub compiler: Compiler,
    /// `core` has to be built from source.
    pub build_std: bool,
    /// Path of bpf-linker.
    pub linker: PathBuf,
}

/// How to build for wasm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wasm {
    /// The compiler.
    pub compiler: Compiler,
    /// `std` has to be built from source.
    pub build_std: bool,
    /// The linker, where the compiler has none of its own.
    pub linker: Option<PathBuf>,
}

impl Compiler {
    /// A cargo command of this compiler, with nothing inherited from a cargo that is running already.
    #[must_use]
    pub fn cargo(&self) -> Command {
        let mut command = match self {
            Self::Distro => {
                let mut command = Command::new("/usr/bin/cargo");
                // Its own clippy and linker come before those of a rustup.
                let path = env::var_os("PATH").unwrap_or_default();
                let path = env::join_paths(std::iter::once("/usr/bin".into()).chain(env::split_paths(&path)));
                if let Ok(path) = path {
                    command.env("PATH", path);
                }
                command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
                command.env_remove("RUSTUP_TOOLCHAIN");
                command
            }
            Self::Rustup(name) => {
                let mut command = Command::new("cargo");
                command.env("RUSTUP_TOOLCHAIN", name).env_remove("RUSTC");
                command
            }
        };
        for (key, _) in env::vars_os() {
            let name = key.to_string_lossy();
            let ours = name.starts_with("CARGO_")
                && name != "CARGO_HOME"
                && !name.starts_with("CARGO_NET")
                && !name.starts_with("CARGO_HTTP")
                && !name.starts_with("CARGO_REGISTR")
                && !name.starts_with("CARGO_SOURCE");
            if ours || name.starts_with("RUSTFLAGS") || name == "RUSTC_WRAPPER" || name == "RUSTC_WORKSPACE_WRAPPER" {
                command.env_remove(&key);
            }
        }
        command
    }

    /// For messages.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Distro => "the distribution's Rust in /usr/bin".to_owned(),
            Self::Rustup(name) => format!("rustup's {name}"),
        }
    }
}

/// Finds a compiler and a linker for BPF.
///
/// # Errors
///
/// [`Error::NoCompiler`] and [`Error::NoLinker`], where there is none.
pub fn find_bpf() -> Result<Bpf, Error> {
    let distro = Path::new("/usr/lib/rustlib/bpfel-unknown-none").is_dir() && Path::new("/usr/bin/cargo").exists();
    let (compiler, build_std) = if distro {
        (Compiler::Distro, false)
    } else if rustup_sysroot("nightly").is_some_and(|sysroot| has_source(&sysroot)) {
        (Compiler::Rustup("nightly".to_owned()), true)
    } else {
        return Err(Error::NoCompiler {
            target: "bpfel-unknown-none",
            looked: "the distribution's libstd-rust-web-dev-bpf, rustup's nightly with rust-src",
        });
    };
    let linker = find_linker().ok_or(Error::NoLinker)?;
    Ok(Bpf {
        compiler,
        build_std,
        linker,
    })
}

/// The linker for BPF; where it is being installed, when it is there.
fn find_linker() -> Option<PathBuf> {
    let find = || find_program("bpf-linker");
    find().or_else(|| {
        // The installation holds the lock until it has ended, well or not.
        File::open(linker_lock()).ok()?.lock_shared().ok()?;
        find()
    })
}

fn linker_lock() -> PathBuf {
    target_dir().join("bpf-linker.lock")
}

/// Says that the linker for BPF is being installed: until the answer is dropped, [`find_bpf`] waits where there is none.
///
/// # Errors
///
/// [`Error::Write`], where that can't be said.
pub fn announce_linker() -> Result<File, Error> {
    let path = linker_lock();
    let announce = || {
        fs::create_dir_all(target_dir())?;
        let file = File::create(&path)?;
        file.lock()?;
        Ok(file)
    };
    announce().map_err(|source| Error::Write {
        path: path.clone(),
        source,
    })
}

/// Finds a compiler for wasm.
///
/// # Errors
///
/// [`Error::NoCompiler`], where there is none.
pub fn find_wasm() -> Result<Wasm, Error> {
    for name in ["stable", "nightly"] {
        if rustup_sysroot(name).is_some_and(|sysroot| sysroot.join("lib/rustlib/wasm32-unknown-unknown/lib").is_dir()) {
            return Ok(Wasm {
                compiler: Compiler::Rustup(name.to_owned()),
                build_std: false,
                linker: None,
            });
        }
    }
    let linker = PathBuf::from(format!("/usr/bin/wasm-ld-{DISTRO_LLVM}"));
    if has_source(Path::new("/usr")) && linker.exists() {
        return Ok(Wasm {
            compiler: Compiler::Distro,
            build_std: true,
            linker: Some(linker),
        });
    }
    Err(Error::NoCompiler {
        target: "wasm32-unknown-unknown",
        looked: "rustup's stable and nightly, the distribution's rust-web-src with lld",
    })
}

fn has_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core").is_dir()
}

fn rustup_sysroot(toolchain: &str) -> Option<PathBuf> {
    let output = Command::new("rustup")
        .args(["run", toolchain, "rustc", "--print", "sysroot"])
        .output()
        .ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim()))
}

/// A program in PATH or in cargo's bin folder.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}
