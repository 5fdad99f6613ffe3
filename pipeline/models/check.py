"""Whether a folder holds a model that can be fine-tuned here, and what it is; one clear line for whatever it
lacks.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.models.load import empty_model
from pipeline.weights.open import open_source
from pipeline.weights.writer import find_extras

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """What the model in `folder` is, for the manifest: architecture, sizes, dtype, digests of the tokenizer's
    files, warnings.

    Raises InputError if it is not a decoder-only causal language model with a usable config, weights and a
    fast tokenizer with an EOS token.
    """
    config = _read_config(folder)
    architecture = _require_causal(folder, config)
    find_extras(folder)  # what a result may not copy is said before anything is trained
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
        what = (
            "is a LoRA adapter, not a whole model"
            if (folder / "adapter_config.json").is_file()
            else "has no config.json"
        )
        raise InputError(f"model.path: {folder} {what}; give the folder of a Hugging Face model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: no model_type in it; this is not a model's configuration")
    return config


def _require_causal(folder: Path, config: dict[str, Any]) -> str:
    """The name of the causal model's class. Families that also fill masks (BERT) count only where the config
    says causal.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    model_type = config["model_type"]
    named = config.get("architectures") or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if (
        causal is None
        or config.get("is_encoder_decoder")
        or (model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and causal not in named)
    ):
        raise InputError(
            f"model.path: {folder} holds a {', '.join(named) or model_type}, not a decoder-only causal language model"
        )
    if "quantization_config" in config:
        raise InputError(
            f"model.path: {folder} holds quantised weights, which cannot be fine-tuned in full; give the unquantised model"
        )
    return str(causal)


def _require_buildable(folder: Path) -> None:
    """Make the model on the meta device, from its config alone: it takes no memory."""
    import torch

    try:
        empty_model(folder, "meta", torch.float32)
    except Exception as error:
        raise unusable_config(folder / "config.json", error) from None


def unusable_config(config: Path | str, error: Exception) -> InputError:
    """What to raise where transformers fails at a config's values; it does so with any exception, a division
    by zero for no heads.
    """
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return InputError(
        f"{config}: transformers cannot make a model of it ({reason}); correct its values, or get the file again"
    )


def _weights(folder: Path) -> tuple[int, str]:
    """The number of floating-point elements, and the dtype of most of them. Reads no more than the files'
    headers.
    """
    source = open_source(folder)
    count: Counter[str] = Counter()
    for info in source.tensors.values():
        count[info.dtype] += info.num_elements if info.is_floating else 0
    source.close()
    return count.total(), count.most_common(1)[0][0]


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # damaged files raise anything
        raise InputError(
            f"model.path: {folder} has no usable tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(
            f"model.path: {folder} has no fast tokenizer; make a tokenizer.json of it with transformers"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model.path: the tokenizer in {folder} has no EOS token: set eos_token in {folder / 'tokenizer_config.json'}"
        )
    return tokenizer


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each tokenizer file: another version of one of them gives other scores, and nothing else
    tells.
    """
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in _TOKENIZER_FILES
        if (folder / name).is_file()
    }


def _warnings(num_rows: int | None, num_tokens: int) -> list[str]:
    if num_rows is None or num_tokens <= num_rows:
        return []
    return [
        f"the tokenizer has {num_tokens} tokens but the model {num_rows} embeddings: a text that uses the surplus ones will fail"
    ]
