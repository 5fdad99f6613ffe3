"""Whether a folder holds a model that can be fine-tuned here, and what it is.

Whatever the model lacks is one clear line, said before hours of fine-tuning and not after.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from pipeline.errors import InputError
from pipeline.models.load import empty_model
from pipeline.weights.extras import find_extras
from pipeline.weights.formats.open import open_source

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def describe(folder: Path) -> dict[str, Any]:
    """What the model in `folder` is: architecture, sizes, dtype, digests of the tokenizer's files, warnings.

    Raises InputError if it is not a decoder-only causal language model with a usable config, weights and a
    fast tokenizer with an EOS token.
    """
    config = _read_config(folder)
    architecture = _require_causal(folder, config)
    find_extras(folder)  # refuses links that the subtraction would not copy to its result
    _require_buildable(folder)
    num_parameters, dtype = _weights(folder)
    tokenizer = _tokenizer(folder)
    num_rows = config.get("vocab_size")
    return {
        "architecture": architecture,
        "model_type": config["model_type"],
        "num_parameters": num_parameters,
        "dtype": dtype,
        "vocab_size": num_rows,
        "tokenizer_size": len(tokenizer),
        "eos_token": tokenizer.eos_token,
        "tokenizer_files": _digests(folder),
        "warnings": _warnings(num_rows, len(tokenizer)),
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"model.path: no such folder: {folder}")
    path = folder / "config.json"
    if not path.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        what = "is a LoRA adapter, not a whole model" if is_adapter else "has no config.json"
        raise InputError(f"model.path: {folder} {what}; give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: no model_type in it; this is not a model's configuration")
    return config


def _require_causal(folder: Path, config: dict[str, Any]) -> str:
    """The name of the causal model's class."""
    model_type = config["model_type"]
    named = config.get("architectures") or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    # A family that also fills masks (BERT) has a causal class, too: it counts only where the config names it.
    fills_masks = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and causal not in named
    if causal is None or config.get("is_encoder_decoder") or fills_masks:
        raise InputError(
            f"model.path: {folder} holds a {', '.join(named) or model_type}, "
            "not a decoder-only causal language model"
        )
    if "quantization_config" in config:
        raise InputError(
            f"model.path: {folder} holds quantised weights, which cannot be fine-tuned in full; "
            "give the unquantised model"
        )
    return str(causal)


def _require_buildable(folder: Path) -> None:
    # On the meta device, from the config alone: it takes no memory.
    try:
        empty_model(folder, "meta", torch.float32)
    except Exception as error:
        raise unusable_config(folder / "config.json", error) from None


def unusable_config(config: Path | str, error: Exception) -> InputError:
    """What to raise where transformers fails at a config's values: it does so with any kind of exception."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return InputError(
        f"{config}: transformers cannot make a model of it ({reason}); "
        "correct its values, or get the file again"
    )


def _weights(folder: Path) -> tuple[int, str]:
    """The number of floating-point elements, and the dtype of most of them. Reads the files' headers only."""
    source = open_source(folder)
    count: Counter[str] = Counter()
    for info in source.tensors.values():
        count[info.dtype] += info.num_elements if info.is_floating else 0
    source.close()
    return count.total(), count.most_common(1)[0][0]


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path: {folder} has no usable tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise InputError(
            f"model.path: {folder} has no fast tokenizer; make a tokenizer.json of it with transformers"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model.path: the tokenizer in {folder} has no EOS token: "
            f"set eos_token in {folder / 'tokenizer_config.json'}"
        )
    return tokenizer


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each tokenizer file: another version gives other scores, and nothing else would tell."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _warnings(num_rows: int | None, num_tokens: int) -> list[str]:
    if num_rows is None or num_tokens <= num_rows:
        return []
    return [
        f"the tokenizer has {num_tokens} tokens but the model {num_rows} embeddings: "
        "a text that uses the surplus ones will fail"
    ]
