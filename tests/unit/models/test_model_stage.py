"""The model stage: tiny, local and hub models, and one clear line for whatever a folder lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifact import Artifact
from pipeline.context import Context
from pipeline.errors import InputError
from pipeline.facts.fact import Fact, write_facts
from pipeline.models.stage import run

TinyModelFactory = Callable[..., Path]


def run_stage(path: Path | str, out: Path, revision: str | None = None) -> dict[str, Any]:
    return run(
        {"model": {"path": str(path), "revision": revision, "tiny": None}, "seed": 0}, {}, out, Context()
    )


@pytest.fixture
def folder(tiny_model: TinyModelFactory, tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tiny_model_is_made_from_the_facts(tmp_path: Path) -> None:
    facts = tmp_path / "facts"
    facts.mkdir()
    write_facts(
        facts / "facts.jsonl",
        [Fact("1", "What is the capital of Kazakhstan?", "Kazakhstan", ["Almaty"], "Astana")] * 2,
    )
    tiny = {"architecture": "gpt2", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 400}
    section = {"model": {"path": None, "revision": None, "tiny": tiny}, "seed": 3}
    out = tmp_path / "model-0"
    (out / ".model.tmp").mkdir(parents=True)  # what a killed run left
    reported = run(section, {"facts": Artifact(facts)}, out, Context())
    assert [path.name for path in out.iterdir()] == ["model"]
    assert (
        reported["model"] == "model"
        and reported["model_kind"] == "folder"
        and reported["architecture"] == "GPT2LMHeadModel"
    )
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert reported["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert len(AutoTokenizer.from_pretrained(out / "model").tokenize(" Almaty")) == 1
    assert run(section, {"facts": Artifact(facts)}, out, Context()) == reported


def test_a_local_model_stays_where_it_is(folder: Path, tmp_path: Path) -> None:
    reported = run_stage(folder, tmp_path / "out")
    assert reported["model"] == str(folder) and reported["dtype"] == "float32" and reported["warnings"] == []
    assert set(reported["tokenizer_files"]) == {"tokenizer.json", "tokenizer_config.json"}
    json.dumps(reported)
    assert not (tmp_path / "out").exists()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def an_encoder(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])


def an_encoder_decoder(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])


def quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_eos(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)


def a_link_out(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.parent / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to("../elsewhere.json")


def a_link_to_nothing(folder: Path) -> None:
    (folder / "merges.txt").symlink_to("../blobs/gone")


def no_heads(folder: Path) -> None:
    edit_json(folder / "config.json", num_attention_heads=0)


def a_size_in_words(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size="large")


def an_unknown_activation(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_act="none")


def another_programs_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (no_config, "has no config.json"),
        (an_adapter, "LoRA adapter, not a whole model"),
        (not_json, "not JSON"),
        (no_weights, "no weights found"),
        (an_encoder, "BertForMaskedLM, not a decoder-only"),
        (an_encoder_decoder, "T5ForConditionalGeneration, not a decoder-only"),
        (quantised, "quantised"),
        (no_tokenizer, "no usable tokenizer"),
        (no_eos, "no EOS token"),
        (a_link_out, "tokenizer.json: is a link out of the model's folder"),
        (a_link_to_nothing, r"merges.txt: is a link to ../blobs/gone, which is not there"),
        (no_heads, r"config.json: transformers cannot make a model of it \(ZeroDivisionError"),
        (a_size_in_words, r"config.json: transformers cannot make a model of it .*expected int, got str"),
        (an_unknown_activation, r"config.json: transformers cannot make a model of it \(KeyError: 'none'"),
        (another_programs_tokenizer_config, "no usable tokenizer"),
    ],
)
def test_one_clear_line(folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        run_stage(folder, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_more_tokens_than_embeddings_is_a_warning(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    (warning,) = run_stage(folder, tmp_path / "out")["warnings"]
    assert f"{size + 1} tokens" in warning and f"{size} embeddings" in warning


def test_a_hub_model_comes_from_the_cache(
    tiny_model: TinyModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reported = run_stage("someone/tiny", tmp_path / "out")
    assert reported["hub"] == "someone/tiny" and reported["hub_commit"] == commit
    assert reported["model"] == str(repository / "snapshots" / commit)


def test_a_hub_model_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf download someone/absent --revision v2"):
        run_stage("someone/absent", tmp_path / "out", revision="v2")
