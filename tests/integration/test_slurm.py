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

# The quickstart with one method, few facts, and fine-tunings that are long enough to be disturbed.
SMALL = [
    "facts.limit=12",
    "methods=[flearn_ft]",
    "model.tiny.num_layers=2",
    "teach.epochs=60",
    "full.epochs=60",
    "full.checkpoint_every_steps=10",
    "evaluate.max_new_tokens=4",
    "evaluate.protocols=[token]",
    "forget.max_shard_size=1MB",
    "cluster.ranks=2",
    "cluster.nodes=2",
]
ZERO = {stage: [f"{name}.deepspeed=configs/deepspeed/zero{stage}.json" for name in ("teach", "full", "lora")] for stage in (2, 3)}
# One of the two has all methods, and nothing that has to be long.
ZERO[3] += ["methods=[full_ft,lora,flearn_ft,flearn_lora,flearn_lora_ft]", "teach.epochs=30", "full.epochs=20", "lora.epochs=20"]


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


def learned(run_dir: Path) -> bytes:
    (path,) = run_dir.glob("learn-*/model/*.safetensors")
    return path.read_bytes()


def digests(run_dir: Path) -> dict[str, dict[str, str]]:
    """By subtraction, those of its tensors."""
    made = {path.parts[-3]: json.loads(path.read_text()) for path in run_dir.glob("forget-*/model/manifest.json")}
    return {step: {name: tensor["blake3"] for name, tensor in manifest["tensors"].items()} for step, manifest in made.items()}


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
    """The whole run by `sbatch slurm/flearn_llama7b.sh`, with ZeRO-2 and, side by side, ZeRO-3; each forgetting in three parts."""
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
    what = f"{(run_dir.parent / 'submit.log').read_text()} {status_text(run_dir)}"
    wait_until(lambda: (run_dir / "results.json").exists(), what, 600)
    assert figures(run_dir) == figures(here[stage])
    assert any(row["reliability"] for row in figures(run_dir))
    assert digests(run_dir) == digests(here[stage])
    assert len(list(run_dir.glob("forget-*/part-?-of-3.json"))) == 3 * len(digests(run_dir))
    assert {row["state"] for row in status(run_dir).values()} == {"done"}
    assert "flearn status" in (run_dir.parent / "submit.log").read_text()
    again = flearn("run", "configs/quickstart.yaml", "--on", "slurm", *settings(run_dir.parent, *ZERO[stage], "cluster.forget_parts=3"))
    assert "nothing to submit" in again.stdout


def status_text(run_dir: Path) -> str:
    return flearn("status", str(run_dir)).stdout


def test_on_local_gives_the_same(here: dict[int, Path], tmp_path: Path) -> None:
    assert figures(run(tmp_path, "local", *ZERO[2])) == figures(here[2])


def num_steps(runs: Path) -> int:
    """That `learn` has done."""
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("quickstart/learn-*/steps.jsonl"))


def copy_before(stage: str, reference: Path, run_dir: Path) -> None:
    """Begin a run with what the reference run made, but for `stage` and what follows from it."""
    left_out: set[str] = set()
    for step in json.loads((reference / "plan.json").read_text())["steps"]:
        if step["stage"] == stage or left_out & set(step["inputs"].values()):
            left_out.add(step["id"])
        else:
            shutil.copytree(reference / step["id"], run_dir / step["id"])


class Disturbed:
    """A chain whose `learn` is at work, with a few steps done."""

    def __init__(self, reference: Path, runs: Path, site: Path, *site_lines: str) -> None:
        self.runs, self.reference, self.run_dir = runs, reference, runs / "quickstart"
        site.write_text("\n".join(site_lines) + "\n")
        self.overrides = [*ZERO[2], f"cluster.site={site}"]
        copy_before("learn", reference, self.run_dir)
        self.submit()
        wait_until(lambda: num_steps(runs) > 12, "some steps")

    def submit(self) -> None:
        run(self.runs, "slurm", *self.overrides)

    @property
    def job(self) -> str:
        jobs: dict[str, str] = json.loads((self.run_dir / "jobs.json").read_text())
        return next(job for step, job in jobs.items() if step.startswith("learn-"))

    def pid(self, **variables: str) -> int:
        """The process of this job's Python with these SLURM variables."""
        wanted = {f"{name}={value}".encode() for name, value in {"SLURM_JOB_ID": self.job, **variables}.items()}
        return find_process(wanted)

    def freeze(self) -> None:
        """Hold all ranks until SLURM's warning wakes them: the training must not end before SLURM gets to it."""
        for rank in (0, 1):
            os.kill(self.pid(SLURM_PROCID=str(rank)), signal.SIGSTOP)

    def state(self) -> str:
        return slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.job}").strip()

    def num_requeues(self) -> int:
        found = re.search(r"Restarts=(\d+)", slurm("scontrol", "show", "job", self.job))
        assert found is not None
        return int(found[1])

    def ends_as_undisturbed(self) -> None:
        wait_until(lambda: (self.run_dir / "results.json").exists(), f"{self.state()} {status_text(self.run_dir)}")
        assert figures(self.run_dir) == figures(self.reference)
        assert learned(self.run_dir) == learned(self.reference)


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
    return lambda *site: Disturbed(here[2], tmp_path, tmp_path / "site.yaml", *(site or ("partition: debug",)))


def test_requeued_by_an_operator(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    slurm("scontrol", "requeue", chain.job)
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 1


def test_preempted_by_a_job_of_higher_priority(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb("partition: low")
    chain.freeze()
    slurm("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    chain.ends_as_undisturbed()
    assert chain.num_requeues() == 1


def test_time_limit(disturb: Callable[..., Disturbed]) -> None:
    chain = disturb()
    chain.freeze()
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
    assert found["learn"]["state"] == "failed"
    assert re.search(r"rank 1 on n\d: Killed \(see .*/jobs/\d+_0_log.err\)", found["learn"]["note"]), found["learn"]
    wait_until(lambda: status(chain.run_dir)["report"]["state"] == "cancelled", "the cancelled rest", 30)
    logs = flearn("logs", str(chain.run_dir), "learn").stdout
    assert "flearn: attempt 1 on n[1-2]" in logs and "Killed" in logs
    chain.submit()
    chain.ends_as_undisturbed()


@pytest.mark.parametrize("without", ["permission", "scontrol"])
def test_a_job_that_cannot_come_back_says_so_and_the_same_command_goes_on(
    disturb: Callable[..., Disturbed], without: str, tmp_path: Path
) -> None:
    """Its step is kept; but SLURM refuses to queue the job again, or there is no scontrol where it runs, as in most containers."""
    if without == "permission":
        chain, said = disturb(), "could not be queued again: run the same command again (Requested operation is presently disabled"
        slurm("scontrol", "update", f"jobid={chain.job}", "requeue=0")
    else:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/srun").symlink_to(str(shutil.which("srun")))
        chain = disturb(f"setup: ['export PATH={tmp_path}/bin']")
        said = "there is no scontrol in this container: run the same command again"
    os.kill(chain.pid(SLURM_PROCID="1"), signal.SIGUSR2)
    wait_until(lambda: chain.state() == "FAILED", "the end of the job", 60)
    found = status(chain.run_dir)["learn"]
    assert found["state"] == "failed" and said in found["note"], found
    steps = num_steps(chain.runs)
    chain.submit()
    chain.ends_as_undisturbed()
    assert f"resuming after step {steps}" in flearn("logs", str(chain.run_dir), "learn").stdout


def test_an_array_with_a_part_that_is_killed_and_one_that_is_warned(here: dict[int, Path], tmp_path: Path) -> None:
    """The warned part comes back by itself; the killed one, alone, is done again by the same command."""
    run_dir = tmp_path / "quickstart"
    copy_before("forget", here[2], run_dir)
    overrides = [*ZERO[2], "cluster.forget_parts=3"]
    run(tmp_path, "slurm", *overrides)
    forget, job = next((step, job) for step, job in json.loads((run_dir / "jobs.json").read_text()).items() if step.startswith("forget-"))

    def part(index: int) -> int:
        return find_process({f"SLURM_ARRAY_JOB_ID={job}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()})

    os.kill(wait_until(lambda: part(1), "the second part"), signal.SIGKILL)
    warned = wait_until(lambda: is_listening(part(2)) and part(2), "the third part")
    os.kill(warned, signal.SIGUSR2)
    wait_until(lambda: status(run_dir)["forget"]["state"] == "failed", "the end of all parts", 60)
    assert "Killed" in status(run_dir)["forget"]["note"]
    assert "Restarts=1" in slurm("scontrol", "show", "job", f"{job}_2")
    assert sorted(path.name for path in (run_dir / forget).glob("part-*")) == ["part-1-of-3.json", "part-3-of-3.json"]
    run(tmp_path, "slurm", *overrides)
    again = json.loads((run_dir / "jobs.json").read_text())[forget]
    assert again != job
    wait_until(lambda: (run_dir / "results.json").exists(), f"the end: {status_text(run_dir)}")
    assert figures(run_dir) == figures(here[2])
    assert digests(run_dir) == digests(here[2])
    assert slurm("sacct", "--noheader", "--allocations", "--format=JobID", f"--jobs={again}").split() == [again]


def is_listening(pid: int) -> bool:
    """Whether a job's process hears signals, and is not yet at work: it imports torch after the first, which takes seconds."""
    return pid != 0 and "libtorch" in Path(f"/proc/{pid}/maps").read_text()


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
        """Its number, once its `learn` is at work."""
        copy_before("learn", here[2], tmp_path / "quickstart")
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
