"""Chains that are requeued, preempted, warned or killed end as undisturbed ones, or say what to do."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dev_cluster import CLUSTER
from halts import Halt, wait_until
from slurm_chains import (
    ZERO,
    copy_before,
    digests,
    figures,
    find_process,
    flearn,
    learned,
    needs_slurm,
    num_steps,
    run,
    settings,
    slurm,
    status,
    status_text,
)

from launch.run_folder import RunFolder

pytestmark = needs_slurm


class Disturbed:
    """A chain whose `learn` has halted on rank 0, at its second checkpoint; rank 1 waits for it."""

    def __init__(self, reference: Path, runs: Path, site: Path, *site_lines: str) -> None:
        self.runs, self.reference, self.run_dir = runs, reference, runs / "quickstart"
        site.write_text("\n".join(site_lines) + "\n")
        self.overrides = [*ZERO[2], f"cluster.site={site}"]
        copy_before("learn", reference, self.run_dir)
        halt = Halt(runs / "halt", str(self.run_dir / "learn-*/checkpoints/*/complete.json"), number=2)
        run(runs, "slurm", *self.overrides, halts=[halt])
        halt.wait()
        self.let_go = halt.let_go
        """Let rank 0 go on. It also does when a signal reaches it."""

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
        """Send the warning to rank 1 alone, and let rank 0 go on."""
        os.kill(self.pid(SLURM_PROCID="1"), signal.SIGUSR2)
        self.let_go()

    def state(self) -> str:
        return slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.job}").strip()

    def num_requeues(self) -> int:
        found = re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", self.job))
        assert found is not None
        return int(found[1])

    def ends_as_undisturbed(self) -> None:
        what = f"{self.state()} {status_text(self.run_dir)}"
        wait_until(lambda: (self.run_dir / "results.json").exists(), what)
        assert figures(self.run_dir) == figures(self.reference)
        assert learned(self.run_dir) == learned(self.reference)


def job_of(run_dir: Path, stage: str) -> tuple[str, str]:
    """The only step of this stage that was submitted, and its job."""
    jobs = RunFolder(run_dir).jobs()
    return next((step, job) for step, job in jobs.items() if step.startswith(f"{stage}-"))


@pytest.fixture
def disturb(undisturbed: Callable[[int], Path], tmp_path: Path) -> Callable[..., Disturbed]:
    site = tmp_path / "site.yaml"
    return lambda *lines: Disturbed(undisturbed(2), tmp_path, site, *(lines or ("partition: debug",)))


def test_requeued_by_an_operator(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    slurm("scontrol", "requeue", chain.job)
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 1


def test_preempted_by_a_job_of_higher_priority(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb("partition: low")
    slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 1


def test_time_limit(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    slurm("scontrol", "update", f"jobid={chain.job}", "timelimit=2")  # minutes: the job is warned at once
    wait_until(lambda: chain.num_requeues() == 1, "its requeue")
    chain.ends_as_undisturbed()


def test_a_warning_to_one_rank_only(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    chain.warn_rank_1()
    wait_until(lambda: chain.num_requeues() == 1, "its requeue")
    chain.ends_as_undisturbed()


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
    chain.let_go()
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


@pytest.mark.parametrize("without", ["permission", "scontrol"])
def test_a_job_that_cannot_come_back_says_so_and_the_same_command_goes_on(
    disturb: Callable[..., Disturbed], without: str, tmp_path: Path
) -> None:
    """SLURM refuses to queue the job again, or there is no scontrol where it runs, as in most containers."""
    if without == "permission":
        chain = disturb()
        said = "could not be queued again: run the same command again (Requested operation is presently dis"
        slurm("scontrol", "update", f"jobid={chain.job}", "requeue=0")
    else:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/srun").symlink_to(str(shutil.which("srun")))
        chain = disturb(f"setup: ['export PATH={tmp_path}/bin']")
        said = "there is no scontrol in this container: run the same command again"
    chain.warn_rank_1()
    wait_until(lambda: chain.state() == "FAILED", "the end of the job")
    found = status(chain.run_dir)["learn"]
    assert found["state"] == "failed" and said in found["note"], found
    steps = num_steps(chain.runs)
    chain.submit()
    chain.ends_as_undisturbed()
    assert f"resuming after step {steps}" in flearn("logs", str(chain.run_dir), "learn").stdout


def test_an_array_with_a_part_that_is_killed_and_one_that_is_warned(
    undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    """The warned part comes back by itself; the killed one, alone, is done again by the same command."""
    run_dir = tmp_path / "quickstart"
    copy_before("forget", undisturbed(2), run_dir)
    overrides = [*ZERO[2], "cluster.forget_parts=3"]
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
    assert figures(run_dir) == figures(undisturbed(2))
    assert digests(run_dir) == digests(undisturbed(2))
    jobs = slurm("sacct", "--noheader", "--allocations", "--format=JobID", f"--jobs={again}")
    assert jobs.split() == [again]  # no array: one part was left
