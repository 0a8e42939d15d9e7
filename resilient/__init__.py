"""Composable policies that keep calls to other systems from failing, and failing calls from doing harm.

    from resilient import CircuitBreaker, Pipeline, Retry, Timeout

    guard = Pipeline(Timeout(30), Retry(on=OSError), CircuitBreaker(), Timeout(2))  # outermost first

    @guard
    def fetch(url): ...

The same object guards sync and async functions, on asyncio and on trio.
"""

from resilient import deadline, events, priority
from resilient.errors import (
    BulkheadFull,
    CircuitOpen,
    Draining,
    FailedResponse,
    FailedResult,
    RateLimited,
    Rejected,
    ResilientError,
    Shed,
    ThreadsExhausted,
    TimedOut,
)
from resilient.events import Event, listen
from resilient.instrumentation import instrument
from resilient.keyed import Keyed
from resilient.pipeline import Pipeline
from resilient.policies.bulkhead import Bulkhead
from resilient.policies.cache import Cache
from resilient.policies.circuit_breaker import CircuitBreaker
from resilient.policies.fallback import Fallback
from resilient.policies.load_shed import LoadShed
from resilient.policies.rate_limit import RateLimit
from resilient.policies.retry import Retry
from resilient.policies.retry_budget import RetryBudget
from resilient.policies.timeout import Timeout
from resilient.policy import Policy
from resilient.priority import Priority
from resilient.rate import Rate

__version__ = "0.1.0"

__all__ = [
    "Bulkhead",
    "BulkheadFull",
    "Cache",
    "CircuitBreaker",
    "CircuitOpen",
    "Draining",
    "Event",
    "FailedResponse",
    "FailedResult",
    "Fallback",
    "Keyed",
    "LoadShed",
    "Pipeline",
    "Policy",
    "Priority",
    "Rate",
    "RateLimit",
    "RateLimited",
    "Rejected",
    "ResilientError",
    "Retry",
    "RetryBudget",
    "Shed",
    "ThreadsExhausted",
    "TimedOut",
    "Timeout",
    "__version__",
    "deadline",
    "events",
    "instrument",
    "listen",
    "priority",
]
