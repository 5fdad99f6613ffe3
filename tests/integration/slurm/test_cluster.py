"""`flearn doctor --on slurm`, `from launch import submit`, and what a cluster of two nodes refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_chains
from dev_cluster import CLUSTER, ROOT
from halts import Halt, environment, wait_until
from slurm_chains import needs_slurm, slurm

pytestmark = needs_slurm

TWO_NODES = ["cluster.ranks=2", "cluster.nodes=2"]
SMALL = ["facts.limit=12", "methods=[flearn_ft]", "model.tiny.num_layers=2", *TWO_NODES]


def flearn(command: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return slurm_chains.flearn(*words(command, *SMALL, *overrides))


def words(command: str, *overrides: str) -> list[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    return [command, "configs/quickstart.yaml", "--on", "slurm", *settings]


def queue() -> str:
    return slurm("squeue", "--noheader")


def require_empty() -> None:
    """Fail unless SLURM has no jobs. One that has ended is in its queue for a moment more, completing."""
    wait_until(lambda: not queue(), "an empty queue")


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """By check: its state, and what it found."""
    lines = [line for line in done.stdout.splitlines() if not line.startswith("      ->")]
    return {line[6:].partition(": ")[0]: (line[:4].strip(), line[6:].partition(": ")[2]) for line in lines}


def test_doctor_on_a_healthy_cluster(tmp_path: Path) -> None:
    done = flearn("doctor", f"cluster.runs_dir={tmp_path}", "cluster.forget_parts=3")
    assert done.returncode == 0, done.stdout + done.stderr
    found = findings(done)
    assert {state for state, _ in found.values()} == {"ok"}, done.stdout
    assert found["accounting"] == ("ok", "accounting_storage/slurmdbd")
    assert "2 ranks on n1, n2 joined over gloo" in found["probe job"][1]
    assert f"{tmp_path} is the same on n1, n2" in found["shared folder"][1]
    assert found["signals"] == ("ok", "SIGUSR2 reached every rank")
    assert "a rank of" in found["teach"][1]
    assert not list(tmp_path.iterdir())
    require_empty()


@pytest.mark.parametrize(
    ("site", "check", "said"),
    [
        ("partition: nowhere", "fine-tuning jobs", "invalid partition specified: nowhere"),
        ("account: nobody", "fine-tuning jobs", "Invalid account"),
        ("gpus: gres", "GPUs", "asked for by gres, but torch sees none on n1"),
        ("python: /nowhere/python3", "probe job", "/nowhere/python3: No such file or directory"),
        ("srun_args: [--container-image=x]", "probe job", "unrecognized option '--container-image=x'"),
    ],
)
def test_doctor_names_what_is_wrong_with_a_site(tmp_path: Path, site: str, check: str, said: str) -> None:
    site_file = tmp_path / "site.yaml"
    site_file.write_text(site + "\n")
    done = flearn("doctor", f"cluster.runs_dir={tmp_path / 'runs'}", f"cluster.site={site_file}")
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {check: found for check, (state, found) in findings(done).items() if state == "fail"}
    assert failed.keys() == {check} and said in failed[check], done.stdout
    require_empty()


def test_an_interrupted_doctor_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs_dir = tmp_path / "made" / "runs"
    arguments = words("doctor", *TWO_NODES, f"cluster.runs_dir={runs_dir}")
    halt = Halt(tmp_path_factory.mktemp("halts") / "halt", str(runs_dir / ".doctor-*/rank0.json"))
    doctor = subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        env=os.environ | environment(halt),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs these tests in the background has told them to ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    halt.wait(lambda: doctor.poll() is None)
    assert " R " in queue()
    doctor.send_signal(signal.SIGINT)
    assert doctor.wait(300) == 130, doctor.communicate()
    assert not list(tmp_path.iterdir())
    require_empty()


def test_submitting_from_python(tmp_path: Path) -> None:
    code = f"""
from launch import submit
run = submit("configs/quickstart.yaml", {[*SMALL, f"cluster.runs_dir={tmp_path}"]!r})
print(run.run_dir, *run.jobs)
"""
    halt = Halt(tmp_path / "halt", str(tmp_path / "quickstart/facts-*/manifest.json"))
    env = os.environ | environment(halt)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    run_dir, *steps = done.stdout.split()
    assert run_dir == str(tmp_path / "quickstart") and len(steps) == 11
    halt.wait()
    assert len(queue().splitlines()) == len(steps), "the first has not ended, and all others wait for it"
    subprocess.run([sys.executable, "-m", "launch", "cancel", run_dir], cwd=ROOT, check=True)
    require_empty()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.runs_dir=/etc/hosts/runs", "cannot write in /etc/hosts/runs/quickstart"),
        ("cluster.site=/nowhere/site.yaml", "/nowhere/site.yaml: no such"),
        ("facts.path=/nowhere/facts.json", "facts.path: no such file or folder: /nowhere/facts.json"),
    ],
)
def test_a_missing_folder_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    for command in ("run", "doctor"):
        done = flearn(command, f"cluster.runs_dir={tmp_path}", override)
        assert done.returncode == 2, done.stdout + done.stderr
        require_empty()
        assert done.stderr.startswith("flearn: ") and done.stderr.count("\n") == 1
        assert said.removesuffix("/quickstart") in done.stderr


def test_an_unreachable_controller_is_one_line(tmp_path: Path) -> None:
    subprocess.run([str(CLUSTER), "down"], check=True, timeout=300)
    try:
        done = flearn("run", f"cluster.runs_dir={tmp_path}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("flearn: SLURM's controller does not answer")
        done = flearn("doctor", f"cluster.runs_dir={tmp_path}")
        assert done.returncode == 1 and findings(done)["SLURM"][0] == "fail"
    finally:
        subprocess.run([str(CLUSTER), "up"], check=True, timeout=300)
