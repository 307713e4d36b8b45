//! Builds the tc programs and hands their object to the library, which embeds it.

use std::{env, fs, path::Path};

fn main() {
    for path in ["../ebpf/src", "../ebpf/Cargo.toml", "../ebpf/Cargo.lock", "../abi/src"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = env::var("OUT_DIR").unwrap_or_default();
    let built = toolchain::build_ebpf()
        .map_err(|error| error.to_string())
        .and_then(|folder| {
            fs::copy(folder.join("datapath"), Path::new(&out).join("datapath.o")).map_err(|error| error.to_string())
        });
    if let Err(error) = built {
        println!(
            "cargo::error=the tc programs: {}",
            error.replace('\n', "\ncargo::error=")
        );
    }
}
