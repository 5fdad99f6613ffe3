"""What differs between SLURM clusters, in one YAML file: partition, GPUs, containers, environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.settings import Section, check, read_yaml


class Site(Section):
    """A file of `slurm/sites/`. The defaults suit a cluster with one partition and no GPUs."""

    partition: str | None = None
    """For fine-tuning and evaluation; None: the cluster's default."""
    cpu_partition: str | None = None
    """For what needs no GPU; None: `partition`."""
    account: str | None = None
    qos: str | None = None
    gpus: Literal["gres", "gpus-per-node", "gpus-per-task"] | None = None
    """How this cluster wants GPUs to be asked for; None: it has none."""
    gpu_type: str | None = None
    """Such as `a100`, where the type has to be named."""
    cpus_per_rank: int = Field(1, gt=0)
    memory_per_rank: str | None = None
    """Such as `60GB`; None: the cluster's default."""
    minutes: int = Field(24 * 60, gt=0)
    """Time limit of a job. A fine-tuning that needs longer saves, and is queued again under the same id."""
    warning_seconds: int = Field(120, ge=0)
    """How long before the time limit a job is told to save. SLURM may be a minute early."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that a job runs first: modules, an environment."""
    python: str | None = None
    """The interpreter inside the job; None: the one that submits."""
    srun_args: list[str] = Field(default_factory=list)
    """Further arguments of srun, such as a container's."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch, by their long names."""
    kill_on_invalid_dependency: bool = True
    """Whether SLURM cancels a job whose predecessor failed. Some sites forbid the option: such a job then
    waits until `flearn cancel`.
    """

    @model_validator(mode="after")
    def _leaves_time(self) -> Site:
        if self.minutes * 60 < self.warning_seconds + 180:
            raise ValueError(
                f"minutes: {self.minutes} leaves a job no time to work: it is told to save"
                f" {self.warning_seconds} s (warning_seconds) before its limit, or a minute earlier"
            )
        return self


def load_site(path: str | None) -> Site:
    """The site at `path`, or the defaults. Raises InputError naming the file and the field."""
    return Site() if path is None else check(Site, read_yaml(Path(path)), Path(path))
