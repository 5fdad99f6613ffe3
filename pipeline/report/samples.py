"""A few records with what each model said, word for word: what the scores mean.

The records are evenly spaced over the data, never picked by their result.
"""

from __future__ import annotations

from typing import Any

from pipeline.report.columns import Records

Json = dict[str, Any]

NUM_SAMPLES = 10
MAX_CHARACTERS = 300
"""Of what a model said; the rest is in the evaluation's records.jsonl."""


def choose(num_records: int) -> list[int]:
    """Positions of the records to show."""
    count = min(NUM_SAMPLES, num_records)
    return [(2 * i + 1) * num_records // (2 * count) for i in range(count)]


def show(positions: list[int], updates: list[Json], records: dict[str, Records]) -> list[Json]:
    """What each model of one seed said about the records at `positions`; nothing where the `generation`
    protocol was not run.
    """
    original = records[updates[0]["evaluations"]["original"]]
    return [
        _sample(position, updates, records)
        for position in positions
        if "generation" in original.samples[position]
    ]


def _sample(position: int, updates: list[Json], records: dict[str, Records]) -> Json:
    original = records[updates[0]["evaluations"]["original"]].samples[position]
    said = []
    for update in updates:
        for state, step in update["evaluations"].items():
            if state != "original":
                answer = _answer(records[step].samples[position])
                said.append({"method": update["method"], "state": state} | answer)
    asked = {key: original[key] for key in ("id", "prompt", "old_answers", "new_answer", "knows_old")}
    return asked | {"original": _answer(original), "said": said}


def _answer(record: Json) -> Json:
    """What the model said, and whether that is the new answer, an old one, or neither - as the evaluation
    scored it.
    """
    generation = record["generation"]
    scores = generation["scores"]
    gives = "new" if scores["reliability"] else "old" if scores["leakage"] else "other"
    text = generation["answer"]
    return {"text": text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …", "gives": gives}
