//! Whether this machine can run kernel tests.

use std::path::Path;

/// What is missing.
#[derive(Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// The tests make network namespaces and load programs.
    NotRoot,
    /// No BTF, without which the kernel takes no maps with types.
    NoBtf,
    /// No `ip` command.
    NoIproute2,
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::NotRoot => "it takes root",
            Self::NoBtf => "the kernel has no /sys/kernel/btf/vmlinux",
            Self::NoIproute2 => "there is no `ip` command (iproute2)",
        })
    }
}

/// Checks that this machine can run kernel tests.
///
/// # Errors
///
/// What is missing.
pub fn check() -> Result<(), Unsupported> {
    if !rustix::process::geteuid().is_root() {
        return Err(Unsupported::NotRoot);
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(Unsupported::NoBtf);
    }
    if super::run("ip", &["-V"]).is_err() {
        return Err(Unsupported::NoIproute2);
    }
    Ok(())
}
