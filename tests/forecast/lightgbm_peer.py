"""The peer of `soe backtest`: LightGBM, trained once on what lies before `--from`, judged by score.py.

One global model over all volumes, with inputs that end at the moment of the forecast:

* load: two quantile models, averaged, for each of q10, q50 and q90 over all twelve leads, the lead being
  an input. The target is the log load, normalised by the trailing day of the volume; the models begin
  with the forecast of `reference` in score.py.
* bursts: one classifier of "an onset begins two to seven bins ahead".
* windows: two regressions of the regret of each start in an interval, asked when the interval begins: of
  the regret up to 2, intervals weighing by what is at stake in them, and of its root.

Missing loads are filled as in score.py, from the past alone. What is tuned was tuned on the 27 days
before those that docs/forecasting.md judges.
"""

import argparse
import datetime
import warnings

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import score
from score import BIN, DAY, WEEK

HOUR, LEADS, SEED = 12, 12, 1
MEMBER = "lightgbm"
PARAMS = {
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "seed": SEED,
    "verbosity": -1,
}


def rolling(x, width):
    """Mean and standard deviation of the `width` bins that end at each bin (fewer at the start)."""
    n = np.minimum(np.arange(1, x.shape[1] + 1), width)

    def mean(y):
        sums = np.cumsum(y, 1)
        sums[:, width:] -= np.cumsum(y, 1)[:, :-width]
        return sums / n

    average = mean(x)
    return average, np.sqrt(np.maximum(mean(x * x) - average**2, 0))


def trailing_quantiles(x, ends, width, levels):
    """Quantiles of the `width` bins up to each of `ends` (volumes, ends, levels)."""
    out = np.empty((len(x), len(ends), len(levels)), dtype=np.float32)
    for i, t in enumerate(ends):
        out[:, i] = np.quantile(x[:, max(0, t + 1 - width) : t + 1], levels, axis=1).T
    return out


def ahead(x, v, at):
    """x at bins that may lie before its beginning: NaN there."""
    return np.where(at >= 0, x[v, np.maximum(at, 0)], np.nan)


def clock(truth, at):
    """Minute of the day, of the hour, and day of the week of bins."""
    index = truth.start // BIN + at
    return [index % DAY, index % HOUR, (index // DAY + 3) % 7]


class Load:
    """Inputs of the load's forecasts: origins are last known bins, all at the end of an hour."""

    def __init__(self, truth):
        self.truth, self.x = truth, np.log1p(truth.filled)
        self.mean, self.sd = rolling(self.x, DAY)
        self.sd = np.maximum(self.sd, 0.1)
        self.short = [rolling(self.x, n) for n in (HOUR, 6 * HOUR, WEEK)]
        self.levels = [score.ewma(self.x, alpha) for alpha in (0.3, 0.1, 0.03)]
        first = (-truth.start // BIN) % HOUR + HOUR - 1
        self.origins = np.arange(first, self.x.shape[1], HOUR)
        self.day = trailing_quantiles(self.x, self.origins, DAY, (0.1, 0.25, 0.5, 0.75, 0.9))
        errors = np.pad(self.x[:, 1:] - self.levels[0][:, :-1], ((0, 0), (1, 0)))
        self.errors = trailing_quantiles(errors, self.origins, DAY, score.LEVELS)

    def simple(self, v, i):
        """The reference's forecasts, normalised; the models begin with them."""
        t = self.origins[i]
        forecast = self.levels[0][v, t, None] + self.errors[v, i]
        return np.clip((forecast - self.mean[v, t, None]) / self.sd[v, t, None], -8, 12)

    def inputs(self, v, i, lead):
        """For volumes, numbers of origins, and leads from 1 on."""
        t = self.origins[i]
        at, mean, sd = t + lead, self.mean[v, t], self.sd[v, t]
        z = lambda values: (values - mean) / sd
        columns = [z(self.x[v, t - back]) for back in range(6)]
        hours = [z(ahead(self.x, v, at - HOUR * k)) for k in range(1, 25)]
        columns += hours + list(np.quantile(hours, (0.1, 0.5, 0.9), axis=0))
        columns += [np.mean(hours, 0), np.mean(hours[:6], 0)]
        days = [z(ahead(self.x, v, at - DAY * k)) for k in range(1, 8)]
        near = [z(ahead(self.x, v, at - DAY * k + d)) for k in range(1, 8) for d in (-1, 1)]
        far = [z(ahead(self.x, v, at - DAY * k)) for k in range(8, 29)]
        columns += days + [far[6], far[13], far[20]]
        ordered = np.sort(days + near, axis=0)
        columns += [ordered[round(q * 20)] for q in (0.1, 0.25, 0.5, 0.75, 0.9)]
        month = np.stack(days + far)
        columns += [np.mean(days, 0), np.mean(near, 0), np.nanmean(month, 0)]
        columns += [z(level[v, t]) for level in self.levels]
        columns += list((self.levels[0][v, t] + self.errors[v, i].T - mean) / sd)
        columns += list((self.day[v, i].T - mean) / sd)
        for average, spread in self.short:
            columns += [z(average[v, t]), spread[v, t] / sd]
        columns += [mean, sd, lead, *clock(self.truth, at)]
        return np.stack(columns, 1).astype(np.float32)


class Bursts:
    """Inputs of the probability of an onset, for every bin; a label is what is to be foretold."""

    def __init__(self, truth, lead=1, window=6):
        self.truth, self.lead, self.reach = truth, lead, lead + window
        self.burst, self.onset = score.bursts(truth)
        self.x = np.log1p(truth.filled)
        n = self.x.shape[1]
        self.sums = np.cumsum(np.pad(self.onset, ((0, 0), (1, 0))), 1)
        self.label = self.began(lead + 1, self.reach)
        self.wide = self.began(-1, self.reach + 3)
        seen = np.cumsum(np.pad(~np.isnan(truth.load), ((0, 0), (1, self.reach))), 1)
        enough = seen[:, self.reach + 1 :] - seen[:, 1 : n + 1] > 0.6 * self.reach
        self.quiet = ~self.burst & ~np.isnan(truth.load) & enough
        ends = np.arange(HOUR - 1, n, HOUR)
        week = trailing_quantiles(self.x, ends, WEEK, (0.5, 0.95))
        height = np.maximum(week[..., 1], np.log1p(2 * np.expm1(week[..., 0])))
        late = np.maximum((np.arange(n) + 1) // HOUR - 1, 0)
        self.threshold = height[:, late]
        self.day = rolling(self.x, DAY)
        self.levels = [score.ewma(self.x, alpha) for alpha in (0.3, 0.1, 0.03)]
        later = np.pad(self.x, ((0, 0), (0, self.reach)), mode="edge")
        spans = np.lib.stride_tricks.sliding_window_view(later[:, lead + 1 :], window, 1)
        self.ahead = spans[:, :n].max(-1)

    def began(self, first, last):
        """Whether an onset lies in the bins `first` to `last` after each bin."""
        n = self.x.shape[1]
        at = np.arange(n)
        low, high = np.clip(at + first, 0, n), np.clip(at + last + 1, 0, n)
        return (self.sums[:, high] - self.sums[:, low] > 0).astype(np.float32)

    def rhythm(self, v, t):
        """What the intervals between onsets say, of bins of one volume."""
        times = np.nonzero(self.onset[v])[0]
        count = np.searchsorted(times, t, "right")
        back = count[:, None] - np.arange(1, 62)
        when = np.where(back >= 0, times[np.maximum(back, 0)] if len(times) else 0, np.nan)
        intervals, elapsed = when[:, :-1] - when[:, 1:], t - when[:, 0]
        first, last = elapsed + self.lead + 1, elapsed + self.reach
        left = intervals >= first[:, None]
        hit = left & (intervals <= last[:, None])
        columns = [elapsed, *intervals[:, :5].T, t - when[:, 3], t - when[:, 10]]
        for keep in (1.0, 0.93, 0.8):
            weight = keep ** np.arange(60)
            columns.append(((hit * weight).sum(1) + 0.3) / ((left * weight).sum(1) + 3))
        ends = np.cumsum(intervals[:, :7], 1)
        columns.append(((ends >= first[:, None]) & (ends <= last[:, None])).sum(1))
        like = (np.abs(intervals[:, 1:] - intervals[:, :1]) <= 2) & left[:, :-1]
        columns.append(((like & hit[:, :-1]).sum(1) + 0.1) / (like.sum(1) + 1))
        middle = np.median(intervals[:, :9], axis=1)
        columns += [middle, elapsed / middle, np.std(intervals[:, :9], axis=1) / middle]
        return np.stack(columns, 1)

    def inputs(self, v, t):
        columns, x, sums = [], self.x, self.sums
        for label, margin in ((self.label, self.reach), (self.wide, self.reach + 3)):
            days = [ahead(label, v, t - DAY * k) for k in range(1, 29)]
            month = np.nan_to_num(np.stack(days))
            columns += days[:7] + [days[13], days[20], days[27]] if label is self.label else []
            columns += [month[:7].mean(0), month[:14].mean(0), month.mean(0), month[6::7].mean(0)]
            columns += [(1 - k) * (k ** np.arange(28) @ month) for k in (0.7, 0.85, 0.93)]
            hours = [ahead(label, v, t - HOUR * k) for k in range(1, 25)]
            columns += hours[:12] if label is self.label else []
            columns += [np.mean(hours[k - 1 :: k], 0) for k in (1, 2, 3, 4, 6, 12)]
            for step in (2, 3, 4, 6, 8, 12):
                week = [ahead(label, v, t - HOUR * step * k) for k in range(1, 168 // step + 1)]
                columns.append(np.mean(week, 0))
        for off in (6, 18):
            near = [ahead(self.label, v, t - DAY * k + d) for k in range(1, 15) for d in (-off, off)]
            columns.append(np.nanmean(near, 0))
        rhythm = np.empty((len(v), 16), dtype=np.float32)
        for volume in np.unique(v):
            rhythm[v == volume] = self.rhythm(volume, t[v == volume])
        columns += list(rhythm.T)
        busy = np.cumsum(np.pad(self.burst, ((0, 0), (1, 0))), 1)
        for bins in (6, HOUR, 3 * HOUR, DAY, WEEK, 4 * WEEK):
            low = np.maximum(t + 1 - bins, 0)
            columns += [busy[v, t + 1] - busy[v, low], sums[v, t + 1] - sums[v, low]]
        average, spread = self.day
        mean, high = average[v, t], self.threshold[v, t]
        scale = np.maximum(np.maximum(high - mean, spread[v, t]), 0.1)
        z = lambda values: (values - high) / scale
        recent = [z(ahead(x, v, t - k)) for k in range(12)]
        columns += recent[:8] + [np.max(recent, 0), np.mean(recent, 0), np.std(recent, 0)]
        columns += [z(level[v, t]) for level in self.levels]
        columns += [z(mean), np.log(scale), high, spread[v, t]]
        for k in (1, 2, 3, 4, 5, 6, 7, 14, 28):
            columns.append(z(ahead(self.ahead, v, t - DAY * k)))
        columns += [z(ahead(self.ahead, v, t - HOUR * k)) for k in (1, 2, 3, 4, 6, 12)]
        columns += clock(self.truth, t)
        return np.stack(columns, 1).astype(np.float32)


class Windows:
    """Inputs of how dear each start in an interval is, known when the interval begins. Intervals are
    counted from the Unix epoch; arrays are (volumes, intervals, starts in the interval)."""

    def __init__(self, truth, interval, length):
        self.truth, self.interval, self.x = truth, interval, np.log1p(truth.filled)
        n = self.x.shape[1]
        first = (-truth.start // BIN) % interval
        self.starts = np.arange(first, n - interval + 1, interval)
        sums = np.cumsum(np.pad(truth.filled, ((0, 0), (1, 0))), 1)
        offsets = np.arange(interval - length + 1)
        at = self.starts[:, None] + offsets
        loads = (sums[:, at + length] - sums[:, at]) / length
        self.log = np.log1p(loads)
        best, middle = loads.min(-1, keepdims=True), loads.mean(-1, keepdims=True)
        self.spread = (middle - best)[..., 0]
        self.regret = np.minimum((loads - best) / np.maximum(middle - best, 1e-9), 5)
        self.centred = self.log - self.log.mean(-1, keepdims=True)
        self.rank = loads.argsort(-1).argsort(-1) / max(len(offsets) - 1, 1)
        missing = np.isnan(truth.load)[:, self.starts[:, None] + np.arange(interval)]
        self.known = ~missing.any(-1)
        self.moments = [rolling(self.x, n) for n in (3, HOUR, DAY)]
        self.levels = [score.ewma(self.x, alpha) for alpha in (0.3, 0.1)]

    def inputs(self, v, i, p):
        """For volumes, numbers of intervals, and starts in the interval."""
        per_day = DAY // self.interval
        last = self.starts[i] - 1
        mean, sd = (m[v, last] for m in self.moments[2])
        sd = np.maximum(sd, 0.1)
        z = lambda values: (values - mean) / sd
        width = self.rank.shape[2]

        def back(a, k, off=0):
            return np.where(i >= k, a[v, np.maximum(i - k, 0), np.clip(p + off, 0, width - 1)], np.nan)

        columns = [p, mean, sd, *clock(self.truth, self.starts[i] + p)]
        columns += [z(ahead(self.x, v, last - k)) for k in range(4)]
        columns += [z(m[v, last]) for m, _ in self.moments[:2]] + [z(x[v, last]) for x in self.levels]
        days = np.arange(1, 29) * per_day
        steps = [(days, (0.7, 0.85, 0.95, 1.0))]
        if per_day > 1:
            steps.append((np.arange(1, min(2 * per_day, 24) + 1), (0.6, 0.8, 0.9, 1.0)))
        near = max(1, width // 24)
        for lags, keeps in steps:
            for a in (self.regret, self.centred, self.rank):
                past = np.stack([back(a, k) for k in lags])
                columns += list(past[: 7 if a is not self.rank else 2])
                known = ~np.isnan(past)
                for keep in keeps:
                    weight = keep ** np.arange(len(lags))[:, None] * known
                    columns.append((np.nan_to_num(past) * weight).sum(0) / weight.sum(0))
                columns += list(np.sort(past[:7], axis=0)[[1, 3, 5]])
                if width > 1:
                    for off in (-near, -1, 1, near):
                        columns.append(np.nanmean([back(a, k, off) for k in lags[:14]], 0))
            columns += [z(back(self.log, k)) for k in lags[:3]]
        columns.append(back(self.regret, 7 * per_day))
        columns.append(back(self.regret, 14 * per_day))
        at = self.starts[i] + p
        for phase in (1, 3, 6):
            step = phase * HOUR
            newest = p // step + 1
            lags = [z(ahead(self.x, v, at - step * (newest + k))) for k in range(6)]
            columns += lags[:2] + [np.mean(lags, 0)]
        return np.stack(columns, 1).astype(np.float32)


def grid(*axes):
    return [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]


def drawn(rows, most):
    """At most so many of the rows, drawn by the seed."""
    chosen = np.random.default_rng(SEED).permutation(len(rows[0]))[:most]
    return [column[np.sort(chosen)] for column in rows]


def trained(inputs, target, rounds, **more):
    more = {"bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.3, **PARAMS, **more}
    weight, start = more.pop("weight", None), more.pop("start", None)
    data = lgb.Dataset(inputs, target, weight=weight, init_score=start, params=PARAMS)
    return lgb.train(more, data, rounds)


def times(truth, bins):
    """Bins, or ends of bins given the next ones, as the times at which they start."""
    return pa.array((truth.start + bins * BIN) * 1_000_000, pa.timestamp("us", "UTC"))


def load(truth, first):
    """Forecasts with the last known bin from `first - 1` on, trained on targets before `first`."""
    make, volumes, leads = Load(truth), np.arange(len(truth.names)), np.arange(1, LEADS + 1)
    origins = make.origins
    begin = np.nonzero((origins >= WEEK) & (origins + LEADS < first))[0]
    v, i, lead = grid(volumes, begin, leads)
    known = ~np.isnan(truth.load[v, origins[i] + lead])
    v, i, lead = drawn([v[known], i[known], lead[known]], 150_000)
    x, t = make.inputs(v, i, lead), origins[i]
    y = (make.x[v, t + lead] - make.mean[v, t]) / make.sd[v, t]
    asked = grid(volumes, np.nonzero(origins >= first - 1)[0], leads)
    x_asked, t_asked = make.inputs(*asked), origins[asked[1]]
    begin, begin_asked = make.simple(v, i), make.simple(*asked[:2])
    out = begin_asked.copy()
    tree = {"num_leaves": 127, "min_data_in_leaf": 20, "learning_rate": 0.07}
    for k, level in enumerate(score.LEVELS):
        for seed in (1, 2):
            more = {"objective": "quantile", "alpha": level, "start": begin[:, k], **tree}
            model = trained(x, y, 70, **{**more, "seed": seed})
            out[:, k] += model.predict(x_asked, num_threads=1) / 2
    mean, sd = (a[asked[0], t_asked][:, None] for a in (make.mean, make.sd))
    out = np.sort(np.maximum(np.expm1(np.clip(out, -8, 12) * sd + mean), 0) * 1024, 1)
    columns = {
        "volume": [truth.names[n] for n in asked[0]],
        "issued_at": times(truth, t_asked + 1),
        "target_start": times(truth, t_asked + asked[2]),
    }
    return columns | {f"q{round(100 * q)}": out[:, k] for k, q in enumerate(score.LEVELS)}


def bursts(truth, first):
    make = Bursts(truth)
    v, t = np.nonzero(make.quiet[:, : first - make.reach])
    late = t >= 2 * WEEK
    v, t = drawn([v[late], t[late]], 200_000)
    tree = {"num_leaves": 31, "min_data_in_leaf": 200, "learning_rate": 0.05}
    model = trained(make.inputs(v, t), make.label[v, t], 180, objective="binary", **tree)
    v, t = grid(np.arange(len(truth.names)), np.arange(first - 1, truth.load.shape[1]))
    p = model.predict(make.inputs(v, t), num_threads=1)
    return {
        "volume": [truth.names[n] for n in v],
        "issued_at": times(truth, t + 1),
        "probability": p,
        "alarm": p >= 0.5,
    }


def windows(truth, first, interval, length):
    """The start of least regret in every interval that begins at `first` or later."""
    make, volumes = Windows(truth, interval, length), np.arange(len(truth.names))
    places = np.arange(make.rank.shape[2])
    past = make.starts + interval <= first
    usual = np.mean(make.spread, 1, where=make.known & past) + 1e-9
    v, i, p = grid(volumes, np.nonzero(past & (make.starts >= WEEK))[0], places)
    useful = make.known[v, i] & (make.spread[v, i] > 1e-9)
    v, i, p = drawn([v[useful], i[useful], p[useful]], 200_000)
    x = make.inputs(v, i, p)
    weight = np.minimum(make.spread[v, i] / usual[v], 5) + 0.05
    asked = grid(volumes, np.nonzero(make.starts >= first)[0], places)
    x_asked = make.inputs(*asked)
    tree = {"num_leaves": 31, "min_data_in_leaf": 200, "learning_rate": 0.05}
    dear = np.zeros(len(asked[0]))
    for target, weighs in ((np.minimum(make.regret, 2), weight), (make.regret**0.5, None)):
        model = trained(x, target[v, i, p], 150, weight=weighs, **tree)
        answer = model.predict(x_asked, num_threads=1)
        dear += answer / answer.std()
    best = dear.reshape(-1, len(places)).argmin(1)
    begin = make.starts[asked[1].reshape(-1, len(places))[:, 0]]
    return {
        "volume": [truth.names[n] for n in asked[0][:: len(places)]],
        "interval_start": times(truth, begin),
        "window_start": times(truth, begin + best),
        "member": [MEMBER] * len(best),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("load", "bursts", "windows"))
    parser.add_argument("truth", help="Parquet: volume, ts (s), read_kbs, write_kbs")
    parser.add_argument("--from", dest="begin", required=True, help="as 2013-09-03T22:00:00Z")
    parser.add_argument("--out", required=True, help="Parquet")
    parser.add_argument("--interval", type=int, default=288, help="bins")
    parser.add_argument("--length", type=int, default=6, help="bins")
    args = parser.parse_args()
    np.seterr(invalid="ignore", divide="ignore")
    warnings.filterwarnings("ignore")  # means of nothing: no history yet
    truth = score.Truth(args.truth)
    begin = datetime.datetime.fromisoformat(args.begin.replace("Z", "+00:00"))
    first = int(truth.bin_of(begin.timestamp()))
    if args.what == "windows":
        columns = windows(truth, first, args.interval, args.length)
    else:
        columns = {"load": load, "bursts": bursts}[args.what](truth, first)
    pq.write_table(pa.table(columns), args.out)


if __name__ == "__main__":
    main()
