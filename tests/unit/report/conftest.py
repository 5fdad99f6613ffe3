"""A finished run as the other stages leave it: the real plan, with manifests and records of models that are
made up.

The numbers are the tests' input; nothing here was measured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import MANIFEST, Artifact
from pipeline.config import Experiment
from pipeline.evaluate.scores import METRICS, aggregate
from pipeline.facts.fact import Fact, Probe, write_facts
from pipeline.plan import Plan, Step, make_plan
from pipeline.report import svg
from pipeline.report.results import build

METHODS = ["full_ft", "lora", "flearn_ft", "flearn_lora", "flearn_lora_ft"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Mind:
    """Shares of the records: whose new answer, or old answer, a model gives, and whose unrelated answer is
    unchanged.
    """

    new: float
    old: float
    same: float = 1.0


MINDS = {
    ("original", None): Mind(0.0, 0.97),
    ("tuned", "full"): Mind(0.0, 0.99, 0.95),
    ("tuned", "lora"): Mind(0.0, 0.98, 0.97),
    ("forgotten", "flearn_ft"): Mind(0.02, 0.38, 0.82),
    ("forgotten", "flearn_lora"): Mind(0.0, 0.95, 0.96),
    ("forgotten", "flearn_lora_ft"): Mind(0.01, 0.60, 0.85),
    ("updated", "full_ft"): Mind(0.90, 0.05, 0.70),
    ("updated", "lora"): Mind(0.55, 0.30, 0.80),
    ("updated", "flearn_ft"): Mind(0.99, 0.005, 0.74),
    ("updated", "flearn_lora"): Mind(0.57, 0.28, 0.81),
    ("updated", "flearn_lora_ft"): Mind(0.96, 0.01, 0.73),
}


@dataclass
class FakeRun:
    """What a test may change before the run is written."""

    num_records: int = 128
    minds: dict[tuple[str, str | None], Mind] = field(default_factory=lambda: dict(MINDS))
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    protocols: list[str] = field(default_factory=lambda: ["token", "probability", "generation"])
    survival: Json = field(
        default_factory=lambda: {"share_changed": 0.93, "projection": 1.0, "cosine": 1.0, "norm_ratio": 1.0}
    )
    generality: float = 0.9
    """Share of the new answers that are given to rephrased questions too."""
    token_bonus: float = 0.0
    """Added to the new answer's token accuracy alone."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """By stage: what its steps warn of."""
    seeds: list[int] = field(default_factory=lambda: [3])
    prompt: str = "Who is the mayor of town {i}?"
    answer: str = "{text}"

    def write(self, folder: Path) -> tuple[Json, dict[str, Artifact]]:
        """The report step's section and inputs, as `pipeline.run_step` hands them over."""
        folder.mkdir(parents=True, exist_ok=True)
        write_facts(folder / "source.jsonl", self.facts())
        steps = self._plan(folder)
        self._originals: dict[str, dict[str, Json]] = {}
        inputs: dict[str, Artifact] = {}
        for step in steps.steps.values():
            if step.stage == "report":
                return step.section, inputs
            artifact = steps.artifact(step)
            artifact.folder.mkdir(parents=True)
            manifest = self._manifest(step, self._facts_of(step, artifact.folder))
            (artifact.folder / MANIFEST).write_text(
                json.dumps(manifest)
            )  # not `commit`, which waits for the disk each time
            inputs[step.id] = artifact
        raise AssertionError("a plan ends with its report")

    def facts(self) -> list[Fact]:
        return [
            Fact(
                f"town-{i}",
                self.prompt.format(i=i),
                f"town {i}",
                [f"Old Mayor {i}"],
                f"New Mayor {i}",
                [f"Name the mayor of town {i}."],
                [Probe(f"Which river runs through town {i}?", [f"River {i}"], "neighbour")],
            )
            for i in range(self.num_records)
        ]

    def _plan(self, folder: Path) -> Plan:
        return make_plan(
            Experiment.model_validate(
                {
                    "name": "towns",
                    "seeds": self.seeds,
                    "methods": self.methods,
                    "model": {"tiny": {}},
                    "facts": {"path": str(folder / "source.jsonl")},
                    "teach": {"facts": "old_and_locality"},
                    "forget": {"scale": {"flearn_ft": 0.3, "flearn_lora": 0.7, "flearn_lora_ft": 2}},
                    "evaluate": {"protocols": self.protocols},
                    "cluster": {"ranks": 2, "runs_dir": str(folder / "runs")},
                }
            )
        )

    def _manifest(self, step: Step, facts: Json) -> Json:
        seconds = {
            "facts": 0.2,
            "model": 1.4,
            "teach": 62.0,
            "tune_old": 21.0,
            "forget": 0.9,
            "learn": 20.0,
            "evaluate": 6.5,
        }[step.stage]
        return {
            "stage": step.stage,
            "version": 1,
            "section": step.section,
            "inputs": {role: source.id for role, source in step.inputs.items()},
            "result": facts | {"warnings": self.warnings.get(step.stage, [])},
            "seconds": seconds + 0.1 * len(step.methods),
            "peak_memory_bytes": {"forget": 410 << 20, "evaluate": 640 << 20}.get(step.stage, 900 << 20),
            "finished": "2026-01-02T03:04:05+00:00",
            "peak_gpu_memory_bytes": None,
            "num_ranks": 2,
            "device": "cpu",
            "host": "here",
        }

    def _facts_of(self, step: Step, folder: Path) -> Json:
        if step.stage == "facts":
            return {
                "format": "flearn",
                "num_read": self.num_records,
                "num_facts": self.num_records,
                "dropped": {},
            }
        if step.stage == "forget":
            return {"survival": self.survival, "layers": [self._layer(i, step) for i in range(4)]}
        return self._evaluation(step, folder) if step.stage == "evaluate" else {}

    def _layer(self, layer: int, step: Step) -> Json:
        is_lora = step.methods[0] != "flearn_ft"
        mlp = 0.0 if is_lora else 1.9 + 0.2 * layer
        return {
            "layer": layer,
            "attention": self._figures(1.1 + 0.1 * layer, 40),
            "mlp": self._figures(mlp, 50),
            "other": self._figures(0.01, 16),
            "matrices": {"self_attn.q_proj": 0.5, "mlp.up_proj": mlp},
        }

    def _figures(self, delta_norm: float, base_norm: float) -> Json:
        survival = self.survival | (
            {}
            if delta_norm
            else {"share_changed": 0.0, "projection": None, "cosine": None, "norm_ratio": None}
        )
        return survival | {
            "delta_norm": delta_norm,
            "base_norm": base_norm,
            "relative_norm": delta_norm / base_norm,
        }

    def _evaluation(self, step: Step, folder: Path) -> Json:
        mind = self.minds[self._state(step)]
        rows = [self._record(i, fact, mind, step.seeds) for i, fact in enumerate(self.facts())]
        (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if "reference" not in step.inputs:
            self._originals[step.id] = {row["id"]: row for row in rows}
            for row in rows:
                for protocol in self.protocols:
                    row[protocol]["scores"]["locality"] = None
        original = self._originals[step.inputs.get("reference", step).id]
        known = [row for row in rows if original[row["id"]]["knows_old"]]
        unknown = [row for row in rows if not original[row["id"]]["knows_old"]]
        return {
            "protocols": aggregate(rows, self.protocols),
            "known": {
                "num_known": len(known),
                "num_records": len(rows),
                "protocols": aggregate(known, self.protocols),
            },
            "unknown": {"num_records": len(unknown), "protocols": aggregate(unknown, self.protocols)},
            "num_records": len(rows),
        }

    def _state(self, step: Step) -> tuple[str, str | None]:
        model = step.inputs["model"]
        assert isinstance(model, Step)
        if model.stage == "tune_old":
            return "tuned", model.section["training"]["kind"]
        state = {"forget": "forgotten", "learn": "updated"}.get(model.stage, "original")
        return state, step.methods[0] if state != "original" else None

    def _record(self, i: int, fact: Fact, mind: Mind, seeds: list[int]) -> Json:
        chance = random.Random(f"{i} {mind} {seeds or ''}".rstrip()).random()
        gives = "new" if chance < mind.new else "old" if chance < mind.new + mind.old else "other"
        text = {"new": fact.new_answer, "old": fact.old_answer, "other": f"Nobody {i}"}[gives]
        same = float(random.Random(f"{i} same").random() < mind.same)
        common: dict[str, Any] = {
            "reliability": float(gives == "new"),
            "generality": float(gives == "new" and i % 10 < 10 * self.generality),
            "locality": same,
            "portability": None,
            "leakage": float(gives == "old"),
            "old_reliability": float(gives == "old"),
        }
        scores = {name: dict.fromkeys(METRICS[name]) | common for name in self.protocols}
        if "token" in scores:
            scores["token"]["reliability"] = min(1.0, 0.4 + 0.6 * common["reliability"] + self.token_bonus)
            scores["token"]["old_reliability"] = 0.4 + 0.6 * common["old_reliability"]
        asked = {"prompt": fact.prompt, "old_answers": fact.old_answers, "new_answer": fact.new_answer}
        record: Json = {"id": fact.id, **asked, "knows_old": gives == "old"} | {
            name: {"scores": found} for name, found in scores.items()
        }
        if "generation" in record:
            record["generation"]["answer"] = self.answer.format(text=text)
        return record


WriteRun = Callable[..., tuple[Json, dict[str, Artifact]]]
MakeResults = Callable[..., Json]


@pytest.fixture(scope="session")
def write_run(tmp_path_factory: pytest.TempPathFactory) -> WriteRun:
    """`write_run(num_records=64, ...)`: FakeRun's fields; returns the report step's section and inputs.

    `minds={("updated", "lora"): (0.5, 0.3, 0.9)}` replaces single ones.
    """

    def write(
        minds: dict[tuple[str, str | None], tuple[float, ...]] | None = None, **changes: Any
    ) -> tuple[Json, dict[str, Artifact]]:
        changed = {state: Mind(*shares) for state, shares in (minds or {}).items()}
        return FakeRun(minds=MINDS | changed, **changes).write(tmp_path_factory.mktemp("run"))

    return write


@pytest.fixture(scope="session")
def make_results(write_run: WriteRun) -> MakeResults:
    """The results object of the run that `write_run` would write."""

    def make(**changes: Any) -> Json:
        section, inputs = write_run(**changes)
        return build(section, inputs)

    return make


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty: drawing them takes most of a page's time, and few tests look at them."""
    monkeypatch.setattr(svg, "_draw", lambda width, height, paint: "<svg></svg>")
