//! What real programs send, from real clients to real servers: on one node, across nodes, through services, outside.
#![expect(clippy::unwrap_used, reason = "helpers of tests, which fail as a whole")]

use harness::{
    Cluster, Namespace, Options, Program, Short, amount, answer_each, ask, in_netns, iperf3, kernel_test,
    short_connections,
};
use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const LONG: Duration = Duration::from_secs(90);
const VIPS: [&str; 2] = ["172.16.0.1", "fd00:96::1"];

/// A client and a server on one node, a server on another, a host outside; and services of either server.
struct Site {
    cluster: Cluster,
}

impl Site {
    fn new(options: &Options) -> Self {
        let mut cluster = Cluster::with(&Options {
            externals: ["203.0.113.1", "2001:db8:99::1"]
                .map(|address| address.parse().unwrap())
                .into(),
            ..options.clone()
        })
        .unwrap();
        for (node, name) in [(0, "red/client"), (0, "red/here"), (1, "red/there")] {
            let app = name.split_once('/').unwrap().1;
            cluster.add_pod(node, name, &[("app", app)]).unwrap();
        }
        cluster.settle().unwrap();
        cluster.load("allow-all").unwrap();
        for pod in &cluster.pods {
            pod.netns.ip(&["link", "set", "lo", "up"]).unwrap();
        }
        Self { cluster }
    }

    /// Makes the services stand for one of the servers.
    fn serve(&self, app: &str) {
        let [v4, v6] = VIPS;
        let ports = ["tcp/80=8080", "tcp/53", "udp/53", "tcp/5201", "udp/5201"].map(|port| format!("--port {port} "));
        let options = format!("--selector app={app} --address {v4} --address {v6} {}", ports.concat());
        self.cluster.add_service("red/web", &options).unwrap();
    }

    fn client(&self) -> &Namespace {
        &self.cluster.pod("red/client").netns
    }

    /// Where a server can be asked: at its own addresses, and through its service.
    fn addresses(&self, app: &str) -> Vec<IpAddr> {
        let own = self.cluster.pod(&format!("red/{app}")).addresses.clone();
        own.into_iter().chain(VIPS.map(|vip| vip.parse().unwrap())).collect()
    }
}

fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

#[test]
fn curl_gets_files_from_a_web_server() {
    kernel_test!();
    let site = Site::new(&Options::dual_stack());
    let folder = site.cluster.folder().join("web");
    fs::create_dir(&folder).unwrap();
    let content: Vec<u8> = (0..3_000_000_u32)
        .map(|index| index.to_le_bytes()[0] ^ index.to_le_bytes()[1])
        .collect();
    fs::write(folder.join("large"), &content).unwrap();
    let config = folder.join("apache.conf");
    let modules = "/usr/lib/apache2/modules";
    let text = format!(
        "ServerRoot {folder}\nServerName web\nPidFile {folder}/pid\nErrorLog {folder}/log\nListen 8080\n\
         LoadModule mpm_event_module {modules}/mod_mpm_event.so\nLoadModule authz_core_module {modules}/mod_authz_core.so\n\
         DocumentRoot {folder}\n",
        folder = folder.display()
    );
    fs::write(&config, text).unwrap();
    for app in ["here", "there"] {
        site.serve(app);
        let netns = &site.cluster.pod(&format!("red/{app}")).netns;
        let _web = Program::listening(netns, "apache2", &["-X", "-f", &config.display().to_string()], 8080)
            .unwrap_or_else(|error| {
                panic!(
                    "{error}: {}",
                    fs::read_to_string(folder.join("log")).unwrap_or_default()
                )
            });
        for (index, address) in site.addresses(app).into_iter().enumerate() {
            let port = if index < 2 { 8080 } else { 80 };
            let got = folder.join("got");
            let url = format!("http://{}:{port}/large", bracketed(address));
            let got_text = got.display().to_string();
            // A new connection each, and two at once.
            for options in [&["--http1.1"][..], &["--http1.1", "--no-keepalive"]] {
                let arguments = [
                    &["-sS", "--fail", "--max-time", "20", "-o", &got_text],
                    options,
                    &[&url],
                ]
                .concat();
                ask(site.client(), "curl", &arguments).unwrap();
                assert!(fs::read(&got).unwrap() == content, "{url}");
            }
        }
    }
}

#[test]
fn names_are_resolved_over_udp_and_tcp_and_in_large_answers() {
    kernel_test!();
    let site = Site::new(&Options::dual_stack());
    // An answer that takes several packets.
    let texts: Vec<String> = (0..24)
        .map(|index| format!("--txt-record=large.test,{index:02}{}", "x".repeat(180)))
        .collect();
    for app in ["here", "there"] {
        site.serve(app);
        let netns = &site.cluster.pod(&format!("red/{app}")).netns;
        let mut arguments = vec![
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--user=root",
            "--pid-file=",
            "--edns-packet-max=4096",
            "--address=/host.test/192.0.2.77",
        ];
        arguments.extend(texts.iter().map(String::as_str));
        let _resolver = Program::listening(netns, "dnsmasq", &arguments, 53).unwrap();
        for address in site.addresses(app) {
            let at = format!("@{address}");
            for how in ["+notcp", "+tcp"] {
                let common = [&at, how, "+short", "+time=5", "+tries=1"];
                let answer = ask(site.client(), "dig", &[&common[..], &["host.test", "A"]].concat()).unwrap();
                assert_eq!(answer.trim(), "192.0.2.77", "{address} {how}");
                let large = ask(
                    site.client(),
                    "dig",
                    &[&common[..], &["+bufsize=8192", "+ignore", "large.test", "TXT"]].concat(),
                )
                .unwrap();
                // Over UDP as many as fit into the 4096 bytes that the server sends at the most.
                let least = if how == "+tcp" { 24 } else { 11 };
                assert!(large.lines().count() >= least, "{address} {how}: {large}");
            }
        }
    }
}

#[test]
fn packets_of_all_sizes_come_back_and_the_path_is_traced() {
    kernel_test!();
    for ipv6_underlay in [false, true] {
        let site = Site::new(&Options {
            ipv6_underlay,
            ..Options::dual_stack()
        });
        let external: [IpAddr; 2] = ["203.0.113.1", "2001:db8:99::1"].map(|address| address.parse().unwrap());
        let pods = ["here", "there"].map(|app| site.cluster.pod(&format!("red/{app}")).addresses.clone());
        for address in pods.into_iter().flatten().chain(external) {
            let to = address.to_string();
            // Without a payload, one byte around each MTU, in pieces, and the largest there is.
            for size in [
                "0", "56", "1372", "1373", "1402", "1422", "1423", "1452", "1472", "1473", "4000", "65000",
            ] {
                let ping = ["-n", "-c", "2", "-i", "0.01", "-W", "2", "-s", size, &to];
                ask(site.client(), "ping", &ping).unwrap_or_else(|problem| panic!("{problem}"));
            }
            let traced = ask(site.client(), "tracepath", &["-n", "-m", "5", &to]).unwrap();
            assert!(traced.contains("reached"), "{to}: {traced}");
            let node = site.cluster.pod("red/there");
            if node.addresses.contains(&address) {
                let mtu = if ipv6_underlay { "pmtu 1430" } else { "pmtu 1450" };
                assert!(traced.contains(mtu), "{to}: {traced}");
            }
        }
    }
}

#[test]
fn throughput_and_latency_programs_run_to_their_end() {
    kernel_test!();
    let site = Site::new(&Options::dual_stack());
    for app in ["here", "there"] {
        site.serve(app);
        let netns = &site.cluster.pod(&format!("red/{app}")).netns;
        let _iperf = Program::listening(netns, "iperf3", &["-s"], 5201).unwrap();
        for address in site.addresses(app) {
            for more in [
                &["-R"][..],
                &["-P", "4"],
                &["-u", "-b", "50M", "-l", "1200"],
                &["--bidir"],
            ] {
                iperf3(site.client(), address, 1, more)
                    .unwrap_or_else(|problem| panic!("{address} {more:?}: {problem}"));
            }
        }
        let own = site.cluster.pod(&format!("red/{app}")).address.to_string();
        for (protocol, more) in [("tcp", &["--tcp"][..]), ("udp", &[])] {
            let _echo = Program::start(netns, "sockperf", &[&["server", "-p", "11111"], more].concat()).unwrap();
            thread::sleep(Duration::from_millis(300));
            let arguments = [&["ping-pong", "-i", &own, "-p", "11111", "-t", "1"], more].concat();
            let report = ask(site.client(), "sockperf", &arguments).unwrap();
            assert!(report.contains("# dropped messages = 0"), "{protocol}: {report}");
        }
    }
}

#[test]
fn short_connections_all_succeed() {
    kernel_test!();
    let site = Site::new(&Options::default());
    let backends = ["here", "there"].map(|app| &site.cluster.pod(&format!("red/{app}")).netns);
    for netns in backends {
        answer_each(netns.name(), 8080).unwrap();
    }
    let own = site.cluster.pods.iter().filter(|pod| pod.name != "red/client");
    let own: Vec<String> = own.map(|pod| format!("--backend {}", pod.address)).collect();
    let options = format!("--address 172.16.0.9 --port tcp/80=8080 {}", own.join(" "));
    site.cluster.add_service("red/all", &options).unwrap();
    let vip = "172.16.0.9".parse().unwrap();
    let all = amount("WASMGATE_CONNECTIONS", 20_000, 100_000);
    // Ports in TIME-WAIT at the servers are the clients' to use again.
    let began = Instant::now();
    for (to, count) in [
        (SocketAddr::new(site.cluster.pod("red/here").address, 8080), all * 2 / 5),
        (
            SocketAddr::new(site.cluster.pod("red/there").address, 8080),
            all * 3 / 10,
        ),
        (SocketAddr::new(vip, 80), all * 3 / 10),
    ] {
        let Short { done, problems } = short_connections(site.client().name(), to, count, 8).unwrap();
        assert!(
            problems.is_empty(),
            "{to}: {} failed, as with {}",
            problems.len(),
            problems[0]
        );
        assert_eq!(done, count, "{to}");
    }
    println!("{all} connections in {:?}", began.elapsed());
    assert_eq!(site.cluster.nodes[0].drops("mid_stream").unwrap(), 0);
}

#[test]
fn one_stream_goes_on_for_long_through_changes_of_everything_else() {
    kernel_test!();
    let mut site = Site::new(&Options::dual_stack());
    site.serve("there");
    let netns = site.cluster.pod("red/there").netns.name().to_owned();
    let listener = in_netns(&netns, || TcpListener::bind(("::", 8080))).unwrap().unwrap();
    let vip: IpAddr = VIPS[0].parse().unwrap();
    let client = site.client().name().to_owned();
    let stream = in_netns(&client, || TcpStream::connect_timeout(&SocketAddr::new(vip, 80), LONG));
    let mut stream = stream.unwrap().unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let reader = thread::spawn(move || -> io::Result<(u64, bool)> {
        let (mut total, mut right, mut buffer) = (0_u64, true, vec![0; 1 << 16]);
        loop {
            let length = server.read(&mut buffer)?;
            if length == 0 {
                return Ok((total, right));
            }
            for byte in &buffer[..length] {
                right &= *byte == (total % 251).to_le_bytes()[0];
                total += 1;
            }
        }
    });
    let end = Arc::new(AtomicBool::new(false));
    let writer_ends = Arc::clone(&end);
    let writer = thread::spawn(move || -> io::Result<u64> {
        let mut sent = 0_u64;
        while !writer_ends.load(Ordering::Relaxed) {
            let block: Vec<u8> = (sent..sent + 25_100).map(|at| (at % 251).to_le_bytes()[0]).collect();
            stream.write_all(&block)?;
            sent += 25_100;
        }
        Ok(sent)
    });
    // Pods come and go, services change, policies are loaded, hostd starts anew.
    let changes = usize::try_from(amount("WASMGATE_CHANGES", 6, 100)).unwrap();
    for number in 0..changes {
        let name = format!("red/more{number}");
        site.cluster.add_pod(number % 2, &name, &[("app", "there")]).unwrap();
        site.cluster
            .load(if number % 2 == 0 {
                "tenant-isolation"
            } else {
                "allow-all"
            })
            .unwrap();
        if number == 2 {
            site.cluster.nodes[0].stop(false).unwrap();
            site.cluster.nodes[0].start().unwrap();
        }
        site.cluster.remove_pod(&name).unwrap();
    }
    end.store(true, Ordering::Relaxed);
    let sent = writer.join().unwrap().unwrap();
    let (received, right) = reader.join().unwrap().unwrap();
    assert!(right);
    assert_eq!(received, sent);
    println!("{sent} bytes through {changes} changes");
}
