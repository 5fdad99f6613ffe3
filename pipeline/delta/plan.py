"""The plan of a subtraction, made before any byte is written: which tensor becomes what, in which shard, how
large.

The output has the base's tensors, under the base's names. Whatever does not fit - missing, extra, mis-shaped
tensors - is listed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import InputError
from pipeline.weights.adapter import AdapterSource
from pipeline.weights.shard import Shard, plan_shards
from pipeline.weights.source import TensorInfo, TensorSource

_COMPARE_ELEMENTS = 1 << 20

_RECOMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias|cos_cached|sin_cached|position_ids)$")
"""Buffers that the model's code computes anew: rotary frequencies, GPT-2's and GPT-NeoX' mask values."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""GPT-2's causal mask, told from a linear layer's bias by its shape (1, 1, n, n)."""
_OUTPUT_EMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_QUANTISED = re.compile(r"(^|\.)(weight|qweight|packed_weight)$")


@dataclass(frozen=True)
class Item:
    """One output tensor: `info` as it will be stored, `base` as it is in the base; `other` is what is
    subtracted.

    `other` is a tensor's name in the tuned source, or None: then the base's values are kept.
    """

    info: TensorInfo
    base: TensorInfo
    other: str | None


@dataclass(frozen=True)
class Plan:
    """All output tensors, in shards."""

    items: dict[str, Item]
    shards: list[Shard]
    notes: list[str] = field(default_factory=list)
    """What was decided that one would want to know: buffers ignored, ties."""

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def can_be_undone(self) -> bool:
        """Whether no result of a subtraction is rounded to 16 bits, so that the base can be had back from
        it.
        """
        return all(
            item.other is None or item.info.dtype in ("float32", "float64") for item in self.items.values()
        )


def make_plan(
    base: TensorSource, tuned: TensorSource, dtypes: str | dict[str, str], max_shard_bytes: int
) -> Plan:
    """The plan of theta' = base - scale * (tuned - base).

    Args:
        dtypes: The dtype of all floating-point tensors, `same` (each as in the base), or one by tensor name.
        max_shard_bytes: The most that a shard may hold, unless one tensor is larger.

    Raises:
        InputError: The two do not fit, with everything that is wrong.
    """
    matched, notes = match(base, tuned)
    items = {}
    for name, info in base.tensors.items():
        dtype = dtypes.get(name, info.dtype) if isinstance(dtypes, dict) else dtypes
        stored = info.dtype if dtype == "same" or not info.is_floating else dtype
        items[name] = Item(TensorInfo(name, info.shape, stored), info, matched[name])
    return Plan(items, plan_shards((item.info for item in items.values()), max_shard_bytes), notes)


def match(base: TensorSource, tuned: TensorSource) -> tuple[dict[str, str | None], list[str]]:
    """For every base tensor the tuned tensor to compare with (None: keep the base's values), and notes.

    Raises InputError with everything that does not fit.
    """
    unusable = [problem for info in base.tensors.values() for problem in _unusable(info)]
    if isinstance(tuned, AdapterSource):
        _raise(unusable)
        return {name: name if name in tuned.changed else None for name in base.tensors}, []
    names = {name: _other_name(base, tuned, info) for name, info in base.tensors.items()}
    problems = [
        problem
        for name, other in names.items()
        if other
        for problem in _misfits(base.tensors[name], other, tuned)
    ]
    extra, notes = _extra(base, tuned)
    _raise(unusable + problems + extra)
    _raise(_broken_ties(base, tuned))
    return names, notes + _narrow(tuned, names.values())


def _other_name(base: TensorSource, tuned: TensorSource, info: TensorInfo) -> str | None:
    """The tuned model's name of a base tensor, or None if nothing is to be subtracted from it."""
    if not is_subtracted(info):
        return None
    if info.name in tuned.tensors:
        return info.name
    return tuned.aliases.get(info.name) or _tied_to(base, info) or info.name


def is_subtracted(info: TensorInfo) -> bool:
    """Whether a tensor holds weights: not an integer or boolean buffer, nor one that the model's code
    computes anew.
    """
    return info.is_floating and not is_recomputed(info)


def is_recomputed(info: TensorInfo) -> bool:
    """Whether a tensor is a known buffer that old files carry and newer code computes by itself."""
    is_mask = _MASK.search(info.name) is not None and len(info.shape) == 4 and info.shape[:2] == (1, 1)
    return is_mask or _RECOMPUTED.search(info.name) is not None


def _unusable(info: TensorInfo) -> Iterator[str]:
    if info.num_elements == 0:
        yield f"{info.name} is empty in the base, shape {_text(info.shape)}: it was saved wrongly (from a partitioned model?)"
    if not info.is_floating and _QUANTISED.search(info.name):
        yield f"{info.name} is quantised ({info.dtype}) in the base: give the model in float32, bfloat16 or float16"


def _misfits(info: TensorInfo, owner: str, tuned: TensorSource) -> Iterator[str]:
    if owner not in tuned.tensors:
        yield f"{info.name} {_text(info.shape)} is missing from the tuned model"
        return
    other = tuned.tensors[owner]
    if not other.is_floating:
        yield f"{info.name} is {info.dtype} in the base and {other.dtype} in the tuned model"
    if other.shape == info.shape:
        return
    problem = f"{info.name} is {_text(info.shape)} in the base and {_text(other.shape)} in the tuned model"
    if (
        len(info.shape) == 2
        and other.shape[1:] == info.shape[1:]
        and re.search(r"emb|wte|lm_head", info.name)
    ):
        problem += (
            " (the vocabulary was resized; rows are never trimmed or padded: tune without adding tokens)"
        )
    yield problem


def _extra(base: TensorSource, tuned: TensorSource) -> tuple[list[str], list[str]]:
    """Problems with, and notes on, the tensors that only the tuned source has."""
    problems, notes = [], []
    for name, info in tuned.tensors.items():
        stands_for = [
            alias for alias, owner in tuned.aliases.items() if owner == name and alias in base.tensors
        ]
        if name in base.tensors or name in base.aliases or stands_for:
            continue
        if not is_subtracted(info):
            notes.append(f"{name}: a buffer that only the tuned model has; ignored")
        elif (owner := _tied_to(tuned, info)) is not None and owner in base.tensors:
            notes.append(f"{name}: equal to {owner}, and the base has that one alone; so has the result")
        else:
            problems.append(f"{name} {_text(info.shape)} is in the tuned model but not in the base")
    return problems, notes


def _tied_to(source: TensorSource, info: TensorInfo) -> str | None:
    """For an output embedding, the input embedding that holds the same values: files do not always say that
    two are tied.
    """
    if not _OUTPUT_EMBEDDING.search(info.name):
        return None
    candidates = [
        other.name
        for other in source.tensors.values()
        if _INPUT_EMBEDDING.search(other.name) and other.shape == info.shape
    ]
    return next((name for name in candidates if _are_equal(source, name, info.name)), None)


def _narrow(tuned: TensorSource, names: Iterable[str | None]) -> list[str]:
    """Masters are float32; a tuned model that was saved in 16 bits has lost what is smaller than their
    steps.
    """
    narrow = {tuned.tensors[name].dtype for name in names if name} & {"bfloat16", "float16"}
    return [
        f"the tuned model is stored in {dtype}: changes smaller than its steps were lost when it was saved"
        for dtype in sorted(narrow)
    ]


def _broken_ties(base: TensorSource, tuned: TensorSource) -> Iterator[str]:
    """Where one of the two keeps one tensor and the other keeps two copies of it, the copies must be
    equal.
    """
    for alias, owner in base.aliases.items():
        if alias in tuned.tensors and owner in tuned.tensors and not _are_equal(tuned, alias, owner):
            yield f"{alias} is tied to {owner} in the base, but differs from it in the tuned model"
    for alias, owner in tuned.aliases.items():
        if alias in base.tensors and owner in base.tensors and not _are_equal(base, alias, owner):
            yield f"{alias} is tied to {owner} in the tuned model, but differs from it in the base"


def _are_equal(source: TensorSource, one: str, two: str) -> bool:
    import torch

    count = source.tensors[one].num_elements
    if count != source.tensors[two].num_elements:
        return False
    slices = ((start, min(start + _COMPARE_ELEMENTS, count)) for start in range(0, count, _COMPARE_ELEMENTS))
    return all(
        torch.equal(source.read(one, start, stop), source.read(two, start, stop)) for start, stop in slices
    )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


def _raise(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        advice = (
            f" ({len(found)} problems; give a model and a fine-tuning of that very model)"
            if len(found) > 1
            else ""
        )
        raise InputError(f"base and tuned model do not fit{advice}: {'; '.join(found)}")
