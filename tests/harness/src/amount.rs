//! How much a test does.

use std::env;

/// Little in every run of the tests, much in `cargo xtask soak`, or what a variable of the environment says.
///
/// # Panics
///
/// Where the variable is no number.
#[must_use]
pub fn amount(variable: &str, little: u64, much: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        Err(_) if env::var_os("WASMGATE_SOAK").is_some() => much,
        Err(_) => little,
    }
}
