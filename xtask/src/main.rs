//! `cargo xtask`: sets the project up, builds it, shows it, tests it.

mod bench;
mod build;
mod check;
mod conformance;
mod demo;
mod setup;
mod test;
mod vm;

use clap::{Parser, Subcommand};
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
    Test {
        /// Only tests whose name contains this.
        filter: Option<String>,
    },
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
    let result = match Arguments::parse().task {
        Task::Setup { check, dev } => setup::run(check, dev),
        Task::Build => setup::quietly().and_then(|()| build::run()),
        Task::Demo { keep } => setup::quietly()
            .and_then(|()| build::run())
            .and_then(|()| demo::run(keep)),
        Task::Test { filter } => setup::quietly().and_then(|()| test::run(filter.as_deref())),
        Task::VmTest { filter } => setup::quietly().and_then(|()| vm::run(filter.as_deref())),
        Task::Bench(which) => setup::quietly().and_then(|()| bench::run(&which)),
        Task::Conformance(arguments) => setup::quietly()
            .and_then(|()| build::run())
            .and_then(|()| conformance::run(&arguments)),
        Task::Check => setup::run(false, true).and_then(|()| check::run()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
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

/// The cargo that runs this task.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(toolchain::workspace_root());
    // What cargo says of this program to this program is not for the build scripts of others: with it `ring`, and what is built on it, would
    // be built again whenever cargo is called without.
    for (name, _) in std::env::vars_os() {
        let its = [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_BIN_",
            "CARGO_CRATE_",
            "CARGO_PRIMARY_",
        ];
        if its.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}
