"""What `scripts/test` tells whoever runs it, with stand-ins for the interpreter and its environment."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "test"

# Fails if the line in $FAILING is part of its arguments; leaves the data that coverage leaves.
PYTHON = """#!/usr/bin/env bash
echo "ran $*"
case "$*" in *"$FAILING"*) exit 3 ;; esac
case "$*" in *combine*) : >"$COVERAGE_FILE" ;; esac
"""


@pytest.fixture
def run(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "test").write_bytes(SCRIPT.read_bytes())
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (scripts / "_env").write_text(f"set -euo pipefail\ncd {tmp_path}\nenvironment() {{ python={python}; }}\n")

    def run(*words, failing="nothing"):
        return subprocess.run(
            ["bash", scripts / "test", *words],
            env={"PATH": "/usr/bin:/bin", "FAILING": failing, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_green_suite_ends_with_success(run):
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "ran -m coverage report" in done.stdout


def test_both_halves_run_all_of_the_suite_and_are_shown(run):
    shown = run().stdout
    assert "ran -m coverage run -m pytest --ignore tests/http --ignore tests/asgi\n" in shown
    assert "ran -m coverage run -m pytest tests/http tests/asgi\n" in shown


@pytest.mark.parametrize("failing", ["pytest tests/http", "--ignore", "combine", "report"])
def test_each_part_that_fails_fails_the_run(run, failing):
    assert run(failing=failing).returncode != 0


def test_nothing_is_left_behind(run, tmp_path):
    run()
    run(failing="report")
    assert {path.name for path in tmp_path.iterdir()} == {"scripts", "python", ".coverage"}


def test_with_arguments_it_is_pytest(run):
    assert run("tests/test_rate.py", "-x").stdout == "ran -m pytest tests/test_rate.py -x\n"
    assert run("-k", "budget", failing="budget").returncode == 3
