"""A user's DeepSpeed JSON: "auto" filled, contradictions and dangers refused by the key's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.train.deepspeed_config import Adam, Ready, make_ready
from pipeline.training_config import FullTraining

ROOT = Path(__file__).parents[3]

# As the tools around DeepSpeed write it.
USUAL: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": "auto",
            "betas": [0.9, 0.95],
            "eps": "auto",
            "weight_decay": "auto",
            "fused": True,
            "amsgrad": False,
        },
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "reduce_scatter": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


def ready(config: dict[str, Any], ranks: int = 2, **training: Any) -> Ready:
    settings = FullTraining(batch_size=10, micro_batch_size=4, deepspeed=config, **training)
    return make_ready(settings, ranks, hidden_size=64)


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
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 3686,
            "stage3_param_persistence_threshold": 640,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "steps_per_print": 2000,
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
    monitors = {
        "csv_monitor": {"enabled": True, "output_path": "logs"},
        "wandb": {"enabled": False, "project": "flearn"},
        "comet": {"online": False, "mode": "create"},
        "checkpoint": {"tag_validation": "Fail"},
    }
    made = ready({"zero_optimization": {"stage": 1}, **monitors, "tensorboard": {"output_path": None}})
    assert {name: made.config[name] for name in monitors} == monitors
    assert made.has_monitor and not ready({"zero_optimization": {"stage": 1}, "wandb": {}}).has_monitor
    assert made.config["tensorboard"] == {}


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
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads",
        ),
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


# What silently gives other numbers, other checkpoints or nothing at all, and what was never tried.
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype"),
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        (
            {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
            "compression_training",
        ),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled"),
        ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled"),
        ({"amp": {"enabled": True}}, "amp.enabled"),
        ({"aio": {"block_size": 1048576}}, "aio.block_size"),
        ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint.use_node_local_storage"),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "zero_optimization.compute_grad_norm",
        ),
        (
            {"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}},
            "zero_optimization.load_from_fp32_weights",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size"),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Block"]}}},
            "zero_optimization.leaf_module",
        ),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "zero_optimization.overlap_comm"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "2e8"}},
            "zero_optimization.reduce_bucket_size",
        ),
        ({"zero_optimization": True}, "zero_optimization"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, True]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1.0]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": True}}}, "optimizer.params.eps"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": float("nan")}}}, "optimizer.params.eps"),
        ({"gradient_clipping": True}, "gradient_clipping"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping"),
        ({"checkpoint": {"tag_validation": "loud"}}, "checkpoint.tag_validation"),
        ({"checkpoint": {"tag_validation": False}}, "checkpoint.tag_validation"),
        ({"tensorboard": True}, "tensorboard"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"optimizer": {"type": "AdamW", "params": []}}, "optimizer"),
        ({"tensorboard": {"enabled": "yes"}}, "tensorboard.enabled"),
        ({"csv_monitor": {"enabled": True, "output_path": 7}}, "csv_monitor.output_path"),
        ({"wandb": {"enabled": True, "entity": "us"}}, "wandb.entity"),
        ({"comet": {"samples_log_interval": "often"}}, "comet.samples_log_interval"),
        ({"comet": {"enabled": True, "api_key": "secret"}}, "comet.api_key"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow"),
    ],
)
def test_what_is_not_known_to_be_right_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"deepspeed\.{named}[.\w]*: [^\n]+$"):
        ready({"zero_optimization": {"stage": 1}} | config)


def test_llama_factorys_zero2_says_what_to_change() -> None:
    zero = {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    }
    usual = {name: value for name, value in USUAL.items() if name not in ("optimizer", "scheduler")}
    stock = usual | {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    with pytest.raises(
        InputError, match=r"deepspeed\.zero_optimization\.round_robin_gradients: .*; set it to false$"
    ):
        ready(stock)
    made = ready(stock | {"zero_optimization": zero | {"round_robin_gradients": False}})
    assert (
        made.zero_stage == 2
        and not made.warnings
        and "round_robin_gradients" not in made.config["zero_optimization"]
    )


def test_a_slip_of_the_pen_gets_the_right_name() -> None:
    with pytest.raises(
        InputError,
        match=r"live_paramters: unknown; did you mean zero_optimization.stage3_max_live_parameters\?",
    ):
        ready({"zero_optimization": {"stage": 3, "stage3_max_live_paramters": 1e9}})


def test_what_says_nothing_is_fine_and_does_not_reach_deepspeed() -> None:
    nothing = {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
        },
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "communication_data_type": None,
        "gradient_predivide_factor": 1.0,
        "data_types": {"grad_accum_dtype": None},
        "tensor_parallel": {},
        "wandb": None,
        "checkpoint": None,
    }
    zero = {
        "stage": 3,
        "offload_param": {"device": "none", "pin_memory": True},
        "cpu_offload": False,
        "zero_hpz_partition_size": 1,
    }
    made = ready({"zero_optimization": zero, **nothing}, precision="fp32")
    assert not nothing.keys() & made.config.keys() and made.config["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        {"type": None, "params": None},
        {"params": dict.fromkeys(["lr", "betas", "eps", "weight_decay", "amsgrad", "adam_w_mode", "fused"])},
    ],
)
def test_an_optimizer_that_says_nothing(optimizer: dict[str, Any] | None) -> None:
    made = ready(
        {"zero_optimization": {"stage": 1}, "optimizer": optimizer, "activation_checkpointing": None}
    )
    assert made.adam == Adam() and not made.warnings


def test_activation_checkpointing_is_gradient_checkpointing_here() -> None:
    section = {"partition_activations": True, "cpu_checkpointing": False}
    made = ready({"zero_optimization": {"stage": 2}, "activation_checkpointing": section})
    assert "activation_checkpointing" not in made.config
    assert [warning.partition(" is not used")[0] for warning in made.warnings] == [
        "deepspeed.activation_checkpointing"
    ]


def test_offload_to_nowhere_and_agreeing_values_are_fine() -> None:
    agreeing = {"train_batch_size": 10, "bf16": {"enabled": True}, "gradient_clipping": 1.0}
    optimizer = {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}}
    zero = {"stage": 2, "offload_optimizer": {"device": "none"}, "round_robin_gradients": False}
    assert (
        ready({"zero_optimization": zero, "optimizer": optimizer, **agreeing}).config["train_batch_size"]
        == 12
    )
