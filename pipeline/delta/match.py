"""Matching: which tensor of a fine-tuned model goes with which of its base.

It is decided before any byte is written. Whatever does not fit (missing, extra, mis-shaped tensors) is listed
at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.weights.floats import NARROW, Array, widen
from pipeline.weights.source import TensorInfo, TensorSource

_COMPARE_ELEMENTS = 1 << 20

_RECOMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias|cos_cached|sin_cached|position_ids)$")
"""Buffers that the model's code computes anew: rotary frequencies, GPT-2's and GPT-NeoX' mask values."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""GPT-2's causal mask, told from a linear layer's bias by its shape (1, 1, n, n)."""
_OUTPUT_EMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_QUANTISED = re.compile(r"(^|\.)(weight|qweight|packed_weight)$")


class Match(NamedTuple):
    """How a fine-tuned model's tensors go with its base's."""

    names: dict[str, str]
    """{the base's name: the tuned model's}, for the tensors that something is subtracted from."""
    notes: list[str]
    """What was decided that one would want to know: buffers ignored, ties."""


def match(base: TensorSource, tuned: TensorSource) -> Match:
    """Find the tuned tensor of every weight of the base.

    Raises InputError with everything that does not fit.
    """
    problems = [problem for info in base.tensors.values() for problem in _unusable(info)]
    names = {}
    for name, info in base.tensors.items():
        if is_subtracted(info):
            names[name] = _other_name(base, tuned, info)
            problems += _misfits(info, names[name], tuned)
    extra, notes = _extra(base, tuned)
    _raise(problems + extra)
    _raise(_broken_ties(base, tuned))
    return Match(names, notes + _narrow(tuned, names.values()))


def require_usable(base: TensorSource) -> None:
    """Raises InputError for a base from which nothing can be subtracted, naming all tensors that are
    wrong.
    """
    _raise(problem for info in base.tensors.values() for problem in _unusable(info))


def _other_name(base: TensorSource, tuned: TensorSource, info: TensorInfo) -> str:
    """The tuned model's name of a base tensor."""
    # A fine-tuned model may keep one of two tied tensors under the other's name.
    if info.name in tuned.tensors:
        return info.name
    return tuned.aliases.get(info.name) or _tied_to(base, info) or info.name


def is_subtracted(info: TensorInfo) -> bool:
    """Whether a tensor holds weights: no integer or boolean buffer, nor one that the model computes anew."""
    return info.is_floating and not is_recomputed(info)


def is_recomputed(info: TensorInfo) -> bool:
    """Whether a tensor is a known buffer that old files carry and newer code computes by itself."""
    is_mask = _MASK.search(info.name) is not None and len(info.shape) == 4 and info.shape[:2] == (1, 1)
    return is_mask or _RECOMPUTED.search(info.name) is not None


def _unusable(info: TensorInfo) -> Iterator[str]:
    if info.num_elements == 0:
        shape = _text(info.shape)
        reason = "it was saved wrongly (from a partitioned model?)"
        yield f"{info.name} is empty in the base, shape {shape}: {reason}"
    if not info.is_floating and _QUANTISED.search(info.name):
        advice = "give the model in float32, bfloat16 or float16"
        yield f"{info.name} is quantised ({info.dtype}) in the base: {advice}"


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
    """For an output embedding, the input embedding that holds the same values.

    Files do not always say that two are tied.
    """
    if not _OUTPUT_EMBEDDING.search(info.name):
        return None
    candidates = [
        other.name
        for other in source.tensors.values()
        if _INPUT_EMBEDDING.search(other.name) and other.shape == info.shape
    ]
    return next((name for name in candidates if _are_equal(source, name, info.name)), None)


def _narrow(tuned: TensorSource, names: Iterable[str]) -> list[str]:
    """A note for a tuned model in 16 bits: it has lost what is smaller than their steps, unlike fp32
    masters.
    """
    narrow = {tuned.tensors[name].dtype for name in names} & {"bfloat16", "float16"}
    return [
        f"the tuned model is stored in {dtype}: changes smaller than its steps were lost when it was saved"
        for dtype in sorted(narrow)
    ]


def _broken_ties(base: TensorSource, tuned: TensorSource) -> Iterator[str]:
    """Where one model keeps one tensor and the other two copies of it, the copies must be equal."""
    for alias, owner in base.aliases.items():
        if alias in tuned.tensors and owner in tuned.tensors and not _are_equal(tuned, alias, owner):
            yield f"{alias} is tied to {owner} in the base, but differs from it in the tuned model"
    for alias, owner in tuned.aliases.items():
        if alias in base.tensors and owner in base.tensors and not _are_equal(base, alias, owner):
            yield f"{alias} is tied to {owner} in the tuned model, but differs from it in the base"


def _are_equal(source: TensorSource, one: str, two: str) -> bool:
    """Whether two tensors of a source hold the same values. NaN equals nothing."""
    infos = source.tensors[one], source.tensors[two]
    if infos[0].num_elements != infos[1].num_elements or infos[0].dtype != infos[1].dtype:
        return False
    for start in range(0, infos[0].num_elements, _COMPARE_ELEMENTS):
        stop = min(start + _COMPARE_ELEMENTS, infos[0].num_elements)
        first, second = (_wide(source.read(name, start, stop)) for name in (one, two))
        if not np.array_equal(first, second):
            return False
    return True


def _wide(values: Array) -> Array:
    return widen(values, np.empty(values.size, np.float32)) if values.dtype in NARROW else values


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
