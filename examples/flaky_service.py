"""One pipeline around a service that fails two times out of three."""

from itertools import count

from resilient import CircuitBreaker, Pipeline, Retry, Timeout

guard = Pipeline(
    Timeout(10, name="total"),
    Retry(on=ConnectionError, wait=0.01),
    CircuitBreaker(name="quotes"),
    Timeout(2, name="attempt"),
)

requests = count(1)


@guard
def quote(symbol: str) -> str:
    number = next(requests)
    if number % 3:
        raise ConnectionError(f"request {number} got no answer")
    return f"{symbol}: {100 + number}"


with guard.listen(lambda event: print("  ", event.name)):
    for symbol in ("AAA", "BBB", "CCC"):
        print(quote(symbol))

for policy, snapshot in guard.statistics().items():
    print(policy, snapshot)
