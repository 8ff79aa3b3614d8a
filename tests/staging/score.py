"""Scores what `soe backtest staging` chose against the trace; shares no code with SOE.

hit: the share of the reads of blocks in bursts that the staged set served, a block overwritten before being
of no use; precision: the share of what was staged that was read. Beside it, at the same number of blocks for
every burst: the blocks accessed last before it (lru), those read most often before it (frequent), and the
best that can be chosen with the burst in sight (oracle).
"""

import argparse
import collections
import csv
import json

import numpy as np
import pyarrow.parquet as pq


def served(window, staged):
    """(reads served, blocks used) of the accesses of a burst by a set of blocks."""
    left, used, hits = set(staged), set(), 0
    for block, write in window:
        if block not in left:
            continue
        if write:
            left.discard(block)
        else:
            hits += 1
            used.add(block)
    return hits, len(used)


def gains(window):
    """How many reads each block would serve if it were staged."""
    counts, lost = collections.Counter(), set()
    for block, write in window:
        if write:
            lost.add(block)
        elif block not in lost:
            counts[block] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("accesses")
    parser.add_argument("bursts")
    parser.add_argument("chosen")
    parser.add_argument("--block", type=int, default=4096)
    args = parser.parse_args()
    table = pq.read_table(args.chosen, columns=["burst_start", "rank", "offset"])
    starts = table["burst_start"].to_numpy().astype("datetime64[us]").astype(np.int64)
    order = np.lexsort((table["rank"].to_numpy(), starts))
    chosen = collections.defaultdict(list)
    for start, offset in zip(starts[order].tolist(), table["offset"].to_numpy()[order].tolist()):
        chosen[start].append(offset // args.block)

    with open(args.bursts) as file:
        bursts = [(int(b["start_us"]), int(b["end_us"])) for b in csv.DictReader(file)]
    recent, frequent = collections.OrderedDict(), collections.Counter()
    window, at = [], 0
    sums = collections.defaultdict(list)

    def close(start):
        reads = sum(1 for _, write in window if not write)
        if not reads:
            return
        staged = chosen[start]
        hits, used = served(window, staged)
        sums["hit"].append(hits / reads)
        sums["precision"].append(used / max(len(staged), 1))
        best = gains(window).most_common(len(staged))
        sums["oracle"].append(sum(n for _, n in best) / reads)
        sums["lru"].append(served(window, candidates["lru"])[0] / reads)
        sums["frequent"].append(served(window, candidates["frequent"])[0] / reads)

    candidates, open_burst = {}, None
    with open(args.accesses) as file:
        for row in csv.DictReader(file):
            ts, write = int(row["ts_us"]), row["op"] != "R"
            while open_burst and ts >= open_burst[1]:
                close(open_burst[0])
                open_burst, window = None, []
            while at < len(bursts) and bursts[at][0] <= ts:
                open_burst, at = bursts[at], at + 1
                window = []
                size = len(chosen[open_burst[0]])
                candidates["lru"] = list(recent)[-size:] if size else []
                candidates["frequent"] = [b for b, _ in frequent.most_common(size)]
            first = int(row["offset"]) // args.block
            last = (int(row["offset"]) + int(row["length"]) - 1) // args.block
            for block in range(first, last + 1):
                if open_burst:
                    window.append((block, write))
                recent[block] = None
                recent.move_to_end(block)
                if not write:
                    frequent[block] += 1
    if open_burst:
        close(open_burst[0])
    print(json.dumps({name: float(np.mean(values)) for name, values in sums.items()} | {"bursts": len(sums["hit"])}))


if __name__ == "__main__":
    main()
