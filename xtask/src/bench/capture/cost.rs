//! What a differential costs: an image of 2 GiB of which 2 % changed, beside copying these blocks.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::super::figures::{Table, median, ms};
use super::ground::{BLOCK, Ground, Noise, copy};
use super::{Args, peers, series};
use crate::demo::stop;

const IMAGE_MIB: u64 = 2048;
/// Of all blocks, in percent.
const CHANGED: u64 = 2;

/// Wall-clock time and CPU time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    pub(super) wall: Duration,
    pub(super) cpu: Duration,
}

/// The median cost of several runs.
pub(super) fn middle(costs: &[Cost]) -> Cost {
    let of = |part: fn(&Cost) -> Duration| {
        let mut values: Vec<f64> = costs.iter().map(|c| part(c).as_secs_f64()).collect();
        Duration::try_from_secs_f64(median(&mut values)).unwrap_or_default()
    };
    Cost {
        wall: of(|cost| cost.wall),
        cpu: of(|cost| cost.cpu),
    }
}

/// CPU time of this thread, or of all children that ended.
pub(super) fn cpu(who: libc::c_int) -> Result<Duration> {
    // SAFETY: the all-zero pattern is a valid rusage, and getrusage only writes into it.
    let (usage, result) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        let result = libc::getrusage(who, &raw mut usage);
        (usage, result)
    };
    if result != 0 {
        bail!("getrusage: {}", std::io::Error::last_os_error());
    }
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec.unsigned_abs())
            + Duration::from_micros(t.tv_usec.unsigned_abs())
    };
    Ok(time(usage.ru_utime) + time(usage.ru_stime))
}

/// Measures, prints, and returns the figures.
pub(super) fn measure(args: &Args, soe: &Path, dir: &Path) -> Result<Value> {
    let ground = Ground::raw(dir, "image", IMAGE_MIB)?;
    ground.fill(1)?;
    let agent = super::watched(soe, &ground)?;
    let blocks = ground.bytes / BLOCK;
    let count = blocks * CHANGED / 100;
    let mut noise = Noise(2);
    let (mut ours, mut copies) = (Vec::new(), Vec::new());
    let mut stored = 0;
    let mut device = ground.open(true)?;
    for round in 0..u64::from(args.rounds) {
        stop::check()?;
        let changed = noise.choose(count, blocks);
        ground.rewrite(&changed, round + 10)?;
        let ranges: Vec<(u64, u64)> = changed.iter().map(|n| (n * BLOCK, BLOCK)).collect();
        let (began, before) = (Instant::now(), cpu(libc::RUSAGE_THREAD)?);
        copy(&mut device, &ranges, &dir.join("blocks"))?;
        copies.push(Cost {
            wall: began.elapsed(),
            cpu: cpu(libc::RUSAGE_THREAD)? - before,
        });
        let (began, before) = (Instant::now(), agent.cpu()? + cpu(libc::RUSAGE_CHILDREN)?);
        let layer = series::capture(&agent, "differential")?
            .map_err(|reason| anyhow::anyhow!("a capture of the image failed: {reason}"))?;
        ours.push(Cost {
            wall: began.elapsed(),
            cpu: agent.cpu()? + cpu(libc::RUSAGE_CHILDREN)? - before,
        });
        stored = layer.bytes_stored;
    }
    drop(agent);
    let (ours, copies) = (middle(&ours), middle(&copies));
    println!(
        "\ncost of a differential: {IMAGE_MIB} MiB image, {count} of {blocks} blocks of 64 KiB changed; medians of {} rounds",
        args.rounds
    );
    let mut table = Table::new(&["", "wall", "CPU", "stored", "times the copy: wall", "CPU"]);
    let row = |table: &mut Table, name: &str, cost: Cost, stored: u64| {
        let share = |a: Duration, b: Duration| format!("{:.2}", a.as_secs_f64() / b.as_secs_f64());
        table.row(vec![
            name.to_owned(),
            ms(cost.wall),
            ms(cost.cpu),
            format!("{:.1} MB", stored as f64 / 1e6),
            share(cost.wall, copies.wall),
            share(cost.cpu, copies.cpu),
        ]);
        json!({
            "wall_us": cost.wall.as_micros() as u64,
            "cpu_us": cost.cpu.as_micros() as u64,
            "stored_bytes": stored,
            "wall_ratio": cost.wall.as_secs_f64() / copies.wall.as_secs_f64(),
            "cpu_ratio": cost.cpu.as_secs_f64() / copies.cpu.as_secs_f64(),
        })
    };
    let mut figures = json!({
        "copy": row(&mut table, "copy of the known blocks, no hash, no compression", copies, count * BLOCK),
        "soe": row(&mut table, "soe layer capture, the client's process included", ours, stored),
    });
    if args.peers {
        let changed = noise.choose(count, blocks);
        for peer in peers::measure(&ground, &changed, dir)? {
            figures[peer.name] = row(&mut table, peer.name, peer.cost, peer.stored);
        }
    }
    table.print();
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_time_of_a_thread_grows_with_its_work() {
        let before = cpu(libc::RUSAGE_THREAD).unwrap();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(60) {
            std::hint::black_box(Noise(1).choose(100, 1 << 20));
        }
        assert!(cpu(libc::RUSAGE_THREAD).unwrap() > before);
    }
}
