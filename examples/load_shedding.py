"""Three times as many requests as a server can do, in virtual time: without a guard nobody is served for long.

The server has 8 connections to its database, and each request needs one for 40 ms: 200 requests a second. Clients
wait for half a second and then give up; the server does not know, and works for them all the same.
"""

import anyio
import httpx
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from resilient import Bulkhead, LoadShed, Pipeline, Timeout, runtime
from resilient.asgi import ResilienceMiddleware
from resilient.testing import run

CONNECTIONS, SERVICE_TIME, PATIENCE, SECONDS = 8, 0.04, 0.5, 4
CAPACITY = CONNECTIONS / SERVICE_TIME


def application():
    database = anyio.Semaphore(CONNECTIONS)

    async def work(request):
        async with database:
            await anyio.sleep(SERVICE_TIME)
        return PlainTextResponse("done")

    return Starlette(routes=[Route("/", work)])


def guarded():
    guard = Pipeline(Timeout(PATIENCE), Bulkhead(CONNECTIONS, queue=CONNECTIONS), LoadShed())
    return ResilienceMiddleware(application(), pipeline=guard)


async def overload(app):
    took, refused = [], 0

    async def client(http):
        nonlocal refused
        began = runtime.now()
        response = await http.get("/")
        if response.status_code == 503:
            refused += 1
        elif runtime.now() - began <= PATIENCE:  # else the client has left
            took.append(runtime.now() - began)

    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")
    async with http, anyio.create_task_group() as clients:
        for _ in range(int(3 * CAPACITY * SECONDS)):
            clients.start_soon(client, http)
            await anyio.sleep(1 / (3 * CAPACITY))
    took.sort()
    served = len(took) / (CAPACITY * SECONDS)
    print(f"  served in time: {served:.0%} of what it can do, refused: {refused}")
    print(f"  slowest of those served: {took[-1]:.2f} s")


print("without a guard")
run(overload, application())
print("guarded")
run(overload, guarded())
