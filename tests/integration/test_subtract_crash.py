"""`subtract` killed at any moment goes on and ends with the bytes of an undisturbed run. Real kills, real
processes, a real full disk.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
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
    return make_models(tmp_path_factory.mktemp("crash"), num_layers=4)


@pytest.fixture(scope="module")
def right(models: Path) -> dict[str, str]:
    """What the command makes of the models. Its chunks are larger than the trials', so the manifest's sums
    may end otherwise.
    """
    subprocess.run(
        command(models, models / "commanded"), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL
    )
    return contents(models / "commanded")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 30 shards, of three writes each."""
    return make_models(tmp_path_factory.mktemp("many"), num_layers=30)


def make_models(folder: Path, num_layers: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i:02d}.mlp.up_proj.weight" for i in range(num_layers)]
    base: Tensors = {name: torch.randn(200, 201, generator=generator).bfloat16() for name in names}
    save(folder / "base", base)
    (folder / "base/config.json").write_text('{"model_type": "llama"}')
    (folder / "base/tokenizer.json").write_text("{}")
    save(folder / "tuned", nudged(base, 1))
    (result,) = run_trials(folder, [("right", "0", "after")])
    assert result["state"] == "written"
    return folder


Trial = tuple[str, str, str]
"""Name of the output folder, the call at which it is killed (0: none), and before, within, after or late: see
`kill_subtract.py`.
"""


def run_trials(folder: Path, trials: list[Trial]) -> list[dict[str, Any]]:
    return results(start_trials(folder, trials))


def start_trials(folder: Path, trials: list[Trial], part: tuple[int, int] = (0, 1)) -> subprocess.Popen[str]:
    settings = {"base": str(folder / "base"), "tuned": str(folder / "tuned"), "part": part}
    words = [word for out, call, when in trials for word in (str(folder / out), call, when)]
    program = [
        sys.executable,
        str(Path(__file__).with_name("kill_subtract.py")),
        json.dumps(settings),
        *words,
    ]
    return subprocess.Popen(program, env=SETTINGS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    told, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in told.splitlines()]


def contents(folder: Path) -> dict[str, str]:
    """{path inside the folder, hidden ones too: blake3 of the file}."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): blake3(path.read_bytes()).hexdigest() for path in files}


def command(folder: Path, out: Path, *options: str) -> list[str]:
    sources = [
        "--base",
        str(folder / "base"),
        "--tuned",
        str(folder / "tuned"),
        "--scale",
        "0.3",
        "--out",
        str(out),
    ]
    return [
        sys.executable,
        "-m",
        "launch",
        "delta",
        "subtract",
        *sources,
        "--max-shard-size",
        "200000",
        *options,
    ]


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(folder, out, *options), cwd=ROOT, env=SETTINGS, stdout=pipe, stderr=pipe, text=True
    )


def test_killed_at_every_call_that_changes_a_file(models: Path) -> None:
    """Also between the writing of a journal's entry and its renaming, and within the writing of either."""
    right = contents(models / "right")
    (whole,) = run_trials(models, [("count", "0", "after")])
    assert {"replace", "rename", "fsync", "pwrite", "posix_fallocate", "mkdir", "unlink"} <= set(
        whole["calls"]
    )
    moments = [
        (call, "within" if name in ("pwrite", "fsync") else "after")
        for call, name in enumerate(whole["calls"], start=1)
    ]
    trials = [
        trial for call, when in moments for trial in ((f"{call}", f"{call}", when), (f"{call}", "0", "after"))
    ]
    ends = run_trials(models, trials)
    killed, resumed = ends[::2], ends[1::2]
    assert sum(result["signal"] == signal.SIGKILL for result in killed) > 0.9 * len(
        moments
    )  # threads may make a call or two less
    assert all(result["signal"] == 0 and result["state"] in ("written", "found") for result in resumed)
    for call, when in moments:
        assert contents(models / f"{call}") == right, f"killed {when} call {call}, {whole['calls'][call - 1]}"
        shutil.rmtree(models / f"{call}")


def test_killed_at_twenty_random_moments(many: Path) -> None:
    """Five times the same output, each life ending some calls after it began; the fifth while other threads
    are far ahead.
    """
    generator = random.Random(0)
    trials: list[Trial] = []
    for out in ("out-0", "out-1", "out-2", "out-3"):
        for _ in range(4):
            kind = generator.choice(["", "pwrite:", "replace:", "fsync:"])
            trials.append(
                (
                    out,
                    f"{kind}{generator.randint(1, 4 if kind else 20)}",
                    generator.choice(["before", "within", "after"]),
                )
            )
        trials += [(out, f"pwrite:{generator.randint(1, 4)}", "late"), (out, "0", "after")]
    for (out, call, when), end in zip(trials, run_trials(many, trials), strict=True):
        if call == "0":
            assert end["state"] == "written"
            assert contents(many / out) == contents(many / "right")
        else:
            assert end["signal"] == signal.SIGKILL, f"{call} {when}"
            assert end["half_written"] or not call.startswith("pwrite"), f"{call} {when}"


def test_three_workers_one_of_which_comes_back_later(many: Path) -> None:
    """The second dies as it begins its second shard; the others end long before somebody starts it again.
    Then it dies once more.
    """
    out = many / "parts"
    moments = [("0", "after"), ("posix_fallocate:2", "after"), ("0", "after")]
    workers = [start_trials(many, [("parts", *moment)], part=(i, 3)) for i, moment in enumerate(moments)]
    (first,), (second,), (third,) = (results(worker) for worker in workers)
    assert first["state"] == third["state"] == "waiting" and second["signal"] == signal.SIGKILL
    assert not (out / "manifest.json").exists() and not (out / "model-00005-of-00030.safetensors").exists()
    again, last = results(
        start_trials(many, [("parts", "posix_fallocate:6", "after"), ("parts", "0", "after")], part=(1, 3))
    )
    assert again["signal"] == signal.SIGKILL and again["half_written"]
    assert last["state"] == "written"
    assert contents(out) == contents(many / "right")


def test_six_workers_at_once_each_part_twice(models: Path, right: dict[str, str]) -> None:
    out = models / "twice"
    workers = [start(models, out, "--part", f"{i}/3") for i in (1, 2, 3, 1, 2, 3)]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 6, told
    assert contents(out) == right


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("foresees", [True, False])
def test_a_full_disk_is_one_line_and_more_room_is_enough(
    models: Path, right: dict[str, str], small_disk: Path, foresees: bool
) -> None:
    """The plan sees that the room is too little; where another program takes it meanwhile, the writing
    does.
    """
    if foresees:
        (small_disk / "other").write_bytes(b"x" * 700_000)
        done = subprocess.run(
            command(models, small_disk / "out"), cwd=ROOT, env=SETTINGS, capture_output=True, text=True
        )
        assert "are needed" in done.stderr
    else:
        blind = "import shutil, sys, types; free = types.SimpleNamespace(free=1 << 40);"
        blind += "shutil.disk_usage = lambda path: free; "
        words = command(models, small_disk / "out", "--memory", "20MiB")[3:]
        blind += f"from launch.cli import main; sys.exit(main({words}))"
        (small_disk / "other").write_bytes(b"x" * 600_000)
        done = subprocess.run(
            [sys.executable, "-c", blind], cwd=ROOT, env=SETTINGS, capture_output=True, text=True
        )
        assert "no space left on the disk" in done.stderr
        assert any((small_disk / "out").glob("model-*.safetensors"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((small_disk / "out").glob(".*.tmp"))
    (small_disk / "other").unlink()
    subprocess.run(
        command(models, small_disk / "out"), cwd=ROOT, env=SETTINGS, check=True, stdout=subprocess.DEVNULL
    )
    assert contents(small_disk / "out") == right
