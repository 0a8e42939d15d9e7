"""A web application whose database goes down: what its callers get, and who gets what was made for whom."""

import asyncio

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from resilient import Cache, CircuitBreaker, Pipeline, Timeout
from resilient.asgi import ResilienceMiddleware

database = {"tea": 3}
runs = []


async def query(path):
    runs.append(path)
    await asyncio.sleep(0.01)
    if not database:
        raise ConnectionError("the database is down")
    return dict(database)


async def prices(request):
    return JSONResponse(await query("prices"))


async def account(request):  # says nothing about caches, so nobody but its caller gets it
    await query("account")
    return JSONResponse({"user": request.headers["Authorization"]})


app = Starlette(routes=[Route("/prices", prices, methods=["GET", "PUT"]), Route("/account", account)])
cache = Cache(ttl=0.2, stale=3600)
breaker = CircuitBreaker(consecutive=3)
app.add_middleware(ResilienceMiddleware, pipeline=Pipeline(cache, breaker, Timeout(1)))


async def main():
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://shop.example") as client:

        def show(when, response):
            how = response.headers.get("Cache-Status", "from the application")
            print(f"{when}: {response.status_code} {response.text} ({how}), {len(runs)} runs")

        crowd = await asyncio.gather(*[client.get("/prices") for _ in range(20)])
        show("a crowd", crowd[-1])
        assert len(runs) == 1
        await client.get("/account", headers={"Authorization": "ada"})

        database.clear()
        await asyncio.sleep(0.3)
        for number in range(1, 5):
            response = await client.get("/prices")
            show(f"outage, request {number}", response)
            assert response.json() == {"tea": 3}
        print("the circuit is", breaker.current_state)

        response = await client.get("/account", headers={"Authorization": "grace"})
        print("somebody else's account:", response.status_code)
        assert "ada" not in response.text

        database["tea"] = 4
        breaker.close()  # or wait for its probe
        await client.put("/prices")  # a write: what was kept is obsolete
        show("back again", await client.get("/prices"))


asyncio.run(main())
print(cache.statistics())
