"""The `evaluate` stage: all ranks score one model on the facts, each on its share of the records,
resumably.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.artifact import Artifact
from pipeline.config import Evaluate, Prompt
from pipeline.context import Context, Preempted
from pipeline.evaluate import records
from pipeline.evaluate.gate import knows_old, split_by_known
from pipeline.evaluate.outputs import Outputs
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.evaluate.respondent import Respondent
from pipeline.evaluate.scores import Row, aggregate
from pipeline.facts.fact import Fact, read_facts
from pipeline.facts.prompts import Prompter
from pipeline.models.load import load_model, load_tokenizer

_BATCHES_PER_ROUND = 2
"""Facts of a round, in batch sizes: enough to sort their questions by length, few enough to save and to stop
soon.
"""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Score `inputs["model"]` on `inputs["facts"]`; locality is measured against `inputs["reference"]`, the
    original's evaluation.

    Without a reference the model is the original itself. Leaves `records.jsonl` in `out`: a row for each
    fact, with all that the model said. Raises Preempted between two rounds; the next call goes on after the
    rows that are there.
    """
    settings = Evaluate.model_validate(section["evaluate"])
    tokenizer = load_tokenizer(inputs["model"])
    prompter = Prompter(tokenizer, Prompt.model_validate(section["prompt"]))
    facts = list(read_facts(inputs["facts"].folder / "facts.jsonl"))
    reference = records.read_rows(inputs["reference"].folder) if "reference" in inputs else None
    finished = context.share(records.recover(out) if context.is_main else None)
    pending = [fact for fact in facts if fact.id not in finished]
    if pending:
        model = load_model(inputs["model"], context.device, _DTYPES[settings.precision])
        _score(pending, Respondent(model, tokenizer, prompter, settings), settings, reference, out, context)
    context.barrier()
    if not context.is_main:
        return {}
    rows = records.merge(out, [fact.id for fact in facts])
    example = tokenizer.decode(prompter.encode(facts[0].prompt, facts[0].new_answer, eos=False).ids)
    return summarise(rows, reference, settings.protocols) | {
        "prompt_example": example,
        "model_kind": inputs["model"].result["model_kind"],
    }


def _score(
    pending: list[Fact],
    respondent: Respondent,
    settings: Evaluate,
    reference: list[Row] | None,
    out: Path,
    context: Context,
) -> None:
    """Add rows for this rank's share of `pending` to its part of the records, round by round."""
    originals = {row["id"]: row for row in reference or []}
    with context.progress("evaluate", len(pending), "facts") as progress:
        for share in _rounds(pending, _BATCHES_PER_ROUND * settings.batch_size, context):
            respondent.ask(share)
            rows = [
                record(fact, respondent.outputs, originals.get(fact.id), settings.protocols) for fact in share
            ]
            records.append(out, context.rank, rows)
            progress.advance(len(share) * context.world_size)


def _rounds(pending: list[Fact], size: int, context: Context) -> Iterator[list[Fact]]:
    """This rank's facts, at most `size` at a time; as many rounds on every rank (the last may be empty), for
    they stop together.
    """
    mine = pending[context.rank :: context.world_size]
    longest_share = -(-len(pending) // context.world_size)
    for start in range(0, longest_share, size):
        if context.should_stop():
            raise Preempted("evaluate: stopped between two rounds; the records so far are kept")
        yield mine[start : start + size]


def record(fact: Fact, outputs: Outputs, original: Row | None, protocols: Sequence[str]) -> Row:
    """The row of one fact: what the model said, and its scores. `original` is the original model's row, if
    this is another model.
    """
    scored = {
        name: PROTOCOLS[name].score(fact, outputs, original[name] if original else None) for name in protocols
    }
    asked = {
        "id": fact.id,
        "prompt": fact.prompt,
        "old_answers": fact.old_answers,
        "new_answer": fact.new_answer,
    }
    return {**asked, "knows_old": knows_old(fact, outputs), **scored}


def summarise(rows: list[Row], reference: list[Row] | None, protocols: Sequence[str]) -> dict[str, Any]:
    """The evaluation's facts: scores over all `rows`, and over those whose old fact the original model knew
    or did not know.
    """
    split = split_by_known(rows, reference if reference is not None else rows, protocols)
    num_known, num_records = split["known"]["num_known"], split["known"]["num_records"]
    nothing_known = reference is None and num_records > 0 and num_known == 0
    warnings = (
        [f"the original model knew 0 of {num_records} old facts: nothing to forget"] if nothing_known else []
    )
    return {"protocols": aggregate(rows, protocols), **split, "num_records": len(rows), "warnings": warnings}
