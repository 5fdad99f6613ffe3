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
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from delta_models import Tensors, nudged, save

ROOT = Path(__file__).parents[2]
SETTINGS = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[:1]])}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of 4 shards' size, its tuned model, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("crash")
    make_models(folder, num_layers=4, size=200)
    (result,) = run_trials(folder, [("right", 0, "after")])
    assert result["state"] == "written"
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 30 shards of 4 MB, whose writing takes longer than the rest."""
    folder = tmp_path_factory.mktemp("large")
    make_models(folder, num_layers=30, size=1000)
    subprocess.run(command(folder, folder / "right"), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL)
    return folder


def make_models(folder: Path, num_layers: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i:02d}.mlp.up_proj.weight" for i in range(num_layers)]
    base: Tensors = {name: torch.randn(size, size + 1, generator=generator).bfloat16() for name in names}
    save(folder / "base", base)
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    (folder / "base/tokenizer.json").write_text("{}")
    save(folder / "tuned", nudged(base, 1))


def run_trials(folder: Path, trials: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """Each trial is (name of the output folder, the call at which it is killed or 0, before, within or after it)."""
    settings = {"base": str(folder / "base"), "tuned": str(folder / "tuned")}
    words = [word for out, call, when in trials for word in (str(folder / out), str(call), when)]
    program = [sys.executable, str(Path(__file__).with_name("kill_subtract.py")), json.dumps(settings), *words]
    done = subprocess.run(program, env=SETTINGS, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """{path inside the folder, hidden ones too: blake3 of the file}."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): blake3(path.read_bytes()).hexdigest() for path in files}


def command(folder: Path, out: Path, *options: str) -> list[str]:
    sources = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--scale", "0.3", "--out", str(out)]
    return [sys.executable, "-m", "launch", "delta", "subtract", *sources, "--max-shard-size", "200000", *options]


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(folder, out, *options), cwd=ROOT, env=SETTINGS, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str, old: Collection[Path] = ()) -> None:
    """Until a file of that name appears that is not one of the `old`, or the process ends."""
    while not set(folder.glob(pattern)).difference(old) and process.poll() is None:
        time.sleep(0.001)


def test_killed_at_every_call_that_changes_a_file(models: Path) -> None:
    """Also between the writing of a journal's entry and its renaming, and within the writing of weights."""
    right = contents(models / "right")
    (whole,) = run_trials(models, [("count", 0, "after")])
    assert {"replace", "rename", "fsync", "pwrite", "posix_fallocate", "mkdir", "unlink"} <= set(whole["calls"])
    moments = [(call, "within" if name == "pwrite" else "after") for call, name in enumerate(whole["calls"], start=1)]
    trials = [trial for call, when in moments for trial in ((f"{call}", call, when), (f"{call}", 0, "after"))]
    results = run_trials(models, trials)
    killed, resumed = results[::2], results[1::2]
    assert sum(result["signal"] == signal.SIGKILL for result in killed) > 0.9 * len(moments)  # threads may make a call or two less
    assert all(result["signal"] == 0 and result["state"] in ("written", "found") for result in resumed)
    for call, when in moments:
        assert contents(models / f"{call}") == right, f"killed {when} call {call}, {whole['calls'][call - 1]}"
        shutil.rmtree(models / f"{call}")


def test_killed_again_and_again(models: Path) -> None:
    """Each life ends a few calls after the last one's progress; at the end nothing is left over."""
    generator = random.Random(0)
    trials = [("often", generator.randint(2, 14), generator.choice(["before", "within", "after"])) for _ in range(20)]
    results = run_trials(models, [*trials, ("often", 0, "after")])
    assert sum(result["signal"] == signal.SIGKILL for result in results) >= 10
    assert results[-1]["state"] in ("written", "found")
    assert contents(models / "often") == contents(models / "right")


def test_a_process_killed_at_twenty_random_moments(large: Path) -> None:
    """Each life begins to write, and is killed some time later; whenever one reaches the end, the next begins anew."""
    right, generator = contents(large / "right"), random.Random(1)
    num_killed = num_half_written = num_finished = 0
    while num_killed < 20 or not num_finished:
        leftovers = set((large / "out").glob(".*.tmp"))
        process = start(large, large / "out", "--memory", "40MiB")
        wait_for(process, large / "out", ".*.tmp", leftovers)
        with suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0, 0.15) if num_killed < 20 else 120)
        process.kill()
        _, told = process.communicate()
        if process.returncode == -signal.SIGKILL:
            num_killed += 1
            num_half_written += not leftovers.issuperset((large / "out").glob(".*.tmp"))
            continue
        assert process.returncode == 0, told
        assert contents(large / "out") == right
        shutil.rmtree(large / "out")
        num_finished += 1
    assert num_half_written >= 5


def test_three_workers_one_of_which_comes_back_later(large: Path) -> None:
    """The second dies while it writes; the others are done long before somebody starts it again. Then it dies once more."""
    out = large / "parts"
    options = ["--memory", "40MiB", "--part"]
    workers = [start(large, out, *options, f"{i}/3") for i in (1, 2, 3)]
    wait_for(workers[1], out, ".model-00005-of-*.tmp")  # the second shard of its own
    workers[1].kill()
    told = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, -signal.SIGKILL, 0]
    assert all("left to other parts" in told[i] for i in (0, 2))
    assert not (out / "manifest.json").exists()
    again = start(large, out, *options, "2/3")
    wait_for(again, out, ".model-00020-of-*.tmp")
    again.kill()
    assert again.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    last = start(large, out, *options, "2/3")
    assert "left to other parts" not in last.communicate(timeout=120)[0]
    assert contents(out) == contents(large / "right")


def test_six_workers_at_once_each_part_twice(models: Path) -> None:
    out = models / "twice"
    workers = [start(models, out, "--part", f"{i}/3") for i in (1, 2, 3, 1, 2, 3)]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 6, told
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
        (small_disk / "other").write_bytes(b"x" * 700_000)
        done = subprocess.run(command(models, small_disk / "out"), cwd=ROOT, env=SETTINGS, capture_output=True, text=True)
        assert "are needed" in done.stderr
    else:
        blind = "import shutil, sys, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40); "
        blind += f"from launch.cli import main; sys.exit(main({command(models, small_disk / 'out', '--memory', '20MiB')[3:]}))"
        (small_disk / "other").write_bytes(b"x" * 600_000)
        done = subprocess.run([sys.executable, "-c", blind], cwd=ROOT, env=SETTINGS, capture_output=True, text=True)
        assert "no space left on the disk" in done.stderr
        assert any((small_disk / "out").glob("model-*.safetensors"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((small_disk / "out").glob(".*.tmp"))
    (small_disk / "other").unlink()
    subprocess.run(command(models, small_disk / "out"), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL)
    assert contents(small_disk / "out") == contents(models / "right")
