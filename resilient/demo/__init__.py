"""The demo: bare and guarded calls live through the same outage, on real HTTP traffic.

    script.py    what happens when: the phases of the server, and the schedule of the calls
    server.py    the server, a process of its own that follows the script and counts what reaches it
    process.py   starting that process, and never leaving it behind
    clients.py   the calls: one function, bare and guarded by a pipeline
    load.py      sending the calls on schedule
    measure.py   what came of them, and whether the guarded side is better
    views.py     the live table, the plain lines
    report.py    the summary, as text and as JSON
    run.py       all of it together

Only the modules themselves import the extra libraries, so that a missing one can be told in one line.
"""

import importlib
import os
import sys
from dataclasses import dataclass

_NEEDED = ("httpx", "rich", "starlette", "uvicorn")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for.

    Attributes:
        seconds: Length of the script; all its phases, and all times of the pipeline, scale with it.
        rate: Calls per second, for each of the two clients.
        port: Port of the server on the loopback interface; 0 for a free one.
        seed: Seed of the schedule and of the server's errors.
        json: Whether to print one JSON document instead of text.
    """

    seconds: float = 24.0
    rate: float = 50.0
    port: int = 0
    seed: int = 1
    json: bool = False


class DemoError(Exception):
    """Why the demo cannot run, in one line."""


def main(options: Options) -> int:
    """Run the demo and print what came of it.

    Returns:
        0 if the guarded side is better, 1 if it is not, 2 if the demo cannot run, 130 after Ctrl-C.
    """
    try:
        missing = [name for name in _NEEDED if not _importable(name)]
        if missing:
            raise DemoError(f'{", ".join(missing)} missing; pip install "resilient-toolkit[demo]"')
        from resilient.demo.run import run

        worse = run(options)
        if worse:
            print(f"demo: the guarded side is not better: {'; '.join(worse)}", file=sys.stderr)
        return 1 if worse else 0
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 141


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
