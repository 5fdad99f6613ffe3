"""theta' into a DeepSpeed engine in float32: each rank reads its own slices of a source into its masters.

`deepspeed.initialize` makes the fp32 masters from weights already rounded to bf16, which undoes a small
subtraction. So the values come afterwards, bit for bit, and the 16-bit weights are then derived from them.
Used by zero_engine.py alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.weights.floats import as_tensor
from pipeline.weights.source import TensorSource

_SLICE_ELEMENTS = 1 << 22
"""Elements read at a time: 16 MiB in fp32. Larger ones are no faster, and a rank holds one at a time."""


class Binding(NamedTuple):
    """`parameter` is to hold the tensor `name` of `source`."""

    parameter: torch.nn.Parameter
    source: TensorSource
    name: str


class Span(NamedTuple):
    """The piece of a flattened parameter that this rank holds: 1-D `values`, from its element `start` on."""

    values: torch.Tensor
    start: int


def read_into(values: torch.Tensor, source: TensorSource, name: str, start: int) -> None:
    """Fill `values` (1-D) with the source's tensor `name`, from its element `start` on, in slices."""
    for begin in range(0, values.numel(), _SLICE_ELEMENTS):
        piece = values[begin : begin + _SLICE_ELEMENTS]
        first = start + begin
        read = source.read(name, first, first + piece.numel())
        piece.copy_(as_tensor(read, source.tensors[name].dtype))


def load(engine: Any, bindings: Iterable[Binding]) -> None:
    """Load every binding's tensor: into the masters if the parameter is trained, else into its weights.

    Collective, between two steps. Trained weights become their masters rounded to the model's dtype.
    """
    with torch.no_grad(), _open_for_writing(engine):
        masters = _spans_of_masters(engine)
        for binding in bindings:
            trained = binding.parameter.requires_grad
            span = masters.get(binding.parameter) if trained else _span_of_frozen(binding.parameter)
            if span is not None:  # all of it lies on other ranks
                read_into(span.values, binding.source, binding.name, span.start)


@contextmanager
def _open_for_writing(engine: Any) -> Iterator[None]:
    """On leaving, the model's weights are derived from the masters, or it would compute with old ones."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        yield
        optimizer.update_lp_params()  # each rank rounds its own partition, then all gather the weights
        return
    # ZeRO-3 keeps small parameters whole on every rank, beside their partitions. Let go of those copies
    # first: the gathering at the end skips what is whole, and the model would compute with stale copies.
    optimizer.checkpoint_event_prologue()
    yield
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


def _spans_of_masters(engine: Any) -> dict[torch.nn.Parameter, Span]:
    """This rank's piece of each trained parameter's fp32 master; a parameter on other ranks is absent."""
    optimizer = engine.optimizer
    found = _spans_zero3(optimizer) if engine.zero_optimization_stage() == 3 else _spans_zero12(optimizer)
    spans = dict(found)
    assert all(span.values.dtype == torch.float32 for span in spans.values())
    return spans


def _spans_zero12(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Span]]:
    """A group's parameters lie in one flat tensor, cut into equal parts: a cut may fall inside a parameter.

    The 16-bit weights have the same layout, and every rank has all of them: their addresses say where in the
    flat tensor a parameter begins.
    """
    groups = zip(
        optimizer.bit16_groups,
        optimizer.bit16_groups_flat,
        optimizer.single_partition_of_fp32_groups,
        strict=True,
    )
    for group, flat, master in groups:
        first = dist.get_rank() * master.numel()
        for parameter in group:
            offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            begin, end = max(offset, first), min(offset + parameter.numel(), first + master.numel())
            if begin < end:
                yield parameter, Span(master.detach()[begin - first : end - first], begin - offset)


def _spans_zero3(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Span]]:
    """Every parameter is cut into equal parts by itself; a group's flat master joins this rank's parts."""
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            num_own = parameter.partition_numel()
            span = _own_part(parameter, master.detach()[offset : offset + num_own])
            offset += num_own
            if span is not None:
                yield parameter, span


def _own_part(parameter: Any, part: torch.Tensor) -> Span | None:
    """`part` without the padding at the parameter's end; None if all of it is padding.

    The padding is zeroed: it holds whatever was in memory, and goes into checkpoints.
    """
    start = dist.get_rank() * part.numel()
    num_real = max(0, min(part.numel(), parameter.ds_numel - start))
    part[num_real:].zero_()
    return Span(part[:num_real], start) if num_real else None


def _span_of_frozen(parameter: Any) -> Span | None:
    """A frozen parameter has no master. ZeRO-3 partitions it too; at ZeRO-1 and 2 each rank has all of it."""
    if hasattr(parameter, "ds_tensor"):
        return _own_part(parameter, parameter.ds_tensor.detach().view(-1))
    return Span(parameter.detach().view(-1), 0)
