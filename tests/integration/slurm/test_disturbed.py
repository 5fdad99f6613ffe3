"""Chains that are requeued, preempted, warned or killed end as undisturbed ones, or say what to do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from dev_cluster import CLUSTER
from halts import Halt, wait_until
from slurm_chains import (
    ONE_METHOD,
    copy_before,
    find_process,
    flearn,
    needs_slurm,
    num_steps,
    require_same,
    run,
    settings,
    slurm,
    status,
    status_text,
)

from launch.run_folder import RunFolder

pytestmark = needs_slurm


def checkpoint(runs: Path, number: int, **variables: str) -> Halt:
    """Where rank 0 of `learn` is to complete its `number`-th checkpoint, in a job with these variables."""
    folder = runs / f"halt-{number}-{'-'.join(variables.values())}"
    return Halt(folder, str(runs / "quickstart/learn-*/checkpoints/*/complete.json"), number, **variables)


class Disturbed:
    """A chain whose `learn` has halted on rank 0, where its second checkpoint is to be complete.

    Rank 1 waits for rank 0, which goes on when a signal reaches it, or when it is let go.
    """

    def __init__(self, reference: Path, runs: Path, site_lines: Sequence[str], halts: Sequence[Halt]) -> None:
        """`halts` are where it is to halt later."""
        self.runs, self.reference, self.run_dir = runs, reference, runs / "quickstart"
        (runs / "site.yaml").write_text("\n".join(site_lines) + "\n")
        self.overrides = [ONE_METHOD, f"cluster.site={runs / 'site.yaml'}"]
        copy_before("learn", reference, self.run_dir)
        self.halt = checkpoint(runs, 2)
        run(runs, "slurm", *self.overrides, halts=[self.halt, *halts])
        self.halt.wait()

    def submit(self) -> None:
        run(self.runs, "slurm", *self.overrides)

    @property
    def job(self) -> str:
        return job_of(self.run_dir, "learn")[1]

    def pid(self, **variables: str) -> int:
        """The process of this job's Python with these SLURM variables."""
        variables["SLURM_JOB_ID"] = self.job
        return find_process({f"{name}={value}".encode() for name, value in variables.items()})

    def warn_rank_1(self) -> None:
        os.kill(self.pid(SLURM_PROCID="1"), signal.SIGUSR2)

    def state(self) -> str:
        return slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.job}").strip()

    def num_requeues(self) -> int:
        found = re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", self.job))
        assert found is not None
        return int(found[1])

    def ends_as_undisturbed(self) -> None:
        what = f"{self.state()} {status_text(self.run_dir)}"
        wait_until(lambda: (self.run_dir / "results.json").exists(), what)
        require_same(self.run_dir, self.reference)


def job_of(run_dir: Path, stage: str) -> tuple[str, str]:
    """The only step of this stage that was submitted, and its job."""
    jobs = RunFolder(run_dir).jobs()
    return next((step, job) for step, job in jobs.items() if step.startswith(f"{stage}-"))


@pytest.fixture
def disturb(undisturbed: Path, tmp_path: Path) -> Callable[..., Disturbed]:
    """`disturb(*lines_of_the_site, halts=[...])`."""
    return lambda *lines, halts=(): Disturbed(undisturbed, tmp_path, lines or ["partition: debug"], halts)


def test_queued_again_four_times_it_ends_as_undisturbed(
    disturb: Callable[..., Disturbed], tmp_path: Path
) -> None:
    """By an operator, for a job of higher priority, when one rank is warned, and before its time limit."""
    again = [checkpoint(tmp_path, 1, SLURM_RESTART_COUNT=attempt) for attempt in ("1", "2", "3")]
    saving = checkpoint(tmp_path, 2, SLURM_RESTART_COUNT="3")
    site = ["partition: low", "minutes: 120", "warning_seconds: 1800"]
    chain = disturb(*site, halts=[*again, saving])
    slurm("scontrol", "requeue", chain.job)
    again[0].wait()
    slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    again[1].wait()
    chain.warn_rank_1()
    again[1].let_go()
    again[2].wait()
    slurm("scontrol", "update", f"jobid={chain.job}", "timelimit=29")  # minutes: it is to be warned 30 before
    saving.wait()
    slurm(
        "scontrol", "update", f"jobid={chain.job}", "timelimit=120"
    )  # or it would be warned again and again
    saving.let_go()
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 4


def test_daemons_killed_and_restarted(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    run_folder = Path(os.environ["FLEARN_SLURM_DIR"]) / "run"
    for name in ("slurmd-n2", "slurmctld"):
        os.kill(int((run_folder / f"{name}.pid").read_text()), signal.SIGKILL)
    arguments = settings(chain.runs, *chain.overrides)
    refused = flearn("run", "configs/quickstart.yaml", "--on", "slurm", *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("flearn: SLURM's controller does not answer")
    assert refused.stderr.count("\n") == 1
    subprocess.run([str(CLUSTER), "up"], check=True, timeout=300)
    chain.halt.let_go()
    chain.ends_as_undisturbed()


def test_a_killed_rank_ends_its_step_and_the_same_command_goes_on(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    os.kill(chain.pid(SLURM_PROCID="1"), signal.SIGKILL)
    wait_until(lambda: chain.state() == "FAILED", "the end of the job")
    found = status(chain.run_dir)
    assert found["learn"]["state"] == "failed"
    note = found["learn"]["note"]
    assert re.search(r"rank 1 on n\d: Killed \(see .*/jobs/\d+_0_log.err\)", note), note
    wait_until(lambda: status(chain.run_dir)["report"]["state"] == "cancelled", "the cancelled rest")
    logs = flearn("logs", str(chain.run_dir), "learn").stdout
    assert "flearn: attempt 1 on n[1-2]" in logs and "Killed" in logs
    chain.submit()
    chain.ends_as_undisturbed()


def test_a_job_that_may_not_come_back_says_so_and_the_same_command_goes_on(
    disturb: Callable[..., Disturbed],
) -> None:
    """SLURM refuses to queue it again. What it has saved is kept."""
    chain = disturb()
    slurm("scontrol", "update", f"jobid={chain.job}", "requeue=0")
    chain.warn_rank_1()
    chain.halt.let_go()
    wait_until(lambda: chain.state() == "FAILED", "the end of the job")
    found = status(chain.run_dir)["learn"]
    said = "could not be queued again: run the same command again (Requested operation is presently dis"
    assert found["state"] == "failed" and said in found["note"], found
    steps = num_steps(chain.runs)
    chain.submit()
    chain.ends_as_undisturbed()
    assert f"resuming after step {steps}" in flearn("logs", str(chain.run_dir), "learn").stdout


def test_a_job_in_a_container_without_scontrol_says_that_it_cannot_come_back(
    disturb: Callable[..., Disturbed], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").symlink_to(str(shutil.which("srun")))
    chain = disturb(f"setup: ['export PATH={tmp_path}/bin']")
    chain.warn_rank_1()
    chain.halt.let_go()
    wait_until(lambda: chain.state() == "FAILED", "the end of the job")
    found = status(chain.run_dir)["learn"]
    said = "there is no scontrol in this container: run the same command again"
    assert found["state"] == "failed" and said in found["note"], found


def test_an_array_with_a_part_that_is_killed_and_one_that_is_warned(
    undisturbed: Path, tmp_path: Path
) -> None:
    """The warned part comes back by itself; the killed one, alone, is done again by the same command."""
    run_dir = tmp_path / "quickstart"
    copy_before("forget", undisturbed, run_dir)
    overrides = [ONE_METHOD, "cluster.forget_parts=3"]
    # Where a part begins its log: it hears signals, and is not yet at work.
    log = str(run_dir / "forget-*/rank0.log")
    killed, warned = (Halt(tmp_path / f"halt-{part}", log, SLURM_ARRAY_TASK_ID=part) for part in ("1", "2"))
    run(tmp_path, "slurm", *overrides, halts=[killed, warned])
    forget, job = job_of(run_dir, "forget")
    os.kill(killed.wait(), signal.SIGKILL)
    os.kill(warned.wait(), signal.SIGUSR2)
    wait_until(lambda: status(run_dir)["forget"]["state"] == "failed", "the end of all parts")
    assert "Killed" in status(run_dir)["forget"]["note"]
    assert "Restarts=1" in slurm("scontrol", "show", "job", f"{job}_2")
    done = sorted(path.name for path in (run_dir / forget).glob("part-*"))
    assert done == ["part-1-of-3.json", "part-3-of-3.json"]
    run(tmp_path, "slurm", *overrides)
    again = job_of(run_dir, "forget")[1]
    assert again != job
    wait_until(lambda: (run_dir / "results.json").exists(), f"the end: {status_text(run_dir)}")
    require_same(run_dir, undisturbed)
    jobs = slurm("sacct", "--noheader", "--allocations", "--format=JobID", f"--jobs={again}")
    assert jobs.split() == [again]  # no array: one part was left
