"""How a rank of a run ends on errors: its exit code, what it says, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import worker
from launch.worker import FAILED, MISTAKE
from pipeline import config
from pipeline.context import Context, log
from pipeline.errors import InputError
from pipeline.plan import Plan, make_plan

ROOT = Path(__file__).parents[3]
THEIRS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT),
)
"""What whoever chose the path can mend."""


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/data/model")


def one_step(runs_dir: Path) -> tuple[Plan, str]:
    plan = make_plan(config.load(ROOT / "configs/quickstart.yaml", [f"cluster.runs_dir={runs_dir}"]))
    return plan, next(iter(plan.steps))


def start_what_is_not_here() -> None:
    subprocess.run(["nvcc-not-here"], check=True)


def write_where_a_file_is() -> None:
    Path("/dev/null/x").mkdir()


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.processes
@pytest.mark.parametrize(
    ("work", "code"),
    [
        *[(raising(refusal(number)), MISTAKE) for number in THEIRS],
        (write_where_a_file_is, MISTAKE),
        *[
            (raising(refusal(number)), FAILED)
            for number in (errno.ESTALE, errno.EIO, errno.ENOENT, errno.EMFILE)
        ],
        (start_what_is_not_here, FAILED),
        (raising(KeyError("x")), FAILED),
    ],
)
def test_a_ranks_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    work: Callable[[], None],
    code: int,
) -> None:
    """Its libraries open files and start programs of their own: the log says who was refused."""
    monkeypatch.setattr(worker, "run_step", lambda *_: work())
    plan, step = one_step(tmp_path)
    assert worker.run_all(plan, [step], Context()) == code
    noted = json.loads((plan.artifact(plan.steps[step]).folder / "error.json").read_text())["message"]
    told = capsys.readouterr().err
    assert told == (f"flearn: {noted}\n" if code == MISTAKE else "")
    log = (plan.artifact(plan.steps[step]).folder / "rank0.log").read_text()
    assert log.count("Traceback") == 1 and "work()" in log


def test_a_mistake_of_the_callers_needs_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_step", lambda *_: raising(InputError("facts.path: no such file"))())
    plan, step = one_step(tmp_path)
    assert worker.run_all(plan, [step], Context()) == MISTAKE
    assert "Traceback" not in (plan.artifact(plan.steps[step]).folder / "rank0.log").read_text()


def test_a_log_on_a_full_disk_does_not_turn_a_mistake_into_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*_: object) -> None:
        log.warning("a line that will not fit")
        raise refusal(errno.ENOSPC)

    monkeypatch.setattr(worker, "run_step", fill_the_disk)
    plan, step = one_step(tmp_path)
    folder = plan.artifact(plan.steps[step]).folder
    folder.mkdir(parents=True)
    (folder / "rank0.log").symlink_to("/dev/full")
    assert worker.run_all(plan, [step], Context()) == MISTAKE


def test_a_rank_that_may_not_write(capsys: pytest.CaptureFixture[str]) -> None:
    plan, step = one_step(Path("/dev/null/foo"))
    assert worker.run_all(plan, [step], Context()) == MISTAKE
    folder = plan.artifact(plan.steps[step]).folder
    assert capsys.readouterr().err == f"flearn: {folder}: Not a directory\n"
