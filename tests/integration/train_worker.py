"""One rank of a training test: runs cases in one process, as a real run does, and writes what came out.

`python train_worker.py CASES.json`, with RANK, WORLD_SIZE, LOCAL_RANK and MEETING set: a file, not there yet,
by which the ranks find each other (a free port may be taken by another process). A case names a function of
this file and its arguments; rank 0 writes each answer to `<out>/answer.json`."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from delta_models import formula
from safetensors.torch import load_file

from pipeline.artifact import Artifact, write_json
from pipeline.context import Context, Preempted
from pipeline.delta.virtual import open_virtual
from pipeline.models.load import empty_model, open_weights
from pipeline.train import stage
from pipeline.train.checkpoint import Checkpoints, Saved
from pipeline.train.job import Job, plan_job
from pipeline.train.lora import InitialAdapter, add_adapter
from pipeline.train.model import skeleton
from pipeline.train.session import Handover, Session
from pipeline.training_config import LoraTraining
from pipeline.weights.floats import as_tensor


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{os.environ['MEETING']}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world_size)
    context = Context(rank, world_size, rank, "cpu", dist.group.WORLD if world_size > 1 else None)
    for case in cases:
        out = Path(case["out"])
        out.mkdir(parents=True, exist_ok=True)
        inputs = {role: Artifact(Path(folder)) for role, folder in case["inputs"].items()}
        answer = _CASES[case["kind"]](case["section"], inputs, out, context)
        if context.is_main:
            write_json(out / "answer.json", answer)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed on a CPU sometimes aborts while the interpreter ends


def train(
    section: dict[str, Any],
    inputs: dict[str, Artifact],
    out: Path,
    context: Context,
    handover: Handover | None = None,
) -> Any:
    with _saves(context) as saves:
        result = stage.run(section, inputs, out, context, handover)
    return result | {"saves": saves} | _left_behind()


def _left_behind() -> dict[str, Any]:
    gc.collect()
    return {
        "linear_restored": torch.nn.functional.linear is torch._C._nn.linear,
        "num_engines": sum(type(thing).__name__ == "DeepSpeedEngine" for thing in gc.get_objects()),
    }


@contextmanager
def _saves(context: Context) -> Iterator[dict[str, str]]:
    """The digest of every file of every checkpoint that is written within, by step and name."""
    digests: dict[str, str] = {}
    save = Checkpoints.save

    def saved(*args: Any) -> Saved:
        made = save(*args)
        for path in made.folder.glob("*.pt"):
            digests[f"{made.step} {path.name}"] = _digest(path)
        context.barrier()  # the next save removes it
        return made

    Checkpoints.save = saved  # type: ignore[method-assign, assignment]
    try:
        yield digests
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]


def _digest(path: Path) -> str:
    """Of a torch file's tensors and all that describes them, but for the numbers that DeepSpeed gives every
    parameter of a process.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            if not name.endswith(".data/serialization_id"):  # a digest of all the rest
                digest.update(re.sub(rb"X.\0\0\0\d+(_\d+)+", b"ds_id", file.read(name), flags=re.DOTALL))
    return digest.hexdigest()


def second_course(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """The training in a live session that another course, from another base, was run in before."""
    first = section | {"seed": 9, "target": "old", "keeps_checkpoint": False}
    with Handover() as handover, _opened() as sessions:
        stage.run(first, inputs | {"model": inputs["first"]}, _folder(out, "first"), context, handover)
        answer = train(section, inputs, out, context, handover)
    return answer | {"num_sessions": len(sessions)} | _left_behind()


def resumed_between(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """A stopped training goes on in a used session, which then serves for the same one from its start."""
    first = section | {"seed": 9, "target": "old"}
    with Handover() as handover, _opened() as sessions:
        stop_early(section, inputs, out, context, handover)
        stage.run(first, inputs, _folder(out, "first"), context, handover)
        stage.run(section, inputs, out, context, handover)
        answer = train(section, inputs, _folder(out, "again"), context, handover)
    return answer | {"num_sessions": len(sessions)}


def after_misfits(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """The training after one of another kind, and after one that was stopped: neither's session serves."""
    training = section["training"]
    lora = section | {
        "training": LoraTraining(rank=2, deepspeed=training["deepspeed"]).model_dump(mode="json")
    }
    with Handover() as handover, _opened() as sessions:
        stage.run(lora | {"target": "old"}, inputs, _folder(out, "first"), context, handover)
        said = stop_early(section, inputs, out, context, handover)
        answer = train(section, inputs, out, context, handover)
    return answer | {"num_sessions": len(sessions), "said": said} | _left_behind()


def _folder(out: Path, name: str) -> Path:
    (out / name).mkdir(exist_ok=True)
    return out / name


@contextmanager
def _opened() -> Iterator[list[Session]]:
    """Every session that is opened within."""
    opened: list[Session] = []
    make = Session.__init__

    def count(self: Session, job: Job, context: Context) -> None:
        opened.append(self)
        make(self, job, context)

    Session.__init__ = count  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        Session.__init__ = make  # type: ignore[method-assign]


def stop_early(
    section: dict[str, Any],
    inputs: dict[str, Artifact],
    out: Path,
    context: Context,
    handover: Handover | None = None,
) -> Any:
    """Only the last rank is asked to stop; all must, together, at the end of the first step."""
    if context.rank == context.world_size - 1:
        context.stop = True
    try:
        stage.run(section, inputs, out, context, handover)
    except Preempted as error:
        context.stop = False
        return str(error)
    return "was not stopped"


def interrupted_result(
    section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context
) -> Any:
    """Training ends, but writing its result fails; the next run must write it without training again.

    For one rank.
    """

    def fail(*_: Any) -> None:
        raise _Failed

    places: list[tuple[Any, str]] = [(stage, "_write_result"), (Session, "run")]
    for owner, name in places:
        original = getattr(owner, name)
        setattr(owner, name, fail)
        try:
            result = stage.run(section, inputs, out, context)
        except _Failed:
            assert name == "_write_result", "it trained again"
        finally:
            setattr(owner, name, original)
    return result


class _Failed(Exception):
    pass


def masters(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """Fill a session with theta' and count the elements that differ, as DeepSpeed itself reads them."""
    job = plan_job(section, inputs, context)
    with Session(job, context) as session, closing(open_weights(job.base)) as source:
        session.fill(source, section["seed"])
        return _compare(session._engine._engine, inputs["model"], _stored(inputs["model"]))


def _stored(model: Artifact) -> dict[str, torch.Tensor]:
    return load_file(Path(model.model_path) / "model.safetensors")


def virtual_masters(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """Fill one session with several virtual models, straight from a ZeRO checkpoint; the counts for each
    scale.

    The checkpoint is that of an earlier case. What theta' has to be comes from DeepSpeed's own consolidation.
    """
    checkpoint = max((out.parent / section["tuned"] / "checkpoints").glob("step-*"))
    tuned = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
    base = _stored(inputs["model"])
    counts = {}
    with Session(plan_job(section, inputs, context), context) as session:
        for scale in (0.3, 0.7, -1.0):
            with closing(open_virtual(Path(inputs["model"].model_path), checkpoint, scale)) as virtual:
                session.fill(virtual, section["seed"])
            right = formula(base, {name: tuned[name] for name in base}, scale)
            counts[str(scale)] = _compare(session._engine._engine, inputs["model"], right)
    return counts


def _compare(engine: Any, model: Artifact, stored: dict[str, torch.Tensor]) -> dict[str, Any]:
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    counts = {
        "masters": 0,
        "different_masters": 0,
        "different_weights": 0,
        "different_buffers": 0,
        "changed_by_rounding": 0,
    }
    plain_buffers = dict(empty_model(Path(model.model_path), "cpu", torch.bfloat16).named_buffers())
    for name, buffer in engine.module.named_buffers():
        expected = plain_buffers[name.removeprefix("base_model.model.")]
        counts["different_buffers"] += int(
            buffer.dtype != expected.dtype or not torch.equal(buffer, expected)
        )
    for name, parameter in engine.module.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with zero.GatheredParameters(gathered):
            weight = parameter.detach().clone()
        if plain in stored:
            counts["different_weights"] += int((weight != stored[plain].to(weight.dtype)).sum())
            counts["changed_by_rounding"] += int((stored[plain].bfloat16().float() != stored[plain]).sum())
        if master is not None:
            expected = stored[plain] if plain in stored else _initial(engine, model, name)
            counts["masters"] += master.numel()
            counts["different_masters"] += int((master.view(expected.shape) != expected).sum())
    return counts


def _initial(engine: Any, model: Artifact, name: str) -> torch.Tensor:
    """The first value of one of LoRA's matrices at seed 0, from a whole model that no engine has touched."""
    whole = add_adapter(skeleton(Path(model.model_path)), engine.module.peft_config["default"])
    source = InitialAdapter(whole, 0)
    info = source.tensors[name]
    return as_tensor(source.read(name, 0, info.num_elements), info.dtype).view(info.shape)


_CASES = {
    "train": train,
    "stop_early": stop_early,
    "masters": masters,
    "virtual_masters": virtual_masters,
    "second_course": second_course,
    "resumed_between": resumed_between,
    "after_misfits": after_misfits,
    "interrupted_result": interrupted_result,
}

if __name__ == "__main__":
    main()
