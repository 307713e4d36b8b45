//! Building.

use crate::cargo;

/// Builds everything for release. hostd's build script builds the tc programs.
pub fn run() -> anyhow::Result<()> {
    println!("building the tc programs and hostd");
    // With what the tests have beside it: libraries that both use are built once, with the features that both ask for.
    crate::run(cargo().args(["build", "--release", "--package", "hostd", "--package", "harness"]))?;
    println!("building the policies");
    toolchain::build_policies()?;
    Ok(())
}
