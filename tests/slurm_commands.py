"""Stand-ins for SLURM's commands: they say what those of SLURM 22.05.8 were recorded to say."""

from __future__ import annotations

from pathlib import Path


class Recorded:
    """A folder of commands, first on the PATH."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, stdout: str = "", stderr: str = "", code: int = 0) -> None:
        """From now on the command `name` says this."""
        for kind, text in (("stdout", stdout), ("stderr", stderr)):
            (self._folder / f"{name}.{kind}").write_text(text)
        here = f"{self._folder}/{name}"
        lines = [f'echo "$*" >>{here}.calls', f"cat {here}.stdout", f"cat {here}.stderr >&2", f"exit {code}"]
        (self._folder / name).write_text("\n".join(["#!/bin/sh", *lines, ""]))
        (self._folder / name).chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call so far."""
        path = self._folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []
