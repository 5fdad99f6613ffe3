"""Unit tests start no processes, but for those marked `processes`; this holds the marks honest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
_started: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _STARTS:
        _started.append(f"{event} {arguments[:2]}")


sys.addaudithook(_note)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever has recorded commands starts them."""
    for item in items:
        if "recorded" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")


@pytest.fixture(autouse=True)
def is_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that starts a process and is not marked."""
    _started.clear()
    yield
    if _started and request.node.get_closest_marker("processes") is None:
        pytest.fail(f"not marked `processes`, but started: {'; '.join(_started)}")
