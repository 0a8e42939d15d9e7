"""Events as log records of the standard library.

    resilient.listen(LoggingListener())

A record reads `circuit.opened policy=payments reason=failure_rate open_for=5.3`. For structured logging the
fields are on the record too: `record.resilient` is a dict of them.
"""

import logging
from dataclasses import fields

from resilient import events
from resilient.events import Event

_WARNINGS = (
    events.BackupsUsed,
    events.BalancerPanicked,
    events.BulkheadRejected,
    events.CacheRefreshFailed,
    events.CircuitOpened,
    events.CircuitRejected,
    events.LoadShedRejected,
    events.PartitionsFull,
    events.RateLimitRejected,
    events.ReplicaEjected,
    events.RetryGaveUp,
    events.ThreadAbandoned,
    events.ThreadsRejected,
    events.TimeoutExpired,
)


class LoggingListener:
    """A listener that writes a log record for each event.

    Args:
        logger: A logger or its name. Default `"resilient"`.
        level: The level of all records. Default None: WARNING for what was refused, given up or opened, INFO
            for everything else.

    Raises:
        TypeError: A logger or level of the wrong type.
    """

    def __init__(self, logger: logging.Logger | str = "resilient", *, level: int | None = None) -> None:
        if not isinstance(logger, logging.Logger | str):
            raise TypeError(f"LoggingListener: logger={logger!r} is not allowed; give a logger or its name")
        if level is not None and (isinstance(level, bool) or not isinstance(level, int)):
            raise TypeError(f"LoggingListener: level={level!r} is not allowed; give an int such as logging.INFO")
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self._level = level

    def __call__(self, event: Event) -> None:
        """Write a record, if the logger wants one of this level."""
        level = self._level
        if level is None:
            level = logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO
        if not self._logger.isEnabledFor(level):
            return
        facts = {field.name: getattr(event, field.name) for field in fields(event) if field.name != "at"}
        text = " ".join(f"{name}={_short(value)}" for name, value in facts.items())
        self._logger.log(level, "%s %s", event.name, text, extra={"resilient": {"event": event.name, **facts}})


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
