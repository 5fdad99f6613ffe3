"""A user's DeepSpeed JSON: "auto" filled, contradictions and dangers refused by the key's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Training
from pipeline.errors import InputError
from pipeline.train.batches import Shape
from pipeline.train.deepspeed_config import Ready, make_ready

ROOT = Path(__file__).parents[3]

# As the tools around DeepSpeed write it.
USUAL: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "wall_clock_breakdown": False,
}


def ready(config: dict[str, Any], ranks: int = 2, **training: Any) -> Ready:
    settings = Training(batch_size=10, micro_batch_size=4, deepspeed=config, **training)
    return make_ready(settings, Shape.of(10, 4, ranks), hidden_size=64)


def test_every_auto_is_filled() -> None:
    made = ready(USUAL, max_grad_norm=0.5)
    assert made.config == {
        "train_batch_size": 12,  # 2 ranks x 2 steps x 3 records: DeepSpeed insists on the product
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 3686,
            "stage3_param_persistence_threshold": 640,
        },
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }
    assert made.zero_stage == 3
    assert made.adam.betas == (0.9, 0.95) and made.adam.eps == 1e-8
    assert len(made.warnings) == 1 and made.warnings[0].startswith("deepspeed.scheduler")
    assert USUAL["optimizer"] and USUAL["bf16"] == {"enabled": "auto"}, "the user's own dict stays as it was"


@pytest.mark.parametrize("name", ["zero1.json", "zero2.json", "zero3.json"])
def test_the_shipped_configs_are_taken(name: str) -> None:
    made = ready(json.loads((ROOT / "configs/deepspeed" / name).read_text()), precision="fp32")
    assert made.zero_stage == int(name[4]) and made.config["bf16"] == {"enabled": False} and not made.warnings


def test_monitors_stay() -> None:
    monitors = {"csv_monitor": {"enabled": True, "output_path": "logs"}, "wandb": {"enabled": False}}
    made = ready({"zero_optimization": {"stage": 1}, **monitors})
    assert {name: made.config[name] for name in monitors} == monitors


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"stage": 0}, "zero_optimization.stage"),
        ({}, "zero_optimization.stage"),
        ({"stage": 2, "round_robin_gradients": True}, "zero_optimization.round_robin_gradients"),
        ({"stage": 1, "elastic_checkpoint": True}, "zero_optimization.elastic_checkpoint"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "zero_optimization.offload_optimizer"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "zero_optimization.offload_param"),
        ({"stage": 2, "cpu_offload": True}, "zero_optimization.cpu_offload"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "zero_optimization.zero_hpz_partition_size"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights"),
        ({"stage": 3, "sub_group_size": "auto"}, "zero_optimization.sub_group_size"),
    ],
)
def test_dangerous_zero_settings_are_refused_by_name(zero: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"deepspeed\.{named}: "):
        ready({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"bf16": {"enabled": False}}, "bf16.enabled"),
        ({"bf16": True}, "bf16"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype"),
        ({"train_batch_size": 16}, "train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu"),
        ({"gradient_clipping": 2.0}, "gradient_clipping"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "optimizer.type"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}, "optimizer.params"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
    ],
)
def test_other_contradictions_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"deepspeed\.{named}: "):
        ready({"zero_optimization": {"stage": 1}, **config})


def test_offload_to_nowhere_and_agreeing_values_are_fine() -> None:
    agreeing = {"train_batch_size": 10, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    optimizer = {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}}
    zero = {"stage": 2, "offload_optimizer": {"device": "none"}, "round_robin_gradients": False}
    assert ready({"zero_optimization": zero, "optimizer": optimizer, **agreeing}).config["train_batch_size"] == 12
