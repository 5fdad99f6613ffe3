"""`flearn doctor [CONFIG]`: what this machine lacks, and the memory, disk and time that each stage of an experiment will want."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import machine
from launch.machine import Row

if TYPE_CHECKING:
    from pipeline.config import Experiment

_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def add_parser(commands: Any) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser("doctor", help="check this machine, and estimate what an experiment will want")
    parser.add_argument("config", type=Path, nargs="?", help="the experiment's YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change a field of the config")
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from pipeline import config

    experiment = config.load(arguments.config, arguments.overrides) if arguments.config is not None else None
    worst = 0
    for row in rows(experiment):
        print(render(row), flush=True)
        worst = max(worst, row.state == "fail")
    return worst


def rows(experiment: Experiment | None) -> Iterator[Row]:
    """Every finding, in the order they are shown."""
    from pipeline.config import Cluster

    cluster = experiment.cluster if experiment is not None else Cluster()
    runs_dir = Path(cluster.runs_dir).absolute()
    devices = machine.find_devices()
    yield from machine.rows(runs_dir, cluster.ranks, devices)
    if experiment is not None:
        from launch import forecast

        yield from forecast.rows(
            experiment,
            forecast.Capacity(
                device_bytes=min(devices.memory_bytes) if devices.names else None,
                host_bytes=machine.host_memory_bytes(),
                disk_bytes=shutil.disk_usage(machine.existing(runs_dir)).free,
                flops=machine.measure_flops(),
            ),
        )


def render(row: Row) -> str:
    """One finding as one line, and what to do about it as another."""
    import sys

    state = f"{row.state:<4}"
    if sys.stdout.isatty():
        state = f"\033[{_COLOURS[row.state]}m{state}\033[0m"
    advice = f"\n{'':<6}-> {row.advice}" if row.advice else ""
    return f"{state}  {row.check}: {row.detail}{advice}"
