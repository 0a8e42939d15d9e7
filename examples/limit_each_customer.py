"""Each customer may make three calls a minute, and is told when to come back."""

from resilient import RateLimit, RateLimited


@RateLimit("3/minute", key=lambda customer, _question: customer)
def ask(customer: str, question: str) -> str:
    return f"{customer} asked {question!r}"


for question in ("who?", "where?", "when?", "why?"):
    try:
        print(ask("ada", question))
    except RateLimited as refused:
        print(f"ada has to wait for {refused.retry_after:.0f} s")

print(ask("grace", "how?"))  # another key has a limit of its own
