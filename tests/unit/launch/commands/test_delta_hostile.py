"""Files that are damaged or meant to do harm: one line, exit code 2, nothing run, nothing written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import formula, load, write_pair
from safetensors.torch import save_file
from zero_checkpoint import Checkpoint

from launch.cli import main


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What `flearn delta WORDS` says, which is one line that any terminal takes."""
    capsys.readouterr()
    assert main(["delta", *map(str, words)]) == 2
    told = capsys.readouterr().err
    assert told.endswith("\n") and told[:-1].isprintable(), told
    return told


def words(base: Path, tuned: Path, out: Path) -> list[str]:
    return ["subtract", "--base", str(base), "--tuned", str(tuned), "--out", str(out), "--scale", "0.3"]


def subtract(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """What it says of `folder`/base and `folder`/tuned."""
    return refused(capsys, *words(folder / "base", folder / "tuned", folder / "out"), *options)


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


FILES = {
    "not JSON": header(b"{]"),
    "a header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "a tensor of 2^60 elements": header({"a": entry(0, 1 << 62, [1 << 60])}, b"x" * 8),
    "sizes that wrap around": header({"a": entry(0, 8, [1 << 31, 1 << 31, 8])}, b"x" * 8),
    "beyond the file": header({"a": entry(8, 16)}, b"x" * 8),
    "overlapping": header({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12),
    "cut": header({"a": entry(0, 8)}, b"x" * 7),
    "a name that colours the terminal": header({"\x1b[31mred": entry(0, 8)}, b"x" * 8),
    "a name of half a surrogate pair": header({"\ud800": entry(0, 8)}, b"x" * 8),
    "a name of two lines": header({"a\nflearn: all is well": entry(0, 8)}, b"x" * 8),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("role", ["base", "tuned"])
def test_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, name: str) -> None:
    write_pair(tmp_path)
    (tmp_path / role / "model.safetensors").write_bytes(FILES[name])
    told = subtract(capsys, tmp_path)
    assert "model.safetensors" in told or "tensor is named" in told
    assert not (tmp_path / "out").exists()
    refused(capsys, "inspect", tmp_path / role)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write_pair(tmp_path)
    (tuned / "model.safetensors").unlink()
    Checkpoint(2, 2, [load(base)]).write(tuned)
    [path] = tuned.rglob("*rank_1*_optim_states.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"ds_config": Evil(tmp_path / "ran")}, path)
    told = subtract(capsys, tmp_path)
    assert path.name in told and "nothing was run" in told
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_an_index_that_leads_out_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write_pair(tmp_path)
    (tuned / "model.safetensors").unlink()
    weight_map = dict.fromkeys(load(base), "../base/model.safetensors")
    (tuned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "not a file name inside the folder" in subtract(capsys, tmp_path)


def test_a_snapshot_of_the_hubs_cache_is_a_model(tmp_path: Path) -> None:
    """Its files are links to ../../blobs; the result has files of its own."""
    base, tuned = write_pair(tmp_path)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "hub/blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub/snapshots/abc"
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        (tmp_path / "hub/blobs" / path.stem).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.stem}")
    out = tmp_path / "out"
    assert main(["delta", *words(snapshot, tuned, out)]) == 0
    right = formula(load(base), load(tuned), 0.3)
    assert all(values.equal(right[name]) for name, values in load(out).items())
    assert not any(path.is_symlink() for path in out.iterdir())
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "additional_chat_templates"])
def test_a_file_to_copy_that_is_a_link_out_of_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base, tuned = write_pair(tmp_path)
    secret = tmp_path / "secrets/key.json"
    secret.parent.mkdir()
    secret.write_text('{"model_type": "llama"}')
    (base / name).symlink_to(secret if name.endswith(".json") else secret.parent)
    told = subtract(capsys, tmp_path)
    assert name in told and f"a link out of the model's folder, to {secret}" in told
    assert not (tmp_path / "out").exists()
    (base / name).unlink()
    (base / "files").mkdir()
    (base / "files/settings.json").write_text(secret.read_text())
    (base / name).symlink_to("files/settings.json" if name.endswith(".json") else "files")
    assert main(["delta", *words(base, tuned, tmp_path / "out")]) == 0
    assert [path for path in (tmp_path / "out").rglob("*.json") if "llama" in path.read_text()]


CONFIGS = ["{", "[]", "[" * 100_000, r'{"name": "\ud800"}']


@pytest.mark.parametrize("text", CONFIGS)
def test_a_damaged_config_is_met_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    base, _ = write_pair(tmp_path)
    (base / "config.json").write_text(text)
    assert f"{base / 'config.json'}: not" in subtract(capsys, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_link_out_of_the_folder_beside_a_single_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base, _ = write_pair(tmp_path)
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / name).unlink(missing_ok=True)
    (tmp_path / "secret.json").write_text('{"model_type": "llama"}')
    (base / name).symlink_to(tmp_path / "secret.json")
    assert f"{name}: is a link out" in subtract(capsys, tmp_path, "--base", str(base / "model.safetensors"))
    assert not (tmp_path / "out").exists()


def test_a_link_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tuned = write_pair(tmp_path)
    (tuned / "model.safetensors").unlink()
    (tuned / "model.safetensors").symlink_to("../blobs/gone")
    assert "model.safetensors" in subtract(capsys, tmp_path)


ADAPTERS = [
    "{",
    "[]",
    '{"peft_type": "LORA", "r": 0, "lora_alpha": 8}',
    '{"peft_type": "LORA", "r": Infinity, "lora_alpha": 8}',
]


@pytest.mark.parametrize("config", ADAPTERS)
def test_adapter_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, tuned = write_pair(tmp_path)
    (tuned / "model.safetensors").unlink()
    factors = {f"model.norm.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"}
    save_file(factors, tuned / "adapter_model.safetensors")
    (tuned / "adapter_config.json").write_text(config)
    assert "adapter_config.json" in subtract(capsys, tmp_path)
    if config in ADAPTERS[:2]:
        assert "adapter_config.json" in refused(capsys, "inspect", tuned)


@pytest.mark.parametrize("architectures", ['{"0": "x"}', "3", '"Llama"', "[3]"])
def test_a_config_whose_architectures_are_no_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architectures: str
) -> None:
    base, _ = write_pair(tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "tuned/model.safetensors")
    (base / "config.json").write_text(f'{{"architectures": {architectures}, "model_type": "llama"}}')
    assert "architectures" in subtract(capsys, tmp_path)


MANIFESTS = [
    "{",
    "[]",
    "{}",
    "[" * 100_000,
    '{"recipe": 5}',
    '{"recipe": {}, "shards": 3}',
    '{"stage": "teach", "facts": {}}',
]


@pytest.mark.parametrize("text", MANIFESTS)
def test_another_programs_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    base, _ = write_pair(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(text)
    assert "not made by this command" in subtract(capsys, tmp_path)
    assert "no result" in refused(capsys, "verify", tmp_path / "out")
    assert "no finished result" in refused(capsys, "undo", tmp_path / "out", "--out", tmp_path / "back")
    (base / "manifest.json").write_text(text)
    assert main(["delta", "inspect", str(base)]) == 0


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_manifest_whose_paths_colour_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    base, tuned = write_pair(tmp_path)
    out, path = tmp_path / "out", "a\x1b[31m\x9b2J\nflearn: all is well \ud800"
    assert main(["delta", *words(base, tuned, out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["recipe"]["tuned"]["path"] = path
    (out / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(["delta", "inspect", str(out), *options]) == 0
    told = capsys.readouterr().out
    assert all(line.isprintable() for line in told.split("\n"))
    if options:
        assert json.loads(told)["made_by"]["tuned"]["path"] == path
    else:
        assert r"a\x1b[31m\x9b2J\nflearn: all is well \ud800" in told


def damaged_manifests() -> dict[str, Callable[[dict[str, Any]], object]]:
    return {
        "no base": lambda manifest: manifest["recipe"].pop("base"),
        "a scale in words": lambda manifest: manifest["recipe"].update(scale="much"),
        "a scale that is no number": lambda manifest: manifest["recipe"].update(scale=float("nan")),
        "a scale beyond float32": lambda manifest: manifest["recipe"].update(scale=10**400),
        "a dtype of nobody": lambda manifest: manifest["recipe"].update(dtype="float7"),
        "a table of no dtypes": lambda manifest: manifest["recipe"].update(dtype={"lm_head.weight": []}),
        "rounding up": lambda manifest: manifest["recipe"].update(rounding="up"),
        "a base's dtype of nobody": lambda manifest: manifest["tensors"]["lm_head.weight"].update(
            base_dtype="zzz"
        ),
        "shards are texts": lambda manifest: manifest.update(shards=["model.safetensors"]),
        "a tensor in no shard": lambda manifest: manifest["tensors"]["lm_head.weight"].update(file="../x"),
        "no survival": lambda manifest: manifest.update(survival={}),
        "extras are a list": lambda manifest: manifest.update(extras=["config.json"]),
        "an extra's digest is none": lambda manifest: manifest.update(extras={"config.json": 5}),
    }


@pytest.mark.parametrize("name", damaged_manifests())
def test_a_damaged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    base, tuned = write_pair(tmp_path)
    out = tmp_path / "out"
    assert main(["delta", *words(base, tuned, out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    damaged_manifests()[name](manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in subtract(capsys, tmp_path)
    assert "manifest.json" in refused(capsys, "verify", out)
    assert "manifest.json" in refused(capsys, "undo", out, "--out", tmp_path / "back")


def test_direct_io_that_the_file_system_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading may be direct where writing may not: nothing of the output's size stays behind."""
    write_pair(tmp_path)
    whole = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT and flags & os.O_WRONLY:
            raise OSError(errno.EINVAL, "no")
        return whole(path, flags & ~os.O_DIRECT, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert "--io buffered" in subtract(capsys, tmp_path, "--io", "direct")
    written = [path.name for path in (tmp_path / "out").rglob("*")]
    assert not [name for name in written if name.endswith((".tmp", ".safetensors"))]


def test_an_output_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path)
    (tmp_path / "out").write_text("a file")
    assert "is not a folder" in subtract(capsys, tmp_path)
