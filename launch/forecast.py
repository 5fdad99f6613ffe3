"""What each stage of an experiment still to be run will want of a machine, and whether it has it."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from launch import estimate
from launch.estimate import Shape
from launch.machine import Row, State
from pipeline import stages
from pipeline.config import Evaluate, Experiment, LoraTraining, Model, Teach, Training
from pipeline.errors import InputError
from pipeline.models.packaged import resolve
from pipeline.stages import Plan, Step

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ESTIMATED = (*stages.TUNINGS, "forget", "evaluate")
_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TOKENS = {"plain": 1, "alpaca": 40}
_OTHER_TEMPLATE_TOKENS = 30
_EFFICIENCY = 0.4
"""Share of a plain matrix product's speed that training reaches."""
_TIGHT = 0.85
_RANKS_TRIED = (2, 4, 8, 16, 32, 64)


class Capacity(NamedTuple):
    """What a machine has. `device_bytes` is one GPU's memory, or None where the ranks share the host's."""

    device_bytes: int | None
    host_bytes: int
    disk_bytes: int
    flops: float | None
    """Floating-point operations a second of one rank's device, in a large matrix product; None: not measured."""


class Data(NamedTuple):
    """How much text there is: facts, and the average tokens of a question with its answer."""

    num_facts: int
    record_tokens: int
    locality: float
    """Unrelated questions per fact."""
    questions: float
    """All questions that an evaluation asks about a fact."""


def rows(experiment: Experiment, capacity: Capacity) -> Iterator[Row]:
    """A finding for each kind of stage still to be run, one for the disk, and one for the time."""
    plan = stages.plan(experiment)
    pending = list(plan.pending())
    if not pending:
        yield Row("experiment", "ok", f"{plan.run_dir}: all {len(plan.steps)} steps are done")
        return
    shape = shape_of(experiment.model)
    if isinstance(shape, str):
        yield Row("estimates", "warn", f"none: {shape}", "fetch the model first, or give a local folder: --set model.path=...")
        return
    data = read_data(plan, experiment)
    yield _experiment_row(experiment, shape, data)
    needs = [_need(experiment, step, shape, data, capacity) for step in pending if step.stage in _ESTIMATED]
    yield from _merged(needs, capacity, experiment)
    yield disk_row(pending, shape, data, capacity.disk_bytes)
    if capacity.flops is not None:
        yield Row("time for this run", "ok", f"about {duration(sum(need.seconds for need in needs))}, and the start of each stage")


def shape_of(model: Model) -> Shape | str:
    """The model's shape from its config alone, or why that is not known. Reads the local hub cache, or the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from pipeline.models.tiny import tiny_config

    if model.tiny is not None:
        config = tiny_config(model.tiny, model.tiny.vocab_size)
    else:
        assert model.path is not None
        try:
            config = AutoConfig.from_pretrained(resolve(model.path), revision=model.revision)
        except (OSError, ValueError) as error:
            return f"the config of {model.path} cannot be read here ({' '.join(str(error).split())[:120]})"
    with no_init_weights(), torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    module.tie_weights()
    return _measured(module, config)


def _measured(module: Any, config: PretrainedConfig) -> Shape:
    return Shape(sum(p.numel() for p in module.parameters()), config.num_hidden_layers, config.hidden_size, config.vocab_size)


def read_data(plan: Plan, experiment: Experiment) -> Data:
    """Counts of the facts that will be trained on, from the facts stage if it is done, else from the file (before filtering)."""
    from pipeline.facts.fact import read_facts
    from pipeline.facts.read import read

    done = [plan.artifact(step).folder for step in plan.steps.values() if step.stage == "facts" and plan.artifact(step).is_complete]
    settings = experiment.facts
    facts = list(read_facts(done[0] / "facts.jsonl")) if done else read(settings.path, settings.format, settings.old_answer).facts
    facts = facts[: settings.limit]
    if not facts:
        raise InputError(f"facts.path: no facts in {settings.path}")
    characters = sum(len(fact.prompt) + len(fact.new_answer) for fact in facts) / len(facts)
    template = _TEMPLATE_TOKENS.get(experiment.prompt.template, _OTHER_TEMPLATE_TOKENS)
    locality = sum(len(fact.locality) for fact in facts) / len(facts)
    related = sum(1 + len(fact.rephrasings) + len(fact.portability) for fact in facts) / len(facts)
    return Data(len(facts), round(characters / _CHARACTERS_PER_TOKEN) + template + 2, locality, locality + related)


def _experiment_row(experiment: Experiment, shape: Shape, data: Data) -> Row:
    ranks = experiment.cluster.ranks
    detail = (
        f"{shape.num_parameters / 1e6:,.0f}M parameters; {data.num_facts} facts of about {data.record_tokens} tokens;"
        f" {ranks} rank{'s' if ranks > 1 else ''}. Estimates, right within a factor of two or so (formulas: launch/estimate.py)"
    )
    return Row("experiment", "ok", detail)


class Need(NamedTuple):
    """What one step wants."""

    step: Step
    memory_bytes: int
    """Of one rank."""
    seconds: float
    detail: str
    advice: str
    """What to change if the memory does not suffice."""


def _need(experiment: Experiment, step: Step, shape: Shape, data: Data, capacity: Capacity) -> Need:
    if step.stage == "forget":
        return Need(step, estimate.PROCESS_BYTES, 0, "memory independent of the model's size", "")
    if step.stage == "evaluate":
        return _evaluation(experiment, step, shape, data, capacity)
    return _training(experiment, step, shape, data, capacity)


def _training(experiment: Experiment, step: Step, shape: Shape, data: Data, capacity: Capacity) -> Need:
    training = training_of(step)
    ranks = experiment.cluster.ranks
    memory = estimate.training_memory(shape, training, ranks, data.record_tokens)
    tokens = num_records(training, data) * data.record_tokens
    seconds = estimate.training_flops(shape, training, tokens) / _rate(capacity, ranks)
    detail = ", ".join(f"{name} {size(value)}" for name, value in memory._asdict().items())
    return Need(step, memory.total, seconds, detail, remedy(step, shape, training, ranks, data.record_tokens, capacity))


def _evaluation(experiment: Experiment, step: Step, shape: Shape, data: Data, capacity: Capacity) -> Need:
    settings = Evaluate.model_validate(step.section["evaluate"])
    weights, working = _evaluation_bytes(settings, shape, data)
    seen = data.num_facts * data.questions * (data.record_tokens * len(settings.protocols) + settings.max_new_tokens)
    seconds = 2.0 * shape.num_parameters * seen / _rate(capacity, experiment.cluster.ranks)
    advice = "no setting makes it fit here: a GPU with more memory, or a smaller model"
    for change, warning in (({"batch_size": 4}, ""), ({"batch_size": 4, "precision": "bf16"}, " (bf16 rounds a small subtraction away)")):
        if sum(_evaluation_bytes(settings.model_copy(update=change), shape, data)) <= _TIGHT * _limit(capacity, experiment):
            advice = f"would fit with {' '.join(f'--set evaluate.{name}={value}' for name, value in change.items())}{warning}"
            break
    return Need(step, weights + working, seconds, f"weights {size(weights)}, working {size(working)}", advice)


def _evaluation_bytes(settings: Evaluate, shape: Shape, data: Data) -> tuple[int, int]:
    """Weights, and what works on them: keys and values, logits, the process itself."""
    width = 2 if settings.precision == "bf16" else 4
    cache = 2 * width * shape.num_layers * shape.hidden_size * settings.batch_size * (data.record_tokens + settings.max_new_tokens)
    logits = 8 * shape.vocab_size * settings.batch_size * estimate.ANSWER_TOKENS
    return width * shape.num_parameters, estimate.PROCESS_BYTES + cache + logits


def _merged(needs: list[Need], capacity: Capacity, experiment: Experiment) -> Iterator[Row]:
    """One row for all steps of a stage that want the same."""
    groups: dict[tuple[Any, ...], list[Need]] = {}
    for need in needs:
        groups.setdefault((need.step.stage, need.memory_bytes, need.seconds), []).append(need)
    for group in groups.values():
        need, limit = group[0], _limit(capacity, experiment)
        methods = dict.fromkeys(method for one in group for method in one.step.methods)
        name = f"{len(group)} x {need.step.stage}" if len(group) > 1 else need.step.stage
        time = f"; about {duration(need.seconds)}{' each' if len(group) > 1 else ''}" if need.seconds else ""
        state = _state(need.memory_bytes, limit)
        detail = f"{size(need.memory_bytes)} a rank of {size(limit)} ({need.detail}){time}"
        yield Row(f"{name} ({', '.join(methods)})" if methods else name, state, detail, need.advice if state != "ok" else "")


def training_of(step: Step) -> Training:
    """The settings of a fine-tuning step."""
    values = step.section["training"]
    kind = LoraTraining if "rank" in values else Teach if step.stage == "teach" else Training
    return kind.model_validate(values)


def _limit(capacity: Capacity, experiment: Experiment) -> int:
    """Bytes that one rank may use."""
    if capacity.device_bytes is not None:
        return capacity.device_bytes
    return capacity.host_bytes * experiment.cluster.nodes // experiment.cluster.ranks


def _rate(capacity: Capacity, ranks: int) -> float:
    """Operations a second of all ranks: a GPU each, or together the cores, whose speed was measured together. Unknown: infinite."""
    if capacity.flops is None:
        return float("inf")
    return capacity.flops * _EFFICIENCY * (ranks if capacity.device_bytes is not None else 1)


def _state(needed: int, limit: int) -> State:
    return "fail" if needed > limit else "warn" if needed > _TIGHT * limit else "ok"


def remedy(step: Step, shape: Shape, training: Training, ranks: int, record_tokens: int, capacity: Capacity) -> str:
    """The smallest change of settings that makes a fine-tuning fit, as `--set` options."""
    section = "lora" if isinstance(training, LoraTraining) else "teach" if step.stage == "teach" else "full"
    saving = training.model_copy(update={"gradient_checkpointing": True, "micro_batch_size": 1})
    zero3 = saving.model_copy(update={"deepspeed": {"zero_optimization": {"stage": 3}}})
    less = f"--set {section}.gradient_checkpointing=true --set {section}.micro_batch_size=1"
    choices = [(saving, ranks, less), (zero3, ranks, f"{less} --set {section}.deepspeed=configs/deepspeed/zero3.json")]
    if capacity.device_bytes is not None:
        choices += [(saving, more, f"{less} --set cluster.ranks={more}") for more in _RANKS_TRIED if more > ranks]
    for changed, number, options in choices:
        limit = capacity.device_bytes if capacity.device_bytes is not None else capacity.host_bytes // number
        if estimate.training_memory(shape, changed, number, record_tokens).total <= _TIGHT * limit:
            return f"would fit with {options}"
    return "no setting makes it fit here: more or larger GPUs, a smaller model, or LoRA alone"


def disk_row(pending: list[Step], shape: Shape, data: Data, free: int) -> Row:
    """The results that stay, and the largest that comes and goes while a stage runs."""
    sizes = [disk_bytes(step, shape, data) for step in pending]
    stay, passing = sum(size for size, _ in sizes), max(size for _, size in sizes)
    detail = f"{size(stay + passing)} of {size(free)} free: results {size(stay)}, checkpoints while they run {size(passing)}"
    state = _state(stay + passing, free)
    return Row("disk for this run", state, detail, "" if state == "ok" else "set cluster.runs_dir to a larger disk, or run fewer methods")


def disk_bytes(step: Step, shape: Shape, data: Data) -> tuple[int, int]:
    """Bytes of a step's result, and those that come and go beside it or before it."""
    if step.stage == "forget":
        return _width(step.section["forget"]["dtype"]) * shape.num_parameters, 0
    if step.stage not in stages.TUNINGS:
        return 0, 0
    training = training_of(step)
    checkpoint = estimate.checkpoint_bytes(shape, training)
    num_steps = training.epochs * ceil(num_records(training, data) / training.batch_size)
    num_copies = 1 if num_steps <= training.checkpoint_every_steps else 2  # an old one goes when the new one is whole
    keeps_checkpoint = step.stage == "tune_old" and not isinstance(training, LoraTraining)
    trained = 4 * estimate.num_trained(shape, training)
    result = estimate.checkpoint_bytes(shape, training, with_moments=False) if keeps_checkpoint else trained
    return result, num_copies * checkpoint - result  # the result is written where moments were


def num_records(training: Training, data: Data) -> int:
    """Records of one epoch."""
    with_locality = isinstance(training, Teach) and training.facts == "old_and_locality"
    return round(data.num_facts * (1 + data.locality)) if with_locality else data.num_facts


def _width(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """A rough time, in the largest unit that fits."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
