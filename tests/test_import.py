"""The core needs its core dependencies only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resilient

PACKAGE = Path(resilient.__file__).parent
EXTRAS = ["httpx", "httpx2", "starlette", "redis", "rich", "uvicorn", "trio", "hypothesis", "pytest", "tornado"]
MEANT_TO = {
    "httpx.py": {"httpx"},
    "httpx2.py": {"httpx2"},
    "asgi": {"starlette"},
    "fastapi.py": {"fastapi", "starlette"},
    "demo": {"httpx", "rich", "starlette", "uvicorn"},
    "pytest_plugin.py": {"pytest"},
}

PROGRAM = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ImportError(f"{{name}} is not installed")

sys.meta_path.insert(0, Block())
import resilient

unwanted = {EXTRAS!r} + ["resilient.testing", "resilient.demo", "resilient.pytest_plugin", "resilient.__main__"]
loaded = [name for name in unwanted if name in sys.modules]
assert not loaded, loaded

@resilient.Pipeline(resilient.Timeout(5, interrupt=False), resilient.Retry(on=OSError), resilient.CircuitBreaker())
def work():
    return "works"

print(work())
"""


def test_the_core_works_alone():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stderr, done.stdout) == ("", "works\n")


def test_the_blocker_blocks():
    program = PROGRAM.replace("import resilient\n", "import trio\n", 1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert "trio is not installed" in done.stderr


def imported_at_the_top(source):
    """Return the top-level packages that a module imports outside of functions and `if TYPE_CHECKING:`."""
    found = set()
    for node in ast.parse(source).body:
        statements = node.body if isinstance(node, ast.Try) else [node]
        for statement in statements:
            if isinstance(statement, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom) and not statement.level:
                found.add(statement.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_those_meant_to_import_an_extra(path):
    allowed = MEANT_TO.get(path.relative_to(PACKAGE).parts[0], set())
    assert imported_at_the_top(path.read_text()) & set(EXTRAS) <= allowed


def test_the_reader_of_imports_sees_them():
    source = "import httpx.x\nfrom trio import run\ntry:\n    import redis\nexcept ImportError: pass\n"
    source += "def later():\n    import rich\n"
    assert imported_at_the_top(source) == {"httpx", "trio", "redis"}
