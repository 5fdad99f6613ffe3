"""From an experiment to its plan: steps over artifacts, each a stage with its settings and its inputs.

A step's folder is `<stage>-<fingerprint>`. The fingerprint covers the stage, its version, its own settings
and its inputs' fingerprints: methods that share a step share its folder, and a new lambda re-uses the old
fine-tuning. Planning reads no weights and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import artifact
from pipeline.artifact import Artifact
from pipeline.config import Experiment, Training
from pipeline.errors import InputError
from pipeline.methods import METHODS, Kind
from pipeline.models.packaged import resolve
from pipeline.settings import Section
from pipeline.stages import STAGES
from pipeline.train import target_modules
from pipeline.train.batches import Shape
from pipeline.train.deepspeed_config import make_ready
from pipeline.weights.digest import content_digest


@dataclass(frozen=True)
class Step:
    """One run of a stage: its settings, and the steps whose artifacts it reads."""

    stage: str
    section: dict[str, Any]
    inputs: dict[str, Step]
    fingerprint: str
    methods: list[str] = field(default_factory=list, compare=False)
    """The methods that need this step; all of them for shared ones."""

    @property
    def id(self) -> str:
        return f"{self.stage}-{self.fingerprint}"


@dataclass
class Plan:
    """An experiment's steps in an order that respects their inputs."""

    run_dir: Path
    steps: dict[str, Step] = field(default_factory=dict)

    def add(
        self,
        stage: str,
        sections: dict[str, Any],
        inputs: dict[str, Step],
        method: str | None = None,
        **recipe: Any,
    ) -> Step:
        """Add a step, or find it if another method already asked for it.

        `sections` holds config sections and plain values, all handed to the stage; `recipe` holds further
        values that enter the fingerprint only (the digest of a file that a section names by path).
        """
        section = {
            name: s.model_dump(mode="json") if isinstance(s, Section) else s for name, s in sections.items()
        }
        identity = {
            name: s.recipe() if isinstance(s, Section) else s for name, s in sections.items()
        } | recipe
        digest = artifact.fingerprint(
            stage, STAGES[stage].version, identity, {role: step.fingerprint for role, step in inputs.items()}
        )
        step = self.steps.setdefault(f"{stage}-{digest}", Step(stage, section, inputs, digest))
        if method is not None and method not in step.methods:
            step.methods.append(method)
        return step

    def artifact(self, step: Step) -> Artifact:
        return Artifact(self.run_dir / step.id)

    @property
    def facts(self) -> Step:
        """The first step, whose facts all others are about."""
        return next(iter(self.steps.values()))

    @property
    def report(self) -> Step:
        """The last step, which reads all others."""
        return next(reversed(self.steps.values()))

    def pending(self) -> Iterator[Step]:
        """The steps not yet complete, in order."""
        return (step for step in self.steps.values() if not self.artifact(step).is_complete)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON object, for the processes that run it and for `flearn status`."""
        steps = [
            {
                "id": step.id,
                "stage": step.stage,
                "section": step.section,
                "inputs": {role: source.id for role, source in step.inputs.items()},
                "methods": step.methods,
            }
            for step in self.steps.values()
        ]
        return {"run_dir": str(self.run_dir), "steps": steps}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        plan = cls(Path(value["run_dir"]))
        for row in value["steps"]:
            inputs = {role: plan.steps[source] for role, source in row["inputs"].items()}
            digest = row["id"].rpartition("-")[2]
            plan.steps[row["id"]] = Step(row["stage"], row["section"], inputs, digest, row["methods"])
        return plan


def make_plan(experiment: Experiment) -> Plan:
    """All steps of `experiment`. Raises InputError for a missing facts file or model folder, or a DeepSpeed
    config or LoRA modules that no fine-tuning could use: better now than after the hours of the fine-tuning
    before it.
    """
    _check_deepspeed(experiment)
    _check_target_modules(experiment)
    result = Plan(experiment.run_dir)
    facts = _add_facts(result, experiment)
    original = _add_original(result, experiment, facts)
    evaluations = {"original": _add_evaluation(result, experiment, facts, original, None, None)}
    states = [
        _add_method(result, experiment, method, facts, original, evaluations["original"])
        for method in experiment.methods
    ]
    _add_report(result, experiment, facts, evaluations["original"], states)
    return result


def _check_deepspeed(experiment: Experiment) -> None:
    kinds = set[Kind]().union(*(METHODS[method].kinds for method in experiment.methods))
    sections: dict[str, Training | None] = {
        "teach": experiment.teach,
        **{kind: getattr(experiment, kind) for kind in sorted(kinds)},
    }
    for name, training in sections.items():
        if training is None:
            continue
        try:
            make_ready(
                training,
                Shape.of(training.batch_size, training.micro_batch_size, experiment.cluster.ranks),
                hidden_size=1,
            )
        except InputError as error:
            raise InputError(f"{name}.{error}") from None


def _check_target_modules(experiment: Experiment) -> None:
    """As far as the model is a folder that is already here: its stage looks at any other."""
    uses_lora = any("lora" in METHODS[method].kinds for method in experiment.methods)
    if uses_lora and experiment.lora.target_modules is not None and experiment.model.path is not None:
        folder = Path(resolve(experiment.model.path))
        if (folder / "config.json").is_file():
            target_modules.require(folder, experiment.lora)


def _add_facts(plan: Plan, experiment: Experiment) -> Step:
    needs_old = experiment.teach is not None or any(METHODS[m].subtract for m in experiment.methods)
    paths = experiment.facts.path if isinstance(experiment.facts.path, list) else [experiment.facts.path]
    contents = [_digest(path, "facts.path") for path in paths]
    return plan.add(
        "facts", {"facts": experiment.facts, "needs_old_answer": needs_old}, {}, contents=contents
    )


def _digest(path: str, field_name: str) -> str:
    """A local file's content; a hub id stands for itself."""
    local = Path(path)
    if local.exists():
        return content_digest(local)
    if local.is_absolute():
        raise InputError(f"{field_name}: no such file or folder: {path}")
    if path.count("/") != 1:
        raise InputError(f"{field_name}: {path} is neither a file or folder here nor a hub id (owner/name)")
    return path


def _add_original(plan: Plan, experiment: Experiment, facts: Step) -> Step:
    """The model that every method starts from: the base model, taught the old facts if the experiment says
    so.
    """
    if experiment.model.tiny is not None:
        # The tiny model's tokenizer is trained on the facts.
        base = plan.add("model", {"model": experiment.model, "seed": experiment.seed}, {"facts": facts})
    else:
        assert experiment.model.path is not None
        path = resolve(experiment.model.path)
        content = _digest(path, "model.path")
        base = plan.add(
            "model",
            {"model": experiment.model.model_copy(update={"path": path}), "seed": 0},
            {},
            content=content,
        )
    if experiment.teach is None:
        return base
    sections = {
        "training": experiment.teach.training,
        "prompt": experiment.prompt,
        "target": experiment.teach.facts,
        "keeps_checkpoint": False,
        "seed": experiment.seed,
    }
    return plan.add("teach", sections, {"model": base, "facts": facts})


class States(NamedTuple):
    """A method's models and their evaluations, as step ids by state."""

    method: str
    scale: float | None
    evaluations: dict[str, Step]
    forget: Step | None


def _add_method(
    plan: Plan, experiment: Experiment, method: str, facts: Step, original: Step, reference: Step
) -> States:
    recipe = METHODS[method]
    start, forget, scale = original, None, None
    evaluations = {"original": reference}
    if recipe.subtract is not None:
        scale = experiment.scale_for(method)
        tuned = _add_tuning(
            plan, experiment, "tune_old", experiment.training_for(recipe.subtract), original, facts, method
        )
        sections = {"forget": experiment.forget.model_copy(update={"scale": scale}), "seed": experiment.seed}
        forget = start = plan.add("forget", sections, {"base": original, "tuned": tuned}, method)
        evaluations["tuned"] = _add_evaluation(plan, experiment, facts, tuned, reference, method)
        evaluations["forgotten"] = _add_evaluation(plan, experiment, facts, forget, reference, method)
    learning = experiment.training_for(recipe.learn, recipe.settings)
    updated = _add_tuning(plan, experiment, "learn", learning, start, facts, method)
    evaluations["updated"] = _add_evaluation(plan, experiment, facts, updated, reference, method)
    return States(method, scale, evaluations, forget)


def _add_tuning(
    plan: Plan, experiment: Experiment, stage: str, training: Training, model: Step, facts: Step, method: str
) -> Step:
    is_old = stage == "tune_old"
    sections = {
        "training": training,
        "prompt": experiment.prompt,
        "target": "old" if is_old else "new",
        "keeps_checkpoint": is_old and training.kind == "full",
        "seed": experiment.seed,
    }
    return plan.add(stage, sections, {"model": model, "facts": facts}, method)


def _add_evaluation(
    plan: Plan, experiment: Experiment, facts: Step, model: Step, reference: Step | None, method: str | None
) -> Step:
    """Scores of one model. `reference` is the original model's evaluation, which locality is measured
    against.
    """
    inputs = {"model": model, "facts": facts} | ({"reference": reference} if reference is not None else {})
    return plan.add(
        "evaluate", {"evaluate": experiment.evaluate, "prompt": experiment.prompt}, inputs, method
    )


def _add_report(
    plan: Plan, experiment: Experiment, facts: Step, reference: Step, methods: list[States]
) -> Step:
    """The report reads all evaluations, and the manifests of all other steps (for their times and
    survival).
    """
    described = [
        {
            "method": states.method,
            "scale": states.scale,
            "evaluations": {state: step.id for state, step in states.evaluations.items()},
            "forget": states.forget.id if states.forget is not None else None,
        }
        for states in methods
    ]
    inputs = {step.id: step for step in plan.steps.values()}
    return plan.add(
        "report", {"name": experiment.name, "seed": experiment.seed, "methods": described}, inputs
    )
