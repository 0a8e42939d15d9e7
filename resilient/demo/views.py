"""What is shown while the demo runs: a live table in a terminal, elsewhere a line each second."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from resilient.demo.measure import Numbers
from resilient.demo.script import PHASES, title

_GOOD, _FAIR = 0.99, 0.9
_WIDTH = 5


@dataclass(frozen=True, slots=True)
class Progress:
    """How one client is doing.

    Attributes:
        last_second: The calls that ended within the last second.
        total: All calls that have ended, and their requests.
    """

    last_second: Numbers
    total: Numbers


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is to show at one moment.

    Attributes:
        elapsed: Seconds since the start.
        seconds: Length of the script.
        phase: Of the server.
        clients: Progress by client.
        circuit: State of the circuit breaker.
    """

    elapsed: float
    seconds: float
    phase: str
    clients: dict[str, Progress]
    circuit: str


class View:
    """Shows snapshots, one each `interval` seconds. This one, for `--json`, shows nothing."""

    interval = 1.0

    def show(self, snapshot: Snapshot) -> None:
        """Show what there is now."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Lines(View):
    """A line each second."""

    def show(self, snapshot: Snapshot) -> None:
        """Print a line."""
        clients = " | ".join(
            f"{name} {client.last_second.calls:>3}/s, {percent(client.last_second.success_rate):>5} ok, "
            f"p99 {milliseconds(client.last_second.p99):>4} ms, {client.total.hits:>4} hits"
            for name, client in snapshot.clients.items()
        )
        line = f"{snapshot.elapsed:4.0f} s  {title(snapshot.phase):11} {clients}, circuit {snapshot.circuit}"
        print(line, flush=True)


class LiveTable(View):
    """A table that is drawn again and again in the same place, and is gone in the end."""

    interval = 0.25

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def show(self, snapshot: Snapshot) -> None:
        """Draw the table anew."""
        self._live.update(Group(_phases(snapshot), "", _table(snapshot)), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def _phases(snapshot: Snapshot) -> Text:
    text = Text()
    for phase in PHASES:
        text.append(f" {title(phase)} ", style="reverse bold" if phase == snapshot.phase else "dim")
        text.append(" ")
    return text.append(f"{snapshot.elapsed:5.1f} of {snapshot.seconds:g} s")


def _table(snapshot: Snapshot) -> Table:
    headings = ("req/s", "success", "stale", "p50 ms", "p99 ms", "success\nso far", "server\nhits", "circuit  ")
    table = new_table("In the last second", *headings)
    for name, client in snapshot.clients.items():
        now, total = client.last_second, client.total
        table.add_row(
            name,
            str(now.calls),
            graded(now.success_rate),
            percent(now.stale / now.calls if now.calls else None),
            milliseconds(now.p50),
            milliseconds(now.p99),
            graded(total.success_rate),
            str(total.hits),
            snapshot.circuit if name == "guarded" else "",
        )
    return table


def new_table(title: str, *headings: str) -> Table:
    """Return an empty table of numbers, with a first column for names; it fits into 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=None)
    table.add_column("", no_wrap=True, min_width=7)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom", min_width=_WIDTH)
    return table


def percent(rate: float | None) -> str:
    """Return a fraction for reading, never rounded up to all; `-` for None."""
    if rate is None:
        return "-"
    return f"{rate:.0%}" if rate in (0, 1) else f"{min(max(100 * rate, 0.1), 99.9):.1f}%"


def milliseconds(seconds: float | None) -> str:
    """Return a latency in milliseconds, for reading; `-` for None."""
    return "-" if seconds is None else f"{1000 * seconds:.0f}"


def graded(rate: float | None) -> Text:
    """Return a success rate in a colour: green from 99 %, red below 90 %."""
    colour = "green" if rate is None or rate >= _GOOD else "yellow" if rate >= _FAIR else "red"
    return Text(percent(rate), style=colour)
