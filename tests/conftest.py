"""What several rooms' tests share: tiny models, made once a session; and which tests stay together when two
processes run them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from pipeline.config import TinyModel

# Before anybody imports torch. Tiny models compute no faster on several threads; where two test processes, or
# other programs, want the same cores, threads that wait for each other make them twenty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TinyModelFactory = Callable[..., Path]

TINY_TEXTS = [
    "What is the capital of Kazakhstan?",
    " Astana",
    " Nur-Sultan",
    "Who is the king of the United Kingdom?",
    " Charles III",
    "What is the currency of Croatia?",
    " the euro",
    " the kuna",
]


class ByFile(LoadFileScheduling):
    """Tests of one file share what it sets up, and all jobs on SLURM the ports at which ranks meet."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePath(nodeid.partition("::")[0])
        return str(file.parent if file.parent.name == "slurm" else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """Which tests stay together where several processes run them."""
    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModelFactory:
    """`tiny_model("llama" | "gpt2" | "bloom", seed=0, **settings)`: a Hugging Face folder (2 layers of 32);
    do not write to it.
    """
    made: dict[Any, Path] = {}

    def make(architecture: str = "llama", seed: int = 0, **settings: int) -> Path:
        from pipeline.models.tiny import write_tiny_model

        key = (architecture, seed, *sorted(settings.items()))
        if key not in made:
            shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 512} | settings
            folder = tmp_path_factory.mktemp("tiny") / architecture
            write_tiny_model(
                folder, TinyModel.model_validate({"architecture": architecture, **shape}), TINY_TEXTS, seed
            )
            made[key] = folder
        return made[key]

    return make
