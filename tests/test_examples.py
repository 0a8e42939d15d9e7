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


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_prints_what_it_promises(name, capsys):
    with virtual_time():
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    printed = capsys.readouterr().out
    for expected in EXPECTED[name]:
        assert expected in printed


def test_the_example_of_tests_passes():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(FOLDER)]
    command += ["-c", "/dev/null", str(FOLDER / "test_with_virtual_time.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_no_example_is_forgotten():
    files = {path.name for path in FOLDER.glob("*.py")}
    assert files == {*EXPECTED, "test_with_virtual_time.py"}
    readme = (FOLDER / "README.md").read_text()
    assert [name for name in files if f"`{name}`" not in readme] == []
