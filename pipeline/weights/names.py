"""Names of one model's tensors in terms of another's.

Two things make them differ. A file may lack a module's prefix: GPT-2 runs as `transformer.wte.weight`, its
hub file says `wte.weight`. And transformers (5 and later) renames some tensors on loading, by a table that it
has for each model: `embed_out.weight` runs as `lm_head.weight`. That table is asked for models whose tensors
are renamed but not regrouped (dense ones).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import InputError
from pipeline.weights.source import TensorSource

if TYPE_CHECKING:
    import torch


class _Prefix(NamedTuple):
    """A prefix that the source's names have and the base's lack, or the other way round."""

    text: str
    in_source: bool

    def apply(self, name: str) -> str | None:
        if not self.in_source:
            return self.text + name
        return name.removeprefix(self.text) if name.startswith(self.text) else None


def align_names(source: Collection[str], base: Collection[str]) -> dict[str, str]:
    """{name in `source`: the base's name for it}, for every name that the base has too.

    Names that both have are themselves. The others may differ by one module prefix, which is the one that
    most of them agree on. Raises InputError where that is not one to one.
    """
    # Names that both have are taken first: a prefix must never carry one of them to another's place.
    own, others = set(source), set(base)
    aligned = {name: name for name in source if name in others}
    prefix = _common_prefix(own - others, others - own)
    if prefix is None:
        return aligned
    for name in source:
        renamed = prefix.apply(name) if name not in others else None
        if renamed in aligned:
            raise InputError(
                f"tensors {name!r} and {renamed!r} would both be the base's {renamed!r}:"
                " the names are not one to one"
            )
        if renamed in others and renamed is not None:
            aligned[name] = renamed
    return aligned


def _common_prefix(source: set[str], base: set[str]) -> _Prefix | None:
    votes: Counter[_Prefix] = Counter()
    for name in source:
        votes.update(_Prefix(prefix, True) for prefix, rest in _splits(name) if rest in base)
    for name in base:
        votes.update(_Prefix(prefix, False) for prefix, rest in _splits(name) if rest in source)
    # The most votes; among equals the same prefix in every process.
    return min(votes, key=lambda prefix: (-votes[prefix], prefix)) if votes else None


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """`a.b.c` as (`a.`, `b.c`) and (`a.b.`, `c`)."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i]) + ".", ".".join(parts[i:])


def runtime_names(names: Collection[str], architecture: str, model_type: str) -> dict[str, str]:
    """{hub name: name in the running model} for the `names` that transformers renames.

    `architecture` and `model_type` are as in a config (`GPTNeoXForCausalLM`, `gpt_neox`).
    Raises InputError for tensors that it splits or merges (mixtures of experts).
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    table = (
        get_checkpoint_conversion_mapping(architecture) or get_checkpoint_conversion_mapping(model_type) or []
    )
    table = [*table, *(get_checkpoint_conversion_mapping("legacy") or [])]
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    renamed = {name: _rename(name, renamings) for name in names}
    converters = [entry for entry in table if not isinstance(entry, WeightRenaming)]
    regrouped = [
        name
        for name, new in renamed.items()
        if any(entry.rename_source_key(new)[1] is not None for entry in converters)
    ]
    if regrouped:
        raise InputError(
            f"{architecture}: transformers regroups {len(regrouped)} of its tensors on loading"
            f" ({regrouped[0]} ...), which is not supported"
        )
    return {name: new for name, new in renamed.items() if new != name}


def _rename(name: str, renamings: list[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def align_to_model(names: Collection[str], model: torch.nn.Module) -> dict[str, str]:
    """{hub name: name in `model.state_dict()`}, for those of `names` that the model has."""
    targets = model.state_dict(keep_vars=True).keys()
    aligned = align_names(names, targets)
    if len(aligned) == len(names):
        return aligned
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    renamed = runtime_names([name for name in names if name not in aligned], type(model).__name__, model_type)
    runtime = align_names([renamed.get(name, name) for name in names], targets)
    return {name: runtime[renamed.get(name, name)] for name in names if renamed.get(name, name) in runtime}


def align_to_base(names: Collection[str], base: TensorSource) -> dict[str, str]:
    """{name in a running model: the base's name for it}, for those of `names` that the base has.

    Raises InputError where they are not one to one.
    """
    hub = [*base.tensors, *base.aliases]
    aligned = align_names(names, hub)
    if len(aligned) in (len(names), len(hub)):
        return aligned
    architecture, model_type = _kind(base)
    known = set(aligned.values())
    renamed = (
        runtime_names([name for name in hub if name not in known], architecture, model_type)
        if model_type
        else {}
    )
    if not renamed:
        return aligned
    hub_name = {renamed.get(name, name): name for name in hub}
    if len(hub_name) != len(hub):
        raise InputError(
            "transformers gives several of the base's tensors one name, so names are not one to one"
        )
    return {name: hub_name[runtime] for name, runtime in align_names(names, hub_name).items()}


def _kind(base: TensorSource) -> tuple[str, str]:
    """Architecture and model type of the model whose tensors `base` has; empty where it has no config."""
    path = getattr(base, "path", None)
    config_path = (path if path.is_dir() else path.parent) / "config.json" if path else None
    if config_path is None or not config_path.is_file():
        return "", ""
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{config_path}: not valid JSON ({type(error).__name__}); get it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{config_path}: not a model's configuration")
    architectures = config.get("architectures") or [""]
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise InputError(f"{config_path}: architectures is {architectures!r}; it must be a list of names")
    return architectures[0], str(config.get("model_type") or "")
