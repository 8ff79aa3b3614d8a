"""Turns a trace (Parquet: volume, ts in s, read_kbs, write_kbs; bins of five minutes) into the `series`
format of `soe trace import`, and prints when its last 27 days begin."""

import datetime
import math
import sys

import pyarrow.parquet as pq

BIN, JUDGED = 300, 27 * 86400


def main(trace, out):
    table = pq.read_table(trace).to_pydict()
    with open(out, "w") as file:
        file.write("ts_s,volume,read_ops,write_ops,read_bytes,write_bytes\n")
        for volume, ts, read, write in zip(
            table["volume"], table["ts"], table["read_kbs"], table["write_kbs"]
        ):
            known = all(v is not None and not math.isnan(v) for v in (read, write))
            cells = [f"{v * 1024 * BIN:.0f}" if known else "" for v in (read, write)]
            file.write(f"{ts},{volume},,,{','.join(cells)}\n")
    begin = max(table["ts"]) + BIN - JUDGED
    print(datetime.datetime.fromtimestamp(begin, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))


if __name__ == "__main__":
    main(*sys.argv[1:])
