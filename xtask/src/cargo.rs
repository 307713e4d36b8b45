//! Running cargo, and what it has built.

use anyhow::{Context, ensure};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The cargo that runs this task.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(toolchain::workspace_root());
    // What cargo says of this program to this program is not for the build scripts of others: with it `ring`, and what is built on it, would
    // be built again whenever cargo is called without.
    for (name, _) in env::vars_os() {
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

/// One thing that cargo has built, or has found built already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// What cargo calls the package: where it comes from, its name and version.
    pub package: String,
    /// `lib`, `proc-macro`, `custom-build`, `bin`, `test` or `bench`.
    pub kind: String,
    /// Name of the crate.
    pub name: String,
    pub features: BTreeSet<String>,
    /// Level of optimization: what runs at build time alone is not optimized.
    pub opt_level: String,
    pub files: Vec<PathBuf>,
    /// The program, where it is one.
    pub executable: Option<PathBuf>,
    /// It was there already.
    pub fresh: bool,
}

impl Unit {
    /// Whether it is this workspace's own.
    pub fn is_own(&self) -> bool {
        self.package.starts_with("path+")
    }

    /// What cargo tells it by from others of its name: `0123456789abcdef` in `…/libserde-0123456789abcdef.rlib` and
    /// `…/serde-0123456789abcdef/build-script-build`.
    pub fn hash(&self) -> Option<&str> {
        self.files.iter().find_map(|file| {
            let names = [file.file_name(), file.parent().and_then(Path::file_name)];
            names.into_iter().flatten().find_map(|name| hash_in(name.to_str()?))
        })
    }
}

fn hash_in(name: &str) -> Option<&str> {
    let (_, hash) = name.split('.').next()?.rsplit_once('-')?;
    let is_hash = hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hash.then_some(hash)
}

/// A line of cargo's JSON (the Cargo Book, "External tools"); one without `files` has built nothing.
#[derive(Deserialize)]
struct Message {
    package_id: Option<String>,
    target: Option<Target>,
    profile: Option<Profile>,
    #[serde(default)]
    features: BTreeSet<String>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
    executable: Option<PathBuf>,
    #[serde(default)]
    fresh: bool,
    /// Where a build script has put what it makes.
    out_dir: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    opt_level: String,
    test: bool,
}

impl Message {
    fn unit(self) -> Option<Unit> {
        let package = self.package_id?;
        if let Some(out) = self.out_dir {
            return Some(Unit {
                package,
                kind: "build-script-run".to_owned(),
                name: String::new(),
                features: BTreeSet::new(),
                opt_level: String::new(),
                files: vec![out],
                executable: None,
                fresh: true,
            });
        }
        let (target, profile) = (self.target?, self.profile?);
        let kind = if profile.test { "test" } else { target.kind.first()? };
        Some(Unit {
            package,
            kind: kind.to_owned(),
            name: target.name,
            features: self.features,
            opt_level: profile.opt_level,
            files: self.filenames,
            executable: self.executable,
            fresh: self.fresh,
        })
    }
}

/// Runs a command of cargo that builds; the answer is what it has built, or found built. Warnings and errors it prints itself.
pub fn build(arguments: &[&str]) -> anyhow::Result<Vec<Unit>> {
    let mut command = cargo();
    let (first, rest) = arguments.split_first().context("no command for cargo")?;
    command
        .args([first, "--message-format=json-render-diagnostics"])
        .args(rest);
    let mut child = command.stdout(Stdio::piped()).spawn().context("running cargo")?;
    let lines = BufReader::new(child.stdout.take().context("cargo's output")?);
    let mut units = Vec::new();
    for line in lines.lines() {
        // What other programs print in between is no message.
        let message: Option<Message> = serde_json::from_str(&line?).ok();
        units.extend(message.and_then(Message::unit));
    }
    ensure!(child.wait()?.success(), "`cargo {}` failed", arguments.join(" "));
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::{Message, Unit};

    fn unit(message: &str) -> Option<Unit> {
        serde_json::from_str::<Message>(message).unwrap().unit()
    }

    #[test]
    fn cargos_messages_are_understood() {
        let library = unit(
            r#"{"reason":"compiler-artifact","package_id":"registry+https://example.org/index#serde@1.0.229","manifest_path":"x",
            "target":{"kind":["lib"],"crate_types":["lib"],"name":"serde","src_path":"x","edition":"2021"},
            "profile":{"opt_level":"3","debuginfo":0,"debug_assertions":false,"overflow_checks":false,"test":false},
            "features":["std","alloc"],"filenames":["/t/release/deps/libserde-0123456789abcdef.rlib"],
            "executable":null,"fresh":true}"#,
        );
        let library = library.unwrap();
        assert_eq!(
            (library.kind.as_str(), library.hash()),
            ("lib", Some("0123456789abcdef"))
        );
        assert!(library.fresh && !library.is_own() && library.features.contains("alloc"));

        let script = unit(
            r#"{"reason":"build-script-executed","package_id":"path+file:///x#host@0.1.0","linked_libs":[],"linked_paths":[],
            "cfgs":[],"env":[],"out_dir":"/t/release/build/host-fedcba9876543210/out"}"#,
        );
        let script = script.unwrap();
        assert!(script.is_own() && script.hash() == Some("fedcba9876543210"));
        assert_eq!(unit(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
