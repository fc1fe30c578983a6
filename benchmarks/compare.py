"""Two runs of a benchmark, with status 1 where the second is slower: ``python -m benchmarks.compare A.json B.json``.

The ratio is A's median over B's, how many times as fast B is; its noise what it is from 20 to 80 % of both runs' times.
Slower or faster is a ratio whose noise does not reach 1. What differs in the machines is told first.
"""

import argparse
import json
import sys
from pathlib import Path

from . import harness


def key_of(row):
    return tuple(text(row) for text in harness.WHAT.values())


def in_unit(row, to_eager):
    """20, 50 and 80 % of the times, in milliseconds, or in what eager takes in the same run."""
    unit = row["median_ms"] * row["ratio_to_eager"] if to_eager else 1
    return tuple(row[name] / unit for name in ("p20_ms", "median_ms", "p80_ms"))


def compare(first, second, to_eager):
    """Rows of what is in both: the ratio, its least and its largest."""
    firsts = {key_of(row): row for row in first}
    rows = []
    for row in second:
        if key_of(row) in firsts:
            a, b = (in_unit(of, to_eager) for of in (firsts[key_of(row)], row))
            rows.append({**row, "ratio": a[1] / b[1], "least": a[0] / b[2], "largest": a[2] / b[0]})
    return rows


def verdict(row):
    return "SLOWER" if row["largest"] < 1 else "faster" if row["least"] > 1 else ""


COLUMNS = {
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "noise": lambda row: f"{row['least']:.2f} to {row['largest']:.2f}",
    "": verdict,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs=2, metavar="FILE", help="JSON of a benchmark")
    parser.add_argument("--to-eager", action="store_true", help="in what eager takes in the same run: other machines")
    args = parser.parse_args(argv)
    first, second = (json.loads(path.read_text()) for path in args.files)
    rows = compare(first["rows"], second["rows"], args.to_eager)
    if not rows:
        parser.error("the files have no row in common")
    for name, value in second["machine"].items():
        if name != "busy_percent" and value != first["machine"].get(name):
            print(f"{name}: {first['machine'].get(name)}, then {value}")
    for path, run in zip(args.files, (first, second), strict=True):
        harness.warn_of_others(run["machine"], f"{path}: ")
    harness.print_table(rows, harness.WHAT | COLUMNS)
    left_out = len(first["rows"]) + len(second["rows"]) - 2 * len(rows)
    slower = sum(verdict(row) == "SLOWER" for row in rows)
    print(f"{slower} of {len(rows)} slower beyond noise; {left_out} rows are in one file alone")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
