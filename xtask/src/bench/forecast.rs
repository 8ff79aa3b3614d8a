//! `cargo xtask bench forecast`: the protocols of docs/forecasting.md over a trace, scored from raw outputs
//! by a program that shares no code with SOE (`tests/forecast/score.py`).
//!
//! `cargo xtask train-prior` makes the network that ships, from a trace.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::figures::Table;
use crate::{place, run};

const LIMIT: Duration = Duration::from_secs(1800);

#[derive(clap::Args)]
pub struct Args {
    /// The trace: Parquet with volume, ts (s), read_kbs and write_kbs in bins of five minutes
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Folds of volumes left out of the network's training, each judged by the network that never saw
    /// it; 0 judges the network that ships alone
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(0..=16))]
    folds: u32,
    /// Leave LightGBM out
    #[arg(long)]
    no_peer: bool,
    /// The `soe` to measure, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    soe: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct TrainArgs {
    /// The trace, as for `bench forecast`; its last 27 days are left out
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// The `soe` to train with, instead of one that is built now
    #[arg(long, value_name = "FILE")]
    soe: Option<PathBuf>,
}

/// The windows of the protocol: interval and length, in words and in bins.
const WINDOWS: [(&str, &str, &str, &str); 3] = [
    ("24h", "30m", "288", "6"),
    ("6h", "10m", "72", "2"),
    ("1h", "5m", "12", "1"),
];

/// What both commands work with.
struct Ground {
    soe: PathBuf,
    python: PathBuf,
    folder: PathBuf,
    history: PathBuf,
    trace: PathBuf,
    from: String,
}

impl Ground {
    fn new(trace: &Path, soe: Option<&PathBuf>) -> Result<Self> {
        let soe = match soe {
            Some(soe) => soe.clone(),
            None => super::stage::build()?,
        };
        let folder = place::target().join("forecast");
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let python = python(&folder)?;
        let series = folder.join("series.csv");
        let mut convert = Command::new(&python);
        convert
            .arg(place::root().join("tests/forecast/convert.py"))
            .arg(trace)
            .arg(&series);
        let from = run::output(&mut convert, LIMIT)?.trim().to_owned();
        let history = folder.join("history");
        if history.exists() {
            std::fs::remove_dir_all(&history).with_context(|| history.display().to_string())?;
        }
        let mut import = Command::new(&soe);
        import
            .args(["trace", "import", "--format", "series"])
            .arg(&series)
            .arg("--out")
            .arg(&history);
        run::output(&mut import, LIMIT)?;
        Ok(Self {
            soe,
            python,
            folder,
            history,
            trace: trace.to_owned(),
            from,
        })
    }

    /// Runs several back-tests, as many at once as there are processors.
    fn backtests(&self, verb: &str, jobs: &[(Vec<&str>, PathBuf)]) -> Result<()> {
        let at_once = std::thread::available_parallelism().map_or(1, usize::from);
        for jobs in jobs.chunks(at_once) {
            std::thread::scope(|scope| {
                let mut running = Vec::new();
                for (more, out) in jobs {
                    running.push(scope.spawn(move || self.backtest(verb, more, out)));
                }
                running.into_iter().try_for_each(|job| match job.join() {
                    Ok(done) => done,
                    Err(_) => bail!("a back-test panicked"),
                })
            })?;
        }
        Ok(())
    }

    /// Runs a verb of `soe backtest` over the history, with its output in `out`.
    fn backtest(&self, verb: &str, more: &[&str], out: &Path) -> Result<()> {
        let mut command = Command::new(&self.soe);
        command
            .args(["backtest", verb])
            .args(more)
            .arg("--history")
            .arg(&self.history)
            .arg("--out")
            .arg(out);
        run::output(&mut command, LIMIT).map(drop)
    }

    /// The same protocol by LightGBM (`tests/forecast/lightgbm_peer.py`), trained on what is before.
    fn peer(&self, verb: &str, scoring: &[&str], out: &Path) -> Result<()> {
        let mut command = Command::new(&self.python);
        command
            .arg(place::root().join("tests/forecast/lightgbm_peer.py"))
            .arg(verb)
            .arg(&self.trace)
            .args(["--from", &self.from])
            .args(scoring)
            .arg("--out")
            .arg(out);
        run::output(&mut command, LIMIT).map(drop)
    }

    /// What the scorer says of raw outputs; of several, volume `i` is taken from the `i % n`th.
    fn score(&self, what: &str, raw: &[PathBuf], more: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.python);
        command
            .arg(place::root().join("tests/forecast/score.py"))
            .arg(what)
            .arg(&self.trace)
            .args(raw)
            .args(more);
        serde_json::from_str(&run::output(&mut command, LIMIT)?).context("what the scorer says")
    }
}

/// A Python with what the scorer needs.
pub(super) fn python(folder: &Path) -> Result<PathBuf> {
    let venv = folder.join("venv");
    let python = venv.join("bin/python");
    if !python.exists() {
        run::check(
            Command::new("python3").args(["-m", "venv"]).arg(&venv),
            LIMIT,
        )?;
    }
    let mut install = Command::new(&python);
    install.args([
        "-m", "pip", "install", "--quiet", "numpy", "pyarrow", "lightgbm",
    ]);
    run::check(&mut install, LIMIT)?;
    Ok(python)
}

/// Runs the command.
pub fn command(args: &Args) -> Result<i32> {
    if !args.trace.is_file() {
        bail!(
            "{} is no file; give a trace in Parquet",
            args.trace.display()
        );
    }
    let ground = Ground::new(&args.trace, args.soe.as_ref())?;
    println!("judged from {} on, trained on what is before", ground.from);
    let mut table = Table::new(&[
        "",
        "network that ships",
        "volumes left out of training",
        "best simple",
        "LightGBM",
    ]);
    let shown = |value: &Value, key: &str| {
        value[key]
            .as_f64()
            .map_or("-".to_owned(), |v| format!("{v:.3}"))
    };
    let folds: Vec<String> = (0..args.folds)
        .map(|fold| format!("{fold}/{}", args.folds))
        .collect();
    let trainings: Vec<(Vec<&str>, PathBuf)> = folds
        .iter()
        .enumerate()
        .map(|(fold, left_out)| {
            let more = vec!["--until", &ground.from, "--leave-out", left_out];
            (more, ground.folder.join(format!("prior-{fold}.soe")))
        })
        .collect();
    ground.backtests("prior", &trainings)?;
    let priors: Vec<String> = trainings
        .iter()
        .map(|(_, prior)| prior.display().to_string())
        .collect();
    let began = Instant::now();
    let mut judge = |verb: &str, options: &[&str], scoring: &[&str], keys: &[&str]| -> Result<()> {
        let shared = ["--from", ground.from.as_str(), "--train-every", "0s"];
        let out = |name: String| ground.folder.join(format!("{name}.parquet"));
        let mut jobs = vec![([&shared, options].concat(), out(verb.to_owned()))];
        jobs.extend(priors.iter().enumerate().map(|(fold, prior)| {
            let more = [&shared, options, &["--prior", prior]].concat();
            (more, out(format!("{verb}-{fold}")))
        }));
        ground.backtests(verb, &jobs)?;
        let mut raw: Vec<PathBuf> = jobs.into_iter().map(|(_, file)| file).collect();
        let shipped = ground.score(verb, &[raw.remove(0)], scoring)?;
        let left_out = match raw.is_empty() {
            true => Value::Null,
            false => ground.score(verb, &raw, scoring)?,
        };
        let peer = match args.no_peer {
            true => Value::Null,
            false => {
                let file = out(format!("{verb}-lightgbm"));
                ground.peer(verb, scoring, &file)?;
                ground.score(verb, &[file], scoring)?
            }
        };
        for key in keys {
            table.row(vec![
                format!("{verb} {} {key}", options.join(" ")),
                shown(&shipped, key),
                shown(&left_out, key),
                shown(&shipped, &format!("simple {key}")),
                shown(&peer, key),
            ]);
        }
        Ok(())
    };
    judge("load", &[], &[], &["relWQL", "harm", "coverage", "worst"])?;
    let keys = ["PR-AUC", "base rate", "precision", "recall"];
    judge("bursts", &[], &[], &keys)?;
    for (interval, length, bins, window) in WINDOWS {
        let options = ["--interval", interval, "--length", length];
        let scoring = ["--interval", bins, "--length", window];
        judge(
            "windows",
            &options,
            &scoring,
            &["median", "mean", "P95", "G"],
        )?;
    }
    table.print();
    println!(
        "back-tests and scores took {:.0} s",
        began.elapsed().as_secs_f64()
    );
    Ok(0)
}

/// Trains the network that ships.
pub fn train_prior(args: &TrainArgs) -> Result<i32> {
    let ground = Ground::new(&args.trace, args.soe.as_ref())?;
    let out = place::root().join("soe-agent/models/prior.soe");
    ground.backtest("prior", &["--until", &ground.from], &out)?;
    println!(
        "{} is trained on what is before {}",
        out.display(),
        ground.from
    );
    Ok(0)
}
