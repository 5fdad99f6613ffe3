"""Extras: all that belongs to a model besides its weights (config, tokenizer, code), found and rendered."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.weights.digest import content_digest

CONFIG = "config.json"

_EXTRAS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


def render_extras(folder: Path | None, dtype: str) -> dict[str, bytes]:
    """{file name: content} to put beside weights of `dtype`; none without a folder.

    Files are as they are in `folder`, but for `config.json`, which says `dtype`.
    Raises InputError as `find_extras`.
    """
    if folder is None:
        return {}
    rendered = {}
    for path in find_extras(folder):
        is_config = path == folder / CONFIG
        content = _with_dtype(path, dtype) if is_config else path.read_bytes()
        rendered[str(path.relative_to(folder))] = content
    return rendered


def find_extras(folder: Path) -> list[Path]:
    """The files that belong to the model in `folder` besides its weights; `config.json`, if there is one, is
    last.

    Raises InputError for a link that leads to nothing, or out of the folder, and for a damaged config. Links
    to weights are followed anywhere, for nothing but weights can be read there. These files are copied
    whatever they hold. The hub's cache, whose folders are made of links, is no way out.
    """
    candidates = [path for pattern in _EXTRAS for path in sorted(folder.glob(pattern))]
    names = dict.fromkeys(path for path in candidates if path.suffix not in _WEIGHTS)
    # The config is last: whoever finds one may take the folder for a model.
    extras = [path for path in [*names, folder / CONFIG] if path.is_file()]
    _require_targets(folder)
    for path in extras:
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(folder)) and not _is_blob(target):
            raise InputError(
                f"{path}: is a link out of the model's folder, to {target}; put the file itself there"
            )
        if path.name == CONFIG:
            _read_config(path)
    return extras


def _require_targets(folder: Path) -> None:
    """Refuse links to nothing, which `glob` and `is_file` take for no file at all."""
    if not folder.is_dir():
        return
    patterns = (*_EXTRAS, "additional_chat_templates", CONFIG)
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        is_extra = path.suffix not in _WEIGHTS and any(map(path.match, patterns))
        if is_extra and path.is_symlink() and not path.exists():
            raise InputError(
                f"{path}: is a link to {os.readlink(path)}, which is not there;"
                " get the file again, or remove the link"
            )


def _is_blob(path: Path) -> bool:
    """Whether the hub's cache keeps a file's content at `path`.

    Its layout: `models--NAME/blobs/DIGEST`, beside `models--NAME/snapshots/`.
    """
    return path.parent.name == "blobs" and (path.parent.parent / "snapshots").is_dir()


def _read_config(path: Path) -> dict[str, Any]:
    """A config as it can be written again."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(config, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not valid JSON ({reason}); repair it or get it again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a model's configuration; get it again")
    return config


def _with_dtype(path: Path, dtype: str) -> bytes:
    """The config with `dtype` under the keys that it has for it: older configs say `torch_dtype`."""
    config = _read_config(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    changed = config | dict.fromkeys(keys, dtype)
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def extras_folder(base: Path) -> Path | None:
    """Where the extras of `base` lie: in itself; of a single file, beside it, if that is a model's folder.

    None: nowhere. Raises InputError as `find_extras`.
    """
    folder = base if base.is_dir() else base.parent
    if folder != base and not (base.is_file() and _is_model_config(folder / CONFIG)):
        return None
    find_extras(folder)
    return folder


def _is_model_config(path: Path) -> bool:
    """Whether a file is a model's config. Other programs have a `config.json`, too."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def extras_recipe(base: Path, folder: Path | None) -> dict[str, Any]:
    """The recipe's field for extras that lie beside a single file; a folder has them in its own digest."""
    if folder is None or folder == base:
        return {}
    digests = [(str(path.relative_to(folder)), content_digest(path)) for path in find_extras(folder)]
    digest = hashlib.sha256(repr(digests).encode()).hexdigest()[:16]
    return {"extras": {"path": str(folder.absolute()), "digest": digest}}


def extras_warnings(base: Path, folder: Path | None) -> list[str]:
    """What the caller should know of a result without a config."""
    if folder is not None and (folder / CONFIG).is_file():
        return []
    return [
        f"the result has no config.json, for {base} has none:"
        " from_pretrained needs the model's config and tokenizer beside the weights"
    ]
