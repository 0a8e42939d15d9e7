"""Rate limits of a FastAPI application: by address for all routes, by API key for one of them."""

from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from resilient import RateLimit
from resilient.asgi import client_address, header
from resilient.fastapi import install, limit

app = FastAPI()
install(app, pipeline=RateLimit("100/minute", key=client_address, name="address"))

by_key = limit("3/minute", key=header("x-api-key"), name="search")


@app.get("/search", dependencies=[Depends(by_key)])
async def search(q: str):
    return {"found": q}


@app.get("/about")
def about():
    return {"about": "us"}


with TestClient(app) as client:

    def ask(path, **headers):
        response = client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        print(f"{path}: {response.status_code}  RateLimit: {response.headers['ratelimit']}")
        return response

    ask("/about")
    for _ in range(3):
        ask("/search?q=a", x_api_key="ada")
    refused = ask("/search?q=a", x_api_key="ada")
    ask("/search?q=a", x_api_key="grace")  # has a limit of her own

    print(refused.json()["title"], "- again in", refused.headers["retry-after"], "s")
    print("429 in the schema:", "429" in app.openapi()["paths"]["/search"]["get"]["responses"])
