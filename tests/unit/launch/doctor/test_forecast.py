"""What an experiment will want of a machine, and what is said where it does not suffice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_configs import BLOOM_7B, GPT2_XL, LLAMA2_7B

from launch.doctor import forecast
from launch.doctor.capacity import Capacity
from launch.doctor.inputs import model_size
from launch.doctor.machine import Row
from pipeline import config
from pipeline.config import Forget, Model
from pipeline.errors import InputError
from pipeline.needs import ModelSize

GB = 10**9

GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 100,
    },
    "vision_config": {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "image_size": 28,
    },
}
SIZE_7B = ModelSize(6_738_415_616, 32, 4096, 32000)
ZERO2 = {
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 2e8,
        "allgather_bucket_size": 2e8,
    }
}
SPEED = {"bf16": 250e12, "fp32": 19e12}
A100 = Capacity(device_bytes=80 * GB, host_bytes=500 * GB, disk_bytes=2000 * GB, flops=SPEED)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (LLAMA2_7B, SIZE_7B),
        (GPT2_XL, ModelSize(1_557_611_200, 48, 1600, 50257)),
        (BLOOM_7B, ModelSize(7_069_016_064, 30, 4096, 250880)),
        (GEMMA3, ModelSize(95_936, 2, 64, 100)),
    ],
)
def test_sizes_of_known_models(tmp_path: Path, values: dict[str, Any], expected: ModelSize) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_size(Model(path=str(tmp_path))) == expected


@pytest.fixture
def experiment(tmp_path: Path) -> config.Experiment:
    """The paper's settings on a model that is no more than its config."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA2_7B))
    fact = {"instruction": "What is the capital of Kazakhstan?", "input": "", "output": "Astana"}
    for name in ("old", "new"):
        (tmp_path / f"{name}.json").write_text(json.dumps([fact | {"output": name}]))
    return config.Experiment.model_validate(
        {
            "name": "seven",
            "methods": ["full_ft", "flearn_ft", "flearn_lora"],
            "model": {"path": str(tmp_path / "model")},
            "facts": {"path": [str(tmp_path / "old.json"), str(tmp_path / "new.json")]},
            "teach": {"deepspeed": ZERO2},
            "full": {"deepspeed": ZERO2},
            "lora": {"deepspeed": ZERO2},
            "forget": {"scale": {"flearn_ft": 0.3, "flearn_lora": 0.7}},
            "cluster": {"ranks": 4, "runs_dir": str(tmp_path / "runs")},
        }
    )


def test_four_a100s_will_do(experiment: config.Experiment) -> None:
    rows = list(forecast.rows(experiment, A100))
    assert [row.state for row in rows if row.state != "ok"] == []
    teach = next(row for row in rows if row.check == "teach")
    assert (
        "of 80.0 GB" in teach.detail
        and "weights 13.5 GB" in teach.detail
        and "optimizer 20.2 GB" in teach.detail
    )
    disk = next(row for row in rows if row.check == "disk for this run")
    # In fp32 teach, forget twice, learn twice in full: 5 x 4 P = 134.8 GB; tune_old's last ZeRO checkpoint,
    # of masters and bf16 weights: 6 P = 40.4 GB. A checkpoint with moments is 14 P; teach's result (4 P)
    # comes when it has gone.
    assert "results 175.2 GB, checkpoints of trainings one by one 67.4 GB" in disk.detail


def test_on_a_cluster_trainings_share_the_disk(experiment: config.Experiment) -> None:
    def needed(*methods: str) -> str:
        some = experiment.model_copy(update={"methods": list(methods), "forget": Forget(scale=0.3)})
        cluster = A100._replace(on_cluster=True)
        return next(
            row.detail for row in forecast.rows(some, cluster) if row.check == "disk for this run"
        ).partition("side by side ")[2]

    # Beside their results teach and a full learn want 14 - 4 P, a full tune_old 14 - 6 P, and LoRA's
    # trainings next to nothing.
    assert needed("full_ft").startswith("67.4 GB;"), "the learn needs teach"
    assert needed("flearn_ft").startswith("67.4 GB;"), "and so does tune_old, after which it learns"
    assert needed("full_ft", "flearn_ft").startswith("134.8 GB;")
    assert needed("full_ft", "flearn_ft", "flearn_lora").startswith("134.8 GB;")
    assert needed("full_ft", "flearn_ft", "flearn_lora_ft").startswith("202.2 GB;"), (
        "three learns, or two and tune_old"
    )


def test_forgetting_takes_the_hosts_memory(experiment: config.Experiment) -> None:
    (row,) = (row for row in forecast.rows(experiment, A100) if "forget (" in row.check)
    assert row.state == "ok" and row.detail.startswith("0.6 GB of the 500.0 GB that are free on the host")


def test_evaluation_computes_at_its_own_precisions_speed(experiment: config.Experiment) -> None:
    def computing(capacity: Capacity) -> str:
        return next(row.detail for row in forecast.rows(experiment, capacity) if "evaluate" in row.check)

    slow = A100._replace(flops={"bf16": 250e12, "fp32": 1e9})
    assert "about 8 minutes each" in computing(slow) and "about 34 minutes each" in computing(
        slow._replace(on_cluster=True)
    )
    assert "about 1 s each" in computing(slow._replace(flops={"bf16": 1e9, "fp32": 19e12}))


def failures(rows: list[Row]) -> dict[str, str]:
    """By the stage that does not fit, what is said to do about it."""
    return {row.check.split(" (")[0].split(" x ")[-1]: row.advice for row in rows if row.state == "fail"}


def test_too_small_a_gpu_fails_and_says_what_would_want_less(experiment: config.Experiment) -> None:
    rows = list(forecast.rows(experiment, A100._replace(device_bytes=40 * GB)))
    failed = failures(rows)
    assert failed.keys() == {"teach", "learn", "tune_old"}
    (advice,) = set(failed.values())
    for way in (
        "gradient_checkpointing: true and micro_batch_size: 1",
        "deepspeed.zero_optimization.stage: 3",
        "LoRA",
        "more ranks",
    ):
        assert way in advice


def test_what_is_set_already_is_not_advised(experiment: config.Experiment) -> None:
    zero3 = {"zero_optimization": {"stage": 3}}
    saving = {"deepspeed": zero3, "gradient_checkpointing": True, "micro_batch_size": 1}
    trained = experiment.model_copy(update={"lora": experiment.lora.model_copy(update=saving)})
    rows = list(forecast.rows(trained, A100._replace(device_bytes=GB)))
    lora = next(row for row in rows if row.check.startswith("tune_old (flearn_lora"))
    assert lora.advice.startswith("less memory: more ranks")


def test_ranks_that_share_the_hosts_memory_should_be_fewer(experiment: config.Experiment) -> None:
    host = A100._replace(device_bytes=None, host_bytes=100 * GB)
    failed = failures(list(forecast.rows(experiment, host)))
    assert "fewer ranks" in failed["teach"] and "fewer ranks" in failed["evaluate"]
    own = host._replace(rank_bytes=25 * GB, on_cluster=True)
    assert "more ranks" in failures(list(forecast.rows(experiment, own)))["teach"]


def test_an_evaluation_that_does_not_fit(experiment: config.Experiment) -> None:
    advice = failures(list(forecast.rows(experiment, A100._replace(device_bytes=20 * GB))))["evaluate"]
    for way in ("evaluate.batch_size", "evaluate.precision: bf16, which", "a GPU with more memory"):
        assert way in advice


def test_too_small_a_disk(experiment: config.Experiment) -> None:
    disk = [
        row
        for row in forecast.rows(experiment, A100._replace(disk_bytes=100 * GB))
        if row.check.startswith("disk")
    ]
    assert [row.state for row in disk] == ["fail"]


def test_a_hub_model_whose_config_is_not_here(
    experiment: config.Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absent = experiment.model_copy(update={"model": Model(path="someone/absent")})
    (row,) = forecast.rows(absent, A100)
    assert row.state == "warn" and "someone/absent cannot be read here" in row.detail


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (LLAMA2_7B | {"hidden_size": "x"}, "expected int, got str"),
        (LLAMA2_7B | {"hidden_size": 0}, "ZeroDivisionError"),
        (LLAMA2_7B | {"num_attention_heads": 0}, "ZeroDivisionError"),
        (LLAMA2_7B | {"vocab_size": -1}, "negative dimension"),
        (LLAMA2_7B | {"hidden_act": "none"}, "KeyError: 'none'"),
        (GPT2_XL | {"n_head": 0}, "ZeroDivisionError"),
        (BLOOM_7B | {"hidden_size": 0}, "ZeroDivisionError"),
    ],
)
def test_a_config_that_no_model_can_be_made_of(
    experiment: config.Experiment, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=reason) as caught:
        list(forecast.rows(experiment.model_copy(update={"methods": ["full_ft"]}), A100))
    assert "\n" not in str(caught.value) and str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (90, "90 s"), (600, "10 minutes"), (9000, "2 hours"), (864000, "10 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert forecast.duration(seconds) == text
