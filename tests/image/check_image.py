"""`make image-test`: builds the container image with buildah on a bare Debian, and runs what it promises.

It needs root, Debian's buildah and debootstrap, and room in the temporary folder (TMPDIR): every layer is
stored whole. It needs no Docker and no GPU. What pip needs on this machine (mirrors, certificates, wheels) is
mounted while building: the Dockerfile knows nothing of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
NOT_IN_CONTEXT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "*.egg-info", ".*_cache", ".hypothesis"
)
SHORT = (
    "cluster.ranks=2",
    "methods=[flearn_ft]",
    "facts.limit=8",
    "teach.epochs=2",
    "full.epochs=1",
    "evaluate.max_new_tokens=4",
)
CONTENTS = {
    ".venv",
    "LICENSE",
    "README.md",
    "configs",
    "constraints.txt",
    "launch",
    "pipeline",
    "pyproject.toml",
    "setup.cfg",
}
SOURCES = ("--base", "base.safetensors", "--tuned", "tuned.safetensors")
SUBTRACTION = """
import torch
from safetensors.torch import load_file, save_file
base, change = torch.randn(64, 32), torch.randn(64, 32)
save_file({"w": base}, "base.safetensors")
save_file({"w": base + change}, "tuned.safetensors")
"""
DIFFERENCE = """
import torch
from safetensors.torch import load_file
base, tuned = load_file("base.safetensors")["w"], load_file("tuned.safetensors")["w"]
result = load_file("out/model.safetensors")["w"]
torch.testing.assert_close(result, base - 0.5 * (tuned - base), rtol=0, atol=0)
"""


class Failure(Exception):
    """What the image does not do, in one line."""


class Buildah:
    """buildah with all its storage in one folder."""

    def __init__(self, folder: Path) -> None:
        self._storage = [
            "--root",
            str(folder / "storage"),
            "--runroot",
            str(folder / "run"),
            "--storage-driver",
            "vfs",
        ]

    def __call__(self, *arguments: str) -> str:
        """Run one command; returns stdout and stderr. Raises Failure with both if it fails."""
        done = subprocess.run(
            ["buildah", *self._storage, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise Failure(
                f"buildah {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout[-8000:]}"
            )
        return done.stdout


class Container:
    """A container of the image, run as Docker would: its entrypoint, user and folder, nothing mounted."""

    def __init__(self, buildah: Buildah, image: str) -> None:
        self._buildah = buildah
        self.config = _config(buildah, image)["config"]
        self._name = buildah("from", "--pull-never", image).split()[-1]

    def remove(self) -> None:
        self._buildah("rm", self._name)

    def flearn(self, *arguments: str, user: str | None = None) -> str:
        return self.run(*self.config["Entrypoint"], *arguments, user=user)

    def run(self, *command: str, user: str | None = None) -> str:
        options = ["--hostname", "localhost"]  # Docker would make the container's name resolve
        options += [] if user is None else ["--user", user]
        return self._buildah("run", "--isolation", "chroot", *options, self._name, "--", *command)


def main() -> None:
    _check_this_machine()
    # By an exception, so that the temporary folder is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with tempfile.TemporaryDirectory(prefix="flearn-image-") as name:
        folder = Path(name)
        buildah = Buildah(folder)
        with _step("a base: Debian bookworm by debootstrap"):
            _make_base(folder / "debian", buildah)
        context = folder / "context"
        shutil.copytree(ROOT, context, ignore=NOT_IN_CONTEXT)
        settings = _pip_settings(folder / "pip.conf")
        with _step("the image"):
            _build(buildah, context, settings, "first")
        container = Container(buildah, "first")
        for check in (
            _user,
            _contents,
            _no_compiler,
            _dry_run,
            _subtraction,
            _health,
            _quickstart,
            _any_user,
        ):
            with _step(check.__doc__ or check.__name__):
                check(container)
        container.remove()
        with _step("a changed source file re-installs no dependency"):
            _cached(buildah, context, settings)
    print("the image does what it should")


def _check_this_machine() -> None:
    if os.geteuid() != 0:
        raise Failure("run it as root: without Docker, buildah needs to chroot")
    for program in ("buildah", "debootstrap"):
        if shutil.which(program) is None:
            raise Failure(f"{program} is missing: apt-get install buildah debootstrap")


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(f"{title} ... ", end="", flush=True)
    start = time.monotonic()
    yield
    print(f"ok ({time.monotonic() - start:.0f} s)", flush=True)


def _make_base(root: Path, buildah: Buildah) -> None:
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", str(root), MIRROR],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise Failure(f"debootstrap from {MIRROR} failed:\n{done.stdout[-4000:]}")
    container = buildah("from", "scratch").split()[-1]
    buildah("add", "--quiet", container, str(root), "/")
    buildah(
        "config",
        "--cmd",
        "bash",
        "--env",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        container,
    )
    buildah("commit", "--quiet", "--rm", container, "base")
    shutil.rmtree(root)


def _pip_settings(path: Path) -> list[str]:
    """buildah's options that give pip in the build what it has here: a pip.conf, and the files that it names.

    The pip.conf is made at `path`. The files are mounted below /mnt: in their own places they would be in the
    way of Debian's packages.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.split("=", 1) for line in listed.splitlines() if "=" in line]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))  # a variable goes before a file
    settings = {
        key.rpartition(".")[2]: value.strip("'\"").replace("\\n", " ").split() for key, value in pairs
    }
    mounts = {f"{path}:/etc/pip.conf:ro"}
    lines = []
    for key, words in settings.items():
        for index, word in enumerate(words):
            scheme, file = (
                ("file://", word.removeprefix("file://")) if word.startswith("file://") else ("", word)
            )
            if file.startswith("/") and os.path.exists(file):
                words[index] = f"{scheme}/mnt{file}"
                place = os.path.dirname(file) if scheme else file  # an index's wheels lie beside it
                mounts.add(f"{place}:/mnt{place}:ro")
        lines.append(f"{key} = {' '.join(words)}\n")
    path.write_text("[global]\n" + "".join(lines))
    return [option for mount in sorted(mounts) for option in ("--volume", mount)]


def _build(buildah: Buildah, context: Path, settings: list[str], image: str) -> str:
    options = [
        "--isolation",
        "chroot",
        "--layers",
        "--format",
        "docker",
        "--pull-never",
        "--build-arg",
        "BASE_IMAGE=localhost/base",
    ]
    return buildah("bud", *options, *settings, "--tag", image, str(context))


def _config(buildah: Buildah, image: str) -> dict[str, Any]:
    inspected: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", image))
    docker: dict[str, Any] = inspected["Docker"]
    return docker


def _user(container: Container) -> None:
    """it is not root, and its working folder is its own to write in"""
    if container.run("id", "--user").strip() == "0":
        raise Failure("the image runs as root")
    container.run("sh", "-c", "touch written && touch runs/written && touch .cache/written")


def _contents(container: Container) -> None:
    """of the project it has what it needs, and no more"""
    found = set(container.run("ls", "-A", "/opt/flearn").split())
    if found != CONTENTS:
        raise Failure(
            f"/opt/flearn: {', '.join(sorted(found ^ CONTENTS))} should not be there, or is missing"
        )


def _no_compiler(container: Container) -> None:
    """there is no compiler, so that what follows shows that none is missed"""
    found = container.run("sh", "-c", "command -v cc gcc c++ g++ clang nvcc; true").split()
    if found:
        raise Failure(f"found {', '.join(found)}: the checks below would prove nothing")


def _dry_run(container: Container) -> None:
    """flearn run configs/quickstart.yaml --dry-run"""
    text = container.flearn("run", "configs/quickstart.yaml", "--dry-run")
    if "to do  teach-" not in text:
        raise Failure(f"no plan:\n{text}")


def _subtraction(container: Container) -> None:
    """flearn delta subtract, to the last bit; flearn delta verify"""
    container.run("python3", "-c", SUBTRACTION)
    container.flearn("delta", "subtract", *SOURCES, "--scale", "0.5", "--out", "out")
    container.run("python3", "-c", DIFFERENCE)
    container.flearn("delta", "verify", "out")


def _any_user(container: Container) -> None:
    """a user id without a name (docker run --user) can run as well"""
    _run(container, "--set", "name=unnamed", "--set", "cluster.ranks=1", user="54321:54321")


def _health(container: Container) -> None:
    """the health check"""
    kind, *command = container.config["Healthcheck"]["Test"]
    if kind != "CMD":
        raise Failure(f"a health check of kind {kind}")
    container.run(*command)


def _quickstart(container: Container) -> None:
    """a short quickstart on 2 CPU ranks, without a warning"""
    _run(container)
    container.run("test", "-f", "runs/quickstart/logs/rank1.log")


def _run(container: Container, *options: str, user: str | None = None) -> None:
    short = [option for field in SHORT for option in ("--set", field)]
    text = container.flearn("run", "configs/quickstart.yaml", *short, *options, user=user)
    alarming = [
        line
        for line in text.splitlines()
        if re.search(r"warning|error:|traceback|compil", line, re.IGNORECASE)
    ]
    if alarming or "report.html" not in text:
        raise Failure("it said:\n" + "\n".join(alarming or [text]))


def _cached(buildah: Buildah, context: Path, settings: list[str]) -> None:
    with (context / "pipeline" / "run.py").open("a") as file:
        file.write("\n# changed\n")
    _build(buildah, context, settings, "second")
    first, second = (_config(buildah, image)["rootfs"]["diff_ids"] for image in ("first", "second"))
    # The last two layers are the source, and its installation.
    if first[:-2] != second[:-2] or first == second:
        raise Failure(f"layers before:\n{first}\nafter:\n{second}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"failed\nimage-test: {failure}")
