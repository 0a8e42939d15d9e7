"""What the whole suite shares: the examples in the docs and the README are tests too."""

import sys
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from resilient import events, runtime

ROOT = Path(__file__).parent

# The folders of tests are no packages, so what several test modules use has to be found by its name.
sys.path.insert(0, str(ROOT / "tests"))


def _remember(namespace: dict[str, Any]) -> None:
    namespace["__name__"] = "__main__"
    namespace["__listeners__"] = events.everywhere.current
    namespace["__runtime__"] = runtime._installed


def _restore(namespace: dict[str, Any]) -> None:
    events.everywhere.current = namespace["__listeners__"]
    runtime.install(namespace["__runtime__"])


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_remember,  # once for each page: the blocks of a page share their names
    teardown=_restore,
).pytest()
