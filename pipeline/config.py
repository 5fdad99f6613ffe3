"""What to run: an experiment's YAML, checked field by field, with `--set a.b=c` on top.

Paths in the YAML are relative to its folder, paths in `--set` to where you are. Fields marked PLACEMENT say
how or where to run, never what comes out: they enter no fingerprint.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.errors import InputError
from pipeline.methods import KINDS, METHODS, Kind
from pipeline.settings import (
    PLACEMENT,
    Section,
    Whole,
    check,
    local_path,
    merge,
    parse_overrides,
    read_json,
    read_yaml,
)
from pipeline.training_config import FullTraining, LoraTraining, Teach, read_training

Protocol = Literal["token", "probability", "generation"]


def _known_method(name: str) -> str:
    if name in METHODS:
        return name
    near = difflib.get_close_matches(name, METHODS, n=1)
    raise ValueError(
        f"no such method; did you mean {near[0]}?"
        if near
        else f"no such method; there are {', '.join(METHODS)}"
    )


Method = Annotated[str, AfterValidator(_known_method)]
"""The name of a row of METHODS."""


class TinyModel(Section):
    """A randomly initialised model, with a tokenizer made of the facts' text."""

    architecture: Literal["llama", "gpt2", "bloom"] = "llama"
    hidden_size: int = Field(128, gt=0)
    num_layers: int = Field(4, gt=0)
    num_heads: int = Field(4, gt=0)
    vocab_size: int = Field(2048, ge=300)
    """Upper bound for the byte-level BPE tokenizer."""


class Model(Section):
    """The base model: exactly one of `path` and `tiny`."""

    path: str | None = Field(None, json_schema_extra=PLACEMENT)
    """A model folder (its content enters the fingerprint), a hub id such as `meta-llama/Llama-2-7b-hf`, or
    the name of a model that `flearn models fetch` fetched.
    """
    revision: str | None = None
    """The hub revision (branch, tag or commit) of `path`."""
    tiny: TinyModel | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Model:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("give exactly one of model.path and model.tiny")
        return self


class Facts(Section):
    """The facts to forget and to learn."""

    path: str | list[str] = Field(json_schema_extra=PLACEMENT)
    """A file (its content enters the fingerprint), a hub data set id, or [old, new] for two Alpaca files."""
    format: Literal[
        "auto", "flearn", "zsre", "counterfact", "rome", "knowedit", "mquake", "qaedit", "alpaca"
    ] = "auto"
    old_answer: Literal["pred", "answers"] = "pred"
    """ZsRE only: which field is the old answer (the paper takes `pred`, EasyEdit `answers[0]`)."""
    limit: int | None = Field(None, gt=0)
    """Keep the first `limit` facts that survive filtering."""
    conflicts: Literal["drop", "keep_first", "error"] = "drop"
    """What to do with facts that contradict each other."""


class Prompt(Section):
    """How a question becomes the model's input, the same in training and in evaluation."""

    template: str = "plain"
    """`plain`, `alpaca`, `chat` (the tokenizer's own), or your own text with `{prompt}` in it."""
    add_bos: bool | None = None
    """Whether a BOS token opens the input; None: as the tokenizer does by itself."""


class Forget(Section):
    """theta' = theta - scale * (theta_tuned - theta)."""

    scale: float | dict[Method, float] = 0.3
    """The paper's lambda: one number, or one per method."""
    dtype: Literal["float32", "bfloat16", "float16", "same"] = "float32"
    """What theta' is stored in; `same`: as the base is. 16 bits round a small subtraction away."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To 16 bits. Stochastic keeps a small change on average, at the price of noise."""
    max_shard_size: str = Field("2GB", json_schema_extra=PLACEMENT)

    @field_validator("scale", mode="before")
    @classmethod
    def _number_or_numbers(cls, scale: Any) -> Any:
        values = scale.values() if isinstance(scale, dict) else [scale]
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
            raise ValueError("expected a number, or one for each F-Learning method")
        return scale


class Evaluate(Section):
    """Which scores to take, on every state of the model."""

    protocols: list[Protocol] = Field(["token", "probability", "generation"], min_length=1)
    batch_size: int = Field(32, gt=0, json_schema_extra=PLACEMENT)
    max_new_tokens: int = Field(24, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 halves the memory, but rounds a small subtraction away: forgotten then scores like original."""


class Cluster(Section):
    """Where to run."""

    ranks: int = Field(1, gt=0)
    """Processes of a fine-tuning (one GPU each, where there are any)."""
    nodes: int = Field(1, gt=0)
    """Machines that a scheduler spreads the ranks over, evenly."""
    forget_parts: int = Field(1, gt=0)
    """Workers that a scheduler lets share one subtraction."""
    site: str | None = None
    """What is particular to a SLURM cluster: one of the files of slurm/sites/, or your own."""
    runs_dir: str = "runs"
    """Folder that holds every run's folder; relative to where you are."""

    @model_validator(mode="after")
    def _evenly(self) -> Cluster:
        if self.ranks % self.nodes:
            raise ValueError(f"{self.ranks} ranks cannot be spread evenly over {self.nodes} nodes")
        return self


class Experiment(Section):
    """One experiment: a base model, facts, and the methods to compare on them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seeds: list[int] = Field([0], min_length=1)
    """What leaves anything to chance is run once with each. `seed: N` is the same as `seeds: [N]`."""
    methods: list[Method] = Field(min_length=1)
    """Which methods to compare; each once."""
    model: Model
    facts: Facts
    prompt: Prompt = Prompt()
    teach: Teach | None = None
    """None: the base model is taken as it is for the original model."""
    full: FullTraining = FullTraining()
    """Full-parameter fine-tuning, on the old and on the new facts."""
    lora: LoraTraining = LoraTraining()
    forget: Forget = Forget()
    evaluate: Evaluate = Evaluate()
    cluster: Cluster = Cluster()

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "seed" not in values:
            return values
        if "seeds" in values:
            raise ValueError("give either seed or seeds, not both")
        return {name: value for name, value in values.items() if name != "seed"} | {"seeds": [values["seed"]]}

    @field_validator("methods", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any], info: ValidationInfo) -> list[Any]:
        if len(set(values)) < len(values):
            raise ValueError(f"each {str(info.field_name).removesuffix('s')} may be named once")
        return values

    @property
    def run_dir(self) -> Path:
        """The folder that holds everything this experiment makes."""
        return Path(self.cluster.runs_dir).expanduser().absolute() / self.name

    def training_for(self, kind: Kind, settings: dict[str, Any] | None = None) -> FullTraining | LoraTraining:
        """The section of that kind, with a method's own `settings` in place of the section's."""
        section: FullTraining | LoraTraining = getattr(self, kind)
        return read_training(section.model_dump() | (settings or {}))

    def scale_for(self, method: str) -> float:
        """The scale of the subtraction for `method`. Raises InputError if the config has none."""
        if not isinstance(self.forget.scale, dict):
            return self.forget.scale
        if method not in self.forget.scale:
            raise InputError(
                f"forget.scale: no value for {method}; give one number, or one for each F-Learning method"
            )
        return self.forget.scale[method]


def _check_methods() -> None:
    """Raises ValueError for a row of METHODS with settings that its section does not have."""
    assert set(KINDS) <= Experiment.model_fields.keys(), f"a section is missing for one of {KINDS}"
    for name, method in METHODS.items():
        try:
            read_training({"kind": method.learn} | method.settings)
        except ValidationError as error:
            raise ValueError(f"METHODS: {name}: {error}") from None


_check_methods()


def load(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Read and check the experiment at `path`, with `KEY=VALUE` overrides applied.

    Raises InputError naming the file and the field, with the nearest right name for an unknown key.
    """
    values = read_yaml(path)
    _resolve_paths(values, path.absolute().parent)
    changed = parse_overrides(overrides or [])
    _resolve_paths(changed, Path.cwd())
    if changed.keys() & {"seed", "seeds"}:  # either replaces what the file says of either
        values = {name: value for name, value in values.items() if name not in ("seed", "seeds")}
    merge(values, changed)
    return check(Experiment, values, path)


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make local paths absolute, and replace the path of a DeepSpeed JSON by its content."""
    for name in ("teach", *KINDS):
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get("deepspeed"), str):
            section["deepspeed"] = Whole(read_json(folder / section["deepspeed"], f"{name}.deepspeed"))
    facts = values.get("facts")
    if isinstance(facts, dict) and isinstance(facts.get("path"), (str, list)):
        path = facts["path"]
        facts["path"] = (
            [local_path(p, folder) for p in path] if isinstance(path, list) else local_path(path, folder)
        )
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = local_path(model["path"], folder)
    cluster = values.get("cluster")
    if isinstance(cluster, dict) and isinstance(cluster.get("site"), str):
        cluster["site"] = os.path.normpath(folder / cluster["site"])
