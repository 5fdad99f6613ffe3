"""When two answers are the same: SQuAD's normalisation, exact match, and containment of whole words."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and extra blanks (SQuAD 1.1's evaluation
    script).

    An answer that consists of nothing else (`The The`, `A`, `!!!`) is kept as it is, in lower case: it must
    not match everything.
    """
    lower = " ".join(text.lower().split())
    return " ".join(_ARTICLES.sub(" ", lower.translate(_PUNCTUATION)).split()) or lower


def is_match(text: str, answers: Iterable[str]) -> bool:
    """Whether `text` is one of `answers`, normalised."""
    return normalise(text) in {normalise(answer) for answer in answers}


def contains(text: str, answers: Iterable[str]) -> bool:
    """Whether one of `answers` stands in `text` as whole words, both normalised."""
    padded = f" {normalise(text)} "
    return any(f" {normalise(answer)} " in padded for answer in answers)
