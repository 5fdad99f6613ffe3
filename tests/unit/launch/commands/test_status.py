"""`flearn status`: a state and a note, from manifests, the steps' files, and what SLURM says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_commands import Recorded

from launch.cli import main
from launch.run_folder import RunFolder
from launch.slurm.chain import ATTEMPT
from pipeline import config
from pipeline.artifact import write_json
from pipeline.plan import Plan, make_plan

ROOT = Path(__file__).parents[4]
JOB = "55725718"

# What srun said of a job that an operator queued again, and whose second rank was killed in its second
# attempt.
TWICE = f"""\
{ATTEMPT}1 on n[1-2]
srun: Job step aborted: Waiting up to 4 seconds for job step to finish.
slurmstepd-n1: error: *** STEP 55725741.0 ON n1 CANCELLED AT 2026-11-26T20:30:02 DUE TO JOB REQUEUE ***
slurmstepd-n1: error: *** JOB 55725741 ON n1 CANCELLED AT 2026-11-26T20:30:02 DUE TO JOB REQUEUE ***
srun: error: n1: task 0: Terminated
srun: launch/slurm: _step_signal: Terminating StepId=55725741.0
srun: got SIGCONT
srun: forcing job termination
{ATTEMPT}2 on n[1-2]
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=55725741.0
slurmstepd-n1: error: *** STEP 55725741.0 ON n1 CANCELLED AT 2026-11-26T20:30:14 ***
srun: error: n1: task 0: Terminated
srun: Force Terminated StepId=55725741.0
"""
EXITED = TWICE.replace("task 1: Killed", "task 1: Exited with exit code 2")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Of a run of which `facts` and `model` are done, and whose `teach` is job 55725718."""
    overrides = [f"cluster.runs_dir={tmp_path}", "methods=[flearn_ft]"]
    made = make_plan(config.load(ROOT / "configs/quickstart.yaml", overrides))
    RunFolder(made.run_dir).submit_plan(made)
    for step in list(made.steps.values())[:2]:
        made.artifact(step).commit({"seconds": 1.5, "finished": "2026-11-26T20:00:00+00:00"})
    write_json(made.run_dir / "jobs.json", {id_of(made, "facts"): "55725716", id_of(made, "teach"): JOB})
    return made


def id_of(plan: Plan, stage: str) -> str:
    return next(step.id for step in plan.steps.values() if step.stage == stage)


@pytest.fixture
def teach(plan: Plan, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """The state and the note of `teach`: given the files in its folder, and its job's standard error."""

    def read(files: dict[str, Any] | None = None, stderr: dict[str, str] | None = None) -> tuple[str, str]:
        for name, content in (files or {}).items():
            path = plan.run_dir / id_of(plan, "teach") / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        for name, content in (stderr or {}).items():
            path = plan.run_dir / "jobs" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        (row,) = (row for row in rows(plan, capsys) if row["id"] == id_of(plan, "teach"))
        assert row["job"] == JOB and row["seconds"] is None
        note = row["note"].replace(f"{plan.run_dir}/", "").replace(id_of(plan, "teach"), "teach")
        return row["state"], note

    return read


def rows(plan: Plan, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["status", str(plan.run_dir), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


STEPS = '{"step": 1, "loss": 7.5}\n{"step": 2, "loss": 3.25}\n'
ERROR = {
    "rank": 1,
    "message": "the loss of step 3 is nan: lower lr, or set max_grad_norm",
    "log": "rank1.log",
    "attempt": 1,
}
QUOTED = f"{ERROR['message']} (see teach/rank1.log)"
NEVER = "an input failed: it will never start; run again, or flearn cancel"


@pytest.mark.parametrize(
    ("said", "files", "expected"),
    [
        ("PENDING|Priority", {}, ("queued", "")),
        ("PENDING|Dependency", {}, ("queued", "")),
        ("PENDING|Resources", {}, ("queued", "Resources")),
        ("PENDING|DependencyNeverSatisfied", {}, ("queued", NEVER)),
        # Saved, and queued again.
        ("PENDING|BeginTime", {"steps.jsonl": STEPS, "rank0.log": ""}, ("queued", "BeginTime")),
        ("RUNNING|None", {}, ("running", "")),
        ("RUNNING|None", {"steps.jsonl": STEPS}, ("running", "step 2, loss 3.2500")),
        ("RUNNING|None", {"steps.jsonl": STEPS[:-10]}, ("running", "")),  # its last line is being written
        ("RUNNING|None", {"error.json": ERROR}, ("running", "")),  # of the attempt before
        ("COMPLETING|NonZeroExitCode", {"steps.jsonl": STEPS}, ("running", "step 2, loss 3.2500")),
        ("FAILED|NonZeroExitCode", {"error.json": ERROR}, ("failed", QUOTED)),
        ("OUT_OF_MEMORY|OutOfMemory", {"rank0.log": ""}, ("failed", "OUT_OF_MEMORY (see scontrol show job)")),
        ("CANCELLED|None", {"rank0.log": ""}, ("cancelled", "CANCELLED (see scontrol show job)")),
        ("COMPLETED|None", {"rank0.log": ""}, ("stopped", "")),
    ],
)
def test_a_step_in_the_queue(
    recorded: Recorded,
    teach: Callable[..., tuple[str, str]],
    said: str,
    files: dict[str, Any],
    expected: tuple[str, str],
) -> None:
    recorded.add("squeue", f"{JOB}|{said}\n")
    assert teach(files) == expected


def test_a_time_limit_names_the_log(recorded: Recorded, teach: Callable[..., tuple[str, str]]) -> None:
    recorded.add("squeue", f"{JOB}|TIMEOUT|TimeLimit\n")
    log = f"{JOB}_0_log.err"
    assert teach({"rank0.log": ""}, {log: f"{ATTEMPT}1 on n1\n"}) == ("failed", f"TIMEOUT (see jobs/{log})")


def test_a_killed_rank_is_the_culprit_not_its_peer(
    recorded: Recorded, teach: Callable[..., tuple[str, str]]
) -> None:
    """Its peer lost the connection, and says so; in the attempt before, SLURM itself ended the ranks."""
    recorded.add("squeue", f"{JOB}|FAILED|NonZeroExitCode\n")
    log = f"{JOB}_0_log.err"
    peer = ERROR | {"rank": 0, "attempt": 2, "message": "RuntimeError: Connection closed by peer"}
    assert teach({"error.json": peer}, {log: TWICE}) == ("failed", f"rank 1 on n2: Killed (see jobs/{log})")


def test_a_rank_that_had_words_of_its_own_is_quoted(
    recorded: Recorded, teach: Callable[..., tuple[str, str]]
) -> None:
    recorded.add("squeue", f"{JOB}|FAILED|NonZeroExitCode\n")
    said = {"error.json": ERROR | {"attempt": 2}}
    assert teach(said, {f"{JOB}_0_log.err": EXITED}) == ("failed", QUOTED)


def test_what_an_attempt_before_said_is_not_quoted(
    recorded: Recorded, teach: Callable[..., tuple[str, str]]
) -> None:
    recorded.add("squeue", f"{JOB}|FAILED|NonZeroExitCode\n")
    log = f"{JOB}_0_log.err"
    assert teach({"error.json": ERROR}, {log: EXITED}) == ("failed", f"FAILED (see jobs/{log})")


def test_of_an_array_the_part_that_was_killed(
    recorded: Recorded, teach: Callable[..., tuple[str, str]]
) -> None:
    recorded.add("squeue", f"{JOB}|COMPLETED|None\n{JOB}|FAILED|NonZeroExitCode\n{JOB}|COMPLETED|None\n")
    quiet, killed = f"{ATTEMPT}1 on n1\n", f"{ATTEMPT}1 on n1\nsrun: error: n1: task 0: Killed\n"
    logs = {f"{JOB}_0_0_log.err": quiet, f"{JOB}_1_0_log.err": killed, f"{JOB}_2_0_log.err": quiet}
    note = f"rank 0 on n1: Killed (see jobs/{JOB}_1_0_log.err)"
    assert teach({"part-1-of-3.json": {}}, logs) == ("failed", note)


def test_of_an_array_the_part_that_had_words_of_its_own(
    recorded: Recorded, teach: Callable[..., tuple[str, str]]
) -> None:
    recorded.add("squeue", f"{JOB}|COMPLETED|None\n{JOB}|FAILED|NonZeroExitCode\n")
    failed = f"{ATTEMPT}1 on n1\nsrun: error: n1: task 0: Exited with exit code 2\n"
    logs = {f"{JOB}_0_0_log.err": f"{ATTEMPT}1 on n1\n", f"{JOB}_1_0_log.err": failed}
    assert teach({"error-part-2.json": ERROR}, logs) == ("failed", QUOTED)
    note = f"FAILED (see jobs/{JOB}_1_0_log.err)"
    assert teach({"error-part-2.json": ERROR | {"attempt": 0}}, logs) == ("failed", note)


def test_a_job_that_slurm_has_forgotten_is_asked_of_the_accounting(
    recorded: Recorded, teach: Callable[..., tuple[str, str]]
) -> None:
    recorded.add("squeue", stderr="slurm_load_jobs error: Invalid job id specified\n", code=1)
    recorded.add("sacct", f"{JOB}|NODE_FAIL\n")
    assert teach({"steps.jsonl": STEPS}) == ("failed", "NODE_FAIL (see scontrol show job)")


def test_a_chain_behind_a_failed_step(
    recorded: Recorded, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    """Done by its manifest, whatever SLURM says; cancelled by what it needs; never submitted."""
    tune_old, forget = id_of(plan, "tune_old"), id_of(plan, "forget")
    jobs = json.loads((plan.run_dir / "jobs.json").read_text())
    write_json(plan.run_dir / "jobs.json", jobs | {tune_old: "55725722", forget: "55725724"})
    never = "CANCELLED|DependencyNeverSatisfied"
    recorded.add("squeue", f"55725722|{never}\n{JOB}|FAILED|NonZeroExitCode\n55725724|{never}\n")
    (plan.run_dir / id_of(plan, "teach")).mkdir()
    found = {row["id"]: row for row in rows(plan, capsys)}
    states = {id.rpartition("-")[0]: row["state"] for id, row in found.items()}
    assert states == {
        "facts": "done",
        "model": "done",
        "teach": "failed",
        "tune_old": "cancelled",
        "forget": "cancelled",
        "learn": "pending",
        "evaluate": "pending",
        "report": "pending",
    }
    assert found[tune_old]["note"] == f"needs {id_of(plan, 'teach')}"
    assert found[forget]["note"] == f"needs {id_of(plan, 'teach')}"
    assert found[id_of(plan, "facts")]["seconds"] == 1.5
    (asked,) = recorded.calls("squeue")
    assert "55725716" not in asked  # that job is of a step that is done


def test_without_an_answer_of_slurm_it_says_what_it_knows(
    recorded: Recorded, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.add("scontrol", "Slurmctld(primary) at head is DOWN\n")
    assert main(["status", str(plan.run_dir)]) == 0
    said = capsys.readouterr()
    assert said.err == "flearn: SLURM's controller does not answer (Slurmctld(primary) at head is DOWN)\n"
    assert not recorded.calls("squeue")  # it would try for half a minute
    assert "2 of 11 steps done" in said.out
