"""Imports point down: every module may import from the rooms below its own, and none above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A room on one line may import rooms on lines above it here, never its neighbours on the
# same line.
ORDER = [
    ["pipeline.errors"],
    ["pipeline.settings", "pipeline.artifact", "pipeline.methods", "pipeline.stages", "pipeline.needs"],
    ["pipeline.config"],
    ["pipeline.context"],
    ["pipeline.facts", "pipeline.weights"],
    ["pipeline.delta"],
    ["pipeline.models"],
    ["pipeline.train", "pipeline.evaluate"],
    ["pipeline.report"],
    ["pipeline.plan"],
    ["pipeline.run_step"],
    ["launch"],
]
HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "matplotlib", "numpy", "submitit")


def room_of(module: str) -> str | None:
    rooms = [room for level in ORDER for room in level if module == room or module.startswith(room + ".")]
    return rooms[0] if rooms else None


def level_of(room: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


def modules() -> list[tuple[str, Path]]:
    files = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("launch/**/*.py")]
    return [(".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), f) for f in files]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_imports_point_down(module: str, path: Path) -> None:
    room = room_of(module)
    if module == "pipeline":
        return
    assert room is not None, f"{module} is in no room: add it to ORDER where it belongs"
    for imported in imports_of(path):
        other = room_of(imported)
        if other is not None and other != room:
            assert level_of(other) < level_of(room), (
                f"{module} imports {imported}, which lies above or beside it"
            )
    if room != "launch":
        assert not any(name.split(".")[0] == "submitit" for name in imports_of(path)), (
            f"{module}: where it runs is launch/'s business"
        )


def test_planning_imports_nothing_heavy() -> None:
    code = f"""
import sys
from launch.cli import main
code = main(["run", {str(ROOT / "configs/quickstart.yaml")!r}, "--dry-run"])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "to do" in done.stdout


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_subtracting_imports_no_torch(tmp_path: Path, stage: int | None) -> None:
    """It takes as long to import as a gigabyte takes to subtract. An adapter's products alone need it; a ZeRO
    stage does not.
    """
    from delta_models import load, write_pair
    from zero_checkpoint import Checkpoint

    base, tuned = write_pair(tmp_path)
    if stage is not None:
        tuned = Checkpoint(stage, 2, [load(tuned)], has_moments=True).write(tmp_path / "checkpoints")
    code = f"""
import sys
from launch.cli import main
base, tuned, out = {str(base)!r}, {str(tuned)!r}, {str(tmp_path / "out")!r}
words = ["subtract", "--base", base, "--tuned", tuned, "--scale", "0.3", "--out", out]
codes = [main(["delta", *words]) for words in (words, ["verify", out], ["inspect", base])]
print(codes, [name for name in ("torch", "transformers", "submitit") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[0, 0, 0] []"
