"""The evaluations' records as the report needs them: every score as a column, and a few whole rows.

A run may hold a dozen evaluations of ten thousand records each: rows are read one by one and not kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple

from pipeline.artifact import Artifact
from pipeline.evaluate.record_files import RECORDS

Json = dict[str, Any]


class Records(NamedTuple):
    """One evaluation: `scores[protocol, metric]` in the facts' order, and sampled rows by their position."""

    scores: dict[tuple[str, str], list[float | None]]
    samples: dict[int, Json]


def read(evaluation: Artifact, sampled: Collection[int]) -> Records:
    """The records of a finished evaluation, with the rows at the positions `sampled` whole."""
    protocols = list(evaluation.result["protocols"])
    records = Records({}, {})
    with (evaluation.folder / RECORDS).open(encoding="utf-8") as lines:
        for position, line in enumerate(lines):
            row = json.loads(line)
            for protocol in protocols:
                for metric, score in row[protocol]["scores"].items():
                    records.scores.setdefault((protocol, metric), []).append(score)
            if position in sampled:
                records.samples[position] = row
    return records
