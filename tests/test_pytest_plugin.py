import subprocess
import sys

import pytest

from resilient import Fallback, Retry, runtime

PROGRAM = """
import sys
from resilient import Fallback, Retry, runtime


def test_everything(virtual_time, captured_events, flaky, run_both):
    assert virtual_time.now() == 0
    assert Retry(3, on=OSError, wait=1800).call(flaky(OSError, OSError, 5)) == 5
    assert virtual_time.now() == runtime.now() == 3600
    assert [event.name for event in captured_events] == ["retry.scheduled"] * 2

    async def scenario(colour):
        return await colour.call(Fallback(1), flaky(OSError))

    assert run_both(scenario) == [("fallback.used", 0.0)]


def test_nothing_is_left(captured_events):
    assert captured_events == []
    assert runtime.now() != 3600
"""


def test_the_fixtures(virtual_time, captured_events, flaky, run_both):
    function = flaky(OSError, OSError, 5)
    assert Retry(3, on=OSError, wait=1800).call(function) == 5
    assert virtual_time.now() == runtime.now() == 3600
    assert [event.name for event in captured_events] == ["retry.scheduled"] * 2

    async def scenario(colour):
        return await colour.call(Fallback(1), flaky(OSError))

    assert run_both(scenario) == [("fallback.used", 0.0)]


def test_the_entry_point_offers_them(tmp_path):
    path = tmp_path / "test_with_fixtures.py"
    path.write_text(PROGRAM)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["resilient.testing", "trio", "hypothesis"])
def test_the_plugin_costs_those_nothing_who_do_not_use_it(module):
    program = f"import sys, resilient.pytest_plugin; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
