"""What is made of the words of SLURM's commands. The words were recorded on a real one."""

from __future__ import annotations

import pytest
from slurm_commands import Recorded

from launch.slurm import scheduler
from launch.slurm.scheduler import JobState
from pipeline.errors import InputError

# squeue --noheader --states=all --array --format=%F|%T|%r
SQUEUE = """\
55725722|CANCELLED|DependencyNeverSatisfied
55725724|CANCELLED|Priority
55725716|COMPLETED|None
55725718|COMPLETED|None
55725717|FAILED|NonZeroExitCode
55725718|FAILED|NonZeroExitCode
55725719|PENDING|JobArrayTaskLimit
55725719|PENDING|JobArrayTaskLimit
55725719|PENDING|JobArrayTaskLimit
55725720|PENDING|Dependency
55725721|PENDING|DependencyNeverSatisfied
55725723|PENDING|Resources
55725718|RUNNING|None
55725719|RUNNING|None
55725725|RUNNING|None
"""
# sacct --noheader --parsable2 --allocations --format=JobID,State
SACCT = """\
55725716|COMPLETED
55725717|FAILED
55725720|PENDING
55725721|PENDING
55725722|CANCELLED
55725723|PENDING
55725724|CANCELLED by 0
55725725|RUNNING
55725718_0|COMPLETED
55725718_1|FAILED
55725718_2|RUNNING
55725719_0|RUNNING
55725719_[1-3%1]|PENDING
"""
STATES = {
    "55725716": "COMPLETED",
    "55725717": "FAILED",
    "55725718": "RUNNING",  # an array: one task is done, one has failed, one runs
    "55725719": "RUNNING",  # an array: one task runs, three wait
    "55725720": "PENDING",
    "55725721": "PENDING",
    "55725722": "CANCELLED",
    "55725723": "PENDING",
    "55725724": "CANCELLED",
    "55725725": "RUNNING",
}


def test_what_the_queue_says(recorded: Recorded) -> None:
    recorded.add("squeue", SQUEUE)
    found = scheduler.states(STATES)
    assert {job: state.state for job, state in found.items()} == STATES
    assert recorded.calls("sacct") == []
    active = {job for job, state in found.items() if state.is_active}
    assert active == {f"557257{number}" for number in (18, 19, 20, 23, 25)}
    assert found["55725721"].reason == "DependencyNeverSatisfied"
    assert found["55725723"] == JobState("PENDING", "Resources")


def test_what_the_queue_has_forgotten_the_accounting_knows(recorded: Recorded) -> None:
    recorded.add("squeue", stderr="slurm_load_jobs error: Invalid job id specified\n", code=1)
    recorded.add("sacct", SACCT)
    assert {job: state.state for job, state in scheduler.states(STATES).items()} == STATES


def test_the_accounting_is_asked_for_the_rest_alone(recorded: Recorded) -> None:
    """It may call a job that the queue still has NODE_FAIL."""
    recorded.add("squeue", "55725716|COMPLETED|None\n")
    recorded.add("sacct", "55725725|TIMEOUT\n")
    found = scheduler.states(["55725725", "55725716", "55725725"])
    assert found == {"55725716": JobState("COMPLETED", "None"), "55725725": JobState("TIMEOUT")}
    (call,) = recorded.calls("sacct")
    assert call.endswith("--jobs=55725725")


@pytest.mark.parametrize(
    ("tasks", "state"),
    [
        ("55725733|COMPLETED|None\n55725733|FAILED|NonZeroExitCode\n", "FAILED"),
        ("55725733|FAILED|NonZeroExitCode\n55725733|COMPLETED|None\n", "FAILED"),
        ("55725733|FAILED|NonZeroExitCode\n55725733|PENDING|BeginTime\n", "PENDING"),  # one is queued again
        ("55725733|COMPLETED|None\n55725733|COMPLETED|None\n", "COMPLETED"),
    ],
)
def test_the_task_of_an_array_that_matters_most(recorded: Recorded, tasks: str, state: str) -> None:
    recorded.add("squeue", tasks)
    assert scheduler.states(["55725733"])["55725733"].state == state


@pytest.mark.parametrize(
    "state", ["PENDING|BeginTime", "REQUEUED|None", "COMPLETING|NonZeroExitCode", "PENDING|JobHeldUser"]
)
def test_a_job_that_may_come_again_is_active(recorded: Recorded, state: str) -> None:
    recorded.add("squeue", f"55725731|{state}\n")
    assert scheduler.states(["55725731"])["55725731"].is_active


def test_a_cluster_without_accounting(recorded: Recorded) -> None:
    recorded.add("sacct", stderr="Slurm accounting storage is disabled\n", code=1)
    recorded.add("squeue", "55725716|COMPLETED|None\n")
    assert scheduler.states(["55725716", "5"]) == {"55725716": JobState("COMPLETED", "None")}


def test_a_controller_that_does_not_answer_is_one_line(recorded: Recorded) -> None:
    error = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
    recorded.add("squeue", stderr=error, code=1)
    with pytest.raises(InputError) as raised:
        scheduler.states(["55725716"])
    assert str(raised.value) == f"squeue failed: {error.strip()}"
    stars = "*" * 41
    lines = [
        "Slurmctld(primary) at vm is DOWN",
        stars,
        "** RESTORE SLURMCTLD DAEMON TO SERVICE **",
        stars,
        "",
    ]
    recorded.add("scontrol", "\n".join(lines), code=1)
    with pytest.raises(InputError) as raised:
        scheduler.require_controller()
    assert str(raised.value) == "SLURM's controller does not answer (Slurmctld(primary) at vm is DOWN)"
    recorded.add("scontrol", "Slurmctld(primary) at vm is UP\n")
    scheduler.require_controller()


class TestComingBack:
    """A task that asks for another turn of its job."""

    @pytest.fixture(autouse=True)
    def _own_job(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "55725726")
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)

    def test_it_asks_for_its_job(self, recorded: Recorded) -> None:
        recorded.add("squeue", "RUNNING\n")
        assert scheduler.come_back() is None
        assert recorded.calls("scontrol") == ["requeue 55725726"]

    def test_of_an_array_for_itself_alone(self, recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last task of an array has the array's own number."""
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "55725726")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        recorded.add("squeue", "RUNNING\n")
        assert scheduler.come_back() is None
        assert recorded.calls("scontrol") == ["requeue 55725726_2"]

    @pytest.mark.parametrize("state", ["COMPLETING", "PENDING"])  # cancelled; being queued again by SLURM
    def test_a_job_that_is_on_its_way_out_is_left_alone(self, recorded: Recorded, state: str) -> None:
        recorded.add("squeue", f"{state}\n")
        assert scheduler.come_back() is None
        assert recorded.calls("scontrol") == []

    def test_a_refusal_is_one_line(self, recorded: Recorded) -> None:
        recorded.add("squeue", "RUNNING\n")
        said = "Requested operation is presently disabled for job 55725726"
        recorded.add("scontrol", stderr=f"{said}\n", code=1)
        problem = scheduler.come_back()
        assert problem is not None and "\n" not in problem
        assert f"run the same command again ({said})" in problem
