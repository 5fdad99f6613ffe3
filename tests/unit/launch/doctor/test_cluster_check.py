"""`flearn doctor --on slurm`: what it makes of ranks' reports, and of what SLURM's commands say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cli import main
from launch.doctor import cluster_check, machine
from launch.doctor.machine import Row
from launch.doctor.probe import Probed, Report
from launch.slurm.site import Site
from pipeline.config import Cluster

GB = 10**9
VERSIONS = machine.versions()
GPUS = {
    "gpus": ["A100"] * 4,
    "gpu_bytes": [80 * GB] * 4,
    "driver": "550.54.14",
    "nccl": "2.27.5",
    "device": "cuda:0",
    "flops": {"bf16": 250e12},
}


def report(rank: int, **changes: object) -> Report:
    """Of a healthy rank on a node of its own, without a GPU."""
    healthy = Report(
        rank=rank,
        host=f"n{rank + 1}",
        num_cores=8,
        host_bytes=60 * GB,
        disk_bytes=500 * GB,
        missing=[],
        versions=VERSIONS,
        gpus=[],
        gpu_bytes=[],
        driver=None,
        nccl=None,
        joined=True,
        num_seen=2,
        flops=None if rank else {"bf16": 1e11},
        signalled=True,
    )
    return replace(healthy, **changes)  # type: ignore[arg-type]


TWO_NODES = Cluster(ranks=2, nodes=2)


def judged(
    folder: Path, *reports: Report, site: Site | None = None, state: str = "COMPLETED"
) -> dict[str, Row]:
    probed = Probed(TWO_NODES, site or Site(), folder / ".doctor", "7", state, list(reports))
    return {row.check: row for row in cluster_check.judge(probed)}


def test_a_healthy_cluster(tmp_path: Path) -> None:
    rows = judged(tmp_path, report(0), report(1))
    assert {row.state for row in rows.values()} == {"ok"}
    assert list(rows) == ["probe job", "shared folder", "inputs", "packages", "signals", "cores", "GPUs"]
    assert "2 ranks on n1, n2" in rows["probe job"].detail


@pytest.mark.parametrize(
    ("changes", "check", "state", "said"),
    [
        ({"num_seen": 1}, "shared folder", "fail", "n2 does not see in"),
        ({"missing": ["/data/zsre.json"]}, "inputs", "fail", "n2 does not see /data/zsre.json"),
        ({"versions": VERSIONS | {"deepspeed": None}}, "packages", "fail", "not installed: deepspeed on n2"),
        ({"versions": VERSIONS | {"torch": "2.0.1"}}, "packages", "warn", "torch 2.0.1 on n2"),
        ({"signalled": False}, "signals", "fail", "did not reach rank 1 on n2"),
        ({"num_cores": 1}, "cores", "warn", "rank 1 on n2 may use 1 of the 8"),
    ],
)
def test_what_one_node_lacks_is_named(
    tmp_path: Path, changes: dict[str, object], check: str, state: str, said: str
) -> None:
    rows = judged(tmp_path, report(0), report(1, **changes), site=Site(cpus_per_rank=8))
    assert [row.check for row in rows.values() if row.state != "ok"] == [check]
    assert rows[check].state == state and said in rows[check].detail and rows[check].advice


def test_ranks_that_do_not_find_each_other(tmp_path: Path) -> None:
    rows = judged(tmp_path, report(0, joined=False), report(1, joined=False), state="RUNNING")
    assert list(rows) == ["probe job"] and rows["probe job"].state == "fail"
    assert "GLOO_SOCKET_IFNAME" in rows["probe job"].advice


def test_a_rank_that_did_not_start_and_what_it_said(tmp_path: Path) -> None:
    of_srun = ["srun: error: n2: task 1: Exited with exit code 1", "slurmstepd-n1: error: *** STEP 7.0 ***"]
    of_the_rank = [
        "Traceback (most recent call last):",
        "  ...",
        "ModuleNotFoundError: No module named 'launch'",
    ]
    (tmp_path / ".doctor").mkdir()
    (tmp_path / ".doctor/7_0_log.err").write_text("\n".join(of_srun))
    (tmp_path / ".doctor/7_1_log.err").write_text("\n".join(of_the_rank))
    row = judged(tmp_path, report(0, joined=False), state="FAILED")["probe job"]
    assert row.state == "fail"
    assert "FAILED; 1 of 2 ranks started (n1)" in row.detail
    assert "it said: ModuleNotFoundError: No module named 'launch'" in row.detail


def test_gpus(tmp_path: Path) -> None:
    site = Site(gpus="gres")
    row = judged(tmp_path, report(0, **GPUS), report(1, **GPUS), site=site)["GPUs"]
    assert row == Row("GPUs", "ok", "n1: 4 x A100, n2: 4 x A100, 75 GiB each, driver 550.54.14, NCCL 2.27.5")
    row = judged(tmp_path, report(0, **GPUS), report(1, **GPUS | {"driver": "535.1"}), site=site)["GPUs"]
    assert row.state == "warn" and "differ" in row.advice
    row = judged(tmp_path, report(0), report(1), site=site)["GPUs"]
    assert row.state == "fail" and "asked for by gres, but torch sees none on n1" in row.detail
    row = judged(tmp_path, report(0, driver="550.54.14"), report(1))["GPUs"]
    assert row.state == "warn" and row.advice == "site file: gpus"


def test_what_the_nodes_have_is_what_the_estimates_are_made_for(tmp_path: Path) -> None:
    reports = [report(0, **GPUS), report(1, **GPUS | {"gpu_bytes": [40 * GB], "flops": None})]
    found = cluster_check.capacity(Probed(TWO_NODES, Site(), tmp_path, reports=reports))
    assert found is not None
    assert (found.device_bytes, found.host_bytes, found.flops) == (40 * GB, 60 * GB, {"bf16": 250e12})


@pytest.mark.parametrize(("cores_seen", "flops"), [(2, 1e11), (8, 0.25e11)])
def test_speed_is_of_one_ranks_own_cores(tmp_path: Path, cores_seen: int, flops: float) -> None:
    reports = [report(0, num_cores=cores_seen), report(1, num_cores=cores_seen)]
    found = cluster_check.capacity(Probed(TWO_NODES, Site(cpus_per_rank=2), tmp_path, reports=reports))
    assert found is not None and found.flops == {"bf16": flops}
    assert found.rate("bf16", 2) == 2 * found.rate("bf16", 1)


def test_fewer_ranks_get_no_more_memory_where_each_asks_for_its_own(tmp_path: Path) -> None:
    def limits(site: Site) -> list[int]:
        reports = [report(0), report(1)]
        found = cluster_check.capacity(Probed(Cluster(ranks=2), site, tmp_path, reports=reports))
        assert found is not None
        return [found.limit(Cluster(ranks=ranks)) for ranks in (2, 1)]

    assert limits(Site()) == [30 * GB, 60 * GB]
    assert limits(Site(memory_per_rank="30GB")) == [30 * GB, 30 * GB]


@pytest.mark.parametrize(
    ("changes", "check", "state"),
    [
        ({}, "accounting", "ok"),
        ({"AccountingStorageType": "accounting_storage/none"}, "accounting", "warn"),
        ({"PreemptMode": "REQUEUE"}, "preemption", "ok"),
        ({"PreemptMode": "CANCEL"}, "preemption", "warn"),
    ],
)
def test_the_controllers_settings(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], check: str, state: str
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    settings = {
        "SLURM_VERSION": "23.11.4",
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "PreemptMode": "OFF",
    }
    rows = {row.check: row for row in cluster_check.controller_rows(settings | changes)}
    assert rows[check].state == state
    assert bool(rows[check].advice) == (state == "warn")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("scontrol", "said"),
    [("echo 'Slurmctld(primary) at head is DOWN'", "at head is DOWN"), (None, "scontrol: not found")],
)
def test_no_controller_is_one_finding(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    scontrol: str | None,
    said: str,
) -> None:
    if scontrol is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if scontrol else str(tmp_path))
    assert main(["doctor", "--on", "slurm"]) == 1
    finding, advice = capsys.readouterr().out.splitlines()
    assert finding.startswith("fail  SLURM: ") and said in finding
    assert "login node" in advice
