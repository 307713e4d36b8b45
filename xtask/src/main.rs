//! `cargo xtask`: sets the project up, builds it, shows it, tests it.

mod bench;
mod build;
mod cargo;
mod check;
mod conformance;
mod demo;
mod libraries;
mod report;
mod setup;
mod soak;
mod test;
mod vm;

use clap::{Parser, Subcommand};
use setup::Purpose;
use std::process::{Command, ExitCode};

/// Sets the project up, builds it, shows it, tests it.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Find what building and testing need, and install what is missing.
    Setup {
        /// Only say what is missing.
        #[arg(long)]
        check: bool,
        /// What `check` needs, too.
        #[arg(long)]
        dev: bool,
    },
    /// Build the tc programs, hostd and the policies, for release.
    Build,
    /// Show the main job: two nodes, two tenants, a policy loaded and replaced under traffic. Needs root.
    Demo {
        /// Leave it up, and print commands to play with; Ctrl-C removes it.
        #[arg(long)]
        keep: bool,
    },
    /// Run all tests, those that need root included.
    ///
    /// At the end it says where the time went: steps, files of tests, and the slowest tests.
    Test(test::Arguments),
    /// Run those tests for long that are kept short in `test`: kills, very many packets, changes under traffic. Needs root.
    Soak(soak::Arguments),
    /// Run the tables of packets and a tour of two nodes on Debian 12's kernel (Linux 6.1), in an emulated machine.
    VmTest {
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
    /// Measure. Needs root, and a machine that does nothing else meanwhile.
    Bench(bench::Bench),
    /// Run `NetworkPolicy` cases with real probes between real pods; compare, and ask `explain` too. Needs root.
    ///
    /// The last line is `N verdicts, M mismatches`; the status is 0 only where M is 0.
    Conformance(conformance::Arguments),
    /// Check format, lints, documentation and dependencies.
    Check,
}

fn main() -> ExitCode {
    perform(Arguments::parse().task).unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}

fn perform(task: Task) -> anyhow::Result<ExitCode> {
    match task {
        Task::Setup { check, dev } => setup::run(check, if dev { Purpose::Check } else { Purpose::Test })?,
        Task::Build => build(Purpose::Demo)?,
        Task::Demo { keep } => {
            build(Purpose::Demo)?;
            demo::run(keep)?;
        }
        Task::Test(arguments) => test::run(&arguments)?,
        Task::Soak(arguments) => {
            build(Purpose::Test)?;
            soak::run(&arguments)?;
        }
        Task::VmTest { filter } => {
            build(Purpose::OldKernel)?;
            vm::run(filter.as_deref())?;
        }
        Task::Bench(which) => {
            build(Purpose::Test)?;
            return bench::run(&which);
        }
        Task::Conformance(arguments) => {
            build(Purpose::Demo)?;
            conformance::run(&arguments)?;
        }
        Task::Check => {
            setup::run(false, Purpose::Check)?;
            check::run()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Sets up what is missing, and builds.
fn build(purpose: Purpose) -> anyhow::Result<()> {
    build::run(setup::begin(purpose)?)
}

/// Runs a command that prints for itself.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .map_err(|error| anyhow::anyhow!("running {}: {error}", command.get_program().display()))?;
    let text = || {
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .collect();
        words.join(std::ffi::OsStr::new(" ")).to_string_lossy().into_owned()
    };
    anyhow::ensure!(status.success(), "`{}` failed", text());
    Ok(())
}
