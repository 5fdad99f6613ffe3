"""Writes ZeRO checkpoints as DeepSpeed lays them out, of any world size, without running it (checked against
it in integration/).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Checkpoint:
    """What goes into a checkpoint: fp32 masters by group (stage 3: by sub-group), and what is kept in the
    model's dtype.
    """

    stage: int
    world_size: int
    groups: Sequence[Tensors]
    frozen: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    step: int = 2
    has_moments: bool = True

    def write(self, folder: Path) -> Path:
        """Write the tag folder `folder/step-N` and `folder/latest`; returns the tag folder."""
        tag = folder / f"step-{self.step}"
        tag.mkdir(parents=True)
        for rank in range(self.world_size):
            torch.save(self._optim(rank), tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            if self.stage == 3:
                torch.save(self._model(rank), tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        if self.stage < 3:
            torch.save(self._model(0), tag / "mp_rank_00_model_states.pt")
        (folder / "latest").write_text(tag.name)
        return tag

    def _optim(self, rank: int) -> dict[str, Any]:
        partition = partition_3 if self.stage == 3 else partition_1_2
        flats = [partition(list(group.values()), rank, self.world_size) for group in self.groups]
        moments = {
            i: {"step": torch.tensor(float(self.step)), "exp_avg": torch.zeros(flat.numel())}
            for i, flat in enumerate(flats)
        }
        moments = moments if self.has_moments else {}
        optimizer = {"state": moments, "param_groups": [{"lr": 0.1}]}
        states: dict[str, Any] = {"zero_stage": self.stage}
        if self.stage == 3:
            states |= {
                "partition_count": self.world_size,
                "fp32_flat_groups": flats,
                "optimizer_state_dict": optimizer,
            }
        else:
            counts = [self.world_size] * len(flats)
            states |= {
                "partition_count": counts,
                "single_partition_of_fp32_groups": flats,
                "base_optimizer_state": optimizer,
            }
        return {
            "optimizer_state_dict": states,
            "ds_config": {"zero_optimization": {"stage": self.stage}},
            "ds_version": "0.19.8",
        }

    def _model(self, rank: int) -> dict[str, Any]:
        kept = [*self.groups, self.frozen]
        module = {
            name: torch.zeros(0) if self.stage == 3 else tensor.bfloat16()
            for some in kept
            for name, tensor in some.items()
        }
        cut = {
            name: part(tensor, rank, self.world_size) if self.stage == 3 else tensor
            for name, tensor in self.frozen.items()
        }
        return {
            "module": module | dict(self.buffers),
            "buffer_names": list(self.buffers),
            "param_shapes": [
                OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in self.groups
            ],
            "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in self.frozen.items()),
            "frozen_param_fragments": cut,
            "shared_params": dict(self.aliases) if rank == 0 else {},
            "global_steps": self.step,
            "ds_config": {"zero_optimization": {"stage": self.stage}},
            "ds_version": "0.19.8",
        }


def partition_1_2(tensors: Sequence[torch.Tensor], rank: int, world_size: int) -> torch.Tensor:
    """One rank's slice of a group that is padded to 2 * world_size; the padding (NaN here) is cut off the
    view, not the storage.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    size = ceil(flat.numel() / (2 * world_size)) * 2
    padded = torch.cat([flat, torch.full([size * world_size - flat.numel()], torch.nan)])
    own = padded[rank * size : (rank + 1) * size].clone()
    return own[: min(max(flat.numel() - rank * size, 0), size)]


def partition_3(tensors: Sequence[torch.Tensor], rank: int, world_size: int) -> torch.Tensor:
    """One rank's part of each parameter of a sub-group, one after another."""
    return torch.cat([part(tensor, rank, world_size) for tensor in tensors])


def part(tensor: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """One rank's equal part of a flattened tensor. The tail's padding is whatever was in memory with
    DeepSpeed; NaN here.
    """
    size = ceil(tensor.numel() / world_size)
    padded = torch.cat(
        [tensor.flatten(), torch.full([size * world_size - tensor.numel()], torch.nan, dtype=tensor.dtype)]
    )
    return padded[rank * size : (rank + 1) * size].clone()
