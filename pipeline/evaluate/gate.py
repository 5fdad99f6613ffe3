"""The known-fact gate: forgetting only makes sense where the original model knew the old fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.evaluate.normalise import contains
from pipeline.evaluate.outputs import Outputs
from pipeline.evaluate.scores import Row, aggregate
from pipeline.facts.fact import Fact


def knows_old(fact: Fact, outputs: Outputs) -> bool | None:
    """Whether the model gives an old answer of `fact`: in free generation if it was asked, else token by
    token.

    None if nobody recorded an old answer.
    """
    if fact.old_answer is None:
        return None
    if fact.prompt in outputs.generated:
        return contains(outputs.generated[fact.prompt], fact.old_answers)
    return outputs.forced[fact.prompt, fact.old_answer].accuracy == 1


def split_by_known(rows: Sequence[Row], original: Sequence[Row], protocols: Sequence[str]) -> dict[str, Any]:
    """The scores of `rows` over the facts that the `original` model's rows say it knew, and over those it did
    not know.

    Facts without an old answer are in neither part.
    """
    verdicts = {row["id"]: row["knows_old"] for row in original}
    known = [row for row in rows if verdicts[row["id"]] is True]
    unknown = [row for row in rows if verdicts[row["id"]] is False]
    num_records = len(known) + len(unknown)
    return {
        "known": {
            "num_known": len(known),
            "num_records": num_records,
            "protocols": aggregate(known, protocols),
        },
        "unknown": {"num_records": len(unknown), "protocols": aggregate(unknown, protocols)},
    }
