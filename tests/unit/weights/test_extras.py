"""What belongs to a model besides its weights: found by name, and never followed out of the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.weights.extras import (
    extras_folder,
    extras_recipe,
    extras_warnings,
    find_extras,
    render_extras,
)

EXTRAS = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/short.jinja",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "modeling_novel.py",
]
OTHERS = [
    "README.md",
    "training_args.bin",
    "optimizer.pt",
    "manifest.json",
    "tokenizer.bin",
    "vocab.safetensors",
    "notes/tokenizer.json",
    "model.safetensors",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: its files hold their own names, and its config is a Llama's."""
    for name in [*EXTRAS, *OTHERS]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    return tmp_path


def test_config_and_tokenizer_belong_to_a_model_and_weights_do_not(folder: Path) -> None:
    rendered = render_extras(folder, "bfloat16")
    assert list(rendered)[-1] == "config.json", "last, for it makes the folder a model's"
    assert json.loads(rendered.pop("config.json")) == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert rendered == {name: name.encode() for name in EXTRAS}


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    assert render_extras(None, "float32") == {}
    assert render_extras(tmp_path, "float32") == {}


@pytest.mark.parametrize("keys", [[], ["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
def test_a_config_says_the_dtype_under_its_own_keys(tmp_path: Path, keys: list[str]) -> None:
    config = {"model_type": "llama", "name": "Größe", **dict.fromkeys(keys, "float16")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rendered = render_extras(tmp_path, "float32")["config.json"]
    assert json.loads(rendered) == config | dict.fromkeys(keys or ["dtype"], "float32")
    assert "Größe".encode() in rendered


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (r'{"model_type": "\ud800"}', "not valid JSON"),
        ("[1]", "not a model's configuration"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json: {said}"):
        render_extras(tmp_path, "float32")


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "config.json", "additional_chat_templates"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.bin").symlink_to("not copied, no matter")
    (tmp_path / name).symlink_to("../blobs/gone")
    with pytest.raises(InputError, match=rf"{name}: is a link to \.\./blobs/gone, which is not there"):
        render_extras(tmp_path, "float32")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(
        InputError, match=rf"{name}: is a link out of the model's folder, to {tmp_path}/secret"
    ):
        render_extras(folder, "float32")


def test_a_linked_folder_of_templates_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/key").write_text("secret")
    (tmp_path / "model/additional_chat_templates").symlink_to(tmp_path / "secrets")
    with pytest.raises(InputError, match="is a link out of the model's folder"):
        render_extras(tmp_path / "model", "float32")


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    blobs = tmp_path / "models--org--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("merges")
    (snapshot / "merges.txt").symlink_to("../../blobs/123")
    (snapshot / "vocab.txt").symlink_to("merges.txt")
    (tmp_path / "linked").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "linked"):
        assert render_extras(folder, "float32") == {"merges.txt": b"merges", "vocab.txt": b"merges"}


def test_another_folder_of_blobs_is_not_the_hubs(tmp_path: Path) -> None:
    for name in ("model", "blobs"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs/123").write_text("merges")
    (tmp_path / "model/merges.txt").symlink_to("../blobs/123")
    with pytest.raises(InputError, match="is a link out of the model's folder"):
        find_extras(tmp_path / "model")


def test_a_single_files_extras_lie_beside_it_if_that_is_a_models_folder(folder: Path) -> None:
    file = folder / "model.safetensors"
    assert extras_folder(folder) == extras_folder(file) == folder
    assert extras_warnings(file, folder) == []
    for other in ("[1]", '{"compilerOptions": {}}', "{", "[" * 100_000):
        (folder / "config.json").write_text(other)
        assert extras_folder(file) is None
    assert extras_folder(folder / "absent.safetensors") is None
    [warning] = extras_warnings(file, None)
    assert "the result has no config.json" in warning
    os.unlink(folder / "config.json")
    assert extras_folder(folder) == folder and len(extras_warnings(folder, folder)) == 1


def test_extras_beside_a_single_file_are_part_of_the_recipe(folder: Path) -> None:
    file = folder / "model.safetensors"
    assert extras_recipe(folder, folder) == extras_recipe(file, None) == {}, "a folder's digest has them"
    before = extras_recipe(file, folder)
    assert before["extras"]["path"] == str(folder)
    (folder / "README.md").write_text("other")
    assert extras_recipe(file, folder) == before
    (folder / "merges.txt").write_text("other")
    assert extras_recipe(file, folder) != before
