"""`python -m benchmarks`."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import cases, harness, memory, report

ROUNDS = 150
KEYS = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure what guarding a call costs, beside the peers."
    )
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument("--only", metavar="NAME", default="", help="only the cases whose name contains NAME")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer keys: rough numbers, soon")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases.CASES if options.only.lower() in case.name.lower()]
    measures_memory = options.only.lower() in memory.CASE.lower()
    if not chosen and not measures_memory:
        names = sorted({case.name for case in cases.CASES} | {memory.CASE})
        parser.error(f"no case is called {options.only!r}; there are {', '.join(names)}")
    rounds, keys = (ROUNDS // 5, KEYS // 20) if options.quick else (ROUNDS, KEYS)
    rows = []
    for case in chosen:
        _progress(options.json, f"{case.name}, {case.colour}")
        rows += harness.measure(case, rounds=rounds)
    memory_rows = []
    if measures_memory:
        _progress(options.json, memory.CASE)
        memory_rows = memory.measure(keys)
    _progress(options.json, "")
    print(
        report.as_json(rows, memory_rows, rounds) if options.json else report.as_table(rows, memory_rows, rounds)
    )
    return 0


def _progress(quiet: bool, what: str) -> None:  # noqa: FBT001 - the only argument that varies is the text
    if not quiet and sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
