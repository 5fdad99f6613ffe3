"""What a fine-tuning changed, and what survived of subtracting it: by tensor, layer, attention and MLP.

The data of the paper's Figures 4 and 5: the L2 norm of the change of every matrix, and of whole attention and
MLP blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

from pipeline.delta.survival import POOR_PROJECTION, Survival

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.(.+)$")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|feed_forward|ffn|fc")


def total(survivals: Mapping[str, Survival]) -> Survival:
    """The whole model's sums, in the tensors' order."""
    whole = Survival()
    for survival in survivals.values():
        whole.add(survival)
    return whole


def layers(survivals: Mapping[str, Survival], scale: float) -> list[dict[str, Any]]:
    """One row a layer: the figures of its attention and its MLP, and the norm of each matrix' change.

    Tensors outside the layers (embeddings, the last norm, the head) are not in it.
    """
    blocks: dict[int, dict[str, Survival]] = {}
    matrices: dict[int, dict[str, float]] = {}
    for name, survival in survivals.items():
        match = _LAYER.search(name)
        if match is None:
            continue
        layer, rest = int(match[1]), match[2]
        blocks.setdefault(layer, {}).setdefault(block_of(rest), Survival()).add(survival)
        if rest.endswith(".weight"):
            matrices.setdefault(layer, {})[rest.removesuffix(".weight")] = float(
                f"{sqrt(survival.delta_square):.9g}"
            )
    return [
        {
            "layer": layer,
            **{block: sums.figures(scale) for block, sums in found.items()},
            "matrices": matrices.get(layer, {}),
        }
        for layer, found in sorted(blocks.items())
    ]


def block_of(name: str) -> str:
    """`attention`, `mlp` or `other`, by a tensor's name inside its layer.

    `post_attention_layernorm.weight` is other.
    """
    # First, for norms are named after the block that they stand before.
    if re.search(r"norm|ln_", name):
        return "other"
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"


def warnings(survivals: Mapping[str, Survival], scale: float, dtype: str) -> list[str]:
    """What the caller should know before using the result."""
    whole = total(survivals)
    figures = whole.figures(scale)
    if whole.delta_square == 0:
        return ["the tuned model equals the base: there was nothing to subtract"]
    if scale == 0:
        return ["the scale is 0: the result is the base"]
    if whole.num_changed == 0:
        return [
            f"the result equals the base: every change was lost in {dtype};"
            " use --dtype float32 or --rounding stochastic"
        ]
    found = []
    if figures["projection"] < POOR_PROJECTION:
        found.append(
            f"only {figures['projection']:.1%} of the intended change survives in {dtype}"
            f" ({figures['share_changed']:.1%} of the weights"
            " changed); use --dtype float32 or --rounding stochastic"
        )
    dead = [
        name
        for name, survival in survivals.items()
        if survival.delta_square > 0 and survival.num_changed == 0
    ]
    if dead:
        found.append(
            f"{len(dead)} of {len(survivals)} tensors did not change at all, though they should have:"
            f" {', '.join(dead[:5])}"
        )
    return found
