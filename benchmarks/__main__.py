"""`python -m benchmarks`."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import (
    asgi,
    cases,
    clients,
    flood,
    harness,
    memory,
    overload,
    report,
    rolling_restart,
    servers,
    sockets,
)

ROUNDS = 150
KEYS = 1_000_000
REQUESTS = 10_000
SERVERS: Mapping[str, Callable[[bool], list[Any]]] = {
    servers.CASE: lambda quick: servers.measure(servers.REQUESTS // 5 if quick else servers.REQUESTS),
    overload.CASE: lambda quick: overload.measure(overload.SECONDS / 4 if quick else overload.SECONDS),
    flood.CASE: lambda quick: flood.measure(flood.KEYS // 5 if quick else flood.KEYS),
    rolling_restart.CASE: lambda quick: rolling_restart.measure(
        rolling_restart.REQUESTS // 5 if quick else rolling_restart.REQUESTS
    ),
}
"""What measures the cases of servers, by name; each is told whether to be quick."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Measure what guarding a call costs, beside the peers."
    )
    parser.add_argument("--json", action="store_true", help="print data instead of a table")
    parser.add_argument("--only", metavar="NAME", default="", help="only the cases whose name contains NAME")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer keys: rough numbers, soon")
    options = parser.parse_args(arguments)
    every = [*cases.CASES, *clients.CASES, *asgi.CASES]
    chosen = [case for case in every if _is_named(case.name, options.only)]
    chosen_memory = _is_named(memory.CASE, options.only)
    chosen_sockets = [case for case in sockets.CASES if _is_named(case, options.only)]
    chosen_servers = [case for case in SERVERS if _is_named(case, options.only)]
    if not (chosen or chosen_memory or chosen_sockets or chosen_servers):
        names = sorted({case.name for case in every} | {memory.CASE, *sockets.CASES, *SERVERS})
        parser.error(f"no case is called {options.only!r}; there are {', '.join(names)}")
    quick = options.quick
    rounds = ROUNDS // 5 if quick else ROUNDS
    rows, memory_rows, socket_rows, server_rows = [], [], [], []
    for case in chosen:
        _progress(options.json, f"{case.name}, {case.colour}")
        rows += asgi.compared(harness.measure(case, rounds=rounds * case.rounds))
    if chosen_memory:
        _progress(options.json, memory.CASE)
        memory_rows = memory.measure(KEYS // 20 if quick else KEYS)
    for name in chosen_sockets:
        _progress(options.json, name)
        socket_rows += sockets.measure(name, REQUESTS // 5 if quick else REQUESTS)
    for name in chosen_servers:
        _progress(options.json, name)
        server_rows += SERVERS[name](quick)
    _progress(options.json, "")
    show = report.as_json if options.json else report.as_table
    print(show(rows, memory_rows, rounds, socket_rows, server_rows))
    return 0


def _is_named(name: str, part: str) -> bool:
    return part.lower() in name.lower()


def _progress(quiet: bool, what: str) -> None:  # noqa: FBT001 - the only argument that varies is the text
    if not quiet and sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
