"""Experiments: what loads, what is refused, and with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.config import Experiment
from pipeline.errors import InputError
from pipeline.methods import METHODS
from pipeline.training_config import read_training

Load = Callable[..., Experiment]

MINIMAL = """
name: small
methods: [full_ft]
model: {path: gpt2}
facts: {path: facts.jsonl}
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def _load(text: str = MINIMAL, *overrides: str) -> Experiment:
        (tmp_path / "small.yaml").write_text(text)
        return config.load(tmp_path / "small.yaml", list(overrides))

    return _load


def refusal(load: Load, text: str = MINIMAL, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers(load: Load) -> None:
    experiment = load()
    assert (experiment.full.epochs, experiment.full.lr, experiment.full.batch_size) == (3, 5e-5, 64)
    assert experiment.full.deepspeed["zero_optimization"]["stage"] == 2


def test_scientific_notation_without_a_dot_is_a_number(load: Load) -> None:
    assert load(MINIMAL + "full: {lr: 5e-5}").full.lr == 5e-5
    assert load(MINIMAL, "full.lr=1e-3").full.lr == 1e-3


def test_overrides_extend_sections_and_replace_values(load: Load) -> None:
    experiment = load(
        MINIMAL + "full: {lr: 1e-4, epochs: 7}\n", "full.epochs=1", "methods=[lora]", "name=other"
    )
    assert (experiment.full.epochs, experiment.full.lr, experiment.methods, experiment.name) == (
        1,
        1e-4,
        ["lora"],
        "other",
    )


def test_scale_may_be_one_number_or_one_a_method(load: Load) -> None:
    assert load(MINIMAL, "forget.scale=0.5").scale_for("flearn_ft") == 0.5
    by_method = load(MINIMAL + "forget: {scale: {flearn_ft: 0.3, flearn_lora: 0.7}}")
    assert by_method.scale_for("flearn_lora") == 0.7
    with pytest.raises(InputError, match=r"forget\.scale: no value for flearn_lora_ft"):
        by_method.scale_for("flearn_lora_ft")
    assert (
        load(MINIMAL + "forget: {scale: {flearn_ft: 0.3}}", "forget.scale=0.5").scale_for("flearn_lora")
        == 0.5
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("full: {learning_rat: 1}", "full.learning_rat: unknown key"),
        ("full: {epoch: 1}", "did you mean full.epochs?"),
        ("fogret: {scale: 1}", "did you mean forget?"),
        ("forget: {scale: much}", "forget.scale"),
        ("forget: {scale: .nan}", "forget.scale"),
        ("full: {lr: 0}", "full.lr: Input should be greater than 0"),
        ("full: {deepspeed: nowhere.json}", "full.deepspeed: no such file"),
        ("evaluate: {protocols: []}", "evaluate.protocols"),
        ("cluster: {ranks: 0}", "cluster.ranks"),
        ("cluster: {ranks: 3, nodes: 2}", "cluster: 3 ranks cannot be spread evenly over 2 nodes"),
        ("forget: {scale: true}", "forget.scale: expected a number"),
        ("forget: {scale: {flearn_ft: much}}", "forget.scale: expected a number"),
    ],
)
def test_refusals_name_the_field(load: Load, extra: str, words: str) -> None:
    assert words in refusal(load, MINIMAL + extra)


def test_refusals_name_the_file(load: Load, tmp_path: Path) -> None:
    assert "small.yaml: not a YAML file" in refusal(load, "a: [")
    assert "small.yaml: expected a mapping of settings" in refusal(load, "- a")
    assert "name: missing" in refusal(load, "methods: [lora]")
    with pytest.raises(InputError, match="no such config file"):
        config.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["forget.scale", "=3", "name.x=1"])
def test_malformed_overrides(load: Load, override: str) -> None:
    refusal(load, MINIMAL, override)


def test_paths_are_relative_to_the_yaml_and_overrides_to_here(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    experiment = load(MINIMAL + "full: {deepspeed: zero.json}")
    assert experiment.full.deepspeed == {"zero_optimization": {"stage": 3}}
    assert experiment.facts.path == str(tmp_path / "facts.jsonl")
    assert experiment.model.path == "gpt2"
    assert load(MINIMAL, "facts.path=../facts.json").facts.path == str(tmp_path / "facts.json")


def test_a_method_may_be_named_once(load: Load) -> None:
    assert "methods: each method may be named once" in refusal(load, MINIMAL, "methods=[lora, lora]")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("methods=[flearn_f]", "methods.0: no such method; did you mean flearn_ft?"),
        ("methods=[memit]", f"no such method; there are {', '.join(METHODS)}"),
        ("forget.scale={flearn_f: 1}", "did you mean flearn_ft?"),
    ],
)
def test_an_unknown_method_is_told_the_nearest(load: Load, given: str, words: str) -> None:
    assert words in refusal(load, MINIMAL, given)


def test_sections_of_training_are_told_apart_by_kind(load: Load) -> None:
    experiment = load(MINIMAL + "teach: {epochs: 1}\nfull: {kind: full}\n")
    assert experiment.teach is not None
    assert (experiment.teach.kind, experiment.full.kind, experiment.lora.kind) == ("full", "full", "lora")
    assert "full.kind" in refusal(load, MINIMAL + "full: {kind: lora}")
    dumped = [experiment.full.model_dump(mode="json"), experiment.lora.model_dump(mode="json")]
    assert [read_training(values) for values in dumped] == [experiment.full, experiment.lora]


def test_a_method_may_set_fields_of_its_training(load: Load) -> None:
    experiment = load(MINIMAL + "lora: {epochs: 2, lr: 0.1}")
    assert experiment.training_for("lora") is not None
    assert experiment.training_for("lora", {"epochs": 6}) == experiment.lora.model_copy(update={"epochs": 6})
    with pytest.raises(ValidationError, match="rank"):
        experiment.training_for("full", {"rank": 6})


@pytest.mark.parametrize(
    ("text", "override", "seeds"),
    [
        ("", [], [0]),
        ("seed: 3", [], [3]),
        ("seeds: [1, 2]", [], [1, 2]),
        ("seed: 3", ["seeds=[1, 2]"], [1, 2]),
        ("seeds: [1, 2]", ["seed=3"], [3]),
    ],
)
def test_one_seed_or_several(load: Load, text: str, override: list[str], seeds: list[int]) -> None:
    assert load(MINIMAL + text, *override).seeds == seeds


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seed=1", "seeds=[1]"], "give either seed or seeds"),
        (["seeds=[1, 1]"], "seeds: each seed may be named once"),
        (["seeds=[]"], "seeds: List should have at least 1 item"),
        (["seed=first"], "seeds.0: Input should be a valid integer"),
    ],
)
def test_seeds_that_are_none(load: Load, given: list[str], words: str) -> None:
    assert words in refusal(load, MINIMAL, *given)


def test_a_deepspeed_file_replaces_and_a_dotted_key_extends(load: Load, tmp_path: Path) -> None:
    text = MINIMAL + "full: {deepspeed: {zero_optimization: {stage: 2}, fp16: {enabled: true}}}"
    (tmp_path / "plain.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert load(text, f"full.deepspeed={tmp_path}/plain.json").full.deepspeed == {
        "zero_optimization": {"stage": 3}
    }
    extended = load(text, "full.deepspeed.zero_optimization.stage=1").full.deepspeed
    assert extended == {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}


def test_what_only_prints_or_places_stays_out_of_the_recipe(load: Load) -> None:
    text = MINIMAL + "full: {deepspeed: {zero_optimization: {stage: 2}}}"
    plain = load(text).full.recipe()
    assert load(text, "full.deepspeed.tensorboard.enabled=true").full.recipe() == plain
    assert load(text, "full.deepspeed.zero_optimization.reduce_bucket_size=1000").full.recipe() == plain
    assert load(text, "full.deepspeed.zero_optimization.stage=3").full.recipe() != plain


def test_placement_stays_out_of_the_recipe(load: Load) -> None:
    one, other = load(MINIMAL, "full.micro_batch_size=1"), load(MINIMAL, "full.micro_batch_size=8")
    assert one.full.recipe() == other.full.recipe()
    assert load(MINIMAL, "full.batch_size=8").full.recipe() != one.full.recipe()
