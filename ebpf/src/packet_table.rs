//! Runs a program under test on one packet. `BPF_PROG_TEST_RUN` gives a packet no tunnel metadata, so this sets it
//! from `skb->cb` and then tail-calls the program.
#![no_std]
#![no_main]

mod object;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, bpf_tunnel_key},
    btf_maps::ProgramArray,
    helpers::bpf_skb_set_tunnel_key,
    macros::{btf_map, classifier},
    programs::TcContext,
};

/// The program under test.
#[btf_map]
static TARGET: ProgramArray<1> = ProgramArray::new();

/// `cb[0]`: outer source address, 0 for none; `cb[1]`: VNI; `cb[2]`: outer destination; all in host byte order. The kernel
/// reads the remote end of a received packet from where a sender puts its local one, and the local end likewise.
#[classifier]
pub fn packet_table(ctx: TcContext) -> i32 {
    // SAFETY: the context is the kernel's `__sk_buff`; helper and context are used as the verifier demands.
    unsafe {
        let [outer_source, vni, outer_destination, ..] = (*ctx.skb.skb).cb;
        (*ctx.skb.skb).cb[0] = 0;
        (*ctx.skb.skb).cb[1] = 0;
        (*ctx.skb.skb).cb[2] = 0;
        if outer_source != 0 {
            let mut key: bpf_tunnel_key = core::mem::zeroed();
            key.tunnel_id = vni;
            key.__bindgen_anon_3.local_ipv4 = outer_source;
            key.__bindgen_anon_1.remote_ipv4 = outer_destination;
            if bpf_skb_set_tunnel_key(ctx.skb.skb, &raw mut key, size_of::<bpf_tunnel_key>() as u32, 0) != 0 {
                return TC_ACT_SHOT;
            }
        }
        // Returns only where there is no program.
        TARGET.tail_call(&ctx, 0);
    }
    TC_ACT_SHOT
}
