"""The result as a table and as data."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby

from benchmarks.harness import BARE, OURS, Row
from benchmarks.memory import MemoryRow

_NAME = 40


def as_table(rows: Sequence[Row], memory: Sequence[MemoryRow], rounds: int) -> str:
    """Return the cases one by one, each with this library first and the others from fast to slow."""
    lines = [f"{platform.python_implementation()} {platform.python_version()}, fastest of {rounds} batches each"]
    for (name, colour), group in groupby(rows, lambda row: (row.case, row.colour)):
        lines += ["", _line(f"{name}, {colour}", "ns", "x bare", "target", "")]
        lines += [
            _line(f"  {row.subject}", _ns(row), _ratio(row), _target(row), row.note) for row in _sorted(group)
        ]
    if memory:
        lines += ["", _line(f"{memory[0].case}, {memory[0].keys:,} keys", "B/key", "", "target", "")]
        lines += [_line(f"  {row.subject}", _bytes(row), "", _target(row), row.note) for row in memory]
    return "\n".join(lines + _summary(rows, memory))


def as_json(rows: Sequence[Row], memory: Sequence[MemoryRow], rounds: int) -> str:
    """Return the same as data."""
    return json.dumps(
        {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "rounds": rounds,
            "rows": [asdict(row) | {"met": row.met} for row in rows],
            "memory": [asdict(row) | {"met": row.met} for row in memory],
        },
        indent=2,
    )


def _summary(rows: Sequence[Row], memory: Sequence[MemoryRow]) -> list[str]:
    aimed = [row for row in (*rows, *memory) if row.target is not None]
    if not aimed:
        return []
    met = sum(row.met is True for row in aimed)
    missed = ", ".join(
        f"{row.case}, {row.colour}" if isinstance(row, Row) else row.case for row in aimed if not row.met
    )
    return ["", f"{met} of {len(aimed)} targets met{f'; not: {missed}' if missed else ''}"]


def _sorted(rows: Iterable[Row]) -> list[Row]:
    first = {BARE: 0, OURS: 1}
    return sorted(rows, key=lambda row: (first.get(row.subject, 2), row.ns is None, row.ns or 0.0))


def _line(*columns: str) -> str:
    name, number, ratio, target, note = columns
    return f"{name:<{_NAME}}{number:>10}{ratio:>10}  {target:<14}{note}".rstrip()


def _ns(row: Row) -> str:
    return "-" if row.ns is None else f"{row.ns:,.0f}"


def _ratio(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:,.1f}"


def _bytes(row: MemoryRow) -> str:
    return "-" if row.bytes_per_key is None else f"{row.bytes_per_key:,.0f}"


def _target(row: Row | MemoryRow) -> str:
    if row.target is None:
        return ""
    return f"<= {row.target:g} {'-' if row.met is None else 'met' if row.met else 'MISSED'}"
