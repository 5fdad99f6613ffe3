"""The evaluate stage: scores by hand, locality against the original, known facts, resuming, stopping."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact
from pipeline.config import Evaluate, Prompt
from pipeline.context import Context, Preempted
from pipeline.evaluate import record_files
from pipeline.evaluate.outputs import Forced, Outputs
from pipeline.evaluate.respondent import Respondent
from pipeline.evaluate.stage import knows_old, run
from pipeline.facts.fact import Fact, write_facts

Inputs = dict[str, Artifact]


def artifact(folder: Path, **result: Any) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    made = Artifact(folder)
    made.commit({"result": result})
    return made


def section(**settings: Any) -> dict[str, Any]:
    return {
        "evaluate": Evaluate(batch_size=1, max_new_tokens=6, **settings).model_dump(),
        "prompt": Prompt().model_dump(),
    }


@pytest.fixture
def inputs(tmp_path: Path, subject: Callable[..., Any], facts: list[Fact]) -> Inputs:
    made = artifact(tmp_path / "facts")
    write_facts(made.folder / "facts.jsonl", facts)
    return {
        "facts": made,
        "model": artifact(tmp_path / "model", model=str(subject("llama").folder), model_kind="folder"),
    }


def evaluate(inputs: Inputs, out: Path, **settings: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return run(section(**settings), inputs, out, Context())


def test_an_original_model(inputs: Inputs, tmp_path: Path, facts: list[Fact]) -> None:
    result = evaluate(inputs, tmp_path / "original")
    rows = record_files.read_rows(tmp_path / "original")
    assert [row["id"] for row in rows] == [fact.id for fact in facts]
    assert [path.name for path in (tmp_path / "original").iterdir()] == ["records.jsonl"]
    assert list(result["protocols"]) == ["token", "probability", "generation"]
    assert result["num_records"] == 4
    assert result["model_kind"] == "folder"
    assert result["prompt_example"] == "<s>What is the capital of Kazakhstan? Astana, as before"
    for name, scores in result["protocols"].items():
        by_hand = [
            row[name]["scores"]["reliability"]
            for row in rows
            if row[name]["scores"]["reliability"] is not None
        ]
        assert scores["reliability"] == pytest.approx(sum(by_hand) / len(by_hand))
        assert scores["counts"]["reliability"] == len(by_hand) == (3 if name == "probability" else 4)
    assert result["protocols"]["token"]["locality"] is None
    assert result["protocols"]["generation"]["locality"] is None
    assert result["protocols"]["probability"]["counts"]["locality"] == 1
    known, unknown = result["known"], result["unknown"]
    assert (known["num_known"], known["num_records"], unknown["num_records"]) == (0, 3, 3)
    assert result["warnings"] == ["the original model knew 0 of 3 old facts: nothing to forget"]
    json.dumps(result, allow_nan=False)


def test_locality_is_measured_against_the_original(
    inputs: Inputs, tmp_path: Path, subject: Callable[..., Any]
) -> None:
    evaluate(inputs, tmp_path / "original")
    inputs["reference"] = artifact(tmp_path / "original")
    same = evaluate(inputs, tmp_path / "same")
    assert same["protocols"]["token"]["locality"] == same["protocols"]["generation"]["locality"] == 1
    assert same["warnings"] == []
    # Now the original knew the first fact's old answer, and answered its locality questions otherwise.
    rows = record_files.read_rows(tmp_path / "original")
    rows[0]["knows_old"] = True
    rows[0]["generation"]["locality"][1] += " different"
    rows[0]["token"]["locality_argmax"][0][0] += 1
    (tmp_path / "original" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = evaluate(inputs, tmp_path / "changed")
    num_tokens = len(rows[0]["token"]["locality_argmax"][0])
    assert changed["protocols"]["generation"]["locality"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert changed["protocols"]["token"]["locality"] == pytest.approx((1 - 1 / num_tokens + 1 + 1) / 3)
    assert (changed["known"]["num_known"], changed["unknown"]["num_records"]) == (1, 2)
    assert changed["known"]["protocols"]["generation"]["locality"] == 0.5
    assert changed["unknown"]["protocols"]["generation"]["locality"] == 1


@pytest.mark.parametrize("protocol", ["token", "probability", "generation"])
def test_one_protocol_alone_gives_the_same_scores(inputs: Inputs, tmp_path: Path, protocol: str) -> None:
    together = evaluate(inputs, tmp_path / "together")
    alone = evaluate(inputs, tmp_path / "alone", protocols=[protocol])
    assert alone["protocols"] == {protocol: together["protocols"][protocol]}
    assert alone["known"]["num_records"] == 3


def test_rows_of_a_killed_run_are_not_computed_again(
    inputs: Inputs, tmp_path: Path, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(inputs, tmp_path / "whole")
    rows = record_files.read_rows(tmp_path / "whole")
    # Two ranks were killed, one of them while it wrote a row; one rank goes on.
    killed = tmp_path / "killed"
    killed.mkdir()
    record_files.append(killed, 0, [rows[2]])
    record_files.append(killed, 1, [rows[1], rows[3]])
    part = killed / "records-rank1.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    asked: list[str] = []
    ask = Respondent.ask

    def note(respondent: Respondent, some: list[Fact]) -> None:
        asked.extend(fact.id for fact in some)
        ask(respondent, some)

    monkeypatch.setattr(Respondent, "ask", note)
    assert evaluate(inputs, killed) == whole
    assert asked == [facts[0].id, facts[3].id]
    assert record_files.read_rows(killed) == rows


def test_nothing_is_loaded_if_all_rows_are_there(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(inputs, tmp_path / "out")
    monkeypatch.setattr("pipeline.evaluate.stage.load_model", None)
    assert evaluate(inputs, tmp_path / "out") == first


class StopAfter(Context):
    """Asks to stop at the second safe point."""

    num_asked = 0

    def should_stop(self) -> bool:
        self.num_asked += 1
        return self.num_asked == 2


def test_stops_between_rounds_and_goes_on(inputs: Inputs, tmp_path: Path) -> None:
    whole = evaluate(inputs, tmp_path / "whole")
    out = tmp_path / "stopped"
    out.mkdir()
    with pytest.raises(Preempted):
        run(section(), inputs, out, StopAfter())
    assert len(record_files.recover(out)) == 2, "a round of batch size 1 is two facts"
    assert evaluate(inputs, out) == whole


def test_knowing_is_saying_so_freely_where_the_model_was_asked_else_token_by_token() -> None:
    fact = Fact("1", "Capital?", "", ["Nur-Sultan", "Akmola"], "Astana")
    right = {("Capital?", "Nur-Sultan"): Forced([1, 2], [1, 2], -1)}
    wrong = {("Capital?", "Nur-Sultan"): Forced([1, 2], [1, 0], -1)}
    assert knows_old(fact, Outputs(right)) is True
    assert knows_old(fact, Outputs(wrong)) is False
    assert knows_old(fact, Outputs(wrong, {"Capital?": "akmola, of course"})) is True
    assert knows_old(fact, Outputs(right, {"Capital?": "Almaty"})) is False
    assert knows_old(Fact("2", "Capital?", "", [], "Astana"), Outputs(right)) is None
