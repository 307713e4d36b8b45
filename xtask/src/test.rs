//! Testing.

use crate::{
    build,
    cargo::cargo,
    conformance,
    report::Times,
    setup::{self, Purpose},
};
use std::{fs, path::PathBuf};
use toolchain::target_dir;

/// What to test.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Write where the time went to this file, as JSON: steps, files of tests, and all tests.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs all tests, and says where the time went. Those that need root must not be skipped here.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "the kernel tests need root: run as root, or run the others alone by `cargo test`"
    );
    let json = arguments.json.as_ref().map(std::path::absolute).transpose()?;
    let mut times = Times::default();
    let result = run_all(arguments.filter.as_deref(), &mut times);
    times.print();
    let written = json.map_or(Ok(()), |path| times.write(&path));
    result.and(written)
}

fn run_all(filter: Option<&str>, times: &mut Times) -> anyhow::Result<()> {
    let linker = times.step("set-up", |_| setup::begin(Purpose::Test))?;
    times.step("compile hostd, the tc programs, the policies and the tests", |_| {
        build::with_tests(linker)
    })?;
    times.step("tests", |times| nextest(filter, times))?;
    if filter.is_some() {
        return Ok(());
    }
    times.step("examples in the documentation", |_| examples())?;
    times.step("conformance: all cases across two nodes", |_| {
        conformance::run(&conformance::Arguments::all(None, true))
    })?;
    times.step("conformance: random cases on one node", |_| {
        conformance::run(&conformance::Arguments::all(Some(conformance::random_suite()), false))
    })
}

/// Unit tests and kernel tests, several at once (`.config/nextest.toml`).
fn nextest(filter: Option<&str>, times: &mut Times) -> anyhow::Result<()> {
    let mut command = cargo();
    command
        .args(["nextest", "run", "--release", "--workspace", "--no-fail-fast"])
        .args(filter)
        .env("WASMGATE_REQUIRE_KERNEL", "1");
    let report = target_dir().join("nextest/default/junit.xml");
    // That of the run before is none of this one.
    if report.exists() {
        fs::remove_file(&report)?;
    }
    let ran = crate::run(&mut command);
    if report.is_file() {
        times.add_junit(&report)?;
    }
    ran
}

/// nextest has no way to run them. The others' documentation has none.
fn examples() -> anyhow::Result<()> {
    crate::run(cargo().args(["test", "--release", "--doc", "--package", "policy-sdk"]))
}
