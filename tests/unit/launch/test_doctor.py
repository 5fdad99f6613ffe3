"""`flearn doctor`: what it finds on this machine, and its arithmetic on models whose sizes are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.doctor import estimate, forecast, machine, storage
from launch.doctor.capacity import Capacity
from launch.doctor.estimate import Data, Shape
from launch.doctor.machine import Devices
from launch.doctor.remedy import evaluation_remedy, training_remedy
from pipeline import config
from pipeline.config import Cluster, Evaluate, Forget, FullTraining, LoraTraining, Model
from pipeline.errors import InputError
from pipeline.plan import make_plan

GB = 10**9

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
GPT2_XL = {"model_type": "gpt2", "n_embd": 1600, "n_head": 25, "n_layer": 48, "vocab_size": 50257}
BLOOM_7B = {"model_type": "bloom", "hidden_size": 4096, "n_head": 32, "n_layer": 30, "vocab_size": 250880}
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
SHAPE_7B = Shape(6_738_415_616, 32, 4096, 32000)
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
DATA = Data(num_facts=1000, record_tokens=32, locality=1, questions=3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (LLAMA2_7B, SHAPE_7B),
        (GPT2_XL, Shape(1_557_611_200, 48, 1600, 50257)),
        (BLOOM_7B, Shape(7_069_016_064, 30, 4096, 250880)),
        (GEMMA3, Shape(95_936, 2, 64, 100)),
    ],
)
def test_sizes_of_known_models(tmp_path: Path, values: dict[str, Any], expected: Shape) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert forecast.shape_of(Model(path=str(tmp_path))) == expected


def test_llama2_7b_in_full_on_four_a100s() -> None:
    memory = estimate.training_memory(
        SHAPE_7B, FullTraining(deepspeed=ZERO2, micro_batch_size=4), 4, record_tokens=32
    )
    assert memory.weights == 13_476_831_232  # 2 P: ZeRO-2 keeps them whole
    assert memory.gradients == 3_369_207_808 + 6_738_415_616  # 2 P / 4, and their fp32 copy
    assert memory.optimizer == 20_215_246_848  # 12 P / 4
    assert 2 * GB < memory.working < 5 * GB
    assert memory.total < 80 * GB


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 4.0, 4.0, 3.0), (2, 4.0, 1.0, 3.0), (3, 1.0, 1.0, 3.0)],
)
def test_bytes_per_parameter_in_fp32_on_four_ranks(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    training = FullTraining(precision="fp32", deepspeed={"zero_optimization": {"stage": stage}})
    memory = estimate.training_memory(Shape(1000, 1, 10, 10), training, 4, 10)
    assert memory[:3] == (weights * 1000, gradients * 1000, optimizer * 1000)


def test_lora_holds_no_states_for_the_frozen_weights() -> None:
    training = LoraTraining(rank=8, deepspeed=ZERO2)
    assert estimate.num_trained(SHAPE_7B, training) == 4_194_304  # 32 layers x (q, v) x 8 x (4096 + 4096)
    memory = estimate.training_memory(SHAPE_7B, training, 1, 32)
    assert memory.weights == 13_476_831_232 and memory.gradients + memory.optimizer < 0.1 * GB


def test_gradient_checkpointing_saves_memory_and_costs_time() -> None:
    plain, saving = (FullTraining(gradient_checkpointing=value) for value in (False, True))
    assert (
        estimate.training_memory(SHAPE_7B, saving, 4, 512).total
        < estimate.training_memory(SHAPE_7B, plain, 4, 512).total
    )
    assert estimate.training_flops(SHAPE_7B, saving, 1000) == pytest.approx(
        estimate.training_flops(SHAPE_7B, plain, 1000) * 4 / 3
    )


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


def test_too_small_a_gpu_fails_and_says_what_would_do(experiment: config.Experiment) -> None:
    rows = list(forecast.rows(experiment, A100._replace(device_bytes=40 * GB)))
    failed = [row for row in rows if row.state == "fail"]
    assert {row.check.split(" (")[0] for row in failed} == {"teach", "2 x learn", "tune_old"}
    assert {row.advice for row in failed} == {"would fit with --set cluster.ranks=8"}


# Of 7B parameters in bf16 a rank of N holds 13.5 GB + 121.3 GB / N with ZeRO-2, and 134.8 GB / N with ZeRO-3,
# beside what it works with.
@pytest.mark.parametrize(
    ("gpu_gb", "micro_batch_size", "record_tokens", "advice"),
    [
        (60, 8, 512, "--set teach.gradient_checkpointing=true --set teach.micro_batch_size=1"),
        (47, 4, 32, "--set teach.deepspeed.zero_optimization.stage=3"),
        (40, 4, 32, "--set cluster.ranks=8"),
        (23, 4, 32, "--set teach.deepspeed.zero_optimization.stage=3 --set cluster.ranks=16"),
    ],
)
def test_the_advice_is_the_least_that_fits(
    experiment: config.Experiment, gpu_gb: int, micro_batch_size: int, record_tokens: int, advice: str
) -> None:
    step = next(step for step in make_plan(experiment).steps.values() if step.stage == "teach")
    training = estimate.training_of(step).model_copy(update={"micro_batch_size": micro_batch_size})
    data, capacity = DATA._replace(record_tokens=record_tokens), A100._replace(device_bytes=gpu_gb * GB)
    assert (
        training_remedy(step, SHAPE_7B, training, experiment.cluster, data, capacity)
        == f"would fit with {advice}"
    )


def test_advice_where_ranks_share_the_hosts_memory(experiment: config.Experiment) -> None:
    step = next(step for step in make_plan(experiment).steps.values() if step.stage == "teach")
    training = estimate.training_of(step)
    host = A100._replace(device_bytes=None, host_bytes=170 * GB)
    advice = training_remedy(step, SHAPE_7B, training, experiment.cluster, DATA, host)
    assert (
        advice == "would fit with --set teach.deepspeed.zero_optimization.stage=3 --set cluster.ranks=2"
    )  # 134.8 GB in all
    two_nodes = experiment.cluster.model_copy(update={"nodes": 2})
    host = host._replace(host_bytes=84 * GB)
    assert "--set cluster.ranks=2" in training_remedy(step, SHAPE_7B, training, two_nodes, DATA, host)
    assert "no setting" in training_remedy(
        step, SHAPE_7B, training, two_nodes, DATA, host._replace(host_bytes=70 * GB)
    )
    tiny = A100._replace(device_bytes=4 * GB)
    assert "no setting" in training_remedy(step, SHAPE_7B, training, experiment.cluster, DATA, tiny)


@pytest.mark.parametrize(
    ("gpu_gb", "cluster", "capacity", "advice"),
    [
        (40, {"ranks": 4}, A100._replace(num_gpus=8), "would fit with --set cluster.ranks=8"),
        (
            40,
            {"ranks": 4},
            A100._replace(num_gpus=4),
            "would fit on 8 GPUs (4 here), with --set cluster.ranks=8",
        ),
        (
            40,
            {"ranks": 4},
            A100._replace(on_cluster=True),
            "would fit with --set cluster.ranks=8 --set cluster.nodes=2",
        ),
        (
            45,
            {"ranks": 3, "nodes": 3},
            A100._replace(on_cluster=True),
            "would fit with --set cluster.ranks=6 --set cluster.nodes=6",
        ),
        (45, {"ranks": 3}, A100, "would fit with --set cluster.ranks=6"),
    ],
)
def test_advice_of_more_ranks_can_be_followed(
    experiment: config.Experiment, gpu_gb: int, cluster: dict[str, int], capacity: Capacity, advice: str
) -> None:
    step = next(step for step in make_plan(experiment).steps.values() if step.stage == "teach")
    capacity = capacity._replace(device_bytes=gpu_gb * GB)
    assert (
        training_remedy(step, SHAPE_7B, estimate.training_of(step), Cluster(**cluster), DATA, capacity)
        == advice
    )


# Of 7B parameters an evaluation holds 27.0 GB in fp32 and 13.5 GB in bf16, and 1 MB (0.5 MB) of keys and
# values per token.
@pytest.mark.parametrize(
    ("gpu_gb", "host_gb", "settings", "advice"),
    [
        (34, 0, {"batch_size": 32}, "--set evaluate.batch_size=4"),
        (24, 0, {"batch_size": 32}, "--set evaluate.precision=bf16 (bf16 rounds a small subtraction away)"),
        (24, 0, {"batch_size": 1}, "--set evaluate.precision=bf16 (bf16 rounds a small subtraction away)"),
        (
            17,
            0,
            {"batch_size": 64},
            "--set evaluate.batch_size=4 --set evaluate.precision=bf16 (bf16 rounds a small subtraction away)",
        ),
        (None, 64, {"batch_size": 1}, "--set cluster.ranks=1"),
        (None, 80, {"batch_size": 1}, "--set cluster.ranks=2"),
        (None, 66, {"batch_size": 32}, "--set evaluate.batch_size=4 --set cluster.ranks=2"),
    ],
)
def test_advice_for_an_evaluation(
    gpu_gb: int | None, host_gb: int, settings: dict[str, Any], advice: str
) -> None:
    capacity = A100._replace(device_bytes=gpu_gb and gpu_gb * GB, host_bytes=host_gb * GB)
    assert (
        evaluation_remedy(SHAPE_7B, Evaluate(**settings), Cluster(ranks=4), DATA, capacity)
        == f"would fit with {advice}"
    )


def test_an_evaluation_for_which_there_is_no_advice() -> None:
    own = A100._replace(device_bytes=None, host_bytes=64 * GB, rank_bytes=10 * GB)
    assert evaluation_remedy(SHAPE_7B, Evaluate(batch_size=1), Cluster(ranks=4), DATA, own).startswith(
        "no setting makes it fit"
    )
    tiny = A100._replace(device_bytes=10 * GB)
    assert evaluation_remedy(SHAPE_7B, Evaluate(batch_size=1), Cluster(), DATA, tiny).startswith(
        "no setting makes it fit"
    )


def test_too_small_a_disk(experiment: config.Experiment) -> None:
    disk = [
        row
        for row in forecast.rows(experiment, A100._replace(disk_bytes=100 * GB))
        if row.check.startswith("disk")
    ]
    assert [row.state for row in disk] == ["fail"]


def test_checkpoints_on_the_way_are_written_too(experiment: config.Experiment) -> None:
    step = next(step for step in make_plan(experiment).steps.values() if step.stage == "teach")
    num_parameters = SHAPE_7B.num_parameters
    few = storage.stored(step, SHAPE_7B, DATA)  # 3 epochs of 16 steps: none before the last
    assert few == (4 * num_parameters, (14 - 4) * num_parameters, (6 + 4) * num_parameters)
    many = storage.stored(step, SHAPE_7B, DATA._replace(num_facts=19085))  # 897 steps: 4 before the last
    assert many == (4 * num_parameters, (2 * 14 - 4) * num_parameters, (4 * 14 + 6 + 4) * num_parameters)


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


def test_packages_against_the_tested_versions(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    installed = machine._version("pydantic")
    constraints.write_text(f"# tested\npydantic=={installed}\nsphinx==1.0\n")
    assert [row.state for row in machine.packages(constraints)] == ["ok"]
    constraints.write_text('pydantic==0.0.1; python_version >= "3.10"\n')
    (row,) = machine.packages(constraints)
    assert row.state == "warn" and f"pydantic {installed} (tested: 0.0.1)" in row.detail
    assert [row.state for row in machine.packages(tmp_path / "absent.txt")] == ["warn"]


def test_more_threads_than_cores() -> None:
    assert machine.cores_row(8, "4", ranks=2).state == "ok"
    assert "OMP_NUM_THREADS=2" in machine.cores_row(8, "4", ranks=4).advice
    assert "cluster.ranks=8" in machine.cores_row(8, None, ranks=16).advice


def test_fewer_gpus_than_ranks() -> None:
    devices = Devices(["A100"] * 2, [80 * GB] * 2)
    assert machine.device_row(devices, ranks=2).state == "ok"
    row = machine.device_row(devices, ranks=4)
    assert row.state == "fail" and "cluster.ranks=2" in row.advice


def test_a_gpu_that_torch_cannot_use_is_a_failure_and_one_that_was_not_given_is_none() -> None:
    assert machine.no_gpu_row(None, False, "13.0").state == "ok"
    row = machine.no_gpu_row("580.65.06", False, "13.0")
    assert row.state == "warn" and "--gpus all" in row.advice, (
        "the image's health check runs on such hosts too"
    )
    assert machine.no_gpu_row("535.1", True, "13.0").state == "fail"
    assert "without CUDA" in machine.no_gpu_row("580.65.06", True, None).detail


def test_little_shared_memory_matters_to_several_gpus() -> None:
    assert machine.shared_memory_row(64 << 20, num_gpus=0).state == "ok"
    assert machine.shared_memory_row(64 << 20, num_gpus=2).state == "warn"


def test_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"python", "packages", "devices", "cores", "memory", "disk", "SLURM"} <= {
        line[6:].split(":")[0] for line in lines
    }
    assert main(["doctor", str(tmp_path / "absent.yaml")]) == 2
    assert main(["doctor", "--set", "cluster.ranks=4"]) == 2


def test_gpus_that_are_not_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))
    root = Path(__file__).parents[3]
    options = [
        "model.path=" + str(tmp_path),
        f"facts.path={root}/configs/facts/world_updates.jsonl",
        "facts.format=auto",
        "cluster.ranks=4",
    ]
    command = [
        "doctor",
        str(root / "configs/llama2_7b_zsre.yaml"),
        *(part for option in options for part in ("--set", option)),
    ]
    main([*command, "--gpu-memory", "80GB"])
    found = capsys.readouterr().out
    assert "ok    teach: 45.9 GB a rank of 80.0 GB" in found and "time for this run: not estimated" in found
    assert main([*command, "--gpu-memory", "24GB"]) == 1
    found = capsys.readouterr().out
    assert "fail  teach: 45.9 GB a rank of 24.0 GB" in found
    assert "would fit with --set evaluate.precision=bf16" in found  # 27 GB of weights in fp32
    assert main([*command, "--gpu-memory", "much"]) == 2
