//! The emulated machine.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::place;
use crate::run::{self, End, Reader};

/// The line in which the guest gives its command's exit code.
const MARKER: &str = "SOE-VM-EXIT ";
/// Bytes of each NVMe disk; the files are sparse.
const DISK_BYTES: u64 = 1 << 30;

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The guest's command ended with this code.
    Code(i32),
    /// The machine ended without saying so: a panic, a hang, or no boot at all.
    NoMarker(String),
}

/// Boots a machine with four NVMe disks and returns how its command ended. The kernel's messages go
/// to `console`, each line of the command's output to `reader`.
///
/// The disks: `nvme0n1` is blank and the tests' own; on `nvme1n1` the guest makes device-mapper
/// nodes; `nvme2n1` is a shared namespace with two controllers, so the kernel's own multipath is on
/// it; on the last one is the guest's scratch file system.
pub fn boot(
    image: &Path,
    initrd: &Path,
    dir: &Path,
    console: &Path,
    limit: Duration,
    reader: &mut dyn FnMut(&str),
) -> Result<Verdict> {
    let program = place::program("qemu-system-x86_64")
        .context("qemu-system-x86_64 is not installed (`cargo xtask setup --vm` installs it)")?;
    let mut qemu = Command::new(program);
    qemu.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072"])
        .args(["-display", "none", "-nodefaults", "-no-reboot", "-no-user-config"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initrd)
        // A panic ends the machine at once: -no-reboot turns the reboot into an exit.
        .args(["-append", "console=ttyS0 panic=-1 oops=panic rdinit=/init loglevel=5 printk.time=1 random.trust_cpu=on mitigations=off"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio"]);
    for disk in ["tests", "mapper", "shared", "scratch"] {
        let path = dir.join(format!("{disk}.img"));
        File::create(&path)
            .and_then(|file| file.set_len(DISK_BYTES))
            .with_context(|| format!("cannot create the disk {}", path.display()))?;
        qemu.arg("-drive").arg(format!(
            "file={},format=raw,if=none,id={disk},cache=unsafe,discard=unmap,detect-zeroes=off",
            path.display()
        ));
    }
    qemu.args(["-device", "nvme,drive=tests,serial=SOETESTS,max_ioqpairs=4"])
        .args([
            "-device",
            "nvme,drive=mapper,serial=SOEMAPPER,max_ioqpairs=4",
        ])
        .args(["-device", "nvme-subsys,id=subsys0,nqn=soe-shared"])
        .args(["-device", "nvme,serial=SOESHARED,subsys=subsys0"])
        .args(["-device", "nvme,serial=SOESHARED,subsys=subsys0"])
        .args(["-device", "nvme-ns,drive=shared,nsid=1,shared=on"])
        .args(["-device", "nvme,drive=scratch,serial=SOESCRATCH"]);

    let mut code = None;
    let end = run::lines(&mut qemu, limit, &mut |line| {
        match line.trim_end_matches('\r').strip_prefix(MARKER) {
            Some(text) => {
                code = text.trim().parse().ok();
                return Reader::Stop;
            }
            None => reader(line.trim_end_matches('\r')),
        }
        Reader::Continue
    })?;
    Ok(match (code, end) {
        (Some(code), _) => Verdict::Code(code),
        (None, End::Exited(status)) => Verdict::NoMarker(format!(
            "the machine stopped by itself (emulator: {status})"
        )),
        (None, end) => Verdict::NoMarker(end.describe(limit)),
    })
}
