"""From a stage and a site to sbatch's options, and what a site file may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.slurm.place import parameters
from launch.slurm.site import Site, load_site
from pipeline.config import Cluster
from pipeline.errors import InputError
from pipeline.stages import STAGES, JobShape

TWO_NODES = Cluster(ranks=8, nodes=2)


def test_a_fine_tuning_has_a_task_and_a_gpu_for_each_rank() -> None:
    asked = {"partition": "gpu", "account": "lab", "qos": "high"}
    site = Site(gpus="gres", gpu_type="a100", cpus_per_rank=6, memory_per_rank="60GB", **asked)
    found = parameters("ranks", TWO_NODES, site)
    shape = {"nodes": 2, "ntasks_per_node": 4, "cpus_per_task": 6, "mem": "240GB"}
    assert found == found | asked | shape
    assert found["additional_parameters"] == {"requeue": True, "gres": "gpu:a100:4"}
    assert found["srun_args"] == ["--cpus-per-task=6", "--kill-on-bad-exit=1"]


@pytest.mark.parametrize(
    ("gpus", "option"), [("gpus-per-node", {"gpus-per-node": "4"}), ("gpus-per-task", {"gpus-per-task": "1"})]
)
def test_gpus_as_the_site_wants_them_asked_for(gpus: Any, option: dict[str, str]) -> None:
    found = parameters("ranks", TWO_NODES, Site(gpus=gpus))
    assert found["additional_parameters"] == {"requeue": True} | option


def test_stages_that_use_a_gpu() -> None:
    jobs = {name: stage.job for name, stage in STAGES.items() if stage.job in ("ranks", "gpu")}
    assert jobs == {"teach": "ranks", "tune_old": "ranks", "learn": "ranks", "evaluate": "gpu"}


@pytest.mark.parametrize("shape", ["cpu", "parts"])
def test_what_needs_no_gpu_takes_none_and_goes_to_the_cpu_partition(shape: JobShape) -> None:
    found = parameters(shape, TWO_NODES, Site(partition="gpu", cpu_partition="cpu", gpus="gres"))
    assert (found["nodes"], found["ntasks_per_node"], found["partition"]) == (1, 1, "cpu")
    assert "gres" not in found["additional_parameters"]


def test_an_evaluation_has_one_gpu() -> None:
    found = parameters("gpu", TWO_NODES, Site(partition="gpu", gpus="gres"))
    assert (found["nodes"], found["ntasks_per_node"]) == (1, 1)
    assert found["additional_parameters"]["gres"] == "gpu:1"


def test_a_sites_own_options_are_added() -> None:
    options: dict[str, str | int | bool] = {"constraint": "a100", "exclusive": True}
    found = parameters("ranks", TWO_NODES, Site(sbatch=options, srun_args=["--container-image=x"]))
    assert found["additional_parameters"] == {"requeue": True, **options}
    assert found["srun_args"][-1] == "--container-image=x"
    assert "partition" not in found and "account" not in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu", "partition"),
        ("gpus: some", "gpus"),
        ("cpus_per_rank: 0", "cpus_per_rank"),
        ("minutes: 4", "warning_seconds"),
    ],
)
def test_a_wrong_site_file_is_one_line_that_names_the_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "site.yaml").write_text(text + "\n")
    with pytest.raises(InputError) as error:
        load_site(str(tmp_path / "site.yaml"))
    assert said in str(error.value) and "site.yaml" in str(error.value) and "\n" not in str(error.value)


def test_memory_in_another_unit_is_refused() -> None:
    with pytest.raises(InputError, match="memory_per_rank"):
        parameters("ranks", TWO_NODES, Site(memory_per_rank="60000M"))
