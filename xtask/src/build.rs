//! Building.

use crate::{
    cargo::{self, Unit},
    libraries,
    setup::Linker,
};
use anyhow::ensure;
use std::{collections::BTreeSet, thread};

/// Builds everything that runs on a node, for release. hostd's build script builds the tc programs.
pub fn run(linker: Linker) -> anyhow::Result<()> {
    println!("building the tc programs, hostd and the policies");
    let units = build(linker, &["build", "--release", "--package", "hostd"])?;
    libraries::keep(&units);
    Ok(())
}

/// The same and all tests, with the same libraries.
pub fn with_tests(linker: Linker) -> anyhow::Result<()> {
    let units = build(
        linker,
        &["build", "--release", "--workspace", "--lib", "--bins", "--tests"],
    )?;
    for package in ["hostd", "xtask"] {
        let alone = cargo::build(&["build", "--release", "--package", package])?;
        let twice = only_in(&alone, &units);
        ensure!(
            twice.is_empty(),
            "{package} has libraries with other features than all crates together have, so that they are compiled twice: \
             {}; name the features that are missing in its Cargo.toml",
            twice.join(", ")
        );
    }
    libraries::keep(&units);
    Ok(())
}

/// Libraries that are in one build alone, with their features.
fn only_in(one: &[Unit], other: &[Unit]) -> Vec<String> {
    let known: BTreeSet<Option<&str>> = other.iter().map(Unit::hash).collect();
    let libraries = one
        .iter()
        .filter(|unit| !unit.is_own() && ["lib", "proc-macro"].contains(&unit.kind.as_str()));
    let alone = libraries.filter(|unit| !known.contains(&unit.hash()));
    alone.map(|unit| format!("{} {:?}", unit.name, unit.features)).collect()
}

/// The policies, which another compiler builds, are built beside the rest.
fn build(linker: Linker, arguments: &[&str]) -> anyhow::Result<Vec<Unit>> {
    libraries::restore();
    let policies = thread::spawn(toolchain::build_policies);
    let units = cargo::build(arguments);
    let policies = policies.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    // Without it nothing else could be built, so it has the first word.
    linker.wait()?;
    policies?;
    units
}

#[cfg(test)]
mod tests {
    use super::only_in;
    use crate::cargo::Unit;

    fn library(hash: &str, feature: &str) -> Unit {
        Unit {
            package: "registry+x#serde@1.0.0".to_owned(),
            kind: "lib".to_owned(),
            name: "serde".to_owned(),
            features: [feature.to_owned()].into(),
            opt_level: "3".to_owned(),
            files: vec![format!("/t/deps/libserde-{hash}.rlib").into()],
            executable: None,
            fresh: true,
        }
    }

    #[test]
    fn a_library_with_other_features_is_found() {
        let all = [library("0123456789abcdef", "alloc"), library("fedcba9876543210", "std")];
        assert!(only_in(&all[..1], &all).is_empty());
        let own = Unit {
            package: "path+file:///x#serde@1.0.0".to_owned(),
            ..library("1111111111111111", "rc")
        };
        let alone = [library("2222222222222222", "rc"), own];
        assert_eq!(only_in(&alone, &all), [r#"serde {"rc"}"#]);
    }
}
