//! `hostd policy new`: a crate for a policy, with tests, that builds as it is.

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use std::{
    fs,
    path::{Path, PathBuf},
};

const MANIFEST: &str = include_str!("manifest.toml");
const SOURCE: &str = include_str!("policy.rs");

/// Names that Cargo gives no crate: Rust's words (the Rust Reference, "Keywords"), and crates that come with it.
const WORDS: &str = "abstract as async await become box break const continue crate do dyn else enum extern false final fn for \
                     gen if impl in let loop macro match mod move mut override priv pub ref return self static struct super \
                     trait true try type typeof unsafe unsized use virtual where while yield \
                     alloc core proc-macro std test";

/// `hostd policy new NAME`: a crate that builds and tests.
pub fn new(name: &str, sdk: Option<&Path>) -> anyhow::Result<()> {
    let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(letters),
        "{name:?}: a crate's name has lower-case letters, digits and `-`, and begins with a letter"
    );
    ensure!(
        !WORDS.split_whitespace().any(|word| word == name),
        "{name:?} means something to Rust; choose another name"
    );
    let folder = PathBuf::from(name);
    ensure!(
        !folder.exists(),
        "{} exists already; choose another name, or remove it",
        folder.display()
    );
    let (sdk, inside) = match sdk {
        Some(path) => (
            fs::canonicalize(path).with_context(|| path.display().to_string())?,
            false,
        ),
        None => find_sdk()?,
    };
    ensure!(
        sdk.join("wit/policy.wit").is_file(),
        "{} is not the folder `policy-sdk` of a checkout of Wasmgate",
        sdk.display()
    );
    if inside {
        let checkout = sdk.parent().context("the SDK is in no folder")?;
        let members = members(checkout)?;
        ensure!(
            !members.iter().any(|member| member == name),
            "the checkout has a crate {name:?}; choose another name"
        );
    }
    // A crate in somebody else's workspace would want to be a member of it.
    let workspace = if inside { "" } else { "\n[workspace]\n" };
    let manifest = MANIFEST
        .replace("NAME", name)
        .replace(
            "SDK",
            &if inside {
                "../../policy-sdk".to_owned()
            } else {
                sdk.display().to_string()
            },
        )
        .replace("WORKSPACE", workspace);
    fs::create_dir_all(folder.join("src"))?;
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::write(folder.join("src/lib.rs"), SOURCE)?;
    println!("made {}", folder.display());
    println!("  cd {name} && cargo test    # natively, without wasm and without root");
    if inside {
        println!("  cargo xtask build          # puts {name}.wasm into target/policies");
    } else {
        println!(
            "  cargo build --release --target wasm32-unknown-unknown    # after `rustup target add` of that target"
        );
    }
    Ok(())
}

/// The SDK of the checkout that this is done in; whether the new crate is one of its policies.
fn find_sdk() -> anyhow::Result<(PathBuf, bool)> {
    let here = std::env::current_dir()?;
    for folder in here.ancestors() {
        let sdk = folder.join("policy-sdk");
        if sdk.join("wit/policy.wit").is_file() {
            return Ok((sdk, here == folder.join("policies")));
        }
    }
    bail!("there is no checkout of Wasmgate around here: say where its SDK is with --sdk PATH/policy-sdk")
}

/// The crates of a checkout: those that its lock file takes from nowhere else (the Cargo Book, "Cargo.toml vs Cargo.lock").
fn members(checkout: &Path) -> anyhow::Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        source: Option<String>,
    }
    let file = checkout.join("Cargo.lock");
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let lock: Lock = toml::from_str(&text).with_context(|| file.display().to_string())?;
    let own = lock.package.into_iter().filter(|package| package.source.is_none());
    Ok(own.map(|package| package.name).collect())
}
