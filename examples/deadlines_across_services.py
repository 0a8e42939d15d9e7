"""Three services in a row and one deadline, in virtual time: nobody works on what nobody waits for any more.

The caller waits for one second. Each service tells the next one how much of that is left.
"""

import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from resilient import Pipeline, Retry, Timeout, runtime
from resilient.asgi import ResilienceMiddleware
from resilient.httpx import AsyncResilientTransport
from resilient.testing import run

HEADER = "x-request-timeout"


def service(name, seconds, further=None):
    """Return a service that works for some seconds and then asks another one."""

    async def work(request):
        print(f"{runtime.now():.2f} s: {name} is told that {request.headers[HEADER]} s are left")
        try:
            await runtime.asleep(seconds)
        except BaseException:
            print(f"{runtime.now():.2f} s: {name} stops")
            raise
        if further is None:
            return PlainTextResponse("done")
        transport = AsyncResilientTransport(
            httpx.ASGITransport(further), pipeline=Retry() | Timeout(5), deadline_header=HEADER
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://next") as client:
            answer = await client.get("/")
        return PlainTextResponse(answer.text, answer.status_code)

    return ResilienceMiddleware(
        Starlette(routes=[Route("/", work)]), pipeline=Pipeline(Timeout(5)), deadline_header=HEADER, gateway=True
    )


async def ask(patience, *works):
    app = None
    for number, seconds in reversed(list(enumerate(works, 1))):
        app = service(f"service {number}", seconds, app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://first") as client:
        answer = await client.get("/", headers={HEADER: str(patience)})
    print(f"{runtime.now():.2f} s: the caller gets {answer.status_code}\n")


run(ask, 1, 0.3, 0.3, 0.3)
run(ask, 1, 0.5, 0.6, 0.3)
