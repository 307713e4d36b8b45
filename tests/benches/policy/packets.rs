//! In the kernel: a packet that policy denies.

use abi::{
    AddressKey, Endpoint, Family, Identity, IpcacheEntry, NodeConfig, map, node::TUNNEL_PORT, policy::FIRST_POD_COLUMN,
};
use anyhow::{Context, ensure};
use aya::{
    Ebpf, TestRunOptions,
    maps::{Array, HashMap},
    programs::{SchedClassifier, TestRun},
};
use harness::{Namespace, in_netns};
use hostd::{
    config::Maps,
    datapath::{Constants, load_programs, shape},
};
use serde_json::{Value, json};
use std::time::Duration;
use wasmgate_tests::report::Samples;

/// Nanoseconds that a packet takes which policy denies, at so many identities: each packet to another one.
struct Packets {
    netns: Namespace,
    ebpf: Ebpf,
    frames: Vec<Vec<u8>>,
    ifindex: u32,
}

/// Frames that are sent in turn.
const FRAMES: usize = 64;
/// Packets in a row; short, so that rounds of both sizes are side by side.
const REPEAT: u32 = 2000;

impl Packets {
    fn new(identities: u32) -> anyhow::Result<Self> {
        let netns = Namespace::new("packets")?;
        netns.ip(&["link", "add", "va", "type", "veth", "peer", "name", "pa"])?;
        let shown = netns.ip(&["-o", "link", "show", "va"])?;
        let ifindex: u32 = shown.split(':').next().context("no index")?.parse()?;
        let maps = Maps {
            identities,
            local_identities: 256,
            ..Maps::default()
        };
        let constants = Constants {
            shape: shape(&maps),
            record_action: false,
        };
        let mut ebpf = load_programs(&maps, &constants, &[])?;
        let config = NodeConfig {
            vxlan_ifindex: ifindex,
            report: 0,
            underlay: abi::Address::NONE,
            tunnel_port: TUNNEL_PORT,
            underlay_family: Family::V4 as u8,
            zero: 0,
            tunnel_mtu: 1450,
            timeouts: abi::conntrack::Timeouts::default(),
            conntrack_limit: u32::MAX,
            conntrack_share: u32::MAX,
            underlay_ifindex: 0,
            node_ports: 0,
            settling_ifindex: 0,
        };
        Array::<_, NodeConfig>::try_from(ebpf.map_mut(map::CONFIG).context("no map")?)?.set(0, config, 0)?;
        let own = AddressKey::v4([10, 1, 0, 2]);
        let endpoint = Endpoint {
            first_stamp: 1,
            address: own.address,
            identity: [Identity(0x01_0001); 2],
            row: [1; 2],
            column: [FIRST_POD_COLUMN; 2],
            owner: 1,
            epoch: 1,
            ifindex,
            macs: abi::Macs {
                pod: [2, 0, 0, 0, 0, 1],
                gateway: [2, 0, 0, 0, 0, 2],
            },
            slot: 0,
            last_stamp: 1,
        };
        HashMap::<_, AddressKey, Endpoint>::try_from(ebpf.map_mut(map::ENDPOINTS).context("no map")?)?
            .insert(own, endpoint, 0)?;
        let mut ipcache =
            HashMap::<_, AddressKey, IpcacheEntry>::try_from(ebpf.map_mut(map::IPCACHE).context("no map")?)?;
        let mut frames = Vec::new();
        for number in 0..u32::try_from(FRAMES)? {
            let column = FIRST_POD_COLUMN + number * (identities - 1) / u32::try_from(FRAMES)?;
            let address = [10, 2, 0, u8::try_from(number)?];
            let entry = IpcacheEntry {
                first_stamp: 1,
                address: AddressKey::v4(address).address,
                identity: [Identity(0x02_0000 + number); 2],
                column: [column; 2],
                owner: number + 2,
                epoch: 1,
                tunnel_endpoint: AddressKey::v4([192, 0, 2, 2]).address,
                tunnel_family: Family::V4 as u8,
                flags: 0,
                zero: [0; 2],
                slot: 0,
                last_stamp: 1,
            };
            ipcache.insert(AddressKey::v4(address), entry, 0)?;
            frames.push(frame(address));
        }
        Ok(Self {
            netns,
            ebpf,
            frames,
            ifindex,
        })
    }

    fn round(&self) -> anyhow::Result<f64> {
        let program: &SchedClassifier = self.ebpf.program("from_pod").context("no program")?.try_into()?;
        let mut ctx = [0; 192];
        ctx[40..44].copy_from_slice(&self.ifindex.to_ne_bytes());
        let mut total = Duration::ZERO;
        for frame in &self.frames {
            let result = in_netns(self.netns.name(), || {
                program.test_run(TestRunOptions {
                    data_in: Some(frame),
                    ctx_in: Some(&ctx),
                    repeat: REPEAT,
                    ..TestRunOptions::default()
                })
            })??;
            ensure!(
                result.return_value == 2,
                "the packet was not denied: {}",
                result.return_value
            );
            total += result.duration;
        }
        Ok(total.as_nanos() as f64 / FRAMES as f64)
    }
}

/// A TCP SYN from 10.1.0.2. Nobody checks its sums.
fn frame(to: [u8; 4]) -> Vec<u8> {
    let ethernet = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    let ip = [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 1, 0, 2];
    let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0];
    [&ethernet[..], &ip, &to, &tcp].concat()
}

pub fn per_packet() -> anyhow::Result<Value> {
    let (few, many) = (Packets::new(100)?, Packets::new(60_000)?);
    let mut samples = [Samples::default(), Samples::default()];
    for _ in 0..20 {
        for (samples, packets) in samples.iter_mut().zip([&few, &many]) {
            samples.push(packets.round()?);
        }
    }
    println!("\na packet that policy denies, in turn to {FRAMES} identities: 20 rounds side by side");
    for (samples, identities) in samples.iter().zip(["   100", "60,000"]) {
        let (median, least, most) = (samples.median(), samples.least(), samples.most());
        println!("  at {identities} identities             {median:>12.1} ns   ({least:.1} to {most:.1})");
    }
    let [few, many] = samples.map(|samples| samples.median());
    let ratio = many / few;
    println!("  ratio                            {ratio:>12.3}");
    Ok(json!({"at_100_ns": few, "at_60000_ns": many, "ratio": ratio}))
}
