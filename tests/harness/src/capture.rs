//! What is on the wire between the nodes, as tcpdump sees it.

use crate::Namespace;
use anyhow::{Context, ensure};
use std::{
    io::{BufRead, BufReader},
    net::IpAddr,
    process::{Child, ChildStdout, Stdio},
};

/// A VXLAN packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VxlanPacket {
    /// Its network identifier.
    pub vni: u32,
    /// Source of the inner packet.
    pub source: IpAddr,
    /// Destination of the inner packet.
    pub destination: IpAddr,
}

/// A capture that is under way.
pub struct Capture {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Capture {
    /// Begins to capture VXLAN packets on an interface.
    ///
    /// # Errors
    ///
    /// Where tcpdump does not start.
    pub fn start(namespace: &Namespace, interface: &str) -> anyhow::Result<Self> {
        // Linux's VXLAN port is another protocol's to tcpdump unless it is told.
        let mut child = namespace
            .command("tcpdump")
            .args([
                "-i",
                interface,
                "-nn",
                "-l",
                "--immediate-mode",
                "-Z",
                "root",
                "-T",
                "vxlan",
                "udp port 8472",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("tcpdump")?;
        let said = BufReader::new(child.stderr.take().context("tcpdump's stderr")?);
        let listening = said
            .lines()
            .map_while(Result::ok)
            .any(|line| line.contains("listening on"));
        ensure!(listening, "tcpdump does not listen on {interface}");
        let output = BufReader::new(child.stdout.take().context("tcpdump's stdout")?);
        Ok(Self { child, output })
    }

    /// Ends the capture; the answer is what was seen.
    ///
    /// # Errors
    ///
    /// Where tcpdump can't be ended.
    pub fn stop(mut self) -> anyhow::Result<Vec<VxlanPacket>> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        let lines: Vec<String> = (&mut self.output).lines().map_while(Result::ok).collect();
        self.child.wait()?;
        Ok(parse(&lines))
    }
}

/// A packet is a line of the outer header, with the VNI at its end, and one of the inner header.
fn parse(lines: &[String]) -> Vec<VxlanPacket> {
    let mut packets = Vec::new();
    for pair in lines.windows(2) {
        let vni = pair[0].rsplit_once("vni ").and_then(|(_, vni)| vni.trim().parse().ok());
        let inner = pair[1]
            .trim()
            .strip_prefix("IP ")
            .and_then(|rest| rest.split_once(": "));
        let ends = inner.and_then(|(ends, _)| ends.split_once(" > "));
        if let (Some(vni), Some((source, destination))) = (vni, ends)
            && let (Some(source), Some(destination)) = (address(source), address(destination))
        {
            packets.push(VxlanPacket {
                vni,
                source,
                destination,
            });
        }
    }
    packets
}

/// `10.1.0.2.40000` or `10.1.0.2`.
fn address(text: &str) -> Option<IpAddr> {
    let parts: Vec<&str> = text.split('.').take(4).collect();
    parts.join(".").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{VxlanPacket, parse};

    #[test]
    fn tcpdump_is_understood() {
        let lines = [
            "12:00:00.1 IP 192.0.2.1.51442 > 192.0.2.2.8472: VXLAN, flags [I] (0x08), vni 65537",
            "IP 10.1.0.0.40000 > 10.2.0.0.80: Flags [S], seq 1, win 64240, length 0",
            "12:00:00.2 IP 192.0.2.2.51442 > 192.0.2.1.8472: VXLAN, flags [I] (0x08), vni 7",
            "IP 10.2.0.0 > 10.1.0.0: ICMP echo reply, id 1, seq 1, length 64",
        ];
        let packet = |vni, source: &str, destination: &str| VxlanPacket {
            vni,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        let expected = [packet(65537, "10.1.0.0", "10.2.0.0"), packet(7, "10.2.0.0", "10.1.0.0")];
        assert_eq!(parse(&lines.map(str::to_owned)), expected);
    }
}
