"""`adapter_config.json` of a PEFT LoRA adapter: ranks and alphas, if it is plain LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import ItemsView
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

FILE_NAME = "adapter_config.json"
MERGE = "merge the adapter with PEFT and give the merged model"
"""What to do with an adapter that is more than plain LoRA."""

_NOT_PLAIN = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias on lora_B",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are; PiSSA, OLoRA, LoftQ and others
change them.
"""


@dataclass(frozen=True)
class AdapterConfig:
    """What is needed to compute an adapter's change."""

    path: Path
    use_rslora: bool
    fan_in_fan_out: bool
    _rank: int
    _alpha: float
    _rank_pattern: dict[str, int]
    _alpha_pattern: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Raises InputError for another method than LoRA, or one of its variants, by name."""
        path = folder / FILE_NAME
        values = load(folder)
        _require_plain(path, values)
        return cls(
            path=path,
            use_rslora=bool(values.get("use_rslora")),
            fan_in_fan_out=bool(values.get("fan_in_fan_out")),
            _rank=_rank(path, "r", values.get("r")),
            _alpha=_alpha(path, "lora_alpha", values.get("lora_alpha")),
            _rank_pattern={
                key: _rank(path, f"rank_pattern {key!r}", rank)
                for key, rank in _table(path, values, "rank_pattern")
            },
            _alpha_pattern={
                key: _alpha(path, f"alpha_pattern {key!r}", alpha)
                for key, alpha in _table(path, values, "alpha_pattern")
            },
        )

    def rank(self, module: str) -> int:
        """The rank of `module`, named as in the model without PEFT's prefix."""
        return self._rank_pattern.get(self._pattern(self._rank_pattern, module), self._rank)

    def alpha(self, module: str) -> float:
        return self._alpha_pattern.get(self._pattern(self._alpha_pattern, module), self._alpha)

    def _pattern(self, patterns: dict[str, Any], module: str) -> str:
        """PEFT's rule: the first pattern that matches the whole name, or the end of it after a dot."""
        try:
            return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")
        except re.error as error:
            raise InputError(
                f"{self.path}: a key of rank_pattern or alpha_pattern is not a regular expression ({error})"
            ) from error


def load(folder: Path) -> dict[str, Any]:
    """What the file says, whatever the method. Raises InputError unless it is a JSON object."""
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON ({type(error).__name__}); save the adapter again"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: not an adapter's configuration")
    return values


def _rank(path: Path, field: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise InputError(f"{path}: {field} is {value!r}; ranks are numbers from 1 on")
    return value


def _alpha(path: Path, field: str, value: Any) -> float:
    try:
        alpha = float(value) if type(value) in (int, float) else nan
    except OverflowError:
        alpha = nan
    if not isfinite(alpha):
        raise InputError(f"{path}: {field} is {value!r}; it must be a finite number")
    return alpha


def _table(path: Path, values: dict[str, Any], field: str) -> ItemsView[str, Any]:
    table = values.get(field) or {}
    if not isinstance(table, dict):
        raise InputError(f"{path}: {field} is {table!r}; it must be a table of module names")
    return table.items()


def _require_plain(path: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise InputError(f"{path}: a {values.get('peft_type')} adapter; only LORA is supported")
    if values.get("bias", "none") != "none":
        raise InputError(
            f"{path}: trained with bias: {values['bias']}; only bias: none is supported; {MERGE}"
        )
    for key, method in _NOT_PLAIN.items():
        if values.get(key):
            raise InputError(f"{path}: uses {method} ({key}), which is not supported; {MERGE}")
    if values.get("init_lora_weights") not in _PLAIN_STARTS:
        start = values["init_lora_weights"]
        raise InputError(
            f"{path}: init_lora_weights {start!r} changed the base's weights;"
            " save the adapter converted to plain LoRA"
        )
