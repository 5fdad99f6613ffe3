"""What things are called and how they look in the report: methods, states, protocols and metrics, one plain
table each.
"""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """A method on the page. `baseline` learns the same way without forgetting first; pairs share a `hue`."""

    label: str
    hue: str
    baseline: str | None = None

    @property
    def is_filled(self) -> bool:
        """F-Learning is drawn filled, everything else hollow, so that colour is never the only difference."""
        return self.label.startswith("F-Learning")


LOOKS: dict[str, Look] = {
    "full_ft": Look("Full-FT", "blue"),
    "lora": Look("LoRA", "orange"),
    "flearn_ft": Look("F-Learning_FT", "blue", baseline="full_ft"),
    "flearn_lora": Look("F-Learning_LoRA", "orange", baseline="lora"),
    "flearn_lora_ft": Look("F-Learning_LoRA-FT", "green", baseline="full_ft"),
    "ft_c": Look("FT-c", "purple"),
    "rome": Look("ROME", "sky"),
    "memit": Look("MEMIT", "yellow"),
}

HUES: dict[str, tuple[str, str]] = {
    "blue": ("#0072b2", "#58b0e6"),
    "orange": ("#c8500a", "#f0924a"),
    "green": ("#00825f", "#2fc79b"),
    "purple": ("#9b4f83", "#d48fbf"),
    "sky": ("#3d8fbf", "#8fd0f5"),
    "yellow": ("#9a7400", "#e6c043"),
    "grey": ("#6b7178", "#9aa1a9"),
}
"""Colours on a light and on a dark page: Okabe and Ito's colour-blind safe set, darkened to 3:1 contrast on
white.
"""


def look(method: str) -> Look:
    """How `method` is shown; a method that this table does not know goes by its own name, in grey."""
    return LOOKS.get(method, Look(method, "grey"))


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
        "The model gets the question alone and writes its answer, always taking the likeliest token. This is what a user sees, and the "
        "hardest of the three tests.",
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
        "Old and new answer compete: each gets the model's mean log-likelihood per token, and the likelier one wins. The editing "
        "literature calls these scores ES, PS and NS. Even a slight preference counts as a win.",
        "",
        {
            "reliability": "share of questions whose new answer beats the old one",
            "generality": "the same for rephrasings of the questions",
            "locality": "share of neighbouring questions (whose true answer is the old one) that still favour it",
            "leakage": "share of questions whose old answer still beats the new one",
            "portability": "not measured by this protocol",
        },
    ),
    "token": Way(
        "Token by token, the paper's metric",
        "token accuracy",
        "Question and right answer go in together, and each answer token counts if it would have been the model's first choice at "
        "its place. The paper's tables (and EasyEdit) use this score.",
        "It has a floor well above zero, because the model is shown the beginning of the right answer: in the paper, models that know only "
        "the old answers score about 20 on CounterFact and about 43 on ZsRE. Read the scores against the original model's row, not "
        "against 0.",
        {
            "reliability": "new answer's tokens that are the model's first choice",
            "generality": "the same after rephrasings of the questions",
            "locality": "tokens predicted at the answers of unrelated questions that are the original model's too",
            "leakage": "share of records whose whole old answer is still the first choice, token for token",
            "portability": "the same for answers that follow from the new fact",
        },
    ),
}
"""In the page's order: the hardest test first."""


def ordered_protocols(present: list[str]) -> list[str]:
    """The protocols that were measured, the most telling one first."""
    return [name for name in PROTOCOLS if name in present] + [
        name for name in present if name not in PROTOCOLS
    ]


def three_digits(value: float | None, factor: float = 1) -> str:
    """`factor` times a number that may be of any size; an en dash where there is none."""
    return "–" if value is None else f"{factor * value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """A score as people read it: one decimal, in percent; an en dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f}"
