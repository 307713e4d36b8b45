//! Checks that run nothing: format, lints, documentation, dependencies.

use crate::{
    cargo::{self, cargo},
    libraries,
};
use toolchain::{find_bpf, workspace_root};

/// Runs all checks.
pub fn run() -> anyhow::Result<()> {
    println!("format");
    crate::run(cargo().args(["fmt", "--all", "--check"]))?;
    crate::run(
        cargo()
            .current_dir(workspace_root().join("ebpf"))
            .args(["fmt", "--check"]),
    )?;

    println!("lints");
    libraries::restore();
    let lints = [
        "clippy",
        "--release",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    let linted = cargo::build(&lints)?;

    println!("lints of the tc programs");
    let bpf = find_bpf()?;
    let mut clippy = bpf.compiler.cargo();
    clippy
        .current_dir(workspace_root().join("ebpf"))
        .args(["clippy", "--release", "--target", "bpfel-unknown-none", "--target-dir"])
        .arg(toolchain::target_dir().join("bpf"));
    if bpf.build_std {
        clippy.args(["-Z", "build-std=core"]);
    }
    crate::run(clippy.args(["--", "-D", "warnings"]))?;

    println!("documentation");
    let mut doc = cargo();
    doc.args(["doc", "--release"]);
    doc.args(["--workspace", "--no-deps", "--document-private-items"]);
    crate::run(doc.env("RUSTDOCFLAGS", "-D warnings"))?;

    libraries::keep(&linted);

    println!("dependencies");
    // The advisory database is another server's; a run without the network has the other three.
    crate::run(cargo().args(["deny", "--all-features", "check", "bans", "licenses", "sources"]))
}
