"""Guard ASGI applications: Starlette, FastAPI and all others.

from resilient.asgi import ResilienceMiddleware, client_address

guard = Pipeline(RateLimit("100/minute", key=client_address), Timeout(10), Bulkhead(200))
app.add_middleware(ResilienceMiddleware, pipeline=guard)
"""

from resilient.asgi.clients import client_address, header, user
from resilient.asgi.drain import Drain
from resilient.asgi.health import Health
from resilient.asgi.middleware import HEALTH_PATHS, ResilienceMiddleware
from resilient.asgi.refusals import Refusal

__all__ = [
    "HEALTH_PATHS",
    "Drain",
    "Health",
    "Refusal",
    "ResilienceMiddleware",
    "client_address",
    "header",
    "user",
]
