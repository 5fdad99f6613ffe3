"""`flearn doctor [CONFIG]`: what this machine or cluster lacks, and what each stage will want of it."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from launch.doctor import cluster_check, machine
from launch.doctor.capacity import Capacity, measure_flops
from launch.doctor.machine import Row
from pipeline import config
from pipeline.config import Cluster, Experiment
from pipeline.errors import InputError
from pipeline.models.packaged import resolve
from pipeline.weights.shard import parse_size

_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", help="the experiment's YAML")
    on = "here: this machine (default); "
    on += "slurm: the cluster, by a job of a few seconds in a fine-tuning's shape"
    parser.add_argument("--on", choices=["here", "slurm"], default="here", help=on)
    change = "change a field of the config"
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=change
    )
    memory = "estimate for GPUs of this memory, such as 80GB, instead of what is found"
    parser.add_argument("--gpu-memory", metavar="SIZE", help=memory)
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.config is None and (arguments.overrides or arguments.gpu_memory):
        raise InputError("--set and --gpu-memory need a CONFIG, such as configs/quickstart.yaml")
    experiment = config.load(arguments.config, arguments.overrides) if arguments.config is not None else None
    gpu_bytes = parse_size(arguments.gpu_memory) if arguments.gpu_memory is not None else None
    worst = 0
    for row in rows(experiment, arguments.on, gpu_bytes):
        print(render(row), flush=True)
        worst = max(worst, row.state == "fail")
    return worst


def rows(experiment: Experiment | None, on: str = "here", gpu_bytes: int | None = None) -> Iterator[Row]:
    """Every finding, in the order they are shown.

    `gpu_bytes` is the memory of GPUs that are not there yet; it stands for that of those that are found.
    """
    cluster = experiment.cluster if experiment is not None else Cluster()
    capacity: Capacity | None
    if on == "here":
        capacity = yield from _rows_here(cluster, experiment is not None)
    else:
        capacity = yield from cluster_check.rows(cluster, inputs(experiment))
    if experiment is not None and capacity is not None:
        from launch.doctor import forecast

        if gpu_bytes is not None:
            capacity = capacity._replace(device_bytes=gpu_bytes, flops=None)
        yield from forecast.rows(experiment, capacity)


def _rows_here(cluster: Cluster, needs_flops: bool) -> Generator[Row, None, Capacity]:
    """The findings of this machine; returns what a rank of it has.

    Its speed is measured only if it is needed: that takes the GPU's memory for a moment, which a training
    that runs beside a health check may not spare.
    """
    runs_dir = Path(cluster.runs_dir).expanduser().absolute()
    devices = machine.find_devices()
    yield from machine.rows(runs_dir, cluster.ranks, devices)
    flops = measure_flops() if needs_flops else None
    if flops is not None and not devices.names:  # the cores' speed, which the ranks share
        flops = {precision: value / cluster.ranks for precision, value in flops.items()}
    return Capacity(
        device_bytes=min(devices.memory_bytes) if devices.names else None,
        host_bytes=machine.host_memory_bytes(),
        disk_bytes=shutil.disk_usage(machine.existing(runs_dir)).free,
        flops=flops,
    )


def inputs(experiment: Experiment | None) -> tuple[Path, ...]:
    """The files and folders of this disk that the experiment reads."""
    if experiment is None:
        return ()
    facts = experiment.facts.path
    named = [*facts] if isinstance(facts, list) else [facts]
    if experiment.model.path:
        named.append(resolve(experiment.model.path))
    return tuple(Path(path) for path in named if Path(path).is_absolute())  # others are hub ids


def render(row: Row) -> str:
    """One finding as one line, and what to do about it as another."""
    state = f"{row.state:<4}"
    if sys.stdout.isatty():
        state = f"\033[{_COLOURS[row.state]}m{state}\033[0m"
    advice = f"\n{'':<6}-> {row.advice}" if row.advice else ""
    return f"{state}  {row.check}: {row.detail}{advice}"
