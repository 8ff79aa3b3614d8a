"""Turns block traces into the CSV of `soe trace import` and a CSV of bursts.

ARC traces (`.lis`: first 512-byte block, blocks, counter, request; order only) become reads a millisecond
apart. Their bursts are the first accesses of every value of the counter, which behaves like a day; where
there is one value only, a stretch at regular distances. CloudPhysics traces keep their own times.
"""

import argparse
import csv
import subprocess

DAY_REQUESTS = 3_000  # of each value of the counter
STRETCH, EVERY = 20_000, 50_000  # without a counter
TIMED_STRETCH, TIMED_EVERY = 2_000, 10_000  # of a trace with times of its own


def lines(path):
    command = ["zstdcat", path] if path.endswith(".zst") else ["cat", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield from process.stdout


def arc(path):
    for nth, line in enumerate(lines(path)):
        start, count, counter, _ = (int(field) for field in line.split())
        yield nth * 1000, "R", start * 512, count * 512, counter


def timed(path):
    for row in csv.DictReader(lines(path)):
        yield int(row["ts_us"]), row["op"], int(row["offset"]), int(row["len"]), None


def bursts(rows, counted):
    """Index ranges [start, end) of the bursts."""
    if not counted:
        return [(i, min(i + TIMED_STRETCH, len(rows))) for i in range(TIMED_EVERY, len(rows), TIMED_EVERY)]
    starts = [i for i in range(1, len(rows)) if rows[i][4] != rows[i - 1][4]]
    if len(starts) < 5:
        return [(i, min(i + STRETCH, len(rows))) for i in range(EVERY, len(rows), EVERY)]
    ends = starts[1:] + [len(rows)]
    return [(start, min(start + DAY_REQUESTS, end)) for start, end in zip(starts, ends)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("volume")
    parser.add_argument("accesses")
    parser.add_argument("bursts")
    args = parser.parse_args()
    counted = ".lis" in args.trace
    rows = list(arc(args.trace) if counted else timed(args.trace))
    # Requests of one microsecond must stay in their order.
    last, times = -1, []
    for row in rows:
        last = max(row[0], last + 1)
        times.append(last)
    with open(args.accesses, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["ts_us", "volume", "op", "offset", "length"])
        for ts, (_, op, offset, length, _) in zip(times, rows):
            out.writerow([ts, args.volume, op, offset, length])
    with open(args.bursts, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["volume", "start_us", "end_us"])
        for start, end in bursts(rows, counted):
            out.writerow([args.volume, times[start], times[end - 1] + 1])


if __name__ == "__main__":
    main()
