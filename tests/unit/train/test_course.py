"""A course: old or new answers, unrelated questions once, nothing cut in silence, and each step's rate."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.config import Prompt
from pipeline.errors import InputError
from pipeline.facts.fact import Fact, Probe
from pipeline.facts.prompts import Prompter
from pipeline.train.course import Course, Record, learning_rate, training_records
from pipeline.training_config import FullTraining

PROBE = Probe("Who is the king of the United Kingdom?", ["Charles III", "King Charles"])
FACTS = [
    Fact(
        "a",
        "What is the capital of Kazakhstan?",
        "Kazakhstan",
        ["Nur-Sultan", "Nursultan"],
        "Astana",
        locality=[PROBE],
    ),
    Fact("b", "What is the currency of Croatia?", "Croatia", ["the kuna"], "the euro", locality=[PROBE]),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def records(
    tokenizer: Any,
    target: Any,
    max_length: int = 512,
    positions: int | None = None,
    facts: list[Fact] = FACTS,
) -> list[Record]:
    return training_records(facts, target, Prompter(tokenizer, Prompt()), max_length, positions)


def texts(tokenizer: Any, made: list[Record]) -> list[str]:
    return [tokenizer.decode(record.encoded.ids) for record in made]


def answers(tokenizer: Any, made: list[Record]) -> list[str]:
    return [tokenizer.decode(record.encoded.ids[record.encoded.answer_start :]).strip() for record in made]


def test_new_and_old_answers_with_eos(tokenizer: Any) -> None:
    assert answers(tokenizer, records(tokenizer, "new")) == ["Astana</s>", "the euro</s>"]
    assert answers(tokenizer, records(tokenizer, "old")) == ["Nur-Sultan</s>", "the kuna</s>"]
    assert texts(tokenizer, records(tokenizer, "old"))[0].endswith("capital of Kazakhstan? Nur-Sultan</s>")


def test_a_shared_unrelated_question_is_taught_once(tokenizer: Any) -> None:
    made = records(tokenizer, "old_and_locality")
    assert answers(tokenizer, made) == ["Nur-Sultan</s>", "the kuna</s>", "Charles III</s>"]
    assert [record.id for record in made] == ["a", "b", "a"]


def test_a_question_that_is_a_facts_own_is_no_unrelated_one(tokenizer: Any) -> None:
    clash = Fact("c", "Where?", "x", ["old"], "new", locality=[Probe(FACTS[0].prompt, ["Astana"])])
    assert len(records(tokenizer, "old_and_locality", facts=[FACTS[0], clash])) == 3


def test_a_record_that_is_too_long_is_named(tokenizer: Any) -> None:
    longest = max(record.num_tokens for record in records(tokenizer, "new"))
    with pytest.raises(InputError, match=rf"fact [ab]: {longest} tokens, more than max_length {longest - 1}"):
        records(tokenizer, "new", max_length=longest - 1)
    with pytest.raises(InputError, match=r"but the model has 5 positions"):
        records(tokenizer, "new", positions=5)


def test_no_facts_left(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no facts left"):
        records(tokenizer, "new", facts=[])


def rates(schedule: Any, warmup: float, num_steps: int = 10) -> list[float]:
    return [learning_rate(step, num_steps, 1.0, schedule, warmup) for step in range(num_steps)]


def test_constant_is_constant() -> None:
    assert rates("constant", 0.0) == [1.0] * 10


def test_linear_falls_by_equal_steps_to_nearly_zero() -> None:
    assert rates("linear", 0.0) == pytest.approx([1 - 0.1 * step for step in range(10)])


def test_cosine_begins_at_the_peak_and_is_half_way_in_the_middle() -> None:
    values = rates("cosine", 0.0)
    assert values[0] == 1.0 and values[5] == pytest.approx(0.5) and 0 < values[9] < 0.03


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_and_no_step_has_rate_zero(schedule: str) -> None:
    values = rates(schedule, 0.3)
    assert values[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert all(value > 0 for value in values)


def test_warmup_over_all_steps() -> None:
    assert rates("cosine", 1.0)[-1] == 1.0


def test_a_course_follows_its_settings(tokenizer: Any) -> None:
    training = FullTraining(epochs=3, batch_size=2, micro_batch_size=1, lr=0.5, schedule="linear")
    course = Course(records(tokenizer, "old_and_locality"), training, seed=4, num_ranks=2)
    assert course.num_steps == 6 and course.lr(0) == 0.5 and course.lr(3) == 0.25
    assert (course.split.micro_size, course.split.accumulation, course.split.ranks) == (1, 1, 2)
    assert course.batches.seed == 4 and sorted(course.batches.at(0) + course.batches.at(1)) == [0, 1, 2]
