"""The result as a table and as data."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TypeAlias

from benchmarks.harness import OURS, Row
from benchmarks.memory import MemoryRow
from benchmarks.sockets import SocketRow

_NAME = 40
_CLOSE_TO_BARE = 2  # below, the third digit matters

AnyRow: TypeAlias = Row | MemoryRow | SocketRow


def as_table(
    rows: Sequence[Row], memory: Sequence[MemoryRow], rounds: int, sockets: Sequence[SocketRow] = ()
) -> str:
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
    for case, group in groupby(sockets, lambda row: row.case):
        measured = list(group)
        lines += ["", _line(f"{case}, {measured[0].requests:,}", "a second", "x bare", "target", "")]
        lines += [
            _line(f"  {row.package}, {row.colour}", _per_second(row), _ratio(row), _target(row), _left(row))
            for row in measured
        ]
    return "\n".join(lines + _summary([*rows, *memory, *sockets]))


def as_json(
    rows: Sequence[Row], memory: Sequence[MemoryRow], rounds: int, sockets: Sequence[SocketRow] = ()
) -> str:
    """Return the same as data."""
    return json.dumps(
        {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "rounds": rounds,
            "rows": [asdict(row) | {"met": row.met} for row in rows],
            "memory": [asdict(row) | {"met": row.met} for row in memory],
            "sockets": [asdict(row) | {"met": row.met} for row in sockets],
        },
        indent=2,
    )


def _summary(rows: Sequence[AnyRow]) -> list[str]:
    aimed = [row for row in rows if _aim(row)]
    if not aimed:
        return []
    met = sum(row.met is True for row in aimed)
    missed = "; ".join(_name_of(row) for row in aimed if not row.met)
    return ["", f"{met} of {len(aimed)} targets met{f'; not: {missed}' if missed else ''}"]


def _name_of(row: AnyRow) -> str:
    if isinstance(row, MemoryRow):
        return row.case
    return f"{row.case}, {row.colour}" if isinstance(row, Row) else f"{row.case}, {row.package}, {row.colour}"


def _sorted(rows: Iterable[Row]) -> list[Row]:
    unit, *subjects = rows
    return [unit, *sorted(subjects, key=lambda row: (row.subject != OURS, row.ns is None, row.ns or 0.0))]


def _line(*columns: str) -> str:
    name, number, ratio, target, note = columns
    return f"{name:<{_NAME}}{number:>10}{ratio:>10}  {target:<22} {note}".rstrip()


def _ns(row: Row) -> str:
    return "-" if row.ns is None else f"{row.ns:,.0f}"


def _ratio(row: Row | SocketRow) -> str:
    if row.ratio is None:
        return "-"
    return f"{row.ratio:.3f}" if row.ratio < _CLOSE_TO_BARE else f"{row.ratio:,.1f}"


def _bytes(row: MemoryRow) -> str:
    return "-" if row.bytes_per_key is None else f"{row.bytes_per_key:,.0f}"


def _per_second(row: SocketRow) -> str:
    return "-" if row.per_second is None else f"{row.per_second:,.0f}"


def _left(row: SocketRow) -> str:
    """Say what a client has used and left behind."""
    if row.blocks is None:
        return row.note
    tasks = "threads" if row.colour == "sync" else "tasks"
    grown = f"{row.sockets} sockets, {row.tasks} {tasks}, {row.blocks:,} blocks of memory"
    return f"connections: {row.connections}; grown by {grown}"


def _aim(row: AnyRow) -> str:
    if isinstance(row, SocketRow):
        return "no leak" if row.target is None else f">= {row.target:g}, no leak"
    aims = [] if row.target is None else [f"<= {row.target:g}"]
    if isinstance(row, Row) and row.to_beat is not None:
        aims.append(f"< {row.to_beat:.3f}")
    return ", ".join(aims)


def _target(row: AnyRow) -> str:
    aim = _aim(row)
    return f"{aim} {'-' if row.met is None else 'met' if row.met else 'MISSED'}" if aim else ""
