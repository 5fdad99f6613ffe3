"""The step log: one JSON line per optimizer step; a resumed training goes on in it after its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pipeline.artifact import write_text


@dataclass(frozen=True)
class Step:
    """What one optimizer step did, over all ranks."""

    step: int
    """From 1."""
    epoch: int
    """From 1."""
    loss: float
    """Mean cross-entropy in nats per answer token (EOS included), before the step."""
    lr: float
    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    tokens: int
    """Real tokens (prompt, answer and EOS, no padding) that went through."""
    tokens_per_second: float


class StepLog:
    """Appends steps to a file; only rank 0 has one. Used as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def open(self, num_steps: int) -> None:
        """Begin to append after the first `num_steps` steps. A killed run's later lines are dropped."""
        kept = [json.dumps(asdict(step)) + "\n" for step in read_steps(self.path) if step.step <= num_steps]
        write_text(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: Step) -> None:
        """Append one line; it is in the file when this returns."""
        assert self._file is not None
        self._file.write(json.dumps(asdict(step)) + "\n")
        self._file.flush()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_steps(path: Path) -> list[Step]:
    """The steps in the log at `path`; none without a file. A last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [Step(**json.loads(line)) for line in lines if line.endswith("\n")]


def summarise(steps: list[Step]) -> dict[str, Any]:
    """The log in a few figures, for the stage's result."""
    tokens = sum(step.tokens for step in steps)
    seconds = sum(step.tokens / step.tokens_per_second for step in steps)
    return {
        "first_loss": steps[0].loss,
        "final_loss": steps[-1].loss,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
    }
