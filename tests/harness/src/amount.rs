//! How much a test does, and when it ends.

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
};

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

/// Tells a test's threads to end when it is dropped: else they would go on for ever after a failure.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
