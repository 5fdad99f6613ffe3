"""`subtract` killed at any moment goes on and ends with the bytes of an undisturbed run. Real kills, real processes, a real full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import Tensors, nudged, save

ROOT = Path(__file__).parents[2]
SETTINGS = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[:1]])}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of 5 shards' size, its tuned model, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("crash")
    generator = torch.Generator().manual_seed(0)
    base: Tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(200, 201, generator=generator).bfloat16() for i in range(5)}
    save(folder / "base", base)
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    (folder / "base/tokenizer.json").write_text("{}")
    save(folder / "tuned", nudged(base, 1))
    (result,) = run_trials(folder, [("right", 0, "after")])
    assert result["state"] == "written"
    return folder


def run_trials(folder: Path, trials: list[tuple[str, int, str]], **arguments: Any) -> list[dict[str, Any]]:
    """Each trial is (name of the output folder, the call at which it is killed or 0, before or after)."""
    settings = {"base": str(folder / "base"), "tuned": str(folder / "tuned"), **arguments}
    words = [word for out, call, when in trials for word in (str(folder / out), str(call), when)]
    program = [sys.executable, str(Path(__file__).with_name("kill_subtract.py")), json.dumps(settings), *words]
    done = subprocess.run(program, env=SETTINGS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_before_and_after_every_call_that_changes_a_file(models: Path) -> None:
    right = contents(models / "right")
    (whole,) = run_trials(models, [("count", 0, "after")])
    assert {"replace", "rename", "fsync", "pwrite", "posix_fallocate", "mkdir", "unlink"} <= set(whole["calls"])
    moments = [(call, when) for call in range(1, len(whole["calls"]) + 1) for when in ("before", "after")]
    trials = [trial for call, when in moments for trial in ((f"{call}-{when}", call, when), (f"{call}-{when}", 0, "after"))]
    results = run_trials(models, trials)
    killed, resumed = results[::2], results[1::2]
    assert sum(result["signal"] == signal.SIGKILL for result in killed) > 0.9 * len(moments)  # threads may make a call or two less
    assert all(result["signal"] == 0 and result["state"] in ("written", "found") for result in resumed)
    for call, when in moments:
        out = models / f"{call}-{when}"
        assert contents(out) == right, f"killed {when} call {call}"
        shutil.rmtree(out)


def test_killed_again_and_again(models: Path) -> None:
    """Each life ends a few calls after the last one's progress; at the end nothing is left over."""
    generator = random.Random(0)
    trials = [("often", generator.randint(2, 14), generator.choice(["before", "after"])) for _ in range(20)]
    results = run_trials(models, [*trials, ("often", 0, "after")])
    assert sum(result["signal"] == signal.SIGKILL for result in results) >= 5
    assert results[-1]["state"] in ("written", "found")
    assert contents(models / "often") == contents(models / "right")


def command(models: Path, out: Path, *options: str) -> list[str]:
    sources = ["--base", str(models / "base"), "--tuned", str(models / "tuned"), "--scale", "0.3", "--out", str(out)]
    return [sys.executable, "-m", "launch", "delta", "subtract", *sources, "--max-shard-size", "200000", *options]


def test_three_workers_one_of_which_comes_back_later(models: Path) -> None:
    out = models / "parts"
    workers = [
        subprocess.Popen(command(models, out, "--part", f"{i}/3"), cwd=ROOT, env=SETTINGS, stdout=subprocess.PIPE) for i in (1, 2, 3)
    ]
    workers[1].kill()
    told = [worker.communicate(timeout=120)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL, 0]
    assert all("left to other parts" in told[i] for i in (0, 2))
    assert not (out / "manifest.json").exists()
    late = subprocess.run(command(models, out, "--part", "2/3"), cwd=ROOT, env=SETTINGS, capture_output=True, text=True, check=True)
    assert "left to other parts" not in late.stdout
    assert contents(out) == contents(models / "right")


def test_six_workers_at_once_each_part_twice(models: Path) -> None:
    out = models / "twice"
    workers = [subprocess.Popen(command(models, out, "--part", f"{i}/3"), cwd=ROOT, env=SETTINGS) for i in (1, 2, 3, 1, 2, 3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 6
    assert contents(out) == contents(models / "right")


def test_killed_at_random_moments_as_a_process(models: Path) -> None:
    out = models / "random"
    generator = random.Random(1)
    started = time.perf_counter()
    subprocess.run(command(models, models / "timed"), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    for _ in range(6):
        process = subprocess.Popen(command(models, out), cwd=ROOT, env=SETTINGS, stdout=subprocess.DEVNULL)
        time.sleep(seconds * generator.uniform(0.5, 1.0))
        process.kill()
        process.wait()
    subprocess.run(command(models, out), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(models / "right")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("foresees", [True, False])
def test_a_full_disk_is_one_line_and_more_room_is_enough(models: Path, small_disk: Path, foresees: bool) -> None:
    """The plan sees that the room is too little; where another program takes it meanwhile, the writing does."""
    if foresees:
        (small_disk / "other").write_bytes(b"x" * 600_000)
        done = subprocess.run(command(models, small_disk / "out"), cwd=ROOT, env=SETTINGS, capture_output=True, text=True)
        assert "are needed" in done.stderr
    else:
        blind = "import shutil, sys, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40); "
        blind += f"from launch.cli import main; sys.exit(main({command(models, small_disk / 'out', '--memory', '20MiB')[3:]}))"
        (small_disk / "other").write_bytes(b"x" * 500_000)
        done = subprocess.run([sys.executable, "-c", blind], cwd=ROOT, env=SETTINGS, capture_output=True, text=True)
        assert "no space left on the disk" in done.stderr
        assert any((small_disk / "out").glob("model-*.safetensors"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((small_disk / "out").glob(".*.tmp"))
    (small_disk / "other").unlink()
    subprocess.run(command(models, small_disk / "out"), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL)
    assert contents(small_disk / "out") == contents(models / "right")
