"""Chains of jobs on a real SLURM of two nodes, started for these tests: figures, kills, preemption, refusals, sweeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dev_cluster import CLUSTER, MISSING, ROOT, dev_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: see slurm/dev/cluster.sh"),
    pytest.mark.skipif(os.geteuid() != 0, reason="naming the virtual nodes in /etc/hosts needs root"),
]

# The quickstart with one method, few facts, and a `teach` that is long enough to be disturbed.
SMALL = [
    "facts.limit=12",
    "methods=[flearn_ft]",
    "model.tiny.num_layers=2",
    "teach.epochs=60",
    "teach.checkpoint_every_steps=10",
    "full.epochs=60",
    "evaluate.max_new_tokens=4",
    "evaluate.protocols=[token]",
    "forget.max_shard_size=1MB",
    "cluster.ranks=2",
    "cluster.nodes=2",
]
ZERO = {stage: [f"{name}.deepspeed=configs/deepspeed/zero{stage}.json" for name in ("teach", "full")] for stage in (2, 3)}


def settings(runs: Path, *overrides: str) -> list[str]:
    return [part for s in [*SMALL, f"cluster.runs_dir={runs}", *overrides] for part in ("--set", s)]


def flearn(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)


def run(runs: Path, on: str, *overrides: str) -> Path:
    done = flearn("run", "configs/quickstart.yaml", "--on", on, *settings(runs, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "quickstart"


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def status(run_dir: Path) -> dict[str, dict[str, Any]]:
    """By step id, or by stage where there is one of it."""
    rows = json.loads(flearn("status", str(run_dir), "--json").stdout)
    return {row["id"]: row for row in rows} | {row["id"].rpartition("-")[0]: row for row in rows}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def figures(run_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run_dir / "results.json").read_text())["rows"]
    return rows


def taught(run_dir: Path) -> bytes:
    (path,) = run_dir.glob("teach-*/model/*.safetensors")
    return path.read_bytes()


def digests(run_dir: Path) -> dict[str, str]:
    (path,) = run_dir.glob("forget-*/model/manifest.json")
    return {name: tensor["blake3"] for name, tensor in json.loads(path.read_text())["tensors"].items()}


def in_queue(run_dir: Path) -> str:
    """Jobs of this run that SLURM has not ended."""
    ids = re.findall(r"\d+", (run_dir / "jobs.json").read_text().partition("{")[2]) if (run_dir / "jobs.json").exists() else []
    return "".join(line for line in slurm("squeue", "--noheader", "--format=%F %T").splitlines() if line.split()[0] in ids)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A dev cluster of these tests' own."""
    before = dict(os.environ)
    try:
        with dev_cluster() as env:
            os.environ.update(env)
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `flearn` that starts this checkout, as an installation would."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "flearn").write_text(f'#!/bin/sh\nexec {sys.executable} -m launch "$@"\n')
    (folder / "flearn").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory, command: Path) -> dict[int, Path]:
    """The whole run by `sbatch slurm/flearn_llama7b.sh`, with ZeRO-2 and ZeRO-3 side by side; forgetting in three parts."""
    os.environ["PATH"] = f"{command}:{os.environ['PATH']}"
    found = {}
    for stage, deepspeed in ZERO.items():
        runs = tmp_path_factory.mktemp(f"zero{stage}")
        arguments = settings(runs, *deepspeed, "cluster.forget_parts=3")
        slurm(
            "sbatch",
            f"--chdir={ROOT}",
            f"--output={runs}/submit.log",
            str(ROOT / "slurm/flearn_llama7b.sh"),
            "configs/quickstart.yaml",
            *arguments,
        )
        found[stage] = runs / "quickstart"
    return found


@pytest.fixture(scope="module")
def here(chains: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same, undisturbed, as processes of this machine."""
    return {stage: run(tmp_path_factory.mktemp(f"here{stage}"), "here", *deepspeed) for stage, deepspeed in ZERO.items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_the_chain_gives_the_figures_of_a_run_here(chains: dict[int, Path], here: dict[int, Path], stage: int) -> None:
    run_dir = chains[stage]
    wait_until(lambda: (run_dir / "results.json").exists(), f"{(run_dir.parent / 'submit.log').read_text()} {status_text(run_dir)}")
    assert figures(run_dir) == figures(here[stage])
    assert any(row["reliability"] for row in figures(run_dir))
    assert digests(run_dir) == digests(here[stage])
    assert len(list(run_dir.glob("forget-*/part-?-of-3.json"))) == 3
    assert {row["state"] for row in status(run_dir).values()} == {"done"}
    assert "flearn status" in (run_dir.parent / "submit.log").read_text()
    again = flearn("run", "configs/quickstart.yaml", "--on", "slurm", *settings(run_dir.parent, *ZERO[stage], "cluster.forget_parts=3"))
    assert "nothing to submit" in again.stdout


def status_text(run_dir: Path) -> str:
    return flearn("status", str(run_dir)).stdout


def test_on_local_gives_the_same(here: dict[int, Path], tmp_path: Path) -> None:
    assert figures(run(tmp_path, "local", *ZERO[2])) == figures(here[2])


def num_steps(runs: Path) -> int:
    """That `teach` has done."""
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("quickstart/teach-*/steps.jsonl"))


class Disturbed:
    """A chain whose `teach` is at work, with a few steps done."""

    def __init__(self, reference: Path, runs: Path, site: Path, partition: str = "debug") -> None:
        self.runs, self.reference = runs, reference
        site.write_text(f"partition: {partition}\n")
        self.overrides = [*ZERO[2], f"cluster.site={site}"]
        for stage in ("facts", "model"):
            (made,) = reference.glob(f"{stage}-*")
            shutil.copytree(made, runs / "quickstart" / made.name)
        self.submit()
        self.run_dir = runs / "quickstart"
        wait_until(lambda: num_steps(runs) > 12, "some steps")
        self.job = json.loads((self.run_dir / "jobs.json").read_text())[self.teach.name]

    def submit(self) -> None:
        run(self.runs, "slurm", *self.overrides)

    @property
    def teach(self) -> Path:
        (folder,) = self.run_dir.glob("teach-*")
        return folder

    def pid(self, **variables: str) -> int:
        """The process of this job's Python with these SLURM variables."""
        wanted = {f"{name}={value}".encode() for name, value in {"SLURM_JOB_ID": self.job, **variables}.items()}
        return find_process(wanted)

    def state(self) -> str:
        return slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.job}").strip()

    def num_requeues(self) -> int:
        found = re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", self.job))
        assert found is not None
        return int(found[1])

    def ends_as_undisturbed(self) -> None:
        wait_until(lambda: (self.teach / "manifest.json").exists(), f"{self.state()} {status_text(self.run_dir)}")
        assert taught(self.run_dir) == taught(self.reference)
        assert flearn("cancel", str(self.run_dir)).returncode == 0
        wait_until(lambda: not in_queue(self.run_dir), "the end of the chain")


def find_process(wanted: set[bytes]) -> int:
    """The Python process of a job with these variables in its environment; 0 if there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program, *arguments = (process / "cmdline").read_bytes().split(b"\0")
            if (
                b"python" in program
                and b"submitit.core._submit" in arguments
                and wanted <= set((process / "environ").read_bytes().split(b"\0"))
            ):
                return int(process.name)
        except OSError:
            continue
    return 0


@pytest.fixture
def disturb(here: dict[int, Path], tmp_path: Path) -> Callable[..., Disturbed]:
    return lambda partition="debug": Disturbed(here[2], tmp_path, tmp_path / "site.yaml", partition)


def test_requeued_by_an_operator(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    slurm("scontrol", "requeue", chain.job)
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 1


def test_preempted_by_a_job_of_higher_priority(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb("low")
    slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 1


def test_time_limit(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    for rank in (0, 1):  # SLURM looks at limits twice a minute: the training must not end before. Its warning wakes them.
        os.kill(chain.pid(SLURM_PROCID=str(rank)), signal.SIGSTOP)
    slurm("scontrol", "update", f"jobid={chain.job}", "timelimit=2")  # the job wants to hear of it two minutes before
    wait_until(lambda: chain.num_requeues() == 1, "its requeue")
    chain.ends_as_undisturbed()


def test_a_warning_to_one_rank_only(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    os.kill(chain.pid(SLURM_PROCID="1"), signal.SIGUSR2)
    wait_until(lambda: chain.num_requeues() == 1, "its requeue", 60)
    chain.ends_as_undisturbed()


def test_daemons_killed_and_restarted(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    run_folder = Path(os.environ["FLEARN_SLURM_DIR"]) / "run"
    for name in ("slurmd-n2", "slurmctld"):
        os.kill(int((run_folder / f"{name}.pid").read_text()), signal.SIGKILL)
    refused = flearn("run", "configs/quickstart.yaml", "--on", "slurm", *settings(chain.runs, *chain.overrides))
    assert refused.returncode == 2
    assert refused.stderr.startswith("flearn: SLURM's controller does not answer") and refused.stderr.count("\n") == 1
    subprocess.run([str(CLUSTER), "up"], check=True, timeout=60)
    chain.ends_as_undisturbed()


def test_a_killed_rank_ends_its_step_and_the_same_command_goes_on(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    os.kill(chain.pid(SLURM_PROCID="1"), signal.SIGKILL)
    wait_until(lambda: chain.state() == "FAILED", "the end of the job", 60)
    found = status(chain.run_dir)
    assert found["teach"]["state"] == "failed"
    assert re.search(r"rank 1 on n\d: Killed \(see .*/jobs/\d+_0_log.err\)", found["teach"]["note"]), found["teach"]
    wait_until(lambda: status(chain.run_dir)["report"]["state"] == "cancelled", "the cancelled rest", 30)
    assert "Killed" in flearn("logs", str(chain.run_dir), "teach").stdout
    chain.submit()
    chain.ends_as_undisturbed()


def test_a_killed_part_of_an_array_alone_is_done_again(here: dict[int, Path], tmp_path: Path) -> None:
    for made in here[2].glob("*-*/"):
        if made.name.split("-")[0] in ("facts", "model", "teach", "tune_old"):
            shutil.copytree(made, tmp_path / "quickstart" / made.name)
    overrides = [*ZERO[2], "cluster.forget_parts=3"]
    run_dir = run(tmp_path, "slurm", *overrides)
    (forget,) = (id for id in status(run_dir) if id.startswith("forget-"))
    job = json.loads((run_dir / "jobs.json").read_text())[forget]
    victim = wait_until(lambda: find_process({f"SLURM_ARRAY_JOB_ID={job}".encode(), b"SLURM_ARRAY_TASK_ID=1"}), "the second part")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: status(run_dir)["forget"]["state"] == "failed", "its failure", 60)
    assert "Killed" in status(run_dir)["forget"]["note"]
    run(tmp_path, "slurm", *overrides)
    again = json.loads((run_dir / "jobs.json").read_text())[forget]
    assert again != job
    wait_until(lambda: (run_dir / forget / "manifest.json").exists(), "the end of forget")
    assert digests(run_dir) == digests(here[2])
    assert slurm("sacct", "--noheader", "--allocations", "--format=JobID", f"--jobs={again}").split() == [again]
    assert flearn("cancel", str(run_dir)).returncode == 0
    wait_until(lambda: not in_queue(run_dir), "the end of the chain")


def test_a_failing_stage_says_why_and_the_later_ones_are_cancelled(tmp_path: Path) -> None:
    run_dir = run(tmp_path, "slurm", "teach.max_length=2")
    wait_until(lambda: not in_queue(run_dir), "the end of the chain")
    found = status(run_dir)
    assert found["teach"]["state"] == "failed"
    assert "max_length" in found["teach"]["note"] and "rank" in found["teach"]["note"], found["teach"]
    assert Path(found["teach"]["note"].rpartition("(see ")[2].rstrip(")")).is_file()
    teach = next(id for id in found if id.startswith("teach-"))
    assert found["tune_old"] == found["tune_old"] | {"state": "cancelled", "note": f"needs {teach}"}
    assert {row["state"] for row in found.values()} == {"done", "failed", "cancelled"}


@pytest.mark.parametrize(
    ("site", "override", "said"),
    [
        ("partition: nowhere", "seed=0", "invalid partition"),
        ("account: nobody", "seed=0", "Invalid account"),
        ("partition: debug", "cluster.nodes=4", "Node count specification invalid"),
    ],
)
def test_refused_is_one_line_and_leaves_nothing_in_the_queue(tmp_path: Path, site: str, override: str, said: str) -> None:
    (tmp_path / "site.yaml").write_text(site + "\n")
    before = slurm("squeue", "--noheader", "--format=%F")
    overrides = [f"cluster.site={tmp_path / 'site.yaml'}", "cluster.ranks=4", override]
    done = flearn("run", "configs/quickstart.yaml", "--on", "slurm", *settings(tmp_path, *overrides))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    wait_until(lambda: set(slurm("squeue", "--noheader", "--format=%F").split()) <= set(before.split()), "an empty queue", 30)


def test_a_sweep_shares_what_it_can(tmp_path: Path) -> None:
    methods = "methods=[full_ft,lora,flearn_ft,flearn_lora,flearn_lora_ft]"
    run_dir = run(tmp_path, "slurm", methods, "forget.scale=0.1")
    first = json.loads((run_dir / "jobs.json").read_text())
    run(tmp_path, "slurm", methods, "forget.scale=0.2")
    after = json.loads((run_dir / "jobs.json").read_text())
    assert len(after) > 30
    assert {step: after[step] for step in first} == first
    assert {step.rpartition("-")[0] for step in after.keys() - first.keys()} == {"forget", "learn", "evaluate", "report"}
    found = json.loads(flearn("status", str(run_dir), "--json").stdout)
    assert {row["id"] for row in found} == after.keys()
    assert flearn("cancel", str(run_dir)).returncode == 0
    wait_until(lambda: not in_queue(run_dir), "an empty queue")


class TestSingleAllocation:
    """All stages inside one allocation of two nodes, through `sbatch slurm/single_allocation.sh`."""

    @pytest.fixture
    def job(self, command: Path, here: dict[int, Path], tmp_path: Path) -> str:
        """Its number, once its `teach` is at work."""
        (tmp_path / "quickstart").mkdir()
        options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--signal=USR2@120", f"--output={tmp_path}/log"]
        script = [str(ROOT / "slurm/single_allocation.sh"), "configs/quickstart.yaml", *settings(tmp_path, *ZERO[2])]
        env = os.environ | {"PATH": f"{command}:{os.environ['PATH']}"}
        started = ["sbatch", "--parsable", f"--chdir={ROOT}", *options, *script]
        job = subprocess.run(started, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        wait_until(lambda: num_steps(tmp_path) > 12, "some steps")
        return job

    def test_a_warned_job_comes_back_and_ends_as_undisturbed(self, job: str, here: dict[int, Path], tmp_path: Path) -> None:
        slurm("scancel", "--signal=USR2", job)
        wait_until(lambda: (tmp_path / "quickstart/results.json").exists(), f"the end: {(tmp_path / 'log').read_text()}")
        assert "Restarts=1" in slurm("scontrol", "show", "job", job)
        assert figures(tmp_path / "quickstart") == figures(here[2])

    def test_a_cancelled_job_stays_away(self, job: str, tmp_path: Path) -> None:
        slurm("scancel", job)
        states = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
        state = wait_until(lambda: slurm(*states).strip() not in ("RUNNING", "COMPLETING") and slurm(*states).strip(), "the job's end", 60)
        assert state == "CANCELLED"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "slurm").glob("*.sh")))
def test_every_script_is_accepted_and_refuses_bash(script: str) -> None:
    options = ["--ntasks-per-node=2", "--cpus-per-task=1"] if script == "single_allocation.sh" else []
    slurm("sbatch", "--test-only", *options, str(ROOT / "slurm" / script))
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_JOB")}
    done = subprocess.run(["bash", f"slurm/{script}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "submit it with: sbatch" in done.stderr
