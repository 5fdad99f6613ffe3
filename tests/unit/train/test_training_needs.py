"""What a fine-tuning wants, for a model whose sizes are known."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.needs import DataSize, ModelSize, Needs
from pipeline.train.training_needs import memory, num_trained, training_needs
from pipeline.training_config import FullTraining, LoraTraining, Training

GB = 10**9
SIZE_7B = ModelSize(6_738_415_616, 32, 4096, 32000)
DATA = DataSize(num_facts=1000, record_tokens=32, locality=1, questions=3)
ZERO2 = {
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 2e8,
        "allgather_bucket_size": 2e8,
    }
}


def needs(training: Training, data: DataSize = DATA, target: str = "old", keeps: bool = False) -> Needs:
    section: dict[str, Any] = {"training": training.model_dump(), "target": target, "keeps_checkpoint": keeps}
    return training_needs(section, SIZE_7B, data, ranks=4)


def test_llama2_7b_in_full_on_four_a100s() -> None:
    found = memory(SIZE_7B, FullTraining(deepspeed=ZERO2, micro_batch_size=4), 4, record_tokens=32)
    assert found["weights"] == 13_476_831_232  # 2 P: ZeRO-2 keeps them whole
    assert found["gradients"] == 3_369_207_808 + 6_738_415_616  # 2 P / 4, and their fp32 copy
    assert found["optimizer"] == 20_215_246_848  # 12 P / 4
    assert 2 * GB < found["working"] < 5 * GB
    assert sum(found.values()) < 80 * GB


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 4.0, 4.0, 3.0), (2, 4.0, 1.0, 3.0), (3, 1.0, 1.0, 3.0)],
)
def test_bytes_per_parameter_in_fp32_on_four_ranks(
    stage: int, weights: float, gradients: float, optimizer: float
) -> None:
    training = FullTraining(precision="fp32", deepspeed={"zero_optimization": {"stage": stage}})
    found = memory(ModelSize(1000, 1, 10, 10), training, 4, 10)
    assert list(found.values())[:3] == [weights * 1000, gradients * 1000, optimizer * 1000]


def test_lora_holds_no_states_for_the_frozen_weights() -> None:
    training = LoraTraining(rank=8, deepspeed=ZERO2)
    assert num_trained(SIZE_7B, training) == 4_194_304  # 32 layers x (q, v) x 8 x (4096 + 4096)
    found = memory(SIZE_7B, training, 1, 32)
    assert found["weights"] == 13_476_831_232 and found["gradients"] + found["optimizer"] < 0.1 * GB


def test_gradient_checkpointing_saves_memory_and_costs_time() -> None:
    plain, saving = (FullTraining(gradient_checkpointing=value) for value in (False, True))
    long = DATA._replace(record_tokens=512)
    assert sum(needs(saving, long).memory.values()) < sum(needs(plain, long).memory.values())
    assert needs(saving).flops == pytest.approx(needs(plain).flops * 4 / 3)


def test_teaching_unrelated_questions_too_takes_longer() -> None:
    assert needs(FullTraining(), target="old_and_locality").flops == 2 * needs(FullTraining()).flops


def test_checkpoints_on_the_way_are_written_too() -> None:
    num = SIZE_7B.num_parameters
    few = needs(FullTraining())  # 3 epochs of 16 steps: no checkpoint before the last
    assert (few.result, few.passing, few.written) == (4 * num, (14 - 4) * num, (6 + 4) * num)
    many = needs(FullTraining(), DATA._replace(num_facts=19085))  # 897 steps: 4 before the last
    assert (many.result, many.passing, many.written) == (
        4 * num,
        (2 * 14 - 4) * num,
        (4 * 14 + 6 + 4) * num,
    )


def test_a_checkpoint_that_is_the_result_is_written_once() -> None:
    num = SIZE_7B.num_parameters
    kept = needs(FullTraining(), keeps=True)
    assert (kept.result, kept.passing, kept.written) == (6 * num, (14 - 6) * num, 6 * num)
