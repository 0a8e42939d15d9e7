"""The summary: as tables, and as data."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resilient.demo import Options
from resilient.demo.measure import Numbers, Side, reasons_why_not_better
from resilient.demo.script import title
from resilient.demo.views import graded, milliseconds, new_table, percent


@dataclass(frozen=True, slots=True)
class Result:
    """What came of the demo.

    Attributes:
        options: What was asked for.
        bare: What came of the bare calls.
        guarded: What came of the guarded calls.
        statistics: The statistics of those policies that keep any, by name.
        events: How often each policy reported which event, by name of the policy.
    """

    options: Options
    bare: Side
    guarded: Side
    statistics: dict[str, Any]
    events: dict[str, dict[str, int]]

    def worse(self) -> list[str]:
        """Tell what is missing for the guarded side to be better."""
        return reasons_why_not_better(self.bare, self.guarded)

    def as_data(self) -> dict[str, Any]:
        """Return what `--json` prints; latencies are in seconds."""
        return {
            "seconds": self.options.seconds,
            "rate": self.options.rate,
            "seed": self.options.seed,
            "better": not self.worse(),
            "reasons": self.worse(),
            "bare": asdict(self.bare),
            "guarded": asdict(self.guarded),
            "statistics": {policy: asdict(snapshot) for policy, snapshot in self.statistics.items()},
            "events": self.events,
        }


def summary(console: Console, result: Result) -> str:
    """Return what came of the demo, laid out for a console."""
    sides = {"bare": result.bare, "guarded": result.guarded}
    with console.capture() as captured:
        for table in (_totals(sides), _by_phase(result), _by_policy(result)):
            console.print(table)
            console.print()
        for name, one in sides.items():
            failed = ", ".join(f"{count} {error}" for error, count in one.errors.items())
            console.print(f"failed {name} calls: {failed or 'none'}", highlight=False)
        if not result.worse():
            console.print(Text(_headline(result.bare.total, result.guarded.total), style="bold green"))
    return captured.get()


def _headline(bare: Numbers, guarded: Numbers) -> str:
    answered, stale = percent(guarded.success_rate), percent(_stale_share(guarded))
    return (
        f"The guarded side is better: {answered} of the calls were answered, {stale} of these with an older "
        f"answer, instead of {percent(bare.success_rate)}; p99 {milliseconds(guarded.p99)} ms instead of "
        f"{milliseconds(bare.p99)} ms; {guarded.hits} requests to the server instead of {bare.hits}."
    )


def _totals(sides: dict[str, Side]) -> Table:
    headings = ("success", "fresh", "stale", "failed", "p50 ms", "p99 ms", "server\nhits", "amplification")
    table = new_table(f"All {sides['bare'].total.calls} calls", *headings)
    for name, one in sides.items():
        total = one.total
        counts = [str(count) for count in (total.fresh, total.stale, total.failed)]
        times = [milliseconds(total.p50), milliseconds(total.p99)]
        hits = [str(total.hits), "-" if total.amplification is None else f"{total.amplification:.2f}"]
        table.add_row(name, graded(total.success_rate), *counts, *times, *hits)
    return table


def _by_phase(result: Result) -> Table:
    headings = ("calls", "success", "guarded\nstale", "p50 ms", "p99 ms", "hits")
    table = new_table("By phase, bare / guarded", *headings)
    for phase, bare in result.bare.phases.items():
        guarded = result.guarded.phases[phase]
        table.add_row(
            title(phase),
            str(bare.calls),
            f"{percent(bare.success_rate)} / {percent(guarded.success_rate)}",
            percent(_stale_share(guarded)),
            f"{milliseconds(bare.p50)} / {milliseconds(guarded.p50)}",
            f"{milliseconds(bare.p99)} / {milliseconds(guarded.p99)}",
            f"{bare.hits} / {guarded.hits}",
        )
    return table


def _stale_share(side: Numbers) -> float | None:
    answered = side.fresh + side.stale
    return side.stale / answered if answered else None


def _by_policy(result: Result) -> Table:
    table = Table(
        title="What each policy did", title_justify="left", title_style="bold", show_header=False, box=None
    )
    table.add_column(no_wrap=True)
    table.add_column()
    for policy, counts in result.events.items():
        table.add_row(policy, ", ".join(f"{count} {event}" for event, count in counts.items()) or "nothing")
    return table
