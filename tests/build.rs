//! Builds the policies as wasm, which the tests load.

fn main() {
    for path in ["../policies", "../policy-sdk", "hostile"] {
        println!("cargo::rerun-if-changed={path}");
    }
    if let Err(error) = toolchain::build_policies().and_then(|_| toolchain::build_test_policies()) {
        println!(
            "cargo::error=the policies: {}",
            error.to_string().replace('\n', "\ncargo::error=")
        );
    }
}
