//! Testing.

use crate::{build, cargo, conformance, setup};
use std::process::Command;

/// What the tests of real traffic run, and Debian's packages that have it. None of them starts a service of its own.
const PROGRAMS: [(&str, &str); 6] = [
    ("apache2", "apache2-bin"),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("sockperf", "sockperf"),
    ("tracepath", "iputils-tracepath"),
];

/// Runs all tests. Those that need root must not be skipped here.
pub fn run(filter: Option<&str>) -> anyhow::Result<()> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "the kernel tests need root: run as root, or run the others alone by `cargo test`"
    );
    setup::programs(&PROGRAMS)?;
    build::run()?;
    let test = |arguments: &[&str]| -> Command {
        let mut command = cargo();
        command.args(["test", "--release"]).args(arguments).args(filter);
        command.env("WASMGATE_REQUIRE_KERNEL", "1");
        command
    };
    println!("unit tests");
    crate::run(&mut test(&["--workspace", "--exclude", "wasmgate-tests"]))?;
    println!("kernel tests");
    crate::run(&mut test(&["--package", "wasmgate-tests", "--no-fail-fast"]))?;
    if filter.is_none() {
        println!("conformance on one node, then across two");
        for two_nodes in [false, true] {
            conformance::run(&conformance::Arguments::all(two_nodes))?;
        }
    }
    Ok(())
}
