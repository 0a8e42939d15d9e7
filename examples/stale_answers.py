"""An async service goes down, and a cache answers with what it knows until the service is back."""

import asyncio

from resilient import Cache, CircuitBreaker, Pipeline

answers_of_the_service = [1.08, OSError("down"), OSError("down"), 1.09]

guard = Pipeline(Cache(ttl=0, stale=3600), CircuitBreaker(consecutive=5))


@guard
async def exchange_rate(currency: str) -> float:
    answer = answers_of_the_service.pop(0)
    if isinstance(answer, OSError):
        raise answer
    return answer


async def main() -> None:
    with guard.listen(lambda event: print("  ", event.name)):
        for _ in range(4):
            print(await exchange_rate("EUR"))


asyncio.run(main())
