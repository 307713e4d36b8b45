//! Other people's programs in a namespace.

use crate::{Namespace, in_netns, probe::wait_until};
use anyhow::{Context, bail, ensure};
use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    process::{Child, Stdio},
    time::Duration,
};

/// How long a program may take until it listens, or until another one can be asked.
const START: Duration = Duration::from_secs(90);

/// A program that runs until it is dropped.
#[derive(Debug)]
pub struct Program(Child);

impl Program {
    /// Starts a program in a namespace.
    ///
    /// # Errors
    ///
    /// Where it can't be started.
    pub fn start(netns: &Namespace, program: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = netns.command(program);
        let child = command
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        child.map(Self).with_context(|| program.to_owned())
    }

    /// The same, and waits until it listens on a TCP port.
    ///
    /// # Errors
    ///
    /// Where it can't be started, or does not listen in time.
    pub fn listening(netns: &Namespace, program: &str, arguments: &[&str], port: u16) -> anyhow::Result<Self> {
        let started = Self::start(netns, program, arguments)?;
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        let listens = wait_until(START, || {
            let open = || TcpStream::connect_timeout(&to, Duration::from_millis(200)).is_ok();
            in_netns(netns.name(), open).unwrap_or(false)
        });
        ensure!(listens, "{program} does not listen on port {port}");
        Ok(started)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended by itself can't be ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program in a namespace says.
///
/// # Errors
///
/// Where it can't be run, or ends with another status than 0; with what it said.
pub fn ask(netns: &Namespace, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = netns.command(program).args(arguments).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {said}{complaint}", arguments.join(" "));
    }
    Ok(said)
}

/// What an iperf3 client in a namespace reports, as JSON text.
///
/// # Errors
///
/// Where it does not get to the end for a while: the server keeps one client at a time, and may still be tidying up.
pub fn iperf3(netns: &Namespace, to: IpAddr, seconds: u32, more: &[&str]) -> anyhow::Result<String> {
    let (to, seconds) = (to.to_string(), seconds.to_string());
    let arguments = [&["-c", &to, "-t", &seconds, "-J"], more].concat();
    let mut outcome = Err(anyhow::anyhow!("not asked"));
    wait_until(START, || {
        outcome = ask(netns, "iperf3", &arguments);
        outcome.is_ok()
    });
    outcome
}
