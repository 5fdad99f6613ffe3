"""Undo: the base back from theta' and the tuned model, by the same subtraction with another scale.

theta' = base - s * (tuned - base) gives base = theta' - t * (tuned - theta') with t = -s / (1 + s). An
adapter holds tuned - base itself, so there t = -s. A float32 base comes back within rounding, a 16-bit one
bit for bit but for weights that are 0 or many thousand times smaller than their change. So it is not the
result that is compared: theta' and the tuned model are, as they are read, with the digests that were noted
when theta' was made, before a shard is put into its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.context import Progress
from pipeline.delta.manifest import make_recipe, read_manifest
from pipeline.delta.subtract import require_outside, require_part, write_virtual
from pipeline.delta.survival import Survival
from pipeline.delta.task_vector import open_vector
from pipeline.delta.virtual import Notes, Observed, Virtual
from pipeline.errors import InputError
from pipeline.weights.digest import content_digest
from pipeline.weights.extras import extras_folder
from pipeline.weights.floats import Array
from pipeline.weights.folder_writer import Outcome
from pipeline.weights.formats.adapter import is_adapter
from pipeline.weights.formats.open import open_source
from pipeline.weights.io.direct import Io
from pipeline.weights.journal import Part
from pipeline.weights.shard import parse_size

MOST_AMPLIFIED = 16.0
"""Up to how many times the rounding errors of theta' may grow: near scale -1, theta' is the tuned model and
hardly holds the base.
"""


def undo(
    forgotten: Path,
    out: Path,
    *,
    tuned: Path | None = None,
    max_shard_size: str | int = "2GB",
    memory: str | int = "256MiB",
    io: Io = "auto",
    part: Part = (0, 1),
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Write the base of `forgotten`, a result of `subtract`, into `out`, each tensor in its old dtype.

    Args:
        tuned: The tuned model or adapter that was subtracted; None: where the manifest says that it is.

    Raises:
        InputError: The base cannot be had back, and why; or as `subtract`.
    """
    manifest = read_manifest(forgotten)
    if manifest is None:
        raise InputError(
            f"{forgotten}: holds no finished result of `flearn delta subtract`,"
            " or its manifest.json is damaged"
        )
    _require_float32(forgotten, manifest)
    # Before any digest is compared: an older flearn's may be made in another way.
    _require_noted_inputs(forgotten, manifest)
    recipe = manifest["recipe"]
    tuned = Path(recipe["tuned"]["path"]) if tuned is None else tuned
    if not tuned.exists():
        raise InputError(f"{tuned}: the tuned model is not there; say with --tuned where it is")
    # A sample, so that the wrong model is named at once; every byte is compared as it is read.
    if content_digest(tuned) != recipe["tuned"]["digest"]:
        raise InputError(
            f"{tuned}: is not the tuned model that was subtracted (or it has changed since):"
            " the base cannot be had back from it"
        )
    require_outside(out, forgotten, tuned)
    require_part(part)
    dtypes = {name: tensor["base_dtype"] for name, tensor in manifest["tensors"].items()}
    scale = undoing_scale(recipe["scale"], is_adapter(tuned))
    with closing(_Undoing(forgotten, tuned, out, manifest, scale, dtypes, io)) as virtual:
        undoing = make_recipe(forgotten, tuned, virtual.formula, dtypes, parse_size(max_shard_size))
        return write_virtual(
            virtual,
            out,
            undoing | {"undoes": True},
            extras_folder(forgotten),
            [],
            memory=memory,
            io=io,
            part=part,
            announce=announce,
            progress=progress,
            base_name="the result",
        )


class _Undoing(Virtual):
    """The base, computed from theta' and the task vector.

    Its shards are refused if they were made of other bytes.
    """

    def __init__(
        self,
        forgotten: Path,
        tuned: Path,
        out: Path,
        manifest: Mapping[str, Any],
        scale: float,
        dtypes: Mapping[str, str],
        io: Io,
    ) -> None:
        """Raises InputError if theta' has other tensors than its manifest says."""
        theta = open_source(forgotten)
        differing = sorted(theta.tensors.keys() ^ manifest["tensors"].keys())
        if differing:
            theta.close()
            raise InputError(
                f"{forgotten}: {differing[0]} is not in both its manifest.json and its weights:"
                " the result is damaged"
            )
        super().__init__(theta, open_vector(tuned, theta, io), scale, dtypes, io=io)
        self.notes_inputs = True
        self._paths = forgotten, tuned, out
        self._right = manifest["tensors"]

    def read_noting(self, name: str, start: int, stop: int, out: Array) -> Observed:
        """As `Virtual.read_noting`, but what is not finite there was so written by nobody: it has changed."""
        try:
            return super().read_noting(name, start, stop, out)
        except InputError as error:
            forgotten, tuned, place = self._paths
            raise InputError(
                f"{error}: {forgotten} or {tuned} has changed, so the base cannot be had back;"
                f" `flearn delta verify {forgotten}` says what differs;"
                f" delete {place} before trying with other inputs"
            ) from error

    def warnings(self, survivals: Mapping[str, Survival], dtype: str) -> list[str]:
        """None: what survives of taking back does not matter."""
        return []

    def notes(self, name: str) -> Notes:
        return _CheckedNotes(name, self._right[name], *self._paths)


class _CheckedNotes(Notes):
    """Compares what was read of a tensor with what was noted of it when theta' was made."""

    def __init__(self, name: str, right: Mapping[str, Any], forgotten: Path, tuned: Path, out: Path) -> None:
        super().__init__()
        self._name, self._right = name, right
        self._forgotten, self._tuned = forgotten, tuned
        self._advice = f"delete {out} before trying with other inputs"  # it is begun by now

    def finish(self) -> dict[str, Any]:
        """As `Notes.finish`. Raises InputError if the bytes are not those that were written, and
        subtracted.
        """
        noted = super().finish()
        read, right = noted["inputs"], self._right
        if read["base"] != right["blake3"]:
            raise InputError(
                f"{self._forgotten}: {self._name}: its bytes are not those that were written,"
                " so the base cannot be"
                f" had back; `flearn delta verify {self._forgotten}` says what differs; {self._advice}"
            )
        if read.get("tuned") != right["inputs"].get("tuned"):
            raise InputError(
                f"{self._tuned}: {self._name} has other values than when it was subtracted;"
                f" give the tuned model as it was then; {self._advice}"
            )
        return noted


def undoing_scale(scale: float, is_delta: bool) -> float:
    """The scale that takes theta' back to the base.

    Raises InputError where theta' no longer holds enough of the base.
    """
    if is_delta:
        return -scale
    if (1 + abs(scale)) > MOST_AMPLIFIED * abs(1 + scale):
        raise InputError(
            f"scale {scale}: theta' is (nearly) the tuned model, and hardly holds the base;"
            " it cannot be had back within rounding"
        )
    return -scale / (1 + scale)


def say_how_exact(forgotten: Path, back: Path) -> str:
    """How many tensors of `back`, which `undo` made of `forgotten`, are the base's bit for bit."""
    result, base = read_manifest(forgotten), read_manifest(back)
    assert result is not None and base is not None
    num_equal = sum(
        tensor["blake3"] == result["tensors"][name]["inputs"]["base"]
        for name, tensor in base["tensors"].items()
    )
    num_tensors = len(base["tensors"])
    return f"{num_equal} of {num_tensors} tensors are the base's bit for bit" + (
        "" if num_equal == num_tensors else ", the others within float32 rounding"
    )


def _require_noted_inputs(forgotten: Path, manifest: dict[str, Any]) -> None:
    """Raises InputError unless the manifest says what each tensor was made of."""
    if not all("base" in tensor.get("inputs", {}) for tensor in manifest["tensors"].values()):
        raise InputError(
            f"{forgotten}: was made by an older flearn, which did not note what it read:"
            " whether the base is right could not be told."
            " Make it again"
        )


def _require_float32(forgotten: Path, manifest: dict[str, Any]) -> None:
    narrow = [
        name
        for name, tensor in manifest["tensors"].items()
        if tensor["survival"] is not None and tensor["dtype"] not in ("float32", "float64")
    ]
    if narrow:
        raise InputError(
            f"{forgotten}: was stored in {manifest['dtype']}, which rounded the result:"
            " the base cannot be had back within float32 rounding"
            f" ({len(narrow)} tensors, such as {narrow[0]})"
        )
