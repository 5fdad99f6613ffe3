"""A cluster for these tests, and what their chains are compared with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dev_cluster import dev_cluster
from slurm_chains import METHODS, run


@pytest.fixture(scope="package", autouse=True)
def cluster() -> Iterator[None]:
    """A dev cluster; our environment becomes that of its users."""
    before = dict(os.environ)
    try:
        with dev_cluster() as env:
            os.environ.update(env)
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `flearn` that starts this checkout, as an installation would."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "flearn").write_text(f'#!/bin/sh\nexec {sys.executable} -m launch "$@"\n')
    (folder / "flearn").chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run as processes of this machine."""
    return run(tmp_path_factory.mktemp("here"), "here", METHODS)
