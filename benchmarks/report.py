"""The result as a table and as data."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TypeAlias

from benchmarks import flood, overload, rolling_restart
from benchmarks.asgi import RIVAL, AddedRow
from benchmarks.flood import FloodRow
from benchmarks.harness import OURS, Row
from benchmarks.memory import MemoryRow
from benchmarks.overload import OverloadRow
from benchmarks.rolling_restart import RestartRow
from benchmarks.servers import ServerRow
from benchmarks.sockets import SocketRow

_NAME = 40
_CLOSE_TO_BARE = 2  # below, the third digit matters

AnyServerRow: TypeAlias = ServerRow | OverloadRow | FloodRow | RestartRow
AnyRow: TypeAlias = Row | MemoryRow | SocketRow | AnyServerRow


def as_table(
    rows: Sequence[Row],
    memory: Sequence[MemoryRow],
    rounds: int,
    sockets: Sequence[SocketRow] = (),
    servers: Sequence[AnyServerRow] = (),
) -> str:
    """Return the cases one by one, each with this library first and the others from fast to slow."""
    lines = [f"{platform.python_implementation()} {platform.python_version()}, fastest of {rounds} batches each"]
    for (name, colour), group in groupby(rows, lambda row: (row.case, row.colour)):
        lines += ["", _line(f"{name}, {colour}", "ns", "x bare", "target", "")]
        lines += [
            _line(f"  {row.subject}", _ns(row), _ratio(row), _target(row), _note(row)) for row in _sorted(group)
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
    for _case, group in groupby(servers, _case_of):
        served = list(group)
        lines += ["", _line(*_heading(served[0]))]
        lines += [_line(f"  {row.subject}", *_served(row)) for row in served]
    return "\n".join(lines + _summary([*rows, *memory, *sockets, *servers]))


def as_json(
    rows: Sequence[Row],
    memory: Sequence[MemoryRow],
    rounds: int,
    sockets: Sequence[SocketRow] = (),
    servers: Sequence[AnyServerRow] = (),
) -> str:
    """Return the same as data."""
    return json.dumps(
        {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "rounds": rounds,
            "rows": [asdict(row) | {"met": row.met} for row in rows],
            "memory": [asdict(row) | {"met": row.met} for row in memory],
            "sockets": [asdict(row) | {"met": row.met} for row in sockets],
            "servers": [{"case": _case_of(row)} | asdict(row) | {"met": row.met} for row in servers],
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
    if isinstance(row, SocketRow):
        return f"{row.case}, {row.package}, {row.colour}"
    return f"{row.case}, {row.colour}" if isinstance(row, Row) else _case_of(row)


def _case_of(row: MemoryRow | AnyServerRow) -> str:
    return rolling_restart.CASE if isinstance(row, RestartRow) else row.case


def _sorted(rows: Iterable[Row]) -> list[Row]:
    unit, *subjects = rows
    return [unit, *sorted(subjects, key=lambda row: (row.subject != OURS, row.ns is None, row.ns or 0.0))]


def _line(*columns: str) -> str:
    name, number, ratio, target, note = columns
    return f"{name:<{_NAME}}{number:>10}{ratio:>10}  {target:<22} {note}".rstrip()


def _ns(row: Row) -> str:
    return "-" if row.ns is None else f"{row.ns:,.0f}"


def _ratio(row: Row | SocketRow | ServerRow) -> str:
    if row.ratio is None:
        return "-"
    return f"{row.ratio:.3f}" if row.ratio < _CLOSE_TO_BARE else f"{row.ratio:,.1f}"


def _note(row: Row) -> str:
    """Say what a guard adds, if that is what counts."""
    if not isinstance(row, AddedRow) or row.added is None:
        return row.note
    share = "" if row.share is None else f", {row.share:.2f} of what {RIVAL} adds"
    return f"adds {row.added:.2f} of a request{share}{f'; {row.note}' if row.note else ''}"


def _bytes(row: MemoryRow) -> str:
    return "-" if row.bytes_per_key is None else f"{row.bytes_per_key:,.0f}"


def _per_second(row: SocketRow | ServerRow) -> str:
    return "-" if row.per_second is None else f"{row.per_second:,.0f}"


def _left(row: SocketRow) -> str:
    """Say what a client has used and left behind."""
    if row.blocks is None:
        return row.note
    tasks = "threads" if row.colour == "sync" else "tasks"
    grown = f"{row.sockets} sockets, {row.tasks} {tasks}, {row.blocks:,} blocks of memory"
    return f"connections: {row.connections}; grown by {grown}"


def _heading(row: AnyServerRow) -> tuple[str, str, str, str, str]:
    """Return the first line of a case of servers."""
    if isinstance(row, ServerRow):
        return f"{row.case}, {row.requests:,} requests", "a second", "x bare", "target", ""
    if isinstance(row, OverloadRow):
        return f"{row.case}, {overload.TIMES} times, {row.seconds:g} s", "goodput", "x p99", "target", ""
    if isinstance(row, FloodRow):
        return f"{row.case}, {row.keys:,}", "kept", "x memory", "target", ""
    return f"{rolling_restart.CASE}, {row.requests:,} requests", "failed", "", "target", ""


def _served(row: AnyServerRow) -> tuple[str, str, str, str]:
    """Return the columns of a row of servers, but for its name."""
    if row.note:
        return "-", "-", _target(row), row.note
    if isinstance(row, ServerRow):
        cpu = f"{row.cpu:.0f} us of the processor for a request, {row.added_cpu:+.0%}"
        return _per_second(row), _ratio(row), _target(row), cpu
    if isinstance(row, OverloadRow):
        return f"{row.goodput:.1%}", _slower(row), _target(row), _under_load(row)
    if isinstance(row, FloodRow):
        grown = f"{row.at_the_end / 1e6:.1f} MB; {row.refused:,} newcomers refused"
        again = f"admitted {row.admitted} of {row.tries:,} times, {row.allowed} allowed"
        ratio = f"{row.at_the_end / row.at_the_cap:.3f}"
        return f"{row.remembered:,}", ratio, _target(row), f"{grown}; who had used up his limit: {again}"
    reasons = "".join(f", {reason}: {times:,}" for reason, times in sorted(row.failed.items()))
    note = f"{row.restarts} restarts, p99 {row.p99:.0f} ms{reasons}"
    return f"{sum(row.failed.values()):,}", "", _target(row), note


def _slower(row: OverloadRow) -> str:
    return f"{row.p99 / row.unloaded_p99:.2f}" if row.p99 and row.unloaded_p99 else "-"


def _under_load(row: OverloadRow) -> str:
    """Say what became of the requests that were too many."""
    times = " and ".join("-" if each is None else f"{each * 1000:.0f} ms" for each in (row.unloaded_p99, row.p99))
    grown = "" if row.grown is None else f"; grown by {row.grown / 1e6:.1f} MB"
    of_many = f"of {row.requests:,} requests {row.refused:,} refused, {row.late:,} given up"
    return f"second half {row.at_the_end:.1%}; p99 {times}; {of_many}{grown}"


def _aim(row: AnyRow) -> str:
    if isinstance(row, SocketRow):
        return "no leak" if row.target is None else f">= {row.target:g}, no leak"
    if isinstance(row, OverloadRow):
        return f">= {overload.GOODPUT:.0%}, <= {overload.P99:g}, flat" if row.subject == OURS else ""
    if isinstance(row, FloodRow):
        return f"<= {flood.SPREAD:g}, none let in"
    if isinstance(row, RestartRow):
        return "none" if row.subject == rolling_restart.WITH else ""
    if isinstance(row, ServerRow):
        return "" if row.target is None else f">= {row.target:g}"
    aims = [] if row.target is None else [f"<= {row.target:g}"]
    if isinstance(row, Row) and row.to_beat is not None:
        aims.append(f"< {row.to_beat:.3f}")
    if isinstance(row, AddedRow) and row.most_share is not None:
        aims.append(f"share <= {row.most_share:.2f}")
    return ", ".join(aims)


def _target(row: AnyRow) -> str:
    aim = _aim(row)
    return f"{aim} {'-' if row.met is None else 'met' if row.met else 'MISSED'}" if aim else ""
