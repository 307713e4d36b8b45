//! Libraries that are compiled once on a machine: `toolchain/libraries.sh` keeps them, and says how.

use crate::cargo::{Unit, cargo};
use anyhow::Context;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};
use toolchain::{target_dir, workspace_root};

/// Names what is kept: the key, a hash of [`Unit::hash`] a line, or a path of the nested builds. It is a part of what is kept.
const LIST: &str = "libraries";
/// The variable that does without.
const WITHOUT: &str = "WASMGATE_NO_CACHE";
/// Folders of the nested builds, whose libraries are all kept: the tc programs, and the policies.
const NESTED: [&str; 4] = [
    "bpf/release",
    "bpf/bpfel-unknown-none/release",
    "wasm/policy",
    "wasm/wasm32-unknown-unknown/policy",
];
/// Where cargo keeps what it knows of its units, what build scripts make, and what the compiler makes.
const PARTS: [&str; 3] = [".fingerprint", "build", "deps"];

/// Takes what an earlier build has left on this machine, where this checkout has not built hostd yet. Without it building takes longer.
pub fn restore() {
    if let Err(error) = crate::run(&mut script("restore")) {
        eprintln!("xtask: libraries that were compiled before are not used: {error:#}");
    }
}

/// Keeps the libraries that builds have used, where some of them are new. That they can't be kept fails nothing.
pub fn keep(units: &[Unit]) {
    if let Err(error) = try_to_keep(units) {
        eprintln!("xtask: the compiled libraries are not kept for the next checkout: {error:#}");
    }
}

fn try_to_keep(units: &[Unit]) -> anyhow::Result<()> {
    if env::var_os(WITHOUT).is_some_and(|value| !value.is_empty()) {
        return Ok(());
    }
    let target = target_dir();
    let own = own_names()?;
    let libraries = units.iter().filter(|unit| !unit.is_own());
    let mut used: BTreeSet<String> = libraries.filter_map(Unit::hash).map(str::to_owned).collect();
    let mut nested = Vec::new();
    for folder in NESTED {
        nested.extend(files(&target, folder, |name, _| !own.contains(name))?);
    }
    used.extend(nested.iter().filter(|path| path.contains("/.fingerprint/")).cloned());
    // The first build of a checkout finds no list.
    let list = fs::read_to_string(target.join(LIST)).unwrap_or_default();
    let key = script("key").output()?.stdout;
    let key = String::from_utf8(key)?.trim().to_owned();
    if key.is_empty() {
        return Ok(());
    }
    // What was used before other sources or compilers came is forgotten.
    let known: BTreeSet<String> = list.lines().map(str::to_owned).collect();
    let known = if known.contains(&key) {
        known
    } else {
        BTreeSet::from([key])
    };
    if used.is_subset(&known) {
        return Ok(());
    }
    let all: BTreeSet<String> = known.union(&used).cloned().collect();
    let mut paths = vec![LIST.to_owned()];
    paths.extend(files(&target, "release", |_, hash| all.contains(hash))?);
    paths.extend(nested);
    fs::write(
        target.join(LIST),
        all.iter().flat_map(|one| [one.as_str(), "\n"]).collect::<String>(),
    )?;
    let saved = save(&paths);
    if saved.is_err() {
        // What is not kept is no known one the next time.
        fs::write(target.join(LIST), list)?;
    }
    saved
}

fn save(paths: &[String]) -> anyhow::Result<()> {
    let mut child = script("save").stdin(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("no standard input")?;
    let written = input.write_all((paths.join("\n") + "\n").as_bytes());
    drop(input);
    anyhow::ensure!(child.wait()?.success(), "toolchain/libraries.sh failed");
    Ok(written?)
}

fn script(command: &str) -> Command {
    let mut script = Command::new(workspace_root().join("toolchain/libraries.sh"));
    script.arg(command).arg(target_dir());
    script
}

/// Paths below the target folder of those units whose name and hash are meant.
fn files(target: &Path, folder: &str, is_meant: impl Fn(&str, &str) -> bool) -> anyhow::Result<Vec<String>> {
    let mut paths = Vec::new();
    for part in PARTS {
        let part = format!("{folder}/{part}");
        if !target.join(&part).is_dir() {
            continue;
        }
        for file in fs::read_dir(target.join(&part))? {
            let file = file?.file_name();
            let file = file.to_str().context("a file without a proper name")?;
            let (stem, _) = file.split_once('.').unwrap_or((file, ""));
            let Some((name, hash)) = stem.rsplit_once('-') else {
                continue;
            };
            let name = name.strip_prefix("lib").filter(|_| file != stem).unwrap_or(name);
            if is_meant(&name.replace('-', "_"), hash) {
                paths.push(format!("{part}/{file}"));
            }
        }
    }
    Ok(paths)
}

/// Names of this project's own packages and crates, as the compiler has them.
fn own_names() -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for folder in ["", "ebpf"] {
        let output = cargo()
            .current_dir(workspace_root().join(folder))
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .output()?;
        let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
        for package in metadata["packages"].as_array().context("no packages")? {
            let targets = package["targets"].as_array().context("no targets")?;
            let all = std::iter::once(package).chain(targets);
            names.extend(all.filter_map(|named| Some(named["name"].as_str()?.replace('-', "_"))));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::Write as _,
        path::{Path, PathBuf},
        process::{Command, Stdio},
        time::{Duration, SystemTime},
    };

    /// A checkout with a cache of its own, and nothing to build.
    struct Checkout(tempfile::TempDir);

    impl Checkout {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for file in ["Cargo.toml", "Cargo.lock", "ebpf/Cargo.toml", "policies/one/Cargo.toml"] {
                let path = folder.path().join("project").join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, file).unwrap();
            }
            let script = folder.path().join("project/toolchain");
            fs::create_dir(&script).unwrap();
            let original = toolchain::workspace_root().join("toolchain/libraries.sh");
            fs::copy(original, script.join("libraries.sh")).unwrap();
            Self(folder)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// A target folder of its own.
        fn target(&self, name: &str) -> PathBuf {
            self.path("project").join(name)
        }

        /// What it is told on its standard input, and what it says.
        fn run(&self, command: &str, target: &str, list: &str, without: bool) -> String {
            let mut script = Command::new(self.path("project/toolchain/libraries.sh"));
            script
                .arg(command)
                .arg(self.target(target))
                .env("XDG_CACHE_HOME", self.path("cache"));
            script.env_remove("WASMGATE_NO_CACHE");
            if without {
                script.env("WASMGATE_NO_CACHE", "1");
            }
            script
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let mut child = script.spawn().unwrap();
            // One that restores does not read it.
            let _ = child.stdin.take().unwrap().write_all(list.as_bytes());
            let output = child.wait_with_output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8(said).unwrap();
            assert!(output.status.success(), "{said}");
            said
        }

        fn save(&self) {
            let old = self.target("old/release/deps");
            fs::create_dir_all(&old).unwrap();
            fs::write(old.join("libserde-1.rlib"), "compiled").unwrap();
            fs::write(self.target("old/libraries"), "1\n").unwrap();
            self.run("save", "old", "libraries\nrelease/deps/libserde-1.rlib\n", false);
        }

        fn archives(&self) -> Vec<PathBuf> {
            let folder = fs::read_dir(self.path("cache/wasmgate/libraries"));
            folder.into_iter().flatten().map(|file| file.unwrap().path()).collect()
        }
    }

    fn modified(file: &Path) -> SystemTime {
        fs::metadata(file).unwrap().modified().unwrap()
    }

    #[test]
    fn a_new_target_folder_gets_what_an_old_one_had_with_its_times() {
        let checkout = Checkout::new();
        checkout.save();
        assert!(checkout.run("restore", "new", "", false).contains("earlier build"));
        let [old, new] = ["old", "new"].map(|target| checkout.target(target).join("release/deps/libserde-1.rlib"));
        assert_eq!(fs::read_to_string(&new).unwrap(), "compiled");
        assert_eq!(modified(&new), modified(&old));
        // One that has had it, or has libraries of its own, keeps what it has.
        fs::write(&new, "compiled anew").unwrap();
        assert_eq!(checkout.run("restore", "new", "", false), "");
        assert_eq!(fs::read_to_string(&new).unwrap(), "compiled anew");
    }

    #[test]
    fn libraries_of_two_builds_are_not_mixed_and_a_checkout_that_has_built_hostd_keeps_its_own() {
        let checkout = Checkout::new();
        checkout.save();
        for (target, built, left) in [("xtask-alone", false, "compiled"), ("all", true, "own")] {
            let deps = checkout.target(target).join("release/deps");
            fs::create_dir_all(&deps).unwrap();
            for name in ["libserde-1.rlib", "libthiserror-2.rlib"] {
                fs::write(deps.join(name), "own").unwrap();
            }
            if built {
                fs::write(deps.with_file_name("hostd"), "").unwrap();
            }
            checkout.run("restore", target, "", false);
            assert_eq!(fs::read_to_string(deps.join("libserde-1.rlib")).unwrap(), left);
            assert_eq!(deps.join("libthiserror-2.rlib").exists(), built);
        }
    }

    #[test]
    fn a_damaged_archive_is_not_used_and_a_missing_one_is_no_error() {
        let checkout = Checkout::new();
        assert_eq!(checkout.run("restore", "new", "", false), "");
        checkout.save();
        let archive = checkout.archives().pop().unwrap();
        let mut bytes = fs::read(&archive).unwrap();
        bytes[600] ^= 1;
        fs::write(&archive, bytes).unwrap();
        assert!(checkout.run("restore", "new", "", false).contains("damaged"));
        assert!(!checkout.target("new").exists() && checkout.archives().is_empty());
    }

    #[test]
    fn a_target_folder_that_is_shared_is_left_alone() {
        let checkout = Checkout::new();
        checkout.save();
        let shared = checkout.path("shared");
        fs::create_dir(&shared).unwrap();
        assert_eq!(checkout.run("restore", "../shared", "", false), "");
        checkout.run("restore", "../shared/target", "", false);
        assert_eq!(fs::read_dir(&shared).unwrap().count(), 0);
    }

    #[test]
    fn the_variable_does_without() {
        let checkout = Checkout::new();
        checkout.run("save", "old", "nothing\n", true);
        assert!(checkout.archives().is_empty());
        checkout.save();
        assert_eq!(checkout.run("restore", "new", "", true), "");
        assert!(!checkout.target("new").exists());
    }

    #[test]
    fn the_two_used_last_are_kept_and_the_one_of_the_same_sources_comes_first() {
        let checkout = Checkout::new();
        let sources = checkout.path("project/Cargo.lock");
        for (age, version) in [(30, "one"), (20, "two"), (10, "three")] {
            fs::write(&sources, version).unwrap();
            checkout.save();
            checkout.save();
            let newest = checkout
                .archives()
                .into_iter()
                .max_by_key(|file| modified(file))
                .unwrap();
            let time = SystemTime::now() - Duration::from_secs(age);
            File::options()
                .append(true)
                .open(newest)
                .unwrap()
                .set_modified(time)
                .unwrap();
        }
        let key = |file: &PathBuf| file.file_name().unwrap().to_str().unwrap()[..16].to_owned();
        let keys: Vec<String> = checkout.archives().iter().map(key).collect();
        assert_eq!(keys.len(), 2, "{keys:?}");
        // That of two, though three's is newer; it is the newer one then.
        fs::write(&sources, "two").unwrap();
        checkout.run("restore", "new", "", false);
        let before = checkout
            .archives()
            .into_iter()
            .max_by_key(|file| modified(file))
            .unwrap();
        fs::write(&sources, "three").unwrap();
        checkout.run("restore", "newer", "", false);
        let after = checkout
            .archives()
            .into_iter()
            .max_by_key(|file| modified(file))
            .unwrap();
        assert_ne!(before, after);
        // For sources that have none it is the one used last.
        fs::write(&sources, "four").unwrap();
        assert!(checkout.run("restore", "newest", "", false).contains("earlier build"));
        // What of it is good is not known yet, and so nothing of it is kept without being used.
        assert_eq!(fs::read_to_string(checkout.target("newest/libraries")).unwrap(), "");
        assert_eq!(fs::read_to_string(checkout.target("new/libraries")).unwrap(), "1\n");
    }
}
