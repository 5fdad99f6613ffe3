"""METHODS: one row a method: what it subtracts, how it learns the new facts, and how the report shows it.

A method that only changes training settings is a row with `settings`. Imports nothing of this project: the
config, the plan and the report all read this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["full", "lora"]
"""A kind of training: a class in `pipeline/training_config.py`, and a section of that name in a config."""
KINDS: tuple[Kind, ...] = get_args(Kind)

Hue = Literal["blue", "orange", "green", "purple", "sky", "yellow", "grey"]
"""A colour of the report; a method shares its baseline's, or has one of its own."""


@dataclass(frozen=True)
class Method:
    """How one method updates the original model. Raises ValueError for an unknown kind of training."""

    label: str
    """What the report calls it."""
    learn: Kind
    """The kind of training by which the new facts enter."""
    subtract: Kind | None = None
    """The kind of training on the old facts whose change is subtracted first; None: nothing is."""
    baseline: str | None = None
    """The method that the report compares it with."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the learning's config section that this method sets to other values."""
    hue: Hue = "grey"

    def __post_init__(self) -> None:
        for kind in (self.learn, self.subtract):
            if kind is not None and kind not in KINDS:
                raise ValueError(f"{self.label}: no kind of training is called {kind}; there are {KINDS}")

    @property
    def is_filled(self) -> bool:
        """Whether the report draws it filled or hollow, so that colour is never the only difference."""
        return self.subtract is not None

    @property
    def kinds(self) -> set[Kind]:
        """Every kind of training that the method runs."""
        return {kind for kind in (self.subtract, self.learn) if kind is not None}


METHODS: dict[str, Method] = {
    "full_ft": Method("Full-FT", learn="full", hue="blue"),
    "lora": Method("LoRA", learn="lora", hue="orange"),
    "flearn_ft": Method("F-Learning_FT", learn="full", subtract="full", baseline="full_ft", hue="blue"),
    "flearn_lora": Method("F-Learning_LoRA", learn="lora", subtract="lora", baseline="lora", hue="orange"),
    "flearn_lora_ft": Method(
        "F-Learning_LoRA-FT", learn="full", subtract="lora", baseline="full_ft", hue="green"
    ),
}


for _name, _method in METHODS.items():
    if _method.baseline is not None and (_method.baseline not in METHODS or _method.baseline == _name):
        raise ValueError(f"{_name}: its baseline {_method.baseline} is no other method")
