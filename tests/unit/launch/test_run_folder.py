"""A run's folder: its plans, jobs, errors and results, and who may work in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run_folder import RunFolder, StepFolder
from pipeline import config
from pipeline.errors import InputError
from pipeline.plan import Plan, make_plan

ROOT = Path(__file__).parents[3]


def plan_of(runs_dir: Path, *overrides: str) -> Plan:
    settings = [f"cluster.runs_dir={runs_dir}", *overrides]
    return make_plan(config.load(ROOT / "configs/quickstart.yaml", settings))


def test_a_plan_is_read_as_it_was_written_wherever_the_folder_is_now(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    RunFolder(plan.run_dir).write_plan(plan)
    moved = plan.run_dir.rename(tmp_path / "moved")
    found = RunFolder(moved).plan()
    assert found.run_dir == moved
    assert found.to_json()["steps"] == plan.to_json()["steps"]


@pytest.mark.parametrize(("text", "said"), [(None, "no plan.json here"), ("{", "plan.json: damaged")])
def test_a_folder_without_a_plan(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=said):
        RunFolder(tmp_path).plan()


def test_steps_that_another_plan_has_in_the_queue_come_after_the_last_plans(tmp_path: Path) -> None:
    first, last = plan_of(tmp_path, "forget.scale=0.25"), plan_of(tmp_path, "forget.scale=0.5")
    run_folder = RunFolder(first.run_dir)
    queued, never_submitted = [id for id in first.steps if id not in last.steps][:2]
    files = [run_folder.submit_plan(plan) for plan in (first, last)]
    assert files[0] != files[1] and all(file.is_file() for file in files)
    run_folder.add_jobs({queued: "7"})
    steps = list(run_folder.all_plans().steps)
    assert steps == [*last.steps, queued] and never_submitted not in steps
    assert list(run_folder.plan().steps) == list(last.steps)


def test_a_later_job_of_a_step_replaces_the_earlier_one(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path)
    assert run_folder.jobs() == {}
    run_folder.add_jobs({"teach-1": "7", "learn-1": "8"})
    run_folder.add_jobs({"teach-1": "9"})
    assert run_folder.jobs() == {"teach-1": "9", "learn-1": "8"}


def test_the_logs_of_a_job_are_its_own_and_in_the_order_of_its_tasks(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path)
    run_folder.jobs_folder.mkdir()
    for name in ("7_10_0_log.err", "7_2_0_log.err", "7_2_0_log.out", "70_0_log.err", "7_submission.sh"):
        (run_folder.jobs_folder / name).touch()
    assert [path.name for path in run_folder.job_logs("7")] == ["7_2_0_log.err", "7_10_0_log.err"]
    assert [path.name for path in run_folder.job_logs("local:70")] == ["70_0_log.err"]
    assert run_folder.job_logs(None) == []


def test_errors_of_a_step_and_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StepFolder(tmp_path)
    folder.note_error(None, 1, "of all")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    folder.note_error((0, 3), 0, "of a part")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error-part-1.json", "error.json"]
    first = {"rank": 0, "message": "of a part", "log": "rank0.log", "attempt": 3}
    second = {"rank": 1, "message": "of all", "log": "rank1.log", "attempt": 1}
    assert folder.errors() == [first, second]
    folder.clear_errors()
    assert folder.errors() == []


def test_only_one_may_work_in_a_run_and_others_see_that_it_does(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path / "run")
    assert not run_folder.is_alive()
    with run_folder.exclusive():
        assert run_folder.is_alive()
        assert run_folder.holder() == (os.uname().nodename, os.getpid())
        with pytest.raises(InputError, match="another run is at work here"), run_folder.exclusive():
            pass
    assert not run_folder.is_alive()


@pytest.mark.processes
def test_a_process_that_inherits_the_lock_holds_it(tmp_path: Path) -> None:
    """So ranks that outlive their launcher keep the run to themselves."""
    run_folder = RunFolder(tmp_path)
    with run_folder.exclusive() as lock:
        rank = subprocess.Popen(
            [sys.executable, "-c", "input()"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock],
        )
    assert run_folder.is_alive()
    rank.communicate(b"\n")
    assert not run_folder.is_alive()


def test_a_place_that_cannot_be_written_to_names_the_setting() -> None:
    with (
        pytest.raises(InputError, match=r"Not a directory.*cluster\.runs_dir"),
        RunFolder(Path("/dev/null/run")).exclusive(),
    ):
        pass


def test_a_finished_report_is_copied_to_the_top(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    run_folder = RunFolder(plan.run_dir)
    report = plan.report
    assert report.stage == "report"
    folder = run_folder.step(report.id).path
    folder.mkdir(parents=True)
    for text in ("one", "two"):
        for name in ("results.json", "report.html"):
            (folder / name).write_text(text)
        run_folder.publish(plan)
        assert run_folder.results.read_text() == run_folder.report.read_text() == text
