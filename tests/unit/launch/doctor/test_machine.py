"""What `flearn doctor` finds on this machine."""

from __future__ import annotations

from pathlib import Path

from launch.doctor import machine
from launch.doctor.machine import Devices

GB = 10**9


def test_packages_against_the_tested_versions(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    installed = machine._version("pydantic")
    constraints.write_text(f"# tested\npydantic=={installed}\nsphinx==1.0\n")
    assert [row.state for row in machine.packages(constraints)] == ["ok"]
    constraints.write_text('pydantic==0.0.1; python_version >= "3.10"\n')
    (row,) = machine.packages(constraints)
    assert row.state == "warn" and f"pydantic {installed} (tested: 0.0.1)" in row.detail
    assert [row.state for row in machine.packages(tmp_path / "absent.txt")] == ["warn"]


def test_more_threads_than_cores() -> None:
    assert machine.cores_row(8, "4", ranks=2).state == "ok"
    assert "OMP_NUM_THREADS=2" in machine.cores_row(8, "4", ranks=4).advice
    assert "cluster.ranks=8" in machine.cores_row(8, None, ranks=16).advice


def test_fewer_gpus_than_ranks() -> None:
    devices = Devices(["A100"] * 2, [80 * GB] * 2)
    assert machine.device_row(devices, ranks=2).state == "ok"
    row = machine.device_row(devices, ranks=4)
    assert row.state == "fail" and "cluster.ranks=2" in row.advice


def test_a_gpu_that_torch_cannot_use_is_a_failure_and_one_that_was_not_given_is_none() -> None:
    assert machine.no_gpu_row(None, False, "13.0").state == "ok"
    row = machine.no_gpu_row("580.65.06", False, "13.0")
    assert row.state == "warn" and "--gpus all" in row.advice, (
        "the image's health check runs on such hosts too"
    )
    assert machine.no_gpu_row("535.1", True, "13.0").state == "fail"
    assert "without CUDA" in machine.no_gpu_row("580.65.06", True, None).detail


def test_little_shared_memory_matters_to_several_gpus() -> None:
    assert machine.shared_memory_row(64 << 20, num_gpus=0).state == "ok"
    assert machine.shared_memory_row(64 << 20, num_gpus=2).state == "warn"
