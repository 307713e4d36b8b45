//! A real etcd, with a folder of its own.

use crate::{Namespace, in_netns, probe::wait_until, warden};
use anyhow::{Context, bail, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// It has to answer within this time.
const START: Duration = Duration::from_secs(90);
/// Password of the users `root` and `hostd`.
const PASSWORD: &str = "correct horse";

/// How etcd is made.
#[derive(Clone, Debug, Default)]
pub struct EtcdOptions {
    /// Members have certificates, and ask for one.
    pub tls: bool,
    /// There is a user `hostd`, who may read and write what begins with `/wasmgate`; nobody else may anything.
    pub users: bool,
    /// Seconds that what a user is given by its password is good for; etcd's own default where none are given.
    pub token_seconds: Option<u32>,
    /// `etcd.hold_seconds` of the nodes; hostd's own default where none are given.
    pub hold_seconds: Option<u32>,
    /// More arguments.
    pub arguments: Vec<String>,
}

/// A member of etcd, mostly the only one; ended when dropped.
#[derive(Debug)]
pub struct Etcd {
    options: EtcdOptions,
    netns: Option<String>,
    address: SocketAddr,
    peer: SocketAddr,
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Etcd {
    /// Starts one on the loopback interface, on a port that is free.
    ///
    /// # Errors
    ///
    /// Where it can't be started.
    pub fn local(options: EtcdOptions) -> anyhow::Result<Self> {
        let [client, peer] = [free_port()?, free_port()?];
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self::begin(None, at(client), at(peer), options)
    }

    /// Starts one of several members on the loopback interface.
    ///
    /// # Errors
    ///
    /// Where a member can't be started.
    pub fn members(count: usize) -> anyhow::Result<Vec<Self>> {
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let ports = (0..count).map(|_| Ok([free_port()?, free_port()?]));
        let ports = ports.collect::<anyhow::Result<Vec<_>>>()?;
        let named = ports.iter().enumerate();
        let all: Vec<String> = named
            .map(|(number, [_, peer])| format!("{number}=http://{}", at(*peer)))
            .collect();
        let all = all.join(",");
        // Each answers only when most are there.
        let start = |(number, [client, peer]): (usize, [u16; 2])| {
            let arguments = ["--name", &number.to_string(), "--initial-cluster", &all].map(str::to_owned);
            let options = EtcdOptions {
                arguments: arguments.to_vec(),
                ..EtcdOptions::default()
            };
            thread::spawn(move || Self::begin(None, at(client), at(peer), options))
        };
        let begun: Vec<_> = ports.into_iter().enumerate().map(start).collect();
        let ended = begun.into_iter().map(|member| {
            let member = member.join();
            member.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        ended.collect()
    }

    /// Starts one in a namespace, at one of its addresses.
    ///
    /// # Errors
    ///
    /// Where it can't be started.
    pub fn start(netns: &Namespace, address: IpAddr, options: EtcdOptions) -> anyhow::Result<Self> {
        let at = |port| SocketAddr::new(address, port);
        Self::begin(Some(netns.name().to_owned()), at(2379), at(2380), options)
    }

    fn begin(
        netns: Option<String>,
        address: SocketAddr,
        peer: SocketAddr,
        options: EtcdOptions,
    ) -> anyhow::Result<Self> {
        let folder = warden::folder()?;
        if options.tls {
            certificates(folder.path(), address.ip())?;
        }
        let users = options.users;
        let mut etcd = Self {
            options,
            netns,
            address,
            peer,
            folder,
            child: None,
        };
        etcd.run()?;
        if users {
            etcd.add_users()?;
        }
        Ok(etcd)
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Lines of a node's configuration by which hostd finds it: keys, and a table.
    #[must_use]
    pub fn configuration(&self) -> (String, String) {
        // As long as the machine may be busy with other things: an etcd that is to be away refuses at once.
        let mut table = String::from("[etcd]\nanswer_seconds = 30\n");
        let mut set = |key: &str, value: &str| table.extend([key, " = \"", value, "\"\n"]);
        if self.options.tls {
            for (key, file) in [("ca", "ca.pem"), ("certificate", "hostd.pem"), ("key", "hostd.key")] {
                set(key, &self.file(file).display().to_string());
            }
        }
        if self.options.users {
            set("user", "hostd");
            set("password_file", &self.file("password").display().to_string());
        }
        if let Some(seconds) = self.options.hold_seconds {
            table.extend(["hold_seconds = ", &seconds.to_string(), "\n"]);
        }
        (format!("store = \"etcd:{}\"\n", self.url()), table)
    }

    /// A file of its own folder: `ca.pem`, `hostd.pem`, `hostd.key`, `password`.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: &str) -> Command {
        let Some(netns) = &self.netns else {
            return Command::new(program);
        };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns, program]);
        command
    }

    /// Starts it again, with what it has on disk.
    ///
    /// # Errors
    ///
    /// Where it does not answer in time.
    pub fn run(&mut self) -> anyhow::Result<()> {
        let (client, peer) = (self.url(), format!("http://{}", self.peer));
        let log = File::options().create(true).append(true).open(self.file("log"))?;
        let mut command = self.command("etcd");
        command.arg("--data-dir").arg(self.file("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap"]);
        if self.options.tls {
            command.arg("--client-cert-auth");
            for (flag, file) in [
                ("--trusted-ca-file", "ca.pem"),
                ("--cert-file", "etcd.pem"),
                ("--key-file", "etcd.key"),
            ] {
                command.arg(flag).arg(self.file(file));
            }
        }
        if let Some(seconds) = self.options.token_seconds {
            command.args(["--auth-token-ttl", &seconds.to_string()]);
        }
        let child = command
            .args(&self.options.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("etcd")?;
        self.child = Some(child);
        let answers = wait_until(START, || self.is_there());
        ensure!(
            answers,
            "etcd does not answer:\n{}",
            fs::read_to_string(self.file("log")).unwrap_or_default()
        );
        Ok(())
    }

    /// Its port is open, and it has a leader: one without a user may be told that there is one, but not more.
    fn is_there(&self) -> bool {
        let open = || TcpStream::connect_timeout(&self.address, Duration::from_millis(200)).is_ok();
        let open = match &self.netns {
            Some(netns) => in_netns(netns, open).unwrap_or(false),
            None => open(),
        };
        open && self.ctl(&["endpoint", "status"]).is_ok()
    }

    /// Process number, where it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Ends it as `kill -9` does. What it has on disk stays.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut child = self.child.take().context("etcd does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Ends it, and removes what it has on disk: the next one is another cluster.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn wipe(&mut self) -> anyhow::Result<()> {
        self.kill()?;
        Ok(fs::remove_dir_all(self.file("data"))?)
    }

    /// Ends it, and starts it again with what a backup has.
    ///
    /// # Errors
    ///
    /// Where etcd takes no such backup, or does not answer.
    pub fn restore(&mut self, backup: &Path) -> anyhow::Result<()> {
        self.wipe()?;
        let (data, peer) = (self.file("data"), format!("http://{}", self.peer));
        let (backup, data) = (backup.display().to_string(), data.display().to_string());
        let cluster = format!("default={peer}");
        let arguments = ["snapshot", "restore", &backup, "--data-dir", &data];
        let member = ["--initial-cluster", &cluster, "--initial-advertise-peer-urls", &peer];
        self.ctl(&[&arguments[..], &member].concat())?;
        self.run()
    }

    /// Keeps it from running, as a disk that hangs does, until [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it run again.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let child = self.child.as_ref().context("etcd does not run")?;
        Ok(kill_process(Pid::from_child(child), signal)?)
    }

    /// Runs etcdctl; the answer is what it prints.
    ///
    /// # Errors
    ///
    /// Where it fails; with what it said.
    pub fn ctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = self.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.url()]);
        if self.options.tls {
            for (flag, file) in [("--cacert", "ca.pem"), ("--cert", "hostd.pem"), ("--key", "hostd.key")] {
                command.arg(flag).arg(self.file(file));
            }
        }
        if self.options.users && self.file("password").exists() {
            command.args(["--user", &format!("root:{PASSWORD}")]);
        }
        let output = command.args(arguments).output().context("etcdctl")?;
        if !output.status.success() {
            bail!(
                "etcdctl {}: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Forgets all revisions before the present one.
    ///
    /// # Errors
    ///
    /// Where etcd refuses.
    pub fn compact(&self) -> anyhow::Result<()> {
        let status: serde_json::Value = serde_json::from_str(&self.ctl(&["endpoint", "status", "-w", "json"])?)?;
        let revision = &status[0]["Status"]["header"]["revision"];
        self.ctl(&["compact", &revision.to_string()])?;
        Ok(())
    }

    fn add_users(&self) -> anyhow::Result<()> {
        for arguments in [
            &["user", "add", &format!("root:{PASSWORD}")][..],
            &["user", "grant-role", "root", "root"],
            &["user", "add", &format!("hostd:{PASSWORD}")],
            &["role", "add", "wasmgate"],
            &[
                "role",
                "grant-permission",
                "wasmgate",
                "readwrite",
                "/wasmgate/",
                "/wasmgate0",
            ],
            &["user", "grant-role", "hostd", "wasmgate"],
            &["auth", "enable"],
        ] {
            self.ctl(arguments)?;
        }
        Ok(fs::write(self.file("password"), format!("{PASSWORD}\n"))?)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that has ended by itself can't be ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port that nobody has, for a moment.
fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A certificate authority, and what it has signed for etcd and for hostd.
fn certificates(folder: &Path, address: IpAddr) -> anyhow::Result<()> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    fs::write(folder.join("ca.pem"), ca.pem())?;
    for (name, subject) in [("etcd", address.to_string()), ("hostd", "hostd".to_owned())] {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new([subject])?.signed_by(&key, &ca)?;
        fs::write(folder.join(format!("{name}.pem")), certificate.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}
