"""What a subtraction wants of a machine: next to no memory, however large the model is, and its result."""

from __future__ import annotations

from typing import Any

from pipeline.needs import PROCESS_BYTES, DataSize, ModelSize, Needs
from pipeline.weights.source import DTYPE_BYTES


def forget_needs(section: dict[str, Any], model: ModelSize, data: DataSize, ranks: int) -> Needs:
    """What a forget step wants; `section` is the step's own. `same` counts as float32, the most it can be."""
    result = DTYPE_BYTES.get(section["forget"]["dtype"], 4) * model.num_parameters
    return Needs({"at most, for a model of any size": PROCESS_BYTES}, result=result, written=result)
