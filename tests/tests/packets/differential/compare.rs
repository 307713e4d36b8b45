//! What is the same on both sides.

use super::{
    super::{
        frame::Frame,
        model::{self, Entry, Translation, Verdict},
        run::Outcome,
    },
    arena::ip4,
};
use abi::{
    ConntrackEntry, ConntrackKey,
    conntrack::{FRONTEND, TRANSLATED, VIA_NODE},
};

/// An entry of the kernel's as the model has it. Of a frontend's, nothing depends on the generation and the epochs.
pub fn entry((key, entry): &(ConntrackKey, ConntrackEntry)) -> (model::Key, Entry) {
    let end = |address, port: u16| (abi::address::ip(key.family, address), u16::from_be(port));
    let ends = [end(key.lower, key.lower_port), end(key.upper, key.upper_port)];
    let opener = entry.originator as usize;
    let peers = [entry.peers[opener], entry.peers[1 - opener]].map(|peer| (peer.owner, peer.epoch));
    let known = &entry.translation;
    let translated = entry.state & (TRANSLATED | FRONTEND) != 0;
    let model = Entry {
        state: entry.state,
        generation: entry.generation,
        peers,
        originator: ends[opener],
        account: entry.account,
        translation: translated.then(|| Translation {
            to: end(known.address, known.port),
            client_port: u16::from_be(known.client_port),
            backend: known.backend,
        }),
        via: (entry.state & VIA_NODE != 0).then(|| abi::address::ip(abi::Family::V4 as u8, known.address)),
    };
    (model::key(key.protocol, ends[0], ends[1]), comparable(model))
}

pub fn comparable(mut entry: Entry) -> Entry {
    if entry.state & FRONTEND != 0 {
        entry.generation = 0;
        entry.peers = entry.peers.map(|(owner, _)| (owner, 0));
    }
    entry
}

/// Whether both did the same. In a checksum all bits set are the same number as none (RFC 1624, section 3).
pub fn agree(expected: &Verdict, actual: &Outcome) -> bool {
    let same = |one: &[u8], other: &Frame| {
        one.len() == other.0.len()
            && one
                .chunks(2)
                .zip(other.0.chunks(2))
                .all(|(one, other)| one == other || matches!((one, other), ([0, 0], [255, 255]) | ([255, 255], [0, 0])))
    };
    match (expected, actual) {
        (Verdict::Dropped(one), Outcome::Dropped(other)) => one == other,
        (Verdict::Told(one, message), Outcome::Told(other, frame)) => one == other && same(message, frame),
        (Verdict::Passed, Outcome::Passed) => true,
        (
            Verdict::Sent {
                path,
                ifindex,
                tunnel,
                frame: expected,
            },
            Outcome::Sent {
                path: sent,
                ifindex: to,
                tunnel: key,
                frame,
            },
        ) => {
            let key = key.map(|(vni, node)| (vni, ip4(node)));
            (path, ifindex, *tunnel) == (sent, to, key) && same(expected, frame)
        }
        _ => false,
    }
}

/// Which entries only one of them has.
pub fn difference(expected: &[(model::Key, Entry)], actual: &[(model::Key, Entry)]) -> String {
    let only = |these: &[(model::Key, Entry)], those: &[(model::Key, Entry)]| -> Vec<(model::Key, Entry)> {
        these.iter().filter(|one| !those.contains(one)).cloned().collect()
    };
    let (model, kernel) = (only(expected, actual), only(actual, expected));
    format!("conntrack\n model: {model:?}\nkernel: {kernel:?}")
}
