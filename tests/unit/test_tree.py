"""Every file has a name of its own, and the unit tests lie as what they test does."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = {"__init__.py", "__main__.py", "conftest.py", "stage.py"}
"""Names that say what a file is to its folder."""


def test_no_two_files_have_the_same_name() -> None:
    """A program of tests/bench/ is called as the file that it measures."""
    places = defaultdict(list)
    for top in ("pipeline", "launch", "tests"):
        for path in (ROOT / top).rglob("*.py"):
            if ROOT / "tests/bench" not in path.parents:
                places[path.name].append(str(path.relative_to(ROOT)))
    assert [found for name, found in places.items() if len(found) > 1 and name not in SHARED] == []


def test_unit_tests_lie_as_what_they_test() -> None:
    """tests/unit/facts/ is for pipeline/facts/, tests/unit/launch/slurm/ for launch/slurm/."""
    unit = ROOT / "tests/unit"
    folders = [path.relative_to(unit) for path in unit.rglob("*") if path.is_dir()]
    for folder in folders:
        if folder.name != "__pycache__":
            assert (ROOT / "pipeline" / folder).is_dir() or (ROOT / folder).is_dir(), folder
    assert Path("launch/slurm") in folders
