"""The command line: `python -m resilient`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

N = TypeVar("N", int, float)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: The words of the command line. Default: those that the process was started with.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m resilient", description="Resilience policies for Python.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="watch guarded and bare calls live through the same outage"))
    chosen = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = chosen.run
    return run(chosen)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Starts an HTTP server that is healthy, fails, hangs, is down and recovers, and calls it twice on the "
        "same schedule: with a bare httpx client, and with the same calls guarded by a pipeline. Exits with 0 "
        "if the guarded side is better, with 1 if it is not."
    )
    parser.add_argument(
        "--seconds", type=_number(3, 600, float), default=24.0, help="length of the script, 3 to 600 (default 24)"
    )
    parser.add_argument(
        "--rate",
        type=_number(20, 500, float),
        default=50.0,
        help="calls per second and client, 20 to 500 (default 50)",
    )
    parser.add_argument(
        "--port", type=_number(0, 65535, int), default=0, help="on the loopback interface (default: a free one)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the schedule and the errors (default 1)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.set_defaults(run=_demo)


def _demo(chosen: argparse.Namespace) -> int:
    from resilient.demo import Options, main

    return main(Options(chosen.seconds, chosen.rate, chosen.port, chosen.seed, chosen.json))


def _number(least: float, most: float, kind: type[N]) -> Callable[[str], N]:
    def number(text: str) -> N:
        if least <= kind(text) <= most:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number from {least} to {most}")

    return number


if __name__ == "__main__":
    sys.exit(main())
