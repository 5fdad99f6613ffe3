from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from delta_models import Tensors, formula, layered, load, nudged, save, write_pair
from safetensors import safe_open

from pipeline.context import Progress
from pipeline.delta.arithmetic import Arithmetic
from pipeline.delta.subtract import subtract
from pipeline.errors import InputError
from pipeline.weights import folder_writer, stream
from pipeline.weights.io.direct import PAGE
from pipeline.weights.io.staged import StagedFile

SHARD = 20_000


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the small models here are many chunks for several threads."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 2 * PAGE)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def equal(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


@pytest.mark.parametrize("scale", [0.3, -1.5, 0.0])
@pytest.mark.parametrize("max_shard_size", ["1GB", SHARD])
def test_float32_output_is_the_formula_bit_for_bit(
    tmp_path: Path, scale: float, max_shard_size: str | int
) -> None:
    base, tuned = write_pair(tmp_path)
    outcome = subtract(base, tuned, scale, tmp_path / "out", max_shard_size=max_shard_size)
    assert equal(load(tmp_path / "out"), formula(load(base), load(tuned), scale))
    assert outcome.state == "written"
    assert outcome.manifest == json.loads((tmp_path / "out/manifest.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "same"])
def test_narrow_output_is_the_formula_rounded_once(tmp_path: Path, dtype: str) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.7, tmp_path / "out", dtype=dtype)
    narrow = torch.float16 if dtype == "float16" else torch.bfloat16
    right = {name: values.to(narrow) for name, values in formula(load(base), load(tuned), 0.7).items()}
    assert equal(load(tmp_path / "out"), right)


def test_scale_0_in_the_bases_dtype_is_the_base(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    outcome = subtract(base, tuned, 0.0, tmp_path / "out", dtype="same")
    assert equal(load(tmp_path / "out"), load(base))
    assert "scale is 0" in outcome.manifest["warnings"][0]


def test_scale_0_gives_float64_and_negative_zeros_back_bit_for_bit(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(9, 1001, dtype=torch.float64), "b.weight": torch.full((5, 7), -0.0)}
    tuned = {"a.weight": base["a.weight"] + 0.01, "b.weight": torch.full((5, 7), -0.01)}
    save(tmp_path / "base", base)
    manifest = subtract(
        tmp_path / "base", save(tmp_path / "tuned", tuned), 0.0, tmp_path / "out", dtype="same"
    ).manifest
    assert (tmp_path / "out/model.safetensors").read_bytes()[-9000:] == (
        tmp_path / "base/model.safetensors"
    ).read_bytes()[-9000:]
    assert all(
        torch.equal(values.view(torch.int32), base[name].view(torch.int32))
        for name, values in load(tmp_path / "out").items()
    )
    assert manifest["survival"]["share_changed"] == 0 and manifest["survival"]["delta_norm"] == pytest.approx(
        0.01 * 9044**0.5, rel=1e-3
    )


def test_the_index_and_the_manifest_say_where_tensors_are(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    manifest = subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD).manifest
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(manifest["shards"]) > 2
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 - safe_open has no `in`
        assert manifest["tensors"][name]["file"] == file
    assert index["weight_map"].keys() == manifest["tensors"].keys() == load(base).keys()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_memory_threads_io_and_parts_do_not_change_a_byte(tmp_path: Path, rounding: Any) -> None:
    base, tuned = write_pair(tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "rounding": rounding, "max_shard_size": SHARD}
    subtract(base, tuned, 0.7, tmp_path / "whole", **options)
    right = contents(tmp_path / "whole")
    others: list[dict[str, Any]] = [
        {"memory": "11MiB"},
        {"memory": "40MiB", "io": "buffered"},
        {"io": "auto"},
    ]
    for number, other in enumerate(others):
        subtract(base, tuned, 0.7, tmp_path / f"{number}", **options, **other)
        assert contents(tmp_path / f"{number}") == right
    states = [subtract(base, tuned, 0.7, tmp_path / "parts", part=(i, 3), **options).state for i in (1, 2, 0)]
    assert states == ["waiting", "waiting", "written"]
    assert contents(tmp_path / "parts") == right


def test_the_same_part_twice_at_once_does_no_harm(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.7, tmp_path / "whole", max_shard_size=SHARD)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            subtract(base, tuned, 0.7, tmp_path / "out", max_shard_size=SHARD, part=(i, 2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS and some FUSE systems have none."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    base, tuned = write_pair(tmp_path)
    assert [
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD, part=(i, 2)).state for i in (0, 1)
    ] == ["waiting", "written"]
    with pytest.raises(InputError, match=r"scale 0\.3 instead of 0\.4"):
        subtract(base, tuned, 0.4, tmp_path / "out", max_shard_size=SHARD)


def test_a_finished_result_is_found_and_not_written_again(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    first = subtract(base, tuned, 0.3, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = subtract(base, tuned, 0.3, tmp_path / "out")
    assert second.state == "found"
    assert second.manifest == first.manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


def test_a_finished_result_that_lost_or_changed_a_file_is_refused(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD)
    right = contents(tmp_path / "out")
    one, two, three = (f"model-{number:05d}-of-00005.safetensors" for number in (2, 4, 5))
    (tmp_path / "out" / one).unlink()
    os.truncate(tmp_path / "out" / two, 1000)
    (tmp_path / "out" / three).write_bytes(right[three].replace(b"layers.", b"lawyers"))
    (tmp_path / "out/model.safetensors.index.json").unlink()
    with pytest.raises(InputError) as caught:
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD)
    changed = f"{two} has another size or header, {three} has another size or header"
    lost = f"{one} is missing, {changed}, model.safetensors.index.json is missing"
    assert (
        str(caught.value) == f"{tmp_path}/out: was finished, but {lost};"
        f" restore what is lost, or delete {tmp_path}/out and run again"
    )
    for name, content in right.items():
        (tmp_path / "out" / name).write_bytes(content)
    assert subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD).state == "found"


def test_what_a_killed_twin_left_in_a_finished_result_goes_when_it_is_found(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    right = contents(tmp_path / "out")
    (tmp_path / "out/.model.safetensors.abcd1234.tmp").write_bytes(b"half of it")
    assert subtract(base, tuned, 0.3, tmp_path / "out").state == "found"
    assert contents(tmp_path / "out") == right


ONE_THREAD: dict[str, Any] = {"max_shard_size": SHARD, "memory": "11MiB"}
"""So that the shards before the failing one are done."""


def fail_at_shard(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The disk fills up when the shard of that number is opened."""

    class Failing(StagedFile):
        def __init__(self, path: Path, *rest: Any) -> None:
            if f"-{number:05d}-of" in path.name:
                raise OSError(28, "No space left on device", str(path))
            super().__init__(path, *rest)

    monkeypatch.setattr(folder_writer, "StagedFile", Failing)


def test_a_failed_run_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "whole", max_shard_size=SHARD)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at_shard(patch, 3)
        subtract(base, tuned, 0.3, tmp_path / "out", **ONE_THREAD)
    left = contents(tmp_path / "out")
    assert any(name.endswith(".safetensors") for name in left)
    assert not any(
        name.endswith((".tmp", "00003-of-00005.safetensors")) or name == "manifest.json" for name in left
    )
    kept = next(tmp_path.glob("out/model-00001*"))
    written = kept.stat().st_mtime_ns
    subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert kept.stat().st_mtime_ns == written


def test_an_unfinished_folder_is_refused_by_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at_shard(patch, 2)
        subtract(base, tuned, 0.3, tmp_path / "out", **ONE_THREAD)
    with pytest.raises(InputError, match="not whole"):
        subtract(tmp_path / "out", tuned, 0.3, tmp_path / "other")


def test_a_lost_or_shortened_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "whole", max_shard_size=SHARD)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at_shard(patch, 4)
        subtract(base, tuned, 0.3, tmp_path / "out", **ONE_THREAD)
    next(tmp_path.glob("out/model-00001*")).unlink()
    os.truncate(next(tmp_path.glob("out/model-00002*")), 1000)
    subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    other = save(tmp_path / "other", nudged(layered(0), 7))
    subtract(base, tuned, 0.3, tmp_path / "done", max_shard_size=SHARD)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at_shard(patch, 3)
        subtract(base, tuned, 0.3, tmp_path / "begun", **ONE_THREAD)
    for state in ("done", "begun"):
        before = contents(tmp_path / state)
        changes: list[tuple[dict[str, Any], str]] = [
            ({"scale": 0.4}, "scale 0.3 instead of 0.4"),
            ({"tuned": other}, "tuned .*tuned instead of .*other"),
            ({"dtype": "same"}, "dtype float32 instead of same"),
            ({"rounding": "stochastic"}, "rounding nearest instead of stochastic"),
        ]
        for change, said in changes:
            right: dict[str, Any] = {
                "base": base,
                "tuned": tuned,
                "scale": 0.3,
                "out": tmp_path / state,
                "max_shard_size": SHARD,
            }
            with pytest.raises(InputError, match=said):
                subtract(**right | change)
        assert contents(tmp_path / state) == before


def test_a_moved_model_is_the_same_model(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    tuned.rename(tmp_path / "moved")
    assert subtract(base, tmp_path / "moved", 0.3, tmp_path / "out").state == "found"


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(notes.txt\)"):
        subtract(base, tuned, 0.3, tmp_path / "out")
    with pytest.raises(InputError, match="is not a folder"):
        subtract(base, tuned, 0.3, tmp_path / "out/notes.txt")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_number_that_is_not_finite_stops_it(tmp_path: Path, side: str, value: float) -> None:
    write_pair(tmp_path)
    tensors = load(tmp_path / side)
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = value
    save(tmp_path / side, tensors)
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight: NaN or infinity"):
        subtract(tmp_path / "base", tmp_path / "tuned", 0.3, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_overflow_of_float16_stops_it(tmp_path: Path) -> None:
    base = {"w.weight": torch.full((8, 8), 60000.0)}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", {"w.weight": torch.full((8, 8), 50000.0)})
    with pytest.raises(InputError, match=r"w\.weight: NaN or infinity"):
        subtract(tmp_path / "base", tmp_path / "tuned", 1.0, tmp_path / "out", dtype="float16")


def test_buffers_are_the_bases(tmp_path: Path) -> None:
    base = layered(0) | {
        "h.0.attn.bias": torch.ones(1, 1, 4, 4).tril(),
        "count": torch.arange(5),
        "flag": torch.tensor([True, False, True]),
    }
    tuned = nudged(layered(0), 1) | {
        "h.0.attn.bias": torch.zeros(1, 1, 4, 4),
        "count": torch.arange(5) + 1,
        "flag": torch.tensor([False] * 3),
    }
    manifest = subtract(
        save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), 0.5, tmp_path / "out"
    ).manifest
    made = load(tmp_path / "out")
    for name in ("h.0.attn.bias", "count", "flag"):
        assert torch.equal(made[name], base[name])
        assert manifest["tensors"][name]["survival"] is None
    assert made["count"].dtype == torch.int64


def test_what_lies_beside_a_single_file_comes_along_if_there_is_a_config(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    file = base / "model.safetensors"
    manifest = subtract(file, tuned, 0.3, tmp_path / "bare").manifest
    assert contents(tmp_path / "bare").keys() == {"manifest.json", "model.safetensors"}
    assert "the result has no config.json" in manifest["warnings"][-1]
    (base / "config.json").write_text('{"model_type": "llama"}')
    manifest = subtract(file, tuned, 0.3, tmp_path / "out").manifest
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "model_type": "llama",
        "dtype": "float32",
    }
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert manifest["warnings"] == []
    assert subtract(file, tuned, 0.3, tmp_path / "out").state == "found"
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"of another recipe \(extras .*base with other contents\)"):
        subtract(file, tuned, 0.3, tmp_path / "out")


@pytest.mark.parametrize("config", ["[1]", '{"compilerOptions": {}}', "{", '"model_type"', "[" * 100_000])
def test_another_programs_config_beside_a_single_file_is_no_models(tmp_path: Path, config: str) -> None:
    base, tuned = write_pair(tmp_path)
    (base / "config.json").write_text(config)
    (base / "tokenizer.txt").write_text("another program's")
    manifest = subtract(base / "model.safetensors", tuned, 0.3, tmp_path / "out").manifest
    assert contents(tmp_path / "out").keys() == {"manifest.json", "model.safetensors"}
    assert "the result has no config.json" in manifest["warnings"][-1]


@pytest.mark.parametrize("name", ["config.json", "additional_chat_templates/short.jinja"])
def test_a_finished_result_that_lost_what_came_along_is_refused(tmp_path: Path, name: str) -> None:
    base, tuned = write_pair(tmp_path)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/short.jinja").write_text("{{ messages }}")
    assert subtract(base, tuned, 0.3, tmp_path / "out").manifest["extras"].keys() == {
        "config.json",
        "additional_chat_templates/short.jinja",
    }
    (tmp_path / "out" / name).unlink()
    with pytest.raises(InputError, match=f"was finished, but {name} is missing; restore"):
        subtract(base, tuned, 0.3, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    del manifest["extras"]  # an older one
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    assert subtract(base, tuned, 0.3, tmp_path / "out").state == "found"


def test_what_belongs_to_the_base_comes_along(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    (base / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (base / "tokenizer.json").write_text("{}")
    subtract(base, tuned, 0.3, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": "float32",
    }
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "1MiB"}, r"--memory.*need \d+MiB"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"part": (-1, 3)}, "part 0/3"),
        ({"part": (3, 3)}, "part 4/3"),
        ({"scale": float("nan")}, "scale nan"),
        ({"inside": "base"}, "lies in .*base, which is read"),
        ({"inside": "tuned/checkpoints"}, "lies in .*tuned, which is read"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    base, tuned = write_pair(tmp_path)
    out = tmp_path / options.pop("inside", ".") / "out"
    arguments: dict[str, Any] = {"scale": 0.3, "out": out} | options
    with pytest.raises(InputError, match=said):
        subtract(base, tuned, **arguments)
    assert not out.exists()


def leave_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(folder_writer, "disk_usage", lambda path: SimpleNamespace(free=num_bytes))


def test_a_full_disk_is_met_before_anything_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    leave_free(monkeypatch, 50_000)
    with pytest.raises(InputError, match=r"out: 71\.9 kB are needed and 50\.0 kB are free"):
        subtract(base, tuned, 0.3, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert subtract(base, tuned, 0.3, tmp_path / "out", dtype="same").state == "written"


def test_shards_that_are_there_need_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_at_shard(patch, 4)
        subtract(base, tuned, 0.3, tmp_path / "out", **ONE_THREAD)
    lines: list[str] = []
    leave_free(monkeypatch, 40_000)
    assert (
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD, announce=lines.append).state
        == "written"
    )
    assert re.fullmatch(
        r"writes 30\.0 kB in 2 of 5 shards, 7\d\.\d kB in all \(float32; .*\); 40\.0 kB are free", lines[0]
    )
    assert (
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD, announce=lines.append).state
        == "found"
    )
    assert len(lines) == 1


class Recorded(Progress):
    """What a progress was told."""

    def __init__(self) -> None:
        super().__init__("", shown=False)
        self.total = 0
        self.amounts: list[int] = []

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.amounts.append(amount)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    progress = Recorded()
    manifest = subtract(base, tuned, 0.3, tmp_path / "out", progress=progress).manifest
    assert progress.total == manifest["num_bytes"] == sum(progress.amounts)
    assert min(progress.amounts) >= 0


class Interrupted(Progress):
    """Ctrl-C while the first chunks are computed."""

    def __init__(self) -> None:
        super().__init__("", shown=False)

    def advance(self, amount: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt


def test_an_interrupt_leaves_no_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: threading.Event
) -> None:
    base, tuned = write_pair(tmp_path)
    whole = Arithmetic.subtract

    def late(*arguments: Any) -> Any:
        assert failed.wait(60)
        return whole(*arguments)

    monkeypatch.setattr(Arithmetic, "subtract", late)
    with pytest.raises(KeyboardInterrupt):
        subtract(base, tuned, 0.3, tmp_path / "out", progress=Interrupted())
    assert not any(name.endswith((".tmp", ".safetensors")) for name in contents(tmp_path / "out"))


def test_a_slower_twin_leaves_a_finished_output_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = write_pair(tmp_path)
    twins: list[str] = []

    class Overtaken(StagedFile):
        """By a twin that does everything before the second shard is opened."""

        def __init__(self, path: Path, *rest: Any) -> None:
            if "00002" in path.name and not twins:
                twins.append("runs")
                twins.append(subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD).state)
            super().__init__(path, *rest)

    monkeypatch.setattr(folder_writer, "StagedFile", Overtaken)
    subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=SHARD)
    assert twins == ["runs", "written"]
    assert not (tmp_path / "out/.incomplete").exists()
    assert equal(load(tmp_path / "out"), formula(load(base), load(tuned), 0.3))


def test_a_scale_beyond_float32_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    with pytest.raises(InputError, match="scale 1e\\+39"):
        subtract(base, tuned, 1e39, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a folder"):
        subtract(base, tuned, 0.3, tmp_path / "out")
