"""The `evaluate` stage: scores one model on the facts, each rank on its share of them, resumably."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.artifact import Artifact
from pipeline.config import Evaluate, Prompt
from pipeline.context import Context, Preempted
from pipeline.evaluate import record_files
from pipeline.evaluate.outputs import Outputs
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.evaluate.protocols.generation import contains
from pipeline.evaluate.respondent import Respondent
from pipeline.evaluate.scores import Row, aggregate, split_by_known
from pipeline.facts.fact import Fact, read_facts
from pipeline.facts.prompts import Prompter
from pipeline.models.load import load_model, load_tokenizer

_BATCHES_PER_ROUND = 2
"""Facts of a round, in batch sizes: enough to sort their questions by length, few enough to stop soon."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(section: dict[str, Any], inputs: dict[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Score `inputs["model"]` on `inputs["facts"]`, and leave a row for each fact in `out`'s `records.jsonl`.

    Locality is measured against `inputs["reference"]`, the original's evaluation. Without a reference the
    model is the original itself. Raises Preempted between two rounds; the next call goes on from the rows
    that are there.
    """
    settings = Evaluate.model_validate(section["evaluate"])
    tokenizer = load_tokenizer(inputs["model"])
    prompter = Prompter(tokenizer, Prompt.model_validate(section["prompt"]))
    facts = list(read_facts(inputs["facts"].folder / "facts.jsonl"))
    reference = record_files.read_rows(inputs["reference"].folder) if "reference" in inputs else None
    # Rank 0 alone looks, and tells the others: they must agree on what is left, and it repairs files.
    finished = context.share(record_files.recover(out) if context.is_main else None)
    pending = [fact for fact in facts if fact.id not in finished]
    if pending:
        model = load_model(inputs["model"], context.device, _DTYPES[settings.precision])
        _score(pending, Respondent(model, tokenizer, prompter, settings), settings, reference, out, context)
    context.barrier()
    if not context.is_main:
        return {}
    rows = record_files.merge(out, [fact.id for fact in facts])
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
    """Append rows for this rank's share of `pending` to its file, round by round."""
    originals = {row["id"]: row for row in reference or []}
    with context.progress("evaluate", len(pending), "facts") as progress:
        for share in _rounds(pending, _BATCHES_PER_ROUND * settings.batch_size, context):
            respondent.ask(share)
            rows = [
                record(fact, respondent.outputs, originals.get(fact.id), settings.protocols) for fact in share
            ]
            record_files.append(out, context.rank, rows)
            progress.advance(len(share) * context.world_size)  # the other ranks are about as far


def _rounds(pending: list[Fact], size: int, context: Context) -> Iterator[list[Fact]]:
    """This rank's facts, at most `size` at a time; the last round may be empty."""
    mine = pending[context.rank :: context.world_size]
    # As many rounds on every rank as the longest share needs: `should_stop` waits for all of them.
    longest_share = -(-len(pending) // context.world_size)
    for start in range(0, longest_share, size):
        if context.should_stop():
            raise Preempted("evaluate: stopped between two rounds; the records so far are kept")
        yield mine[start : start + size]


def record(fact: Fact, outputs: Outputs, original: Row | None, protocols: Sequence[str]) -> Row:
    """The row of one fact: what the model said, and its scores.

    `original` is the original model's row, or None if this is the original itself.
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


def knows_old(fact: Fact, outputs: Outputs) -> bool | None:
    """Whether the model gives an old answer of `fact`; None if nobody recorded one.

    Its free generation says so, if there is one; else all of the old answer's tokens must be the likeliest.
    """
    if fact.old_answer is None:
        return None
    if fact.prompt in outputs.generated:
        return contains(outputs.generated[fact.prompt], fact.old_answers)
    return outputs.forced[fact.prompt, fact.old_answer].accuracy == 1


def summarise(rows: list[Row], reference: list[Row] | None, protocols: Sequence[str]) -> dict[str, Any]:
    """Scores over all `rows`, and over the facts that the original model knew and those that it did not."""
    split = split_by_known(rows, reference if reference is not None else rows, protocols)
    num_known, num_records = split["known"]["num_known"], split["known"]["num_records"]
    nothing_known = reference is None and num_records > 0 and num_known == 0
    warnings = (
        [f"the original model knew 0 of {num_records} old facts: nothing to forget"] if nothing_known else []
    )
    return {"protocols": aggregate(rows, protocols), **split, "num_records": len(rows), "warnings": warnings}
