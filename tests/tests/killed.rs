//! A run of tests that is killed leaves nothing on the machine.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{Cluster, EtcdOptions, Options, Program, kernel_test, wait_until};
use std::{
    env, fs,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

const LONG: Duration = Duration::from_mins(1);
/// Says to a run that it is the one that is killed.
const KILLED: &str = "WASMGATE_IS_KILLED";

/// Namespaces, folders, mounts and processes of a run; none of them is anybody else's.
fn left(run: u32) -> Vec<String> {
    let names = |folder: &str, prefix: String| {
        let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
        let names = files.map(|name| name.to_string_lossy().into_owned());
        names.filter(move |name| name.starts_with(&prefix)).collect::<Vec<_>>()
    };
    let folder = format!("wasmgate-{run}-");
    let mut left = names("/run/netns", format!("wg{run}-"));
    left.extend(names(env::temp_dir().to_str().unwrap(), folder.clone()));
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    left.extend(mounts.lines().filter(|line| line.contains(&folder)).map(str::to_owned));
    for process in fs::read_dir("/proc").unwrap() {
        // Most of what is there is no process, or ends meanwhile.
        let command = fs::read_to_string(process.unwrap().path().join("cmdline")).unwrap_or_default();
        if command.contains(&folder) || command.contains(&format!("wg{run}-")) {
            left.push(command.replace('\0', " "));
        }
    }
    left
}

/// Ends a child that a failed test leaves.
struct Run(Child);

impl Drop for Run {
    fn drop(&mut self) {
        // One that has ended can't be ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is killed is a run of this very test.
#[test]
fn a_run_that_is_killed_leaves_nothing() {
    kernel_test!();
    if env::var_os(KILLED).is_some() {
        return be_killed();
    }
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_run_that_is_killed_leaves_nothing"])
        .env(KILLED, "1")
        .stdout(Stdio::null())
        .spawn();
    let mut run = Run(child.unwrap());
    let pid = run.0.id();
    let up = || left(pid).iter().any(|what| what.contains("sleep 1717"));
    assert!(wait_until(LONG, up), "{:?}", left(pid));
    let there = left(pid);
    for what in ["hostd", "etcd --", " bpf ", "-external", "-red-a"] {
        assert!(there.iter().any(|line| line.contains(what)), "no {what}: {there:#?}");
    }
    run.0.kill().unwrap();
    run.0.wait().unwrap();
    assert!(wait_until(LONG, || left(pid).is_empty()), "{:#?}", left(pid));
}

/// Makes all that a run may leave, and waits.
fn be_killed() {
    let options = Options {
        etcd: Some(EtcdOptions::default()),
        ..Options::default()
    };
    let mut cluster = Cluster::with(&options).unwrap();
    let pod = cluster.add_pod(0, "red/a", &[]).unwrap();
    let name = cluster.pods[pod].netns.name();
    // Its namespace's name is among its arguments, for the test to find it by.
    let _program = Program::start(&cluster.pods[pod].netns, "sh", &["-c", "sleep 1717; true", name]).unwrap();
    thread::sleep(LONG * 2);
}
