"""Reads every table of a history with DuckDB and pyarrow and prints what they see as JSON.

usage: read_history.py DIR

The two must agree with each other; the caller compares the figures with what was written.
"""

import json
import pathlib
import sys

import duckdb
import pyarrow
import pyarrow.dataset
import pyarrow.parquet

TABLES = [
    "volume_stats",
    "region_heat",
    "io_trace",
    "app_stats",
    "events",
    "layers",
    "decisions",
    "forecasts",
    "staging",
]


def values(table: pyarrow.Table, column: str) -> list:
    """A column's values in the order of time, times in nanoseconds."""
    found = table.sort_by("ts").column(column)
    if not pyarrow.types.is_timestamp(found.type):
        return found.to_pylist()
    scale = {"us": 1000, "ns": 1}[found.type.unit]
    numbers = found.cast(pyarrow.int64()).to_pylist()
    return [None if number is None else number * scale for number in numbers]


def one_table(root: pathlib.Path, table: str) -> dict:
    pattern = str(root / table / "**" / "*.parquet")
    source = f"read_parquet('{pattern}', hive_partitioning = true)"
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    rows, first, last = connection.execute(
        f"SELECT count(*), min(epoch_ns(ts)), max(epoch_ns(ts)) FROM {source}"
    ).fetchone()
    hours = connection.execute(
        f"SELECT count(*) FROM {source} WHERE CAST(dt AS DATE) <> CAST(ts AS DATE)"
        f" OR CAST(hour AS BIGINT) <> extract(hour FROM ts)"
    ).fetchone()[0]
    dataset = pyarrow.dataset.dataset(root / table, format="parquet", partitioning="hive")
    arrow = dataset.to_table().drop_columns(["dt", "hour"])
    columns = arrow.column_names
    if arrow.num_rows != rows:
        raise SystemExit(f"{table}: DuckDB sees {rows} rows, pyarrow {arrow.num_rows}")
    # Every value of every column, as both see it.
    duck = connection.execute(f"SELECT * EXCLUDE (dt, hour) FROM {source}").to_arrow_table()
    if duck.column_names != columns:
        raise SystemExit(f"{table}: columns differ: {duck.column_names} and {columns}")
    for column in columns:
        mine, others = values(duck, column), values(arrow, column)
        if mine != others:
            raise SystemExit(f"{table}.{column}: DuckDB and pyarrow see different values")
    versions, indexed, codecs = set(), True, set()
    for path in sorted((root / table).rglob("*.parquet")):
        metadata = pyarrow.parquet.ParquetFile(path).metadata
        versions.add(metadata.metadata[b"soe.schema_version"].decode())
        for group in range(metadata.num_row_groups):
            for column in range(metadata.row_group(group).num_columns):
                chunk = metadata.row_group(group).column(column)
                indexed = indexed and chunk.has_offset_index
                codecs.add(chunk.compression)
    return {
        "rows": rows,
        "first_ns": first,
        "last_ns": last,
        "misplaced": hours,
        "columns": columns,
        "versions": sorted(versions),
        "page_index": indexed,
        "codecs": sorted(codecs),
    }


def main() -> None:
    root = pathlib.Path(sys.argv[1])
    seen = {table: one_table(root, table) for table in TABLES}
    stats = str(root / "volume_stats" / "**" / "*.parquet")
    seen["sums"] = duckdb.connect().execute(
        "SELECT sum(read_ops)::BIGINT, sum(read_bytes)::BIGINT,"
        " sum(list_sum(list_transform(read_latency_histogram, lambda b: b.count)))::BIGINT,"
        f" count(*) FILTER (write_bytes IS NULL) FROM read_parquet('{stats}')"
    ).fetchone()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
