"""Ways to read and write files; direct I/O is skipped where the file system refuses it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.weights.io.direct import PAGE, Io


@pytest.fixture
def needs_direct(tmp_path: Path) -> None:
    """Skips the test unless files under `tmp_path` can be read and written directly."""
    probe = tmp_path / "probe"
    try:
        probe.write_bytes(b"x" * PAGE)
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no direct I/O here")
    finally:
        probe.unlink(missing_ok=True)


@pytest.fixture(params=["direct", "buffered", "auto"])
def io(request: pytest.FixtureRequest) -> Io:
    if request.param == "direct":
        request.getfixturevalue("needs_direct")
    way: Io = request.param
    return way
