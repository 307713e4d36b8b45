//! Another kernel: Debian's oldest that is supported, in an emulated machine, with an initramfs made from the build.

use crate::{cargo, setup};
use anyhow::{Context, ensure};
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write as _},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use toolchain::target_dir;

/// Debian 12's kernel for virtual machines: Linux 6.1.
const KERNEL: &str = "linux-image-cloud-amd64";
/// What the tests run.
const TOOLS: [&str; 4] = ["ip", "tc", "nft", "umount"];
/// What the kernel has as modules.
const MODULES: &str = "veth vxlan sch_ingress cls_bpf nft_ct nft_chain_nat nft_masq nft_fib_inet bridge";
/// Test programs, and which of their tests: all tables of packets, and the tour of two nodes.
const TESTS: [&str; 2] = ["packets", "floor"];
/// What the machine says at the end of each of them.
const ENDED: &str = "vm-test: ended with";

/// Boots the machine and runs the tests.
pub fn run(filter: Option<&str>) -> anyhow::Result<()> {
    let folder = target_dir().join("vm");
    fs::create_dir_all(&folder)?;
    let kernel = kernel(&folder)?;
    let programs = test_programs()?;
    let initramfs = initramfs(&folder, &kernel, &programs, filter)?;
    println!("booting {} in an emulated machine", kernel.version);
    let ended = boot(&kernel, &initramfs)?;
    ensure!(
        ended.len() == programs.len() && ended.iter().all(|status| *status == 0),
        "on {}: the tests ended with {ended:?}",
        kernel.version
    );
    println!("on Linux {}: all tests passed", kernel.version);
    Ok(())
}

struct Kernel {
    version: String,
    image: PathBuf,
    modules: PathBuf,
}

/// Downloads the kernel's package, unless it is there, and unpacks it.
fn kernel(folder: &Path) -> anyhow::Result<Kernel> {
    let unpacked = folder.join("kernel");
    if !unpacked.join("boot").is_dir() {
        let depends = output(Command::new("apt-cache").args(["depends", KERNEL]))?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .with_context(|| format!("{KERNEL} depends on no kernel; was `apt-get update` run?"))?;
        println!("downloading linux-image-{package}");
        let mut download = Command::new("apt-get");
        download
            .current_dir(folder)
            .args(["download", &format!("linux-image-{package}")]);
        crate::run(&mut download)?;
        let prefix = format!("linux-image-{package}_");
        let file = find(folder, |name| name.starts_with(&prefix))?;
        crate::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked))?;
        fs::remove_file(file)?;
    }
    let image = find(&unpacked.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    let version = name.trim_start_matches("vmlinuz-").to_owned();
    let modules = unpacked.join("lib/modules").join(&version);
    Ok(Kernel {
        version,
        image,
        modules,
    })
}

/// The file in a folder whose name is meant.
fn find(folder: &Path, is_meant: impl Fn(&str) -> bool) -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if is_meant(&entry.file_name().to_string_lossy()) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("{} lacks a file that the machine needs", folder.display())
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("running {name}"))?;
    ensure!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Builds the test programs, and says where they are.
fn test_programs() -> anyhow::Result<Vec<PathBuf>> {
    let mut arguments = vec!["test", "--release", "--package", "wasmgate-tests", "--no-run"];
    arguments.extend(TESTS.iter().flat_map(|test| ["--test", test]));
    let built = cargo::build(&arguments)?;
    let found = |test: &&str| {
        let unit = built.iter().find(|unit| unit.is_own() && unit.name == **test);
        let program = unit.and_then(|unit| unit.executable.clone());
        program.with_context(|| format!("cargo has built no test {test}"))
    };
    TESTS.iter().map(found).collect()
}

/// Packs everything into one file: what was built at its own place, the tools with their libraries, and the modules.
fn initramfs(folder: &Path, kernel: &Kernel, programs: &[PathBuf], filter: Option<&str>) -> anyhow::Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for mounted in ["bin", "proc", "sys", "dev", "tmp", "run", "etc", "var/lib"] {
        fs::create_dir_all(root.join(mounted))?;
    }
    let busybox = setup::path_of("busybox").context("busybox")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    let target = target_dir();
    for program in programs.iter().cloned().chain([target.join("release/hostd")]) {
        let place = copy(&program, &program, &root)?;
        crate::run(Command::new("strip").arg(place))?;
        copy_libraries(&program, &root)?;
    }
    for tool in TOOLS {
        let program = setup::path_of(tool).with_context(|| format!("no program {tool}"))?;
        copy(&program, &Path::new("/usr/bin").join(tool), &root)?;
        copy_libraries(&program, &root)?;
    }
    for object in ["packet_table", "yardstick"] {
        let object = target.join("bpf/bpfel-unknown-none/release").join(object);
        copy(&object, &object, &root)?;
    }
    for policy in ["tenant-isolation", "allow-all"] {
        let module = target.join(format!("policies/{policy}.wasm"));
        copy(&module, &module, &root)?;
    }
    copy_modules(kernel, &root)?;
    let init = root.join("init");
    fs::write(&init, script(programs, filter))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    pack(folder, &root)
}

/// Copies a file to a place under the root; the answer is the copy.
fn copy(file: &Path, place: &Path, root: &Path) -> anyhow::Result<PathBuf> {
    let to = root.join(place.strip_prefix("/")?);
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(file, &to).with_context(|| format!("copying {}", file.display()))?;
    Ok(to)
}

fn copy_libraries(program: &Path, root: &Path) -> anyhow::Result<()> {
    let listed = output(Command::new("ldd").arg(program))?;
    let libraries: BTreeSet<&str> = listed.split_whitespace().filter(|word| word.starts_with('/')).collect();
    for library in libraries {
        copy(Path::new(library), Path::new(library), root)?;
    }
    Ok(())
}

/// The modules of the network, and an index of them.
fn copy_modules(kernel: &Kernel, root: &Path) -> anyhow::Result<()> {
    let to = root.join("lib/modules").join(&kernel.version);
    fs::create_dir_all(to.join("kernel/drivers"))?;
    for part in ["kernel/net", "kernel/lib", "kernel/crypto", "kernel/drivers/net"] {
        let from = kernel.modules.join(part);
        if from.is_dir() {
            crate::run(Command::new("cp").arg("-r").arg(from).arg(to.join(part)))?;
        }
    }
    for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(kernel.modules.join(list), to.join(list))?;
    }
    crate::run(
        Command::new(setup::path_of("depmod").context("no depmod")?)
            .arg("-b")
            .arg(root)
            .arg(&kernel.version),
    )
}

/// What the machine does: it mounts what a system has, runs the tests and goes out.
fn script(programs: &[PathBuf], filter: Option<&str>) -> String {
    let mount = format!(
        "#!/bin/sh\n\
         /bin/busybox --install -s /bin\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
         mount -t tmpfs run /run; mount -t bpf bpf /sys/fs/bpf; mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         export PATH=/usr/sbin:/usr/bin:/sbin:/bin WASMGATE_REQUIRE_KERNEL=1 PROPTEST_CASES=40 WASMGATE_STRESS_PACKETS=200000\n\
         ip link set lo up\n\
         for module in {MODULES}; do modprobe $module; done\n"
    );
    let filter = filter.unwrap_or_default();
    let tests = programs
        .iter()
        .map(|program| format!("{} {filter}; echo \"{ENDED} $?\"\n", program.display()));
    [mount].into_iter().chain(tests).collect::<String>() + "poweroff -f\n"
}

fn pack(folder: &Path, root: &Path) -> anyhow::Result<PathBuf> {
    let file = folder.join("initramfs.gz");
    let command = format!(
        "find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 > '{}'",
        file.display()
    );
    crate::run(Command::new("sh").current_dir(root).args(["-c", &command]))?;
    Ok(file)
}

/// Boots, prints what the machine says, and answers what the tests ended with.
fn boot(kernel: &Kernel, initramfs: &Path) -> anyhow::Result<Vec<i32>> {
    let mut machine = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072"])
        .args(["-nographic", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", "console=ttyS0 rdinit=/init panic=-1 quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the emulator")?;
    let said = BufReader::new(machine.stdout.take().context("the emulator's output")?);
    let mut ended = Vec::new();
    for line in said.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        writeln!(std::io::stdout(), "{line}")?;
        if let Some((_, status)) = line.split_once(ENDED) {
            ended.push(status.trim().parse().unwrap_or(-1));
        }
    }
    machine.wait()?;
    Ok(ended)
}
