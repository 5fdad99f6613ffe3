"""One rank of a DeepSpeed run that makes many small ZeRO checkpoints, each beside `expected.pt`: what the
engine says it holds.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 python make_zero_checkpoints.py OUT '{"name": {"stage": 2, ...}, ...}'

The ranks find each other by the file OUT/meeting: a free port may be taken by another process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn


class Odd(nn.Module):
    """Odd sizes everywhere, so that every padding there is shows; buffers of three dtypes."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.gate = nn.Parameter(torch.randn(1))
        self.down = nn.Linear(11, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 13, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.randn(3))
        self.register_buffer("count", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.down(torch.relu(self.up(hidden))) * self.gate
        return self.head(self.norm(hidden)).float().square().mean()


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": case["stage"],
        "stage3_param_persistence_threshold": case.get("persistence", 0),
    }
    if case.get("round_robin"):
        zero["round_robin_gradients"] = True
    if case.get("parameter_alignment"):
        zero["parameter_alignment"] = True
    if case.get("sub_group_size"):
        zero["sub_group_size"] = case["sub_group_size"]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if case.get("dtype", "bf16") != "fp32":
        config[case.get("dtype", "bf16")] = {"enabled": True}
    if case.get("fp32_gradients"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def groups_of(model: nn.Module, case: dict[str, Any]) -> list[dict[str, Any]]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if case.get("groups") == "two":
        return [
            {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
    if case.get("groups") == "tiny":  # at 3 ranks the padding of one element is longer than a partition
        return [{"params": [p for n, p in trained.items() if n != "gate"]}, {"params": [trained["gate"]]}]
    return [{"params": list(trained.values())}]


def make(out: Path, case: dict[str, Any]) -> None:
    torch.manual_seed(case.get("seed", 0))
    model = Odd(case.get("tied", False))
    for name in case.get("frozen", []):
        model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.AdamW(groups_of(model, case), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(case))
    for step in range(case.get("steps", 2)):
        torch.manual_seed(100 * step + dist.get_rank())
        engine.backward(engine(torch.randint(0, 13, (2, 5))))
        engine.step()
    engine.save_checkpoint(
        str(out), tag=case.get("tag", "step-2"), exclude_frozen_parameters=case.get("exclude_frozen", False)
    )
    expected = {
        name: value_of(parameter)
        for name, parameter in engine.module.named_parameters(remove_duplicate=False)
    }
    expected |= {name: buffer for name, buffer in engine.module.named_buffers() if name != "scratch"}
    if dist.get_rank() == 0:
        torch.save(expected, out / "expected.pt")
    engine.destroy()


def value_of(parameter: nn.Parameter) -> torch.Tensor:
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).clone()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    out = Path(sys.argv[1]).absolute()
    dist.init_process_group("gloo", f"file://{out}/meeting", rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    for name, case in json.loads(sys.argv[2]).items():
        make(out / name, case)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
