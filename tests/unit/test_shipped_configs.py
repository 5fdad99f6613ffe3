"""The shipped experiments: each one loads and plans, and the paper's settings are the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.config import Experiment
from pipeline.plan import make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

ZSRE = {
    "subject": "Charity Creek",
    "src": "Which river system contains Charity Creek?",
    "pred": "Parramatta River",
    "rephrase": "What river system is Charity Creek in?",
    "alt": "Chichester River",
    "answers": ["Parramatta River"],
    "loc": "nq question: how many series of diary of a wimpy kid are there",
    "loc_ans": "12",
    "cond": "Parramatta River >> Chichester River || Which river system contains Charity Creek?",
}
COUNTERFACT = {
    "case_id": 0,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak the language of",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}

# The paper's table: lambda for LoRA, LoRA-FT and FT, and the learning rate.
PAPER = {
    "llama2_7b_zsre": (0.7, 3, 0.3, 5e-5),
    "llama2_7b_counterfact": (1.5, 3, 0.1, 5e-5),
    "llama_7b_zsre": (0.7, 2, 0.3, 5e-5),
    "llama_7b_counterfact": (1, 3, 0.05, 1e-5),
    "bloom_7b_zsre": (0.1, 3, 0.2, 5e-5),
}
# GPT-2-XL is not in the paper: it takes LLaMA2-7B's values.
ALL_LIKE_THE_PAPER = PAPER | {
    "gpt2_xl_zsre": PAPER["llama2_7b_zsre"],
    "gpt2_xl_counterfact": PAPER["llama2_7b_counterfact"],
}
METHODS = ["full_ft", "lora", "flearn_ft", "flearn_lora", "flearn_lora_ft"]


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What stands in for data and models that are not part of the project."""
    monkeypatch.setenv("FLEARN_MODELS", str(tmp_path))
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    files = {}
    for name, record in (("zsre", ZSRE), ("counterfact", COUNTERFACT)):
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
        files[name] = [f"facts.path={tmp_path / name}.json"]
    return {stem: next((files[name] for name in files if stem.endswith(name)), []) for stem in SHIPPED}


def load(name: str, overrides: dict[str, Any]) -> Experiment:
    return config.load(CONFIGS / f"{name}.yaml", overrides[name])


def test_every_experiment_of_the_paper_is_shipped() -> None:
    assert set(ALL_LIKE_THE_PAPER) | {"quickstart", "smollm2_world", "smollm2_zsre"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_and_plans(name: str, overrides: dict[str, Any]) -> None:
    experiment = load(name, overrides)
    assert experiment.name == name and experiment.methods == METHODS
    plan = make_plan(experiment)
    # Shared: facts, model, teach, the original's scores, the report. By method: learn and its scores; two
    # tunings on the old facts with their scores; the subtractions, which are shared where lambda is the same,
    # with theirs.
    num_subtractions = len({experiment.scale_for(m) for m in ("flearn_lora", "flearn_lora_ft")}) + 1
    assert len(plan.steps) == 5 + 2 * 5 + 2 * 2 + 2 * num_subtractions


@pytest.mark.parametrize("name", SHIPPED)
def test_its_facts_are_of_the_format_it_names(name: str, overrides: dict[str, Any]) -> None:
    from pipeline.facts.read import read

    settings = load(name, overrides).facts
    reading = read(settings.path, settings.format, settings.old_answer)
    assert reading.facts and not reading.bad_rows


@pytest.mark.parametrize(("name", "values"), ALL_LIKE_THE_PAPER.items())
def test_the_papers_settings(
    name: str, values: tuple[float, float, float, float], overrides: dict[str, Any]
) -> None:
    experiment = load(name, overrides)
    lora, lora_ft, full, lr = values
    assert experiment.scale_for("flearn_lora") == lora
    assert experiment.scale_for("flearn_lora_ft") == lora_ft
    assert experiment.scale_for("flearn_ft") == full
    assert experiment.cluster.ranks == 4
    assert experiment.facts.old_answer == "pred"
    for training in (experiment.teach, experiment.full, experiment.lora):
        assert training is not None
        assert (training.lr, training.epochs) == (lr, 3)
        assert (
            training.batch_size == 4 * 4 * 4 and training.micro_batch_size == 4
        )  # batch 4 x accumulation 4 x 4 processes
        assert training.deepspeed["zero_optimization"]["stage"] == 2
    assert experiment.teach is not None and experiment.teach.facts == "old"
    assert experiment.lora.target_modules is None  # query and value
    assert "token" in experiment.evaluate.protocols


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_deepspeed_configs(stage: int) -> None:
    content = json.loads((CONFIGS / "deepspeed" / f"zero{stage}.json").read_text())
    assert content["zero_optimization"]["stage"] == stage
