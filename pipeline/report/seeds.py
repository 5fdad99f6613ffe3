"""Several seeds as one: means of what each measured, and how far apart the seeds lie."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.evaluate.scores import mean

Json = dict[str, Any]

_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5% quantiles of Student's t for 1 to 10 degrees of freedom. For more, that of 10 is a little large."""


def over_seeds(rows: Iterable[Json], by: Sequence[str], of: Sequence[str]) -> list[Json]:
    """One row for all rows that agree in the fields `by`, in the order of the first of each.

    That is their first, with the mean of each field in `of` (None where a seed has none), `num_seeds`, and
    `deviation`: of each field the standard deviation over seeds (None with one seed).
    """
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        group[0]
        | {name: average([row[name] for row in group]) for name in of}
        | {
            "num_seeds": len(group),
            "deviation": {name: deviation([row[name] for row in group]) for name in of},
        }
        for group in groups.values()
    ]


def average(values: Sequence[Any]) -> Any:
    """The mean of numbers, None if one is missing; of objects and lists, that of each of their values.

    What all values agree in stays as it is, so that one seed's figures are its own.
    """
    first = values[0]
    if len(values) == 1 or all(value == first for value in values):
        return first
    if isinstance(first, dict):
        return {name: average([value[name] for value in values]) for name in first}
    if isinstance(first, list):
        return [average(items) for items in zip(*values, strict=True)]
    return None if None in values else mean(values)


def deviation(values: Sequence[float | None]) -> float | None:
    """The standard deviation (n - 1) of one number a seed; None for one seed, or where one is missing."""
    present = [value for value in values if value is not None]
    if len(values) < 2 or len(present) < len(values):
        return None
    centre = math.fsum(present) / len(present)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in present) / (len(present) - 1))


def margin(values: Sequence[float]) -> float:
    """Half the 95% confidence interval (Student's t) of the mean of one number a seed, of two or more."""
    spread = deviation(values)
    assert spread is not None
    return _STUDENT_T[min(len(values) - 1, len(_STUDENT_T)) - 1] * spread / math.sqrt(len(values))
