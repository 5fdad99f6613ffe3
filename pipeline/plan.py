"""From an experiment to its plan: steps over artifacts, each a stage with its settings and its inputs.

A step's folder is `<stage>-<fingerprint>`. The fingerprint covers the stage, its version, its own settings
and its inputs' fingerprints: methods that share a step share its folder, and a new lambda re-uses the old
fine-tuning. Planning reads no weights and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.artifact import Artifact
from pipeline.config import Experiment
from pipeline.errors import InputError
from pipeline.methods import METHODS
from pipeline.models.packaged import resolve
from pipeline.settings import Section
from pipeline.stages import STAGES
from pipeline.train import target_modules
from pipeline.train.deepspeed_config import make_ready
from pipeline.training_config import Training
from pipeline.weights.digest import content_digest


@dataclass(frozen=True)
class Step:
    """One run of a stage: its settings, and the steps (or artifacts of other runs) that it reads."""

    stage: str
    section: dict[str, Any]
    inputs: Mapping[str, Step | Existing]
    fingerprint: str
    methods: list[str] = field(default_factory=list, compare=False)
    """The methods that need this step; none for what all share."""
    seeds: list[int] = field(default_factory=list, compare=False)
    """The seeds that need this step; none for what all share, and where there is only one."""

    @property
    def id(self) -> str:
        return f"{self.stage}-{self.fingerprint}"

    @property
    def users(self) -> str:
        """For whom the step is, in words."""
        seeds = f"; seed {', '.join(map(str, self.seeds))}" if self.seeds else ""
        return (", ".join(self.methods) or "all methods") + seeds


@dataclass(frozen=True)
class Existing:
    """A finished artifact of another run, as a step's input. It is known by its absolute path."""

    folder: Path

    def __post_init__(self) -> None:
        assert self.folder.is_absolute(), self.folder

    @property
    def id(self) -> str:
        return str(self.folder)

    @property
    def inputs(self) -> Mapping[str, Step | Existing]:
        """None: it is finished, so nothing has to be run before it."""
        return {}

    @property
    def fingerprint(self) -> str:
        """Its own. Raises InputError if it is not finished, or was made by another flearn."""
        fingerprint = Artifact(self.folder).manifest.get("fingerprint")
        if not isinstance(fingerprint, str):
            raise InputError(f"{self.folder}: was made by another flearn; make it again")
        return fingerprint


@dataclass
class Plan:
    """An experiment's steps in an order that respects their inputs."""

    run_dir: Path
    steps: dict[str, Step] = field(default_factory=dict)

    def add(
        self,
        stage: str,
        sections: dict[str, Any],
        inputs: Mapping[str, Step | Existing],
        method: str | None = None,
        seed: int | None = None,
        contents: Sequence[str] = (),
    ) -> Step:
        """Add a step for `method` and `seed` (None: for all), or find it if another asked for it before.

        `sections` holds config sections and plain values, all handed to the stage. `contents` are digests of
        the files that they name by path: they enter the fingerprint in place of the paths.
        """
        section: dict[str, Any] = {}
        recipe: dict[str, Any] = {"contents": list(contents)}
        for name, value in sections.items():
            is_section = isinstance(value, Section)
            section[name] = value.model_dump(mode="json") if is_section else value
            recipe[name] = value.recipe() if is_section else value
        sources = {role: source.fingerprint for role, source in inputs.items()}
        digest = artifact.fingerprint(stage, STAGES[stage].version, recipe, sources)
        step = self.steps.setdefault(f"{stage}-{digest}", Step(stage, section, inputs, digest))
        if method is not None and method not in step.methods:
            step.methods.append(method)
        if seed is not None and seed not in step.seeds:
            step.seeds.append(seed)
        return step

    def artifact(self, source: Step | Existing) -> Artifact:
        """Where the step's result lies, or will; an absolute id stands for itself."""
        return Artifact(self.run_dir / source.id)

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
        steps = []
        for step in self.steps.values():
            inputs = {role: source.id for role, source in step.inputs.items()}
            row = {"id": step.id, "stage": step.stage, "section": step.section, "inputs": inputs}
            steps.append(row | {"methods": step.methods, "seeds": step.seeds})
        return {"run_dir": str(self.run_dir), "steps": steps}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The inverse of `to_json`."""
        plan = cls(Path(value["run_dir"]))
        for row in value["steps"]:
            inputs = {role: plan.steps.get(id) or Existing(Path(id)) for role, id in row["inputs"].items()}
            digest = row["id"].rpartition("-")[2]
            seeds = row.get(
                "seeds", []
            )  # an earlier flearn planned one seed; `flearn status` reads its plans
            plan.steps[row["id"]] = Step(row["stage"], row["section"], inputs, digest, row["methods"], seeds)
        return plan


def make_plan(experiment: Experiment) -> Plan:
    """All steps of `experiment`.

    Raises InputError for a missing facts file or model folder, or a DeepSpeed config or LoRA modules that no
    fine-tuning could use: better now than after the hours of the fine-tuning before it.
    """
    _check_deepspeed(experiment)
    _check_target_modules(experiment)
    plan = Plan(experiment.run_dir)
    facts = _add_facts(plan, experiment)
    updates: list[dict[str, Any]] = []
    for seed in experiment.seeds:
        updates += _OneSeed(plan, experiment, facts, seed).add()
    # The report reads the evaluations, and the manifests of all other steps for their times and survival.
    sections = {"name": experiment.name, "seeds": experiment.seeds, "facts": facts.id, "updates": updates}
    plan.add("report", sections, dict(plan.steps))
    return plan


def _check_deepspeed(experiment: Experiment) -> None:
    sections: dict[str, Training] = {} if experiment.teach is None else {"teach": experiment.teach}
    for kind in sorted(set().union(*(METHODS[method].kinds for method in experiment.methods))):
        sections[kind] = experiment.training_for(kind)
    for name, training in sections.items():
        try:
            make_ready(training, experiment.cluster.ranks, hidden_size=1)
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
    sections = {"facts": experiment.facts, "needs_old_answer": needs_old}
    return plan.add("facts", sections, {}, contents=contents)


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


class _OneSeed:
    """The steps that one seed adds: a model that is not made by chance is shared with the other seeds."""

    def __init__(self, plan: Plan, experiment: Experiment, facts: Step, seed: int) -> None:
        self._plan = plan
        self._experiment = experiment
        self._facts = facts
        self._seed = seed
        self._named_seed = seed if len(experiment.seeds) > 1 else None

    def add(self) -> list[dict[str, Any]]:
        """Add all steps; for each method, what the report has to know of it."""
        original = self._original()
        reference = self._evaluation(original, None, None)
        return [self._method(method, original, reference) for method in self._experiment.methods]

    def _original(self) -> Step:
        """The model that every method starts from: the base model, taught the old facts if the experiment
        says so.
        """
        base, teach = self._base(), self._experiment.teach
        if teach is None:
            return base
        sections = self._training_sections(teach.training, teach.facts, keeps_checkpoint=False)
        inputs = {"model": base, "facts": self._facts}
        return self._plan.add("teach", sections, inputs, seed=self._named_seed)

    def _base(self) -> Step:
        model = self._experiment.model
        if model.tiny is not None:  # random weights, and a tokenizer that is trained on the facts
            sections = {"model": model, "seed": self._seed}
            return self._plan.add("model", sections, {"facts": self._facts}, seed=self._named_seed)
        assert model.path is not None
        path = resolve(model.path)
        sections = {"model": model.model_copy(update={"path": path}), "seed": 0}
        return self._plan.add("model", sections, {}, contents=[_digest(path, "model.path")])

    def _method(self, name: str, original: Step, reference: Step) -> dict[str, Any]:
        method, experiment = METHODS[name], self._experiment
        scale, forget, start = None, None, original
        evaluations = {"original": reference}
        if method.subtract is not None:
            scale = experiment.scale_for(name)
            tuned = self._tuning("tune_old", "old", experiment.training_for(method.subtract), original, name)
            settings = experiment.forget.model_copy(update={"scale": scale})
            forget = start = self._plan.add(
                "forget",
                {"forget": settings, "seed": self._seed},
                {"base": original, "tuned": tuned},
                name,
                self._named_seed,
            )
            evaluations["tuned"] = self._evaluation(tuned, reference, name)
            evaluations["forgotten"] = self._evaluation(forget, reference, name)
        learning = experiment.training_for(method.learn, method.settings)
        updated = self._tuning("learn", "new", learning, start, name)
        evaluations["updated"] = self._evaluation(updated, reference, name)
        return {
            "method": name,
            "seed": self._seed,
            "scale": scale,
            "evaluations": {state: step.id for state, step in evaluations.items()},
            "subtraction": forget.id if forget is not None else None,
        }

    def _tuning(self, stage: str, target: str, training: Training, model: Step, method: str) -> Step:
        # What is subtracted is read from the ZeRO partitions in place: no consolidated copy is made.
        keeps_checkpoint = target == "old" and training.kind == "full"
        sections = self._training_sections(training, target, keeps_checkpoint)
        inputs = {"model": model, "facts": self._facts}
        return self._plan.add(stage, sections, inputs, method, self._named_seed)

    def _training_sections(self, training: Training, target: str, keeps_checkpoint: bool) -> dict[str, Any]:
        return {
            "training": training,
            "prompt": self._experiment.prompt,
            "target": target,
            "keeps_checkpoint": keeps_checkpoint,
            "seed": self._seed,
        }

    def _evaluation(self, model: Step, reference: Step | None, method: str | None) -> Step:
        """Scores of one model. `reference` is the original model's evaluation, which locality is measured
        against.
        """
        inputs = {"model": model, "facts": self._facts}
        if reference is not None:
            inputs["reference"] = reference
        sections = {"evaluate": self._experiment.evaluate, "prompt": self._experiment.prompt}
        return self._plan.add("evaluate", sections, inputs, method, self._named_seed)
