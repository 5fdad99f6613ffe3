"""One rank of a training test: runs cases in one process, as a real run does, and writes what came out.

`python train_worker.py CASES.json`, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set. A
case names a function of this file and its arguments; rank 0 writes each answer to `<out>/answer.json`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.artifact import Artifact, write_json
from pipeline.context import Context, Preempted
from pipeline.models.load import empty_model
from pipeline.train import fit as fit_module
from pipeline.train import stage
from pipeline.train.lora import InitialAdapter, add_adapter
from pipeline.train.model import skeleton
from pipeline.weights.floats import as_tensor


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
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


def train(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    facts = stage.run(section, inputs, out, context)
    gc.collect()
    num_engines = sum(type(thing).__name__ == "DeepSpeedEngine" for thing in gc.get_objects())
    return facts | {
        "linear_restored": torch.nn.functional.linear is torch._C._nn.linear,
        "num_engines": num_engines,
    }


def stop_early(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """Only the last rank is asked to stop; all must, together, at the end of the first step."""
    if context.rank == context.world_size - 1:
        context.stop = True
    try:
        stage.run(section, inputs, out, context)
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
        raise _LookedAt

    module: Any = stage
    for name in ("_write_result", "fit"):
        original = getattr(module, name)
        setattr(module, name, fail)
        try:
            facts = stage.run(section, inputs, out, context)
        except _LookedAt:
            assert name == "_write_result", "it trained again"
        finally:
            setattr(module, name, original)
    return facts


def masters(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> Any:
    """Load theta' into an engine and count the elements that differ, as DeepSpeed itself reads them."""
    seen: dict[str, Any] = {}

    def inspect(engine: Any, *_: Any) -> None:
        seen.update(_compare(engine, inputs["model"]))
        raise _LookedAt

    fit: Any = fit_module
    original, fit.train = fit.train, inspect
    try:
        stage.run(section, inputs, out, context)
    except _LookedAt:
        return seen
    finally:
        fit.train = original
    raise AssertionError("training was never reached")


class _LookedAt(Exception):
    pass


def _compare(engine: Any, model: Artifact) -> dict[str, Any]:
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import load_file

    stored = load_file(Path(model.model_path) / "model.safetensors")
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
    "interrupted_result": interrupted_result,
}

if __name__ == "__main__":
    main()
