"""What each stage of an experiment still to be run will want of a machine, and whether it has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.doctor import estimate, remedy, storage
from launch.doctor.capacity import Capacity, state_of
from launch.doctor.estimate import Data, Shape
from launch.doctor.machine import Row
from launch.doctor.storage import size
from pipeline.config import Cluster, Evaluate, Experiment, Model
from pipeline.errors import InputError
from pipeline.models.packaged import resolve
from pipeline.plan import Plan, Step, make_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ESTIMATED = (*storage.TUNINGS, "forget", "evaluate")
_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TOKENS = {"plain": 1, "alpaca": 40}
_OTHER_TEMPLATE_TOKENS = 30


def rows(experiment: Experiment, capacity: Capacity) -> Iterator[Row]:
    """A finding for each kind of stage still to be run, one for the disk, and one for the time."""
    plan = make_plan(experiment)
    pending = list(plan.pending())
    if not pending:
        yield Row("experiment", "ok", f"{plan.run_dir}: all {len(plan.steps)} steps are done")
        return
    shape = shape_of(experiment.model)
    if isinstance(shape, str):
        yield Row(
            "estimates",
            "warn",
            f"none: {shape}",
            "fetch the model first, or give a local folder: --set model.path=...",
        )
        return
    data = read_data(plan, experiment)
    yield _experiment_row(experiment, shape, data)
    needs = [
        _need(experiment.cluster, step, shape, data, capacity) for step in pending if step.stage in _ESTIMATED
    ]
    yield from _merged(needs)
    yield storage.disk_row(pending, shape, data, capacity)
    yield _time_row(needs, capacity)


def shape_of(model: Model) -> Shape | str:
    """The model's shape from its config alone, or why that is not known. Reads the local hub cache, or the
    hub.

    Raises InputError for a config that no model can be made of.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from pipeline.models.check import unusable_config
    from pipeline.models.tiny import tiny_config

    if model.tiny is not None:
        config = tiny_config(model.tiny, model.tiny.vocab_size)
    else:
        assert model.path is not None
        try:
            config = AutoConfig.from_pretrained(resolve(model.path), revision=model.revision)
        except (OSError, ValueError) as error:
            return f"the config of {model.path} cannot be read here ({' '.join(str(error).split())[:120]})"
        except Exception as error:
            raise unusable_config(f"model.path: {model.path}", error) from None
    try:
        with no_init_weights(), torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise unusable_config(f"model.path: {model.path}", error) from None
    module.tie_weights()
    return _measured(module, config.get_text_config())


def _measured(module: Any, config: PretrainedConfig) -> Shape:
    return Shape(
        sum(p.numel() for p in module.parameters()),
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
    )


def read_data(plan: Plan, experiment: Experiment) -> Data:
    """Counts of the facts that will be trained on, from the facts stage if it is done, else from the file
    (before filtering).
    """
    from pipeline.facts.fact import read_facts
    from pipeline.facts.read import read

    done = [
        plan.artifact(step).folder
        for step in plan.steps.values()
        if step.stage == "facts" and plan.artifact(step).is_complete
    ]
    settings = experiment.facts
    facts = (
        list(read_facts(done[0] / "facts.jsonl"))
        if done
        else read(settings.path, settings.format, settings.old_answer).facts
    )
    facts = facts[: settings.limit]
    if not facts:
        raise InputError(f"facts.path: no facts in {settings.path}")
    characters = sum(len(fact.prompt) + len(fact.new_answer) for fact in facts) / len(facts)
    template = _TEMPLATE_TOKENS.get(experiment.prompt.template, _OTHER_TEMPLATE_TOKENS)
    locality = sum(len(fact.locality) for fact in facts) / len(facts)
    related = sum(1 + len(fact.rephrasings) + len(fact.portability) for fact in facts) / len(facts)
    return Data(
        len(facts), round(characters / _CHARACTERS_PER_TOKEN) + template + 2, locality, locality + related
    )


def _experiment_row(experiment: Experiment, shape: Shape, data: Data) -> Row:
    ranks = experiment.cluster.ranks
    detail = (
        f"{shape.num_parameters / 1e6:,.0f}M parameters; {data.num_facts} facts of about {data.record_tokens} tokens;"
        f" {ranks} rank{'s' if ranks > 1 else ''}. Estimates, right within a factor of two or so (formulas: launch/doctor/estimate.py)"
    )
    return Row("experiment", "ok", detail)


class Need(NamedTuple):
    """What one step wants."""

    step: Step
    memory_bytes: int
    """Of one rank."""
    limit: int
    """What it may use."""
    whose: str
    """Whose memory that is, with its amount."""
    seconds: float
    """Of computing."""
    detail: str
    advice: str
    """What to change if the memory does not suffice."""


def _need(cluster: Cluster, step: Step, shape: Shape, data: Data, capacity: Capacity) -> Need:
    if step.stage == "forget":
        whose = f"of the {size(capacity.host_bytes)} that are free on the host"
        return Need(
            step,
            estimate.PROCESS_BYTES,
            capacity.host_bytes,
            whose,
            0,
            "at most, however large the model is",
            "",
        )
    if step.stage == "evaluate":
        return _evaluation(cluster, step, shape, data, capacity)
    return _training(cluster, step, shape, data, capacity)


def _training(cluster: Cluster, step: Step, shape: Shape, data: Data, capacity: Capacity) -> Need:
    training, limit = estimate.training_of(step), capacity.limit(cluster)
    memory = estimate.training_memory(shape, training, cluster.ranks, data.record_tokens)
    tokens = estimate.num_records(step, data) * data.record_tokens
    seconds = estimate.training_flops(shape, training, tokens) / capacity.rate(
        training.precision, cluster.ranks
    )
    detail = ", ".join(f"{name} {size(value)}" for name, value in memory._asdict().items())
    advice = remedy.training_remedy(step, shape, training, cluster, data, capacity)
    return Need(step, memory.total, limit, f"a rank of {size(limit)}", seconds, detail, advice)


def _evaluation(cluster: Cluster, step: Step, shape: Shape, data: Data, capacity: Capacity) -> Need:
    settings, limit = Evaluate.model_validate(step.section["evaluate"]), capacity.limit(cluster)
    weights, working = estimate.evaluation_memory(shape, settings, data.record_tokens)
    seen = (
        data.num_facts
        * data.questions
        * (data.record_tokens * len(settings.protocols) + settings.max_new_tokens)
    )
    seconds = (
        2.0
        * shape.num_parameters
        * seen
        / capacity.rate(settings.precision, 1 if capacity.on_cluster else cluster.ranks)
    )
    advice = remedy.evaluation_remedy(shape, settings, cluster, data, capacity)
    detail = f"weights {size(weights)}, working {size(working)}"
    return Need(step, weights + working, limit, f"a rank of {size(limit)}", seconds, detail, advice)


def _merged(needs: list[Need]) -> Iterator[Row]:
    """One row for all steps of a stage that want the same."""
    groups: dict[tuple[Any, ...], list[Need]] = {}
    for need in needs:
        groups.setdefault((need.step.stage, need.memory_bytes, need.seconds), []).append(need)
    for group in groups.values():
        need = group[0]
        methods = dict.fromkeys(method for one in group for method in one.step.methods)
        name = f"{len(group)} x {need.step.stage}" if len(group) > 1 else need.step.stage
        time = (
            f"; computes for about {duration(need.seconds)}{' each' if len(group) > 1 else ''}"
            if need.seconds
            else ""
        )
        state = state_of(need.memory_bytes, need.limit)
        detail = f"{size(need.memory_bytes)} {need.whose} ({need.detail}){time}"
        yield Row(
            f"{name} ({', '.join(methods)})" if methods else name,
            state,
            detail,
            need.advice if state != "ok" else "",
        )


def _time_row(needs: list[Need], capacity: Capacity) -> Row:
    if capacity.flops is None:
        return Row("time for this run", "ok", "not estimated: the speed of GPUs that are not here is unknown")
    seconds = sum(need.seconds for need in needs)
    detail = f"computes for about {duration(seconds)}, one step after another; to that come the start of each step, and what it writes"
    return Row("time for this run", "ok", detail)


def duration(seconds: float) -> str:
    """A rough time, in the largest unit that fits."""
    for unit_seconds, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit_seconds:
            return f"{seconds / unit_seconds:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
