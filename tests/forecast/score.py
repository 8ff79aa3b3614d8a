"""Scores raw outputs of `soe backtest` against a trace, by the protocols of docs/forecasting.md.

It shares no code with SOE: the truth comes from the trace, and so do the reference forecasts. Loads are
in KB/s, bins of five minutes, times in UTC.
"""

import argparse
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BIN, DAY, WEEK = 300, 288, 2016
LEVELS = (0.1, 0.5, 0.9)
CARRY = 6  # missing bins in a row that repeat the last known one; later ones the day before


class Truth:
    """Load of every volume on one grid: `load` has NaN where it is unknown, `filled` has guesses."""

    def __init__(self, path):
        table = pq.read_table(path)
        names = np.array(table["volume"].to_pylist())
        ts = np.array(table["ts"].to_pylist(), dtype=np.int64)
        column = lambda name: np.array(
            [np.nan if v is None else v for v in table[name].to_pylist()], dtype=float
        )
        load = column("read_kbs") + column("write_kbs")
        self.names = sorted(set(names.tolist()))
        self.start = int(ts.min())
        bins = int((ts.max() - self.start) // BIN) + 1
        self.load = np.full((len(self.names), bins), np.nan)
        rows = np.searchsorted(self.names, names)
        self.load[rows, (ts - self.start) // BIN] = load
        self.filled = np.stack([fill(row) for row in self.load])

    def bin_of(self, seconds):
        return (np.asarray(seconds) - self.start) // BIN


def fill(load):
    filled, last, gap = load.copy(), np.nan, 0
    for t, value in enumerate(load):
        if not np.isnan(value):
            last, gap = value, 0
            continue
        gap += 1
        if gap <= CARRY and not np.isnan(last):
            filled[t] = last
        elif t >= DAY:
            filled[t] = filled[t - DAY]
        else:
            filled[t] = 0 if np.isnan(last) else last
    return filled


def ewma(x, alpha=0.3):
    out = np.empty_like(x)
    level = x[..., 0].copy()
    for t in range(x.shape[-1]):
        level += alpha * (x[..., t] - level)
        out[..., t] = level
    return out


def pinball(actual, forecast, level):
    error = actual - forecast
    return np.maximum(level * error, (level - 1) * error)


def reference(truth, origins):
    """EWMA(0.3) of log1p(load) with the quantiles of its one-bin errors over the trailing day: the
    strongest of the simple forecasts. Shape (volumes, origins, levels)."""
    x = np.log1p(truth.filled)
    level = ewma(x)
    errors = x[:, 1:] - level[:, :-1]
    out = np.empty((len(x), len(origins), len(LEVELS)))
    for i, t in enumerate(origins):
        q = np.quantile(errors[:, max(0, t - DAY) : t], LEVELS, axis=1).T
        out[:, i] = np.maximum(np.expm1(level[:, t, None] + q), 0)
    return out


def simple_loads(truth, origins, target, back):
    """The other simple forecasts: quantiles of the trailing day, and of the same clock time (a bin to either
    side) of seven days. Each (volumes, n, levels)."""
    trailing = np.stack(
        [np.quantile(truth.filled[:, t - DAY + 1 : t + 1], LEVELS, axis=1).T for t in origins], 1
    )
    same = np.stack([truth.filled[:, target - k * DAY + d] for k in range(1, 8) for d in (-1, 0, 1)])
    return {
        "trailing day": trailing[:, back],
        "same clock": np.moveaxis(np.quantile(same, LEVELS, axis=0), 0, -1),
    }


def seconds(table, name):
    """Whole seconds of a column of times."""
    column = table[name]
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz)).cast("int64")
    return np.array(column.to_pylist(), dtype=np.int64) // 1_000_000


def wql(truth, forecast, target, known):
    """Weighted quantile loss by volume; `forecast` (volumes, n, levels), `target` bins (n)."""
    actual = np.where(known, truth.load[:, target], 0)
    loss = sum(
        np.where(known, pinball(actual, forecast[..., k], level), 0).sum(1)
        for k, level in enumerate(LEVELS)
    )
    return 2 / 3 * loss / np.maximum(np.abs(actual).sum(1), 1e-9)


def load(truth, table):
    issued, start = seconds(table, "issued_at"), seconds(table, "target_start")
    names = np.array(table["volume"].to_pylist())
    values = np.stack([np.array(table[q].to_pylist()) / 1024 for q in ("q10", "q50", "q90")], -1)
    pairs = sorted(set(zip(issued.tolist(), start.tolist())))
    place = {pair: i for i, pair in enumerate(pairs)}
    rows = np.searchsorted(truth.names, names)
    columns = np.array([place[p] for p in zip(issued.tolist(), start.tolist())])
    forecast = np.full((len(truth.names), len(pairs), 3), np.nan)
    forecast[rows, columns] = values
    target = truth.bin_of([p[1] for p in pairs])
    origin = truth.bin_of([p[0] for p in pairs]) - 1
    inside = (target < truth.load.shape[1]) & (origin >= 2 * DAY)
    forecast, target, origin = forecast[:, inside], target[inside], origin[inside]
    origins, back = np.unique(origin, return_inverse=True)
    simple = reference(truth, origins)[:, back]
    known = ~np.isnan(truth.load[:, target]) & ~np.isnan(forecast[..., 0])
    mine, theirs = wql(truth, np.nan_to_num(forecast), target, known), wql(truth, simple, target, known)
    ratio = mine / theirs
    others = simple_loads(truth, origins, target, back) if origins.min() > 8 * DAY else {}
    simple_ratios = {"ewma": 1.0} | {
        name: float(np.exp(np.log(wql(truth, forecast, target, known) / theirs).mean()))
        for name, forecast in others.items()
    }
    actual = truth.load[:, target]
    inside = (actual >= forecast[..., 0]) & (actual <= forecast[..., 2])
    return {
        "relWQL": float(np.exp(np.log(ratio).mean())),
        "harm": float((ratio > 1.05).mean()),
        "coverage": float(inside[known].mean()),
        "worst": float(ratio.max()),
        "simple relWQL": min(simple_ratios.values()),
        "simple": simple_ratios,
        "volumes": len(ratio),
        "ratio": dict(zip(truth.names, ratio.round(4).tolist())),
    }


def bursts(truth):
    """Burst bins and onsets: above max(q0.95, 2 x median) of the trailing week, after three bins that are
    not."""
    x = truth.filled
    burst = np.zeros(x.shape, dtype=bool)
    for v, row in enumerate(x):
        window = np.sort(row[:WEEK])
        for t in range(WEEK, len(row)):
            at = 0.95 * (WEEK - 1)
            i = int(at)
            high = window[i] + (at - i) * (window[i + 1] - window[i])
            middle = 0.5 * (window[(WEEK - 1) // 2] + window[WEEK // 2])
            burst[v, t] = row[t] > max(high, 2 * middle)
            window = np.delete(window, np.searchsorted(window, row[t - WEEK]))
            window = np.insert(window, np.searchsorted(window, row[t]), row[t])
    burst &= ~np.isnan(truth.load)
    onset = burst.copy()
    for back in (1, 2, 3):
        onset[:, back:] &= ~burst[:, :-back]
    onset[:, : WEEK + 3] = False
    return burst, onset


def average_precision(positive, score):
    order = np.argsort(-score, kind="stable")
    positive, score = positive[order], score[order]
    last = np.r_[np.nonzero(np.diff(score))[0], len(score) - 1]  # equal scores are one step
    hits = np.cumsum(positive)[last]
    precision, recall = hits / (last + 1), hits / max(positive.sum(), 1)
    return float((np.diff(np.r_[0, recall]) * precision).sum())


def burst(truth, table, lead, window):
    rows = np.searchsorted(truth.names, np.array(table["volume"].to_pylist()))
    t = truth.bin_of(seconds(table, "issued_at")) - 1  # the last known bin
    p = np.array(table["probability"].to_pylist())
    alarm = np.array(table["alarm"].to_pylist())
    burst, onset = bursts(truth)
    ends = t + lead + window
    ok = (t >= WEEK) & (ends < truth.load.shape[1])
    rows, t, p, alarm = rows[ok], t[ok], p[ok], alarm[ok]
    counts = np.cumsum(np.pad(onset, ((0, 0), (1, 0))), 1)
    seen = np.cumsum(np.pad(~np.isnan(truth.load), ((0, 0), (1, 0))), 1)
    label = counts[rows, t + lead + window + 1] - counts[rows, t + lead + 1] > 0
    enough = seen[rows, t + lead + window + 1] - seen[rows, t + 1] > 0.6 * (lead + window)
    quiet = ~burst[rows, t] & ~np.isnan(truth.load[rows, t]) & enough
    # How often a burst began in the same stretch of the last fourteen days.
    days = [t - k * DAY for k in range(1, 15)]
    began = [
        (counts[rows, np.maximum(d + lead + window + 1, 0)] > counts[rows, np.maximum(d + lead + 1, 0)])
        for d in days
    ]
    same_clock = np.mean(began, 0)[quiet]
    positive, score, raised = label[quiet], p[quiet], alarm[quiet]
    hits = (positive & raised).sum()
    precision, recall = hits / max(raised.sum(), 1), hits / max(positive.sum(), 1)
    return {
        "PR-AUC": average_precision(positive, score),
        "simple PR-AUC": average_precision(positive, same_clock),
        "base rate": float(positive.mean()),
        "origins": int(quiet.sum()),
        "precision": float(precision),
        "recall": float(recall),
        "F1": float(2 * precision * recall / max(precision + recall, 1e-9)),
    }


def windows(truth, table, interval, length):
    rows = np.searchsorted(truth.names, np.array(table["volume"].to_pylist()))
    start = truth.bin_of(seconds(table, "interval_start"))
    chosen = truth.bin_of(seconds(table, "window_start"))
    sums = np.cumsum(np.pad(truth.filled, ((0, 0), (1, 0))), 1)
    missing = np.cumsum(np.pad(np.isnan(truth.load), ((0, 0), (1, 0))), 1)
    policy, best, random, simple = (np.zeros(len(truth.names)) for _ in range(4))
    for v, s, c in zip(rows, start, chosen):
        if s < 0 or s + interval > truth.load.shape[1] or missing[v, s + interval] > missing[v, s]:
            continue
        starts = np.arange(s, s + interval - length + 1)
        loads = (sums[v, starts + length] - sums[v, starts]) / length
        policy[v] += loads[c - s]
        # Where the best window was at the same hours of yesterday.
        yesterday = starts - DAY
        if s >= DAY:
            simple[v] += loads[np.argmin(sums[v, yesterday + length] - sums[v, yesterday])]
        best[v] += loads.min()
        random[v] += loads.mean()
    spread = random - best
    some = spread > 1e-9

    def judged(policy, name=""):
        regret = (policy - best)[some] / spread[some]
        return {
            name + "median": float(np.median(regret)),
            name + "mean": float(regret.mean()),
            name + "P95": float(np.quantile(regret, 0.95)),
            name + "G": float(policy.sum() / max(random.sum(), 1e-9)),
        }

    return judged(policy) | judged(simple, "simple ") | {"volumes": int(some.sum())}


def merged(truth, paths):
    """The rows of all files, of each volume those of its file only."""
    parts = []
    for nth, path in enumerate(paths):
        table = pq.read_table(path)
        mine = set(truth.names[nth :: len(paths)])
        parts.append(table.filter(pa.array([name in mine for name in table["volume"].to_pylist()])))
    return pa.concat_tables(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("load", "bursts", "windows"))
    parser.add_argument("truth", help="Parquet: volume, ts (s), read_kbs, write_kbs")
    parser.add_argument(
        "raw", nargs="+", help="what soe backtest wrote; of n files, volume i is taken from the i %% n-th"
    )
    parser.add_argument("--lead", type=int, default=1, help="bins")
    parser.add_argument("--window", type=int, default=6, help="bins")
    parser.add_argument("--interval", type=int, default=288, help="bins")
    parser.add_argument("--length", type=int, default=6, help="bins")
    args = parser.parse_args()
    truth = Truth(args.truth)
    table = merged(truth, args.raw)
    if args.what == "load":
        answer = load(truth, table)
    elif args.what == "bursts":
        answer = burst(truth, table, args.lead, args.window)
    else:
        answer = windows(truth, table, args.interval, args.length)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
