"""SLURM's commands, recorded."""

from __future__ import annotations

import os

import pytest
from slurm_commands import Recorded


@pytest.fixture
def recorded(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    folder = tmp_path_factory.mktemp("commands")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    made = Recorded(folder)
    for name in ("squeue", "sacct", "scontrol", "scancel"):
        made.add(name)
    made.add("scontrol", "Slurmctld(primary) at head is UP\n")
    return made
