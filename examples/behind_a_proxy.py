"""Who is the client? One service behind a proxy, and a client that writes what it likes into X-Forwarded-For."""

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from resilient import RateLimit
from resilient.asgi import ResilienceMiddleware, client_address


async def hello(request):
    return PlainTextResponse("hello")


def service(key):
    app = Starlette(routes=[Route("/", hello)])
    guarded = ResilienceMiddleware(app, pipeline=RateLimit("2/minute", key=key))
    return TestClient(guarded, client=("10.0.0.1", 1234))  # the peer is always the proxy


def ask(client, forwarded):
    response = client.get("/", headers={"x-forwarded-for": forwarded})
    print(f"  {forwarded:28} {response.status_code}")


print("nobody is trusted: all clients are one, the proxy")
client = service(client_address)
for address in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
    ask(client, address)

print("one proxy is ours, and has appended the address that it saw")
client = service(client_address(trusted_hops=1))
ask(client, "192.0.2.1")
ask(client, "192.0.2.2")
ask(client, "6.6.6.1, 192.0.2.1")  # the client has made up the first one
ask(client, "6.6.6.2, 192.0.2.1")  # in vain

print("our proxies are in a network; IPv6 clients own all addresses of a /64")
client = service(client_address(trusted_networks=["10.0.0.0/8"]))
ask(client, "2001:db8::1")
ask(client, "2001:db8::2, 10.0.0.7")
ask(client, "2001:db8::3")
