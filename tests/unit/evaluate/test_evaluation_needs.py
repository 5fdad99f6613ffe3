"""What an evaluation wants, for a model whose sizes are known."""

from __future__ import annotations

from pipeline.config import Evaluate
from pipeline.evaluate.evaluation_needs import evaluation_needs
from pipeline.needs import DataSize, ModelSize, Needs

SIZE_7B = ModelSize(6_738_415_616, 32, 4096, 32000)
DATA = DataSize(num_facts=1000, record_tokens=32, locality=1, questions=3)


def needs(settings: Evaluate) -> Needs:
    return evaluation_needs({"evaluate": settings.model_dump()}, SIZE_7B, DATA, ranks=4)


def test_weights_and_a_batchs_keys_and_values() -> None:
    one = needs(Evaluate(batch_size=1, precision="fp32")).memory
    assert one["weights"] == 26_953_662_464
    many = needs(Evaluate(batch_size=33, precision="fp32")).memory
    per_question = 2 * 4 * 32 * 4096 * (32 + 24) + 8 * 32000 * 10
    assert many["working"] - one["working"] == 32 * per_question


def test_bf16_halves_the_weights_and_is_not_advised_twice() -> None:
    half = needs(Evaluate(precision="bf16", batch_size=1))
    assert half.memory["weights"] == 13_476_831_232 and half.precision == "bf16"
    assert half.advice == ""


def test_every_question_is_asked_under_each_protocol() -> None:
    one, three = needs(Evaluate(protocols=["token"])), needs(Evaluate())
    assert one.flops == 2.0 * 6_738_415_616 * 1000 * 3 * (32 + 24)
    assert three.flops == 2.0 * 6_738_415_616 * 1000 * 3 * (3 * 32 + 24)
