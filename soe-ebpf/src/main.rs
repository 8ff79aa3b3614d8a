//! SOE's kernel half.
//!
//! Change tracking (`mark`) comes first and may never drop anything; statistics (`stats`) follow in the
//! same programs, and the trace stream (`stream`), which counts what it drops, has its own. All are `tp_btf` programs: raw pointers, and a recursion guard
//! of their own each.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod kernel;
mod maps;
mod mark;
mod stats;
mod stream;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // The verifier rejects any program in which this could be reached with side effects.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
