//! What is done without an agent: freeze, copy, thaw.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::figures::{Durations, Table, ms};
use super::super::stage::Agent;
use super::ground::{Ground, copy};
use super::load::{self, Fio, PATTERNS};
use super::series::{GROUP, capture};
use crate::demo::stop;
use crate::run;

const ROUNDS: usize = 3;
const CALL: Duration = Duration::from_secs(60);

/// The pause of a copy under a freeze: of the whole device, and of a differential's ranges.
pub(super) fn measure(agent: &Agent, ground: &Ground, dir: &Path) -> Result<Value> {
    let [pattern, ..] = PATTERNS;
    let fio = Fio::start(ground.mount()?, pattern, &dir.join("fio.json"))?;
    std::thread::sleep(Duration::from_secs(1));
    let ranges = changed(agent, ground)?;
    let changed_bytes: u64 = ranges.iter().map(|(_, len)| len).sum();
    let mut table = Table::new(&[
        "by hand, under 4 KiB random writes",
        "copied",
        "pause",
        "probe's longest write",
    ]);
    let mut figures = json!({});
    for (name, ranges) in [
        ("nothing", Vec::new()),
        ("whole", vec![(0, ground.bytes)]),
        ("changed", ranges),
    ] {
        let probe = load::probe(ground.mount()?)?;
        let mut pauses = Vec::new();
        for _ in 0..ROUNDS {
            stop::check()?;
            pauses.push(frozen_copy(ground, &ranges, &dir.join("copy"))?);
            std::thread::sleep(Duration::from_millis(500));
        }
        let seen = probe.stop()?;
        let pauses = Durations::new(pauses);
        let bytes: u64 = ranges.iter().map(|(_, len)| len).sum();
        let what = match name {
            "nothing" => "fsfreeze, thaw".to_owned(),
            "whole" => "fsfreeze, copy of the device, thaw".to_owned(),
            _ => format!(
                "the same, of the {} pieces a differential held",
                ranges.len()
            ),
        };
        table.row(vec![
            format!("{what} ({})", pattern.name),
            format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
            pauses.shown(),
            seen.max().map_or("-".to_owned(), ms),
        ]);
        figures[name] = json!({
            "bytes": bytes,
            "pauses": pauses.json(),
            "probe": seen.json(),
        });
    }
    fio.stop()?;
    println!();
    table.print();
    figures["changed_bytes"] = changed_bytes.into();
    Ok(figures)
}

/// Freezes, copies, thaws; how long that held the writers. It is thawed whatever happens.
fn frozen_copy(ground: &Ground, ranges: &[(u64, u64)], to: &Path) -> Result<Duration> {
    let mut device = ground.open(true)?;
    let began = Instant::now();
    ground.fsfreeze("-f")?;
    let copied = match ranges {
        [] => Ok(0),
        ranges => copy(&mut device, ranges, to),
    };
    let thawed = ground.fsfreeze("-u");
    let pause = began.elapsed();
    copied?;
    thawed?;
    Ok(pause)
}

/// The ranges of one more differential, a second after the one before.
fn changed(agent: &Agent, ground: &Ground) -> Result<Vec<(u64, u64)>> {
    let mut layers = Vec::new();
    let mut reason = String::new();
    for _ in 0..10 {
        if layers.len() == 2 {
            break;
        }
        stop::check()?;
        std::thread::sleep(Duration::from_secs(1));
        match capture(agent, "differential")? {
            Ok(layer) => layers.push(layer),
            Err(why) => reason = why,
        }
    }
    let [from, to] = layers.as_slice() else {
        anyhow::bail!("two layers were wanted, and there are none after ten captures: {reason}");
    };
    let arguments = [
        "layer",
        "diff",
        GROUP,
        "--volume",
        &ground.node,
        &from.id,
        &to.id,
        "--json",
    ];
    let text = run::output(&mut agent.client(&arguments), CALL)?;
    let answer: Value = serde_json::from_str(&text).context("the answer of soe layer diff")?;
    let extents = answer["extents"].as_array();
    Ok(extents
        .into_iter()
        .flatten()
        .filter_map(|e| Some((e["offset"].as_u64()?, e["len"].as_u64()?)))
        .collect())
}
