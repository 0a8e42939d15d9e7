"""Every file of examples/ runs, and prints what its reader expects."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from resilient.testing import virtual_time

FOLDER = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "flaky_service.py": [
        "retry.scheduled",
        "AAA: 103",
        "CCC: 109",
        "quotes CircuitBreakerStatistics(state='closed'",
    ],
    "limit_each_customer.py": ["ada asked 'when?'", "ada has to wait for 20 s", "grace asked 'how?'"],
    "office_hours.py": ["OfficeHours(): the office is closed; retry after 3600 s", "good morning"],
    "stale_answers.py": ["1.08\n   cache.stale_served\n1.08\n   cache.stale_served\n1.08\n1.09"],
}

OVER_HTTP = {  # these talk to a server of their own, in real time
    "httpx2_client.py": ["50 answers after", "tried again: ['FailedResponse', 'RemoteProtocolError']"],
    "behind_a_proxy.py": [
        "the proxy\n  192.0.2.1                    200\n",
        "  192.0.2.3                    429\none proxy is ours",
        "6.6.6.1, 192.0.2.1           200\n  6.6.6.2, 192.0.2.1           429",
        "2001:db8::2, 10.0.0.7        200\n  2001:db8::3                  429",
    ],
    "deadlines_across_services.py": [
        "0.60 s: service 3 is told that 0.359 s are left\n0.90 s: the caller gets 200",
        "0.96 s: service 2 stops\n0.96 s: the caller gets 504",
    ],
    "graceful_shutdown.py": [
        "SIGTERM: not ready any more, but alive: 200",
        "after the grace period: 503 connection: close",
        "the slow one: 200 the report",
        "the server ended: True",
    ],
    "httpx_client.py": [
        "GET: 200 after ['GET /prices', 'GET /prices']",
        "POST: 503 after ['POST /orders']",
        "POST with a key: 200 after ['POST /orders', 'POST /orders']",
        "drip: total: not done after 0.5 s",
        ": the circuit is open; retry after",
    ],
    "load_shedding.py": [
        "without a guard\n  served in time: 18% of what it can do, refused: 0",
        "guarded\n  served in time: 101% of what it can do, refused: 1592\n  slowest of those served: 0.08 s",
    ],
    "rate_limits.py": [
        '/search?q=a: 200  RateLimit: "address";r=98;t=2, "search";r=2;t=20',
        '/search?q=a: 429  RateLimit: "address";r=95;t=3, "search";r=0;t=20',
        "Quota exceeded - again in 20 s",
        "429 in the schema: True",
    ],
    "replicas.py": [
        "all is well: ['first', 'second']",
        "the first fails: ['second']",
        "replica.ejected consecutive",
        "backups.used",
        "the second fails too: ['standby']",
    ],
    "sdk_client.py": [
        "no retries in the SDK: 42 after 3 requests",
        "max_retries=0: 3 requests",
        "max_retries=2: 9 requests",
        "an open circuit: circuit breaker[http://127.0.0.1:",
    ],
    "stale_data.py": [
        "all is well: 1.08 (from the service, asked 1 times)",
        "request 4: 1.08 (stale-if-error, asked 5 times)\nthe circuit is open",
        "back again: 1.09 (from the service, asked 6 times)",
    ],
    "stale_responses.py": [
        'outage, request 4: 200 {"tea":3} (resilient; fwd=stale;',
        "the circuit is open",
        "somebody else's account: 503",
        'back again: 200 {"tea":4} (from the application)',
    ],
    "tokens.py": [
        "twenty requests: {'token-1'}",
        "it was revoked: {'token-3'}",
        "revoked again: token-5",
        "before it expires: token-6 after 0 refusals",
    ],
}


def run(name, capsys):
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_prints_what_it_promises(name, capsys):
    with virtual_time():
        printed = run(name, capsys)
    for expected in EXPECTED[name]:
        assert expected in printed


@pytest.mark.parametrize("name", sorted(OVER_HTTP))
def test_an_example_over_http_prints_what_it_promises(name, capsys):
    printed = run(name, capsys)
    for expected in OVER_HTTP[name]:
        assert expected in printed


def test_the_example_of_tests_passes():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(FOLDER)]
    command += ["-c", "/dev/null", str(FOLDER / "test_with_virtual_time.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_no_example_is_forgotten():
    files = {path.name for path in FOLDER.glob("*.py")}
    assert files == {*EXPECTED, *OVER_HTTP, "test_with_virtual_time.py"}
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in files if f"`{name}`" not in readme] == []
