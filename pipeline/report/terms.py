"""What states, protocols and metrics are called in the report, one table each.

Methods have their names in `pipeline/methods.py`, stages in `pipeline/stages.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.methods import METHODS, Method


def look(method: str) -> Method:
    """The row of METHODS; a method that it does not know goes by its own name, in grey."""
    return METHODS.get(method, Method(method, learn="full"))


STATES = {"original": "original", "tuned": "after FT-old", "forgotten": "forgotten", "updated": "updated"}
"""A model's states, in the order in which it passes through them."""


class Metric(NamedTuple):
    """A score's name in tables, and whether more of it is better."""

    label: str
    higher_is_better: bool
    question: str


METRICS: dict[str, Metric] = {
    "reliability": Metric("Reliability", True, "Does it give the new answer?"),
    "generality": Metric("Generality", True, "Also to rephrased questions?"),
    "locality": Metric("Locality", True, "Are unrelated answers left alone?"),
    "leakage": Metric("Old answers", False, "Does it still give the old answer?"),
    "portability": Metric("Portability", True, "Does it answer what follows from the new fact?"),
    "old_reliability": Metric("Old answer", False, "How well does the old answer score?"),
}
SCORES = ("reliability", "generality", "locality", "leakage", "portability")
"""The metrics of the main tables, in their order. `old_reliability` is the forgetting curve's."""
ROW_METRICS = (*SCORES, "old_reliability")
"""The metrics of a row of results.json."""


class Way(NamedTuple):
    """A protocol: how answers are scored, and what each metric then means."""

    title: str
    short: str
    about: str
    floor: str
    meanings: dict[str, str]


PROTOCOLS: dict[str, Way] = {
    "generation": Way(
        "What it says when asked",
        "free generation",
        "The model gets the question alone and writes its answer, always taking the likeliest token. This is"
        " what a user sees, and the hardest of the three tests.",
        "",
        {
            "reliability": "share of questions answered with the new answer",
            "generality": "the same for rephrasings of the questions",
            "locality": "share of unrelated questions answered exactly as the original model answers them",
            "leakage": "share of questions still answered with the old answer, and not the new one",
            "portability": "share of follow-up questions answered in line with the new fact",
        },
    ),
    "probability": Way(
        "Which answer it finds likelier",
        "likelier answer",
        "Old and new answer compete: each gets the model's mean log-likelihood per token, and the likelier"
        " one wins. The editing literature calls these scores ES, PS and NS. Even a slight preference counts"
        " as a win.",
        "",
        {
            "reliability": "share of questions whose new answer beats the old one",
            "generality": "the same for rephrasings of the questions",
            "locality": "share of neighbouring questions (whose true answer is the old one) that still favour"
            " it",
            "leakage": "share of questions whose old answer still beats the new one",
            "portability": "not measured by this protocol",
        },
    ),
    "token": Way(
        "Token by token, the paper's metric",
        "token accuracy",
        "Question and right answer go in together, and each answer token counts if it would have been the"
        " model's first choice at its place. The paper's tables (and EasyEdit) use this score.",
        "It has a floor well above zero, because the model is shown the beginning of the right answer: in the"
        " paper, models that know only the old answers score about 20 on CounterFact and about 43 on ZsRE."
        " Read the scores against the original model's row, not against 0.",
        {
            "reliability": "new answer's tokens that are the model's first choice",
            "generality": "the same after rephrasings of the questions",
            "locality": "tokens predicted at the answers of unrelated questions that are the original model's"
            " too",
            "leakage": "share of records whose whole old answer is still the first choice, token for token",
            "portability": "the same for answers that follow from the new fact",
        },
    ),
}
"""In the page's order: the hardest test first."""


def ordered_protocols(present: list[str]) -> list[str]:
    """The protocols that were measured, the most telling one first."""
    known = [name for name in PROTOCOLS if name in present]
    return known + [name for name in present if name not in PROTOCOLS]


def short(protocol: str) -> str:
    """The protocol in two words; one that the table does not know goes by its own name."""
    return PROTOCOLS[protocol].short if protocol in PROTOCOLS else protocol


def three_digits(value: float | None, factor: float = 1) -> str:
    """`factor` times a number that may be of any size; an en dash where there is none."""
    return "–" if value is None else f"{factor * value:#.3g}".rstrip(".")


def count(value: float) -> str:
    """A number of records; over several seeds it is a mean, and may have a decimal."""
    return f"{value:.1f}".removesuffix(".0")


def percent(value: float | None) -> str:
    """A score as people read it: one decimal, in percent; an en dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f}"
