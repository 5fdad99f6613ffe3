"""Imports point down, never in a circle, and are at the top of the file unless they cost time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A room may import the rooms on lines above its own here, never its neighbours on the
# same line. A room is a module or a folder; inside a folder modules may import each other.
ORDER = [
    ["pipeline.__init__", "pipeline.errors"],
    ["pipeline.settings", "pipeline.artifact", "pipeline.methods", "pipeline.stages", "pipeline.needs"],
    ["pipeline.training_config"],
    ["pipeline.config"],
    ["pipeline.context"],
    ["pipeline.facts", "pipeline.weights"],
    ["pipeline.delta"],
    ["pipeline.models"],
    ["pipeline.train", "pipeline.evaluate"],
    ["pipeline.report"],
    ["pipeline.plan"],
    ["pipeline.run_step"],
    ["launch.run_folder"],
    ["launch.worker"],
    ["launch.here", "launch.slurm"],
    ["launch.__init__"],
    ["launch.doctor"],
    ["launch.commands"],
    ["launch.cli"],
    ["launch.__main__"],
]

# What takes from 0.05 s (rich) to 5 s (peft) to import. Planning does without, and for their sake alone an
# import may stand inside a function.
HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "datasets",
    "matplotlib",
    "numpy",
    "submitit",
    "rich",
    "huggingface_hub",
)


class Import(NamedTuple):
    """One name that a module imports."""

    name: str
    """Of one of our modules, or of a library."""
    line: int
    is_at_top: bool
    """Whether it happens as soon as the module is imported: not in a function, nor for the type checker."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {
    name_of(file): file for package in ("pipeline", "launch") for file in ROOT.glob(f"{package}/**/*.py")
}
ROOMS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> list[Import]:
    return list(_imports_in(tree_of(module), is_at_top=True))


def _imports_in(node: ast.AST, is_at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(our_module(alias.name) or alias.name, child.lineno, is_at_top)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module is not None, "imports are absolute here"
            for alias in child.names:
                inside = our_module(f"{child.module}.{alias.name}")
                yield Import(inside or our_module(child.module) or child.module, child.lineno, is_at_top)
        else:
            yield from _imports_in(child, is_at_top and not _is_later(child))


def _is_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def our_module(name: str) -> str | None:
    return next((module for module in (name, f"{name}.__init__") if module in FILES), None)


def room_of(module: str) -> str | None:
    rooms = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


@cache
def is_heavy(module: str) -> bool:
    """Whether importing this (a module of ours, or a library) imports a heavy library."""
    if module not in FILES:
        return module.split(".")[0] in HEAVY
    return any(is_heavy(imported.name) for imported in imports_of(module) if imported.is_at_top)


def is_program(module: str) -> bool:
    """Whether it is started as `python -m`. Python warns if the package has already imported it."""
    return module in FILES and any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree_of(module).body
    )


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    room = room_of(module)
    assert room is not None, f"{module} is in no room: add it to ORDER where it belongs"
    for imported in imports_of(module):
        other = room_of(imported.name)
        if other is not None and other != room:
            assert ROOMS[other] < ROOMS[room], (
                f"{module} imports {imported.name}, which lies above or beside it"
            )
        is_submitit = imported.name.split(".")[0] == "submitit"
        assert not is_submitit or module.startswith("launch."), (
            f"{module}: where it runs is launch/'s business"
        )


def test_there_are_no_circles() -> None:
    """Among single modules, whatever room they are in, and wherever in a module the import stands."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in {imported.name for imported in imports_of(module)} & FILES.keys():
                visit(name, (*way, module))
        done.add(module)

    for module in FILES:
        visit(module, ())


@pytest.mark.parametrize("module", FILES)
def test_an_import_is_at_the_top_unless_it_costs_time(module: str) -> None:
    for imported in imports_of(module):
        assert imported.is_at_top or is_heavy(imported.name) or is_program(imported.name), (
            f"{FILES[module]}:{imported.line}: {imported.name} is light: import it at the top"
        )


def test_a_program_is_not_imported_by_its_package() -> None:
    """`python -m launch.worker` imports the package first, and would then run a second copy of the module."""
    seen = {"launch.__init__"}
    waiting = ["launch.__init__"]
    while waiting:
        for imported in imports_of(waiting.pop()):
            if imported.is_at_top and imported.name in FILES and imported.name not in seen:
                seen.add(imported.name)
                waiting.append(imported.name)
    assert "launch.slurm.chain" in seen
    assert not [module for module in seen if is_program(module)]


@pytest.mark.processes
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


@pytest.mark.processes
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
