"""`flearn run` from start to end on this machine: re-use, kills, stops, mistakes. Real processes, real
DeepSpeed, two ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from halts import Halt, environment, wait_until

from launch.run_folder import RunFolder
from pipeline.artifact import write_json
from pipeline.plan import Existing, Plan, Step

ROOT = Path(__file__).parents[2]
# The quickstart with two methods, few facts and short trainings.
SMALL = [
    "facts.limit=12",
    "methods=[flearn_ft,flearn_lora]",
    "teach.epochs=8",
    "teach.checkpoint_every_steps=2",
    "full.epochs=3",
    "full.checkpoint_every_steps=1",
    "lora.epochs=3",
    "lora.checkpoint_every_steps=1",
    "evaluate.max_new_tokens=4",
]

# For runs that are disturbed: enough, and half of the work.
ONE_METHOD = "methods=[flearn_ft]"

pytestmark = pytest.mark.slow


def command(runs: Path, *overrides: str) -> list[str]:
    settings = [*SMALL, f"cluster.runs_dir={runs}", *overrides]
    return [
        sys.executable,
        "-m",
        "launch",
        "run",
        "configs/quickstart.yaml",
        *(part for s in settings for part in ("--set", s)),
    ]


def flearn(runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(runs, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=600)


Begin = Callable[..., "tuple[subprocess.Popen[str], int]"]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """`begin(pattern, number)`: a run in `tmp_path` up to where it writes such a file for the `number`-th
    time.

    Returns the command's process, the leader of a group of its own, and the id of the process that has
    halted. Whatever is left of the group is killed after the test."""
    begun: list[subprocess.Popen[str]] = []

    def _begin(pattern: str, number: int = 1) -> tuple[subprocess.Popen[str], int]:
        halt = Halt(tmp_path / f"halt-{len(begun)}", str(tmp_path / "quickstart" / pattern), number)
        process = subprocess.Popen(
            command(tmp_path, ONE_METHOD),
            cwd=ROOT,
            env=os.environ | environment(halt),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process, halt.wait(lambda: process.poll() is None)

    yield _begin
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    runs = tmp_path_factory.mktemp("finished")
    done = flearn(runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scores in %" in done.stdout
    return runs / "quickstart"


def figures(run_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run_dir / "results.json").read_text())["rows"]
    return rows


def ends_as_undisturbed(runs: Path, finished: Path) -> None:
    """Run what is left to do of a disturbed run; it must come to the figures of the other."""
    done = flearn(runs, ONE_METHOD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert figures(runs / "quickstart") == [row for row in figures(finished) if row["method"] == "flearn_ft"]


def manifests(run_dir: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in run_dir.glob("*/manifest.json")}


def test_results_have_a_row_for_each_method_protocol_and_state(finished: Path) -> None:
    rows = figures(finished)
    found = {(row["method"], row["protocol"], row["state"]) for row in rows}
    assert found == {
        (method, protocol, state)
        for method in ("flearn_ft", "flearn_lora")
        for protocol in ("token", "probability", "generation")
        for state in ("original", "forgotten", "updated")
    }
    assert len(rows) == len(found)
    assert (finished / "report.html").read_text().startswith("<!doctype html>")


def test_run_again_does_nothing(finished: Path) -> None:
    before = manifests(finished)
    done = flearn(finished.parent)
    assert done.returncode == 0
    assert "nothing to run" in done.stdout
    assert manifests(finished) == before


def test_another_seed_is_added_to_what_is_there(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    run_dir = tmp_path / "runs" / "quickstart"
    before = manifests(run_dir)
    done = flearn(tmp_path / "runs", "methods=[flearn_lora]", "seeds=[0, 1]")
    assert done.returncode == 0, done.stdout + done.stderr
    after = manifests(run_dir)
    assert {name: after[name] for name in before} == before
    added = sorted(name.rpartition("-")[0] for name in after.keys() - before.keys())
    assert added == sorted(["model", "teach", "tune_old", "forget", "learn", "report", *4 * ["evaluate"]])
    old = [row for row in figures(finished) if row["method"] == "flearn_lora"]
    assert [row for row in figures(run_dir) if row["seed"] == 0] == old
    results = json.loads((run_dir / "results.json").read_text())
    assert len([row for row in results["rows"] if row["seed"] == 1]) == len(results["summary"]) == len(old)
    assert "deviation of 2 seeds" in done.stdout


def test_a_run_builds_on_another_runs_results(finished: Path, tmp_path: Path) -> None:
    """On its models and on its adapters, which name what they were made from beside themselves."""
    other = Plan.from_json(json.loads((finished / "plan.json").read_text()))

    def existing(stage: str, method: str | None = None) -> Existing:
        steps = [step for step in other.steps.values() if step.stage == stage]
        return Existing(finished / next(s.id for s in steps if method is None or s.methods == [method]))

    def section(stage: str) -> dict[str, Any]:
        return next(
            s.section for s in other.steps.values() if s.stage == stage and s.methods == ["flearn_lora"]
        )

    plan = Plan(tmp_path)
    facts = existing("facts")
    tuned = {"base": existing("teach"), "tuned": existing("tune_old", "flearn_lora")}
    plan.add("forget", section("forget"), tuned)
    learned = plan.add("learn", section("learn"), {"model": existing("learn", "flearn_lora"), "facts": facts})
    original = next(s for s in other.steps.values() if s.stage == "evaluate" and "reference" not in s.inputs)
    reference = Existing(finished / original.id)
    inputs: dict[str, Step | Existing] = {"model": learned, "facts": facts, "reference": reference}
    plan.add("evaluate", section("evaluate"), inputs)
    write_json(tmp_path / "plan.json", plan.to_json())
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    worker = [sys.executable, "-m", "launch.worker", str(tmp_path / "plan.json")]
    done = subprocess.run(
        worker, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(plan.pending()) == []
    assert plan.artifact(learned).input("model").folder == existing("learn", "flearn_lora").folder
    forgotten = next(step for step in plan.steps.values() if step.stage == "forget")
    twin = existing("forget", "flearn_lora")
    written, before = (folder / "model" for folder in (plan.artifact(forgotten).folder, twin.folder))
    for shard in before.glob("*.safetensors"):
        assert (written / shard.name).read_bytes() == shard.read_bytes()
    scores = plan.artifact(next(reversed(plan.steps.values()))).result["protocols"]
    assert scores["token"]["reliability"] is not None


def test_a_new_lambda_reuses_the_fine_tunings(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    run_dir = tmp_path / "runs" / "quickstart"
    before = manifests(run_dir)
    done = flearn(tmp_path / "runs", "forget.scale=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    after = manifests(run_dir)
    assert {name: after[name] for name in before} == before
    assert {name.rpartition("-")[0] for name in after.keys() - before.keys()} == {
        "forget",
        "learn",
        "evaluate",
        "report",
    }
    assert {row["scale"] for row in figures(run_dir)} == {0.5}


CHECKPOINT = "checkpoints/*/complete.json"
"""Written last: where it is about to be, a training is amid its steps."""


def test_killed_in_each_stage_it_ends_with_the_same_figures(
    finished: Path, tmp_path: Path, begin: Begin
) -> None:
    run_dir = tmp_path / "quickstart"
    moments = {
        "facts": ("manifest.json", 1),
        "model": ("manifest.json", 1),
        "teach": (CHECKPOINT, 2),
        "evaluate": ("records-rank0.jsonl", 1),
        "tune_old": (CHECKPOINT, 2),
        "forget": ("model/*.safetensors", 1),
        "learn": (CHECKPOINT, 2),
        "report": ("manifest.json", 1),
    }
    for stage, (file, number) in moments.items():
        process, _ = begin(f"{stage}-*/{file}", number)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not RunFolder(run_dir).is_alive(), "the end of the ranks, which die with it")
        assert not (run_dir / "results.json").exists()
    ends_as_undisturbed(tmp_path, finished)


def test_asked_to_stop_it_saves_and_goes_on(finished: Path, tmp_path: Path, begin: Begin) -> None:
    """In a training, while one rank works and the other waits, and in a training again."""
    run_dir = tmp_path / "quickstart"
    for stage, number, file in (
        ("teach", signal.SIGINT, CHECKPOINT),
        ("forget", signal.SIGTERM, "rank0.log"),
        ("learn", signal.SIGTERM, CHECKPOINT),
    ):
        process, _ = begin(f"{stage}-*/{file}")
        os.killpg(process.pid, number)  # as a terminal does: to every process of the group
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 128 + number, output
        assert "the same command goes on from there" in output
        if stage == "forget":
            assert "forget: stopped" in output
        else:
            assert any(run_dir.glob(f"{stage}-*/checkpoints/*")), output
        assert not any(run_dir.glob(f"{stage}-*/manifest.json"))
    ends_as_undisturbed(tmp_path, finished)


def test_a_dead_rank_ends_the_others(begin: Begin) -> None:
    process, halted = begin(f"teach-*/{CHECKPOINT}")
    ranks = children(process)
    assert halted in ranks, "rank 0, which would write the file"
    (victim,) = set(ranks) - {halted}
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "rank 1 was killed by signal 9 (SIGKILL)" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_two_runs_in_one_folder(tmp_path: Path, begin: Begin) -> None:
    begin("plan.json")
    second = flearn(tmp_path)
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "another run is at work here" in second.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_no_loss(finished: Path, tmp_path: Path) -> None:
    runs = tmp_path / "small"
    runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(runs)], check=True)
    try:
        done = flearn(runs, ONE_METHOD)
        assert done.returncode == 2, done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("flearn: ")]
        assert len(lines) == 1
        assert "free" in lines[0]
        subprocess.run(["mount", "-o", "remount,size=1g", str(runs)], check=True)
        ends_as_undisturbed(runs, finished)
    finally:
        subprocess.run(["umount", str(runs)], check=True)
