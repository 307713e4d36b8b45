//! Building.

use crate::cargo;

/// Builds everything for release. hostd's build script builds the tc programs.
pub fn run() -> anyhow::Result<()> {
    println!("building the tc programs and hostd");
    crate::run(cargo().args(["build", "--release", "--package", "hostd"]))?;
    println!("building the policies");
    toolchain::build_policies()?;
    Ok(())
}
