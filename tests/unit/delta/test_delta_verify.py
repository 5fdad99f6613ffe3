from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import formula, layered, load, nudged, save, write_pair
from safetensors.torch import load_file, save_file

from pipeline.artifact import write_json
from pipeline.delta import manifest as module
from pipeline.delta.manifest import ARITHMETIC_VERSION
from pipeline.delta.subtract import subtract
from pipeline.delta.verify import Verdict, verify
from pipeline.errors import InputError
from pipeline.weights import folder_writer, slices
from pipeline.weights.io.direct import InputFile, Io
from pipeline.weights.io.pread import PreadFile
from pipeline.weights.io.staged import StagedFile

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=20_000)
    return tmp_path / "out"


def shard_of(out: Path, name: str = NAME) -> Path:
    return out / json.loads((out / "manifest.json").read_text())["tensors"][name]["file"]


def change(out: Path, values: torch.Tensor, name: str = NAME) -> None:
    """Replace a tensor's values in its shard, which stays a sound file."""
    path = shard_of(out, name)
    save_file(load_file(path) | {name: values}, path, metadata={"format": "pt"})


def only_problem(out: Path) -> str:
    verdict = verify(out)
    assert len(verdict.problems) == 1, verdict
    return verdict.problems[0]


def test_a_sound_result_has_no_problems(out: Path) -> None:
    assert verify(out) == Verdict([], [])


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16", "rounding": "stochastic"}, {"dtype": "same"}, {"dtype": "float16"}]
)
def test_so_has_one_in_16_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.7, tmp_path / "out", seed=5, **options)
    assert verify(tmp_path / "out") == Verdict([], [])


def test_results_are_read_from_the_disk_wherever_it_can_be(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the page cache, in which they lie: that would not show what has become of the disk's own."""
    kinds: dict[str, set[bool]] = {}

    class Watched(InputFile):
        def __init__(self, file: PreadFile, io: Io, may_use_cache: bool) -> None:
            super().__init__(file, io, may_use_cache)
            kinds.setdefault(file.path.parent.name, set()).add(may_use_cache)

    monkeypatch.setattr(slices, "InputFile", Watched)
    assert verify(out) == Verdict([], [])
    assert kinds == {"out": {False}, "base": {True}, "tuned": {True}}


def test_a_flipped_bit_is_found(out: Path) -> None:
    values = load(out)[NAME]
    right = values.flatten()[5].item()
    values.view(torch.int32).view(-1)[5] ^= 1 << 20
    wrong = values.flatten()[5].item()
    change(out, values)
    problem = only_problem(out)
    assert NAME in problem
    assert (
        f"1 of {values.numel()} elements differ; element 5 is {wrong:.9g} instead of {right:.9g}" in problem
    )


def test_another_scales_tensor_is_recognised(out: Path, tmp_path: Path) -> None:
    change(out, formula(load(tmp_path / "base"), load(tmp_path / "tuned"), 0.8)[NAME])
    assert "was made with scale 0.8 instead of 0.3" in only_problem(out)


def test_the_bases_values_are_recognised(out: Path, tmp_path: Path) -> None:
    change(out, load(tmp_path / "base")[NAME].float())
    assert "holds the base's values" in only_problem(out)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(out: Path, value: float) -> None:
    values = load(out)[NAME]
    values[0, 5] += 1
    values[1, 2] = value
    right = load(out)[NAME][1, 2].item()
    change(out, values)
    problem = only_problem(out)
    assert f"{NAME} in {shard_of(out).name}: 1 elements are NaN or infinite" in problem
    assert problem.endswith(
        f"2 of {values.numel()} elements differ; element 35 is {value} instead of {right:.9g}"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_zeros_sign_is_a_difference(tmp_path: Path, dtype: str) -> None:
    """In a tensor that is not changed otherwise, so that it equals the base, but for that sign."""
    base = layered(0)
    base[NAME][0, :3] = torch.tensor([0.0, -0.0, 0.0])
    tuned = nudged(base, 1) | {NAME: base[NAME].float()}
    subtract(
        save(tmp_path / "base", base), save(tmp_path / "tuned", tuned), 0.3, tmp_path / "out", dtype=dtype
    )
    values = load(tmp_path / "out")[NAME]
    values[0, :3] *= -1
    change(tmp_path / "out", values)
    assert (
        f"3 of {values.numel()} elements differ, in the sign of zero alone; element 0 is -0 instead of 0"
        in only_problem(tmp_path / "out")
    )


def test_an_empty_tensor_is_named(out: Path) -> None:
    change(out, torch.empty(0))
    assert f"{NAME} in {shard_of(out).name}: is empty" in only_problem(out)


def test_a_missing_a_stray_and_a_truncated_shard_are_named(out: Path) -> None:
    (out / "stray.safetensors").write_bytes(b"")
    shard_of(out).unlink()
    norm = shard_of(out, "lm_head.weight")
    norm.write_bytes(norm.read_bytes()[:-1])
    problems = "\n".join(verify(out).problems)
    assert "stray.safetensors: is not in the manifest" in problems
    assert f"{shard_of(out).name}: is missing" in problems
    assert f"{norm}: truncated" in problems


def test_a_tensor_in_another_shard_is_named(out: Path) -> None:
    path = shard_of(out)
    tensors = load_file(path)
    moved = tensors.pop(NAME)
    save_file(tensors | {"stranger": moved}, path)
    problems = "\n".join(verify(out).problems)
    assert f"{NAME}: is missing from {path.name}" in problems
    assert f"stranger: is a stranger in {path.name}" in problems


def test_a_wrong_index_is_named(out: Path) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"][NAME] = "model-00001-of-00005.safetensors"
    write_json(out / "model.safetensors.index.json", index)
    assert only_problem(out).startswith(f"model.safetensors.index.json: says that {NAME} lies in model-00001")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": ["x"]}}', "{}"])
def test_an_index_that_is_none_is_named(out: Path, text: str) -> None:
    (out / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in only_problem(out)


def test_a_config_that_is_lost_or_changed_is_named(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    (base / "config.json").write_text('{"model_type": "llama"}')
    subtract(base, tuned, 0.3, tmp_path / "out")
    assert verify(tmp_path / "out") == Verdict([], [])
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace("llama", "gpt2"))
    assert only_problem(tmp_path / "out") == "config.json: its bytes are not those that were written"
    config.unlink()
    assert only_problem(tmp_path / "out") == "config.json: is missing"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    del manifest["extras"]  # an older one
    write_json(tmp_path / "out/manifest.json", manifest)
    assert verify(tmp_path / "out") == Verdict([], [])


def test_a_doctored_manifest_is_found_out(out: Path) -> None:
    """The file and its digest fit each other, but not the models they were made from."""
    values = load(out)[NAME] + 1
    change(out, values)
    manifest = json.loads((out / "manifest.json").read_text())
    from blake3 import blake3

    manifest["tensors"][NAME]["blake3"] = blake3(values.numpy().tobytes()).hexdigest()
    write_json(out / "manifest.json", manifest)
    assert only_problem(out) == f"{NAME}: the manifest's digest is not that of base - scale * (tuned - base)"


def test_a_result_that_equals_its_base_is_a_problem(tmp_path: Path) -> None:
    base = layered(0)
    subtract(
        save(tmp_path / "base", base),
        save(tmp_path / "tuned", nudged(base, 1, std=1e-9)),
        0.1,
        tmp_path / "out",
        dtype="same",
    )
    assert only_problem(tmp_path / "out") == "the result equals its base: every change was lost in bfloat16"


def test_inputs_that_have_gone_are_noted_and_the_rest_is_checked(out: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "tuned")
    verdict = verify(out)
    assert verdict.is_good
    assert (
        verdict.summary == "as it was written; not compared with its inputs:"
        f" the tuned model {tmp_path / 'tuned'} is not there"
    )
    shutil.rmtree(tmp_path / "base")
    assert f"the base model {tmp_path / 'base'} is not there, the tuned model" in verify(out).summary
    change(out, load(out)[NAME] + 1)
    assert "its bytes are not those that were written" in only_problem(out)
    assert verify(out).summary.startswith("1 differ; not compared with its inputs")


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_an_input_that_changed_where_its_digest_does_not_look_is_named(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "content_digest", lambda path: "0")
    monkeypatch.setattr("pipeline.delta.verify.content_digest", lambda path: "0")
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    values = load(tmp_path / role)
    values[NAME][3, 4] += 1
    save(tmp_path / role, values)
    assert only_problem(tmp_path / "out") == f"{NAME}: the {role} model has changed since the result was made"


def test_an_input_that_has_changed_is_a_problem(out: Path, tmp_path: Path) -> None:
    save(tmp_path / "tuned", nudged(layered(0), 2))
    assert only_problem(out).endswith("has changed since the result was made")


def test_a_result_of_another_version_is_compared_with_its_manifest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inputs' digests may be defined otherwise: they accuse nobody."""
    base, tuned = write_pair(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "ARITHMETIC_VERSION", ARITHMETIC_VERSION - 1)
        patch.setattr(module, "content_digest", lambda path: "another")
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=20_000)
    verdict = verify(tmp_path / "out")
    assert verdict.is_good
    assert (
        verdict.summary
        == "as it was written; not compared with its inputs: it was made by another version of flearn"
    )
    change(tmp_path / "out", load(tmp_path / "out")[NAME] + 1)
    assert "its bytes are not those that were written" in only_problem(tmp_path / "out")


class Failing(StagedFile):
    """A disk that is full at the fourth shard."""

    def __init__(self, path: Path, *rest: Any) -> None:
        if "-00004-of" in path.name:
            raise OSError(28, "No space left on device", str(path))
        super().__init__(path, *rest)


def test_an_unfinished_result_of_another_version_is_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = write_pair(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(module, "ARITHMETIC_VERSION", ARITHMETIC_VERSION - 1)
        patch.setattr(folder_writer, "StagedFile", Failing)
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=20_000)
    verdict = verify(tmp_path / "out")
    assert verdict.problems == [] and not verdict.is_good
    assert verdict.summary == (
        "not finished, and begun by another version of flearn, which this one cannot go on with:"
        f" delete {tmp_path / 'out'} and run the command again"
    )


def test_an_unfinished_results_shards_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    monkeypatch.setattr(folder_writer, "StagedFile", Failing)
    monkeypatch.setattr("pipeline.weights.stream.MAX_THREADS", 1)
    with pytest.raises(OSError, match="No space left"):
        subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=20_000)
    verdict = verify(tmp_path / "out")
    assert verdict.problems == [] and not verdict.is_good
    assert (
        verdict.summary == "not finished, 3 shards are done and as they were written;"
        " run the same command again, it goes on from there"
    )
    path = next((tmp_path / "out").glob("model-00001*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "its bytes are not those that were written" in only_problem(tmp_path / "out")
    assert verify(tmp_path / "out").summary.startswith(
        "1 differ; not finished, 3 shards are done; run the same"
    )


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path)
    with pytest.raises(InputError, match="holds no result"):
        verify(base)


def test_a_forget_stages_folder_is_told_from_its_result(out: Path, tmp_path: Path) -> None:
    (tmp_path / "forget-1").mkdir()
    out.rename(tmp_path / "forget-1/model")
    with pytest.raises(InputError, match=r"verify .*forget-1/model"):
        verify(tmp_path / "forget-1")


def test_an_input_that_became_nan_where_its_digest_does_not_look_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends nothing: what else differs is named, too."""
    monkeypatch.setattr(module, "content_digest", lambda path: "0")
    monkeypatch.setattr("pipeline.delta.verify.content_digest", lambda path: "0")
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out")
    values = load(tuned)
    values[NAME][3, 4] = torch.nan
    save(tuned, values)
    change(tmp_path / "out", load(tmp_path / "out")["model.norm.weight"] + 1, "model.norm.weight")
    problems = verify(tmp_path / "out").problems
    assert f"{NAME}: the tuned model has changed since the result was made" in problems
    assert len(problems) == 2 and any("model.norm.weight" in problem for problem in problems)


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path)
    subtract(base, tuned, 0.3, tmp_path / "out", max_shard_size=1000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 10
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    try:
        assert verify(tmp_path / "out", io="direct") == Verdict([], [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_unfinished_model_is_not_called_an_older_flearns(tmp_path: Path) -> None:
    (tmp_path / "model/.incomplete/recipe").mkdir(parents=True)
    (tmp_path / "model/.incomplete/recipe/recipe.json").write_text('{"artifact": "teach-1"}')
    with pytest.raises(InputError, match="an unfinished model"):
        verify(tmp_path / "model")
