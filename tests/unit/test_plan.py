"""Plans: what is shared between methods and re-runs, and what a changed setting touches."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.artifact import Artifact
from pipeline.delta.manifest import ARITHMETIC_VERSION
from pipeline.errors import InputError
from pipeline.methods import METHODS, Method
from pipeline.plan import Existing, Plan, make_plan
from pipeline.stages import STAGES

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"

QUICKSTART_METHODS = config.load(QUICKSTART).methods


def planned(*overrides: str) -> Plan:
    return make_plan(config.load(QUICKSTART, list(overrides)))


def changed(*overrides: str) -> set[str]:
    """The stages that a changed setting makes run again."""
    before = planned()
    return {step.stage for step in planned(*overrides).steps.values() if step.id not in before.steps}


def test_every_stage_function_exists() -> None:
    for stage in STAGES.values():
        module, _, name = stage.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_the_forget_stage_has_a_version_for_each_of_the_arithmetic() -> None:
    """Or its folder would be the one where a run of an earlier version was interrupted, which cannot be gone
    on with.
    """
    assert (ARITHMETIC_VERSION, STAGES["forget"].version) == (4, 2), "raise both"


def test_methods_share_what_they_can() -> None:
    steps = planned("forget.scale={flearn_ft: 0.3, flearn_lora: 0.7, flearn_lora_ft: 3}").steps.values()
    count = {stage: sum(step.stage == stage for step in steps) for stage in STAGES}
    assert count["teach"] == 1
    assert count["tune_old"] == 2  # one full, one LoRA, for three methods
    assert count["forget"] == 3
    assert count["learn"] == len(QUICKSTART_METHODS)
    assert [step.methods for step in steps if step.stage == "tune_old"] == [
        ["flearn_ft"],
        ["flearn_lora", "flearn_lora_ft"],
    ]


@pytest.mark.parametrize("overrides", [[], ["seeds=[0, 1]"]])
def test_inputs_come_first(overrides: list[str]) -> None:
    seen: set[str] = set()
    for step in planned(*overrides).steps.values():
        assert {source.id for source in step.inputs.values()} <= seen
        seen.add(step.id)


def test_seeds_share_what_leaves_nothing_to_chance(tiny_model: Any) -> None:
    steps = list(planned("seeds=[0, 1]").steps.values())
    count = {stage: sum(step.stage == stage for step in steps) for stage in STAGES}
    assert (count["facts"], count["model"], count["teach"], count["learn"]) == (
        1,
        2,
        2,
        2 * len(QUICKSTART_METHODS),
    )
    assert (steps[0].seeds, steps[0].users) == ([], "all methods")
    learned = [step for step in steps if step.stage == "learn" and step.methods == ["flearn_ft"]]
    assert [step.users for step in learned] == ["flearn_ft; seed 0", "flearn_ft; seed 1"]
    folder = planned("seeds=[0, 1]", "model.tiny=null", f"model.path={tiny_model('llama')}")
    assert sum(step.stage == "model" for step in folder.steps.values()) == 1


def test_another_seed_leaves_the_first_ones_steps_alone() -> None:
    one, two = planned(), planned("seeds=[0, 1]")
    assert one.steps.keys() - two.steps.keys() == {one.report.id}
    assert all(step.seeds == [] for step in one.steps.values())


def test_a_method_that_changes_settings_alone_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = Method("Full-FT twice", learn="full", baseline="full_ft", settings={"epochs": 99})
    monkeypatch.setitem(METHODS, "twice", twice)
    before, after = planned("methods=[full_ft]"), planned("methods=[full_ft, twice]")
    added = [step for id, step in after.steps.items() if id not in before.steps]
    assert [step.stage for step in added] == ["learn", "evaluate", "report"]
    assert added[0].section["training"]["epochs"] == 99 and added[0].methods == ["twice"]


def test_a_new_lambda_forgets_learns_and_evaluates_again() -> None:
    assert changed("forget.scale=0.5") == {"forget", "learn", "evaluate", "report"}


def test_a_new_lambda_leaves_the_baselines_alone() -> None:
    before, after = planned(), planned("forget.scale=0.5")
    rerun = [step for step in after.steps.values() if step.id not in before.steps and step.stage == "learn"]
    assert all(not {"full_ft", "lora"} & set(step.methods) for step in rerun)


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("cluster.ranks=1", set()),
        ("full.micro_batch_size=1", set()),
        ("evaluate.batch_size=1", set()),
        ("evaluate.max_new_tokens=3", {"evaluate", "report"}),
        ("lora.rank=4", {"tune_old", "forget", "learn", "evaluate", "report"}),
        ("facts.limit=3", set(STAGES)),
        ("seed=1", set(STAGES) - {"facts"}),
    ],
)
def test_a_changed_setting_runs_only_what_depends_on_it(override: str, stages: set[str]) -> None:
    assert changed(override) == stages


def test_facts_are_known_by_their_content(tmp_path: Path) -> None:
    copy = tmp_path / "moved.jsonl"
    copy.write_bytes((QUICKSTART.parent / "facts/world_updates.jsonl").read_bytes())
    assert changed(f"facts.path={copy}") == set()
    copy.write_bytes(copy.read_bytes() + b"\n")
    assert changed(f"facts.path={copy}") == set(STAGES)


@pytest.mark.parametrize("overrides", [[], ["seeds=[0, 1]"]])
def test_a_plan_survives_its_json(overrides: list[str]) -> None:
    plan = planned(*overrides)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json() and list(again.steps.values()) == list(plan.steps.values())


def test_a_plan_of_an_earlier_flearn_can_be_looked_at() -> None:
    value = planned().to_json()
    for row in value["steps"]:
        del row["seeds"]
    assert Plan.from_json(value).to_json() == planned().to_json()


def test_an_artifact_of_another_run_may_be_an_input(tmp_path: Path) -> None:
    folder = tmp_path / "other" / "learn-0123456789ab"
    with pytest.raises(InputError, match="has not finished"):
        Existing(folder).fingerprint  # noqa: B018
    Artifact(folder).commit({"result": {}})
    with pytest.raises(InputError, match="made by another flearn"):
        Existing(folder).fingerprint  # noqa: B018
    Artifact(folder).commit({"fingerprint": "0123456789ab", "result": {}})
    plan = Plan(tmp_path / "run")
    step = plan.add("evaluate", {}, {"model": Existing(folder)})
    assert plan.artifact(step.inputs["model"]).folder == folder
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.steps == plan.steps
    Artifact(folder).commit({"fingerprint": "000000000000", "result": {}})
    assert plan.add("evaluate", {}, {"model": Existing(folder)}).id != step.id


@pytest.mark.parametrize("section", ["teach", "full", "lora"])
def test_a_deepspeed_config_is_refused_before_anything_runs(section: str) -> None:
    with pytest.raises(InputError, match=rf"^{section}\.deepspeed\.zero_optimization\.stage"):
        planned(f"{section}.deepspeed.zero_optimization.stage=0")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("facts.path=./nowhere.json", "facts.path: no such file"),
        ("facts.path=nowhere", "neither a file or folder here nor a hub id"),
    ],
)
def test_missing_files_are_named(override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        planned(override)


def test_target_modules_that_the_model_lacks_are_said_when_planning(tiny_model: Any, tmp_path: Path) -> None:
    model = ["model.tiny=null", f"model.path={tiny_model('llama')}"]
    planned(*model, "lora.target_modules=[q_proj, down_proj]")
    planned(*model, "lora.target_modules=[query]", "methods=[full_ft]")  # no LoRA, no matter
    with pytest.raises(InputError, match=r"lora\.target_modules: the model has no module named query$"):
        planned(*model, "lora.target_modules=[q_proj, query]")
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)  # all that `flearn doctor` needs of a model
    planned("model.tiny=null", f"model.path={tmp_path}", "lora.target_modules=[q_proj]")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_size": "x"}))
    with pytest.raises(InputError, match=r"config\.json: .*'hidden_size'[^\n]*expected int, got str[^\n]*$"):
        planned("model.tiny=null", f"model.path={tmp_path}", "lora.target_modules=[q_proj]")
