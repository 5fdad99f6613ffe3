"""Where a generated line ends, and that a batch of lines may change while it is being written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.evaluate.forward import Forward
from pipeline.evaluate.generate import Generator, Line

QUESTIONS = [[3, 9, 27, 81], [5], [7, 49], [2, 4, 8, 16, 32, 64], [6, 36], [100, 10]]


class NewlineTokenizer:
    """Reads one token as the end of a line, and every other one as a word."""

    def __init__(self, newline: int) -> None:
        self.newline = newline

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("\n" if token == self.newline else f" {token}" for token in ids)


def write(model: Any, newline: int, batches: list[list[int]], leave: int) -> tuple[list[str], list[int]]:
    """The lines after `QUESTIONS`, which join in `batches`; and the number of rows in each forward pass."""
    generator = Generator(NewlineTokenizer(newline), eos=set())  # type: ignore[arg-type]
    forward = Forward(model)
    num_rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: num_rows.append(len(output)))
    lines: dict[int, Line] = {}
    for batch in batches:
        reading = forward.read([QUESTIONS[i] for i in batch], [str(i) for i in batch])
        lines |= zip(batch, generator.add(reading, [9] * len(batch)), strict=True)
        generator.write(leave)
    generator.write()
    hook.remove()
    return [generator.text(lines[i]) for i in range(len(QUESTIONS))], num_rows


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_lines_stop_after_their_first_line_and_others_take_their_place(
    subject: Any, architecture: str
) -> None:
    model = subject(architecture).model
    written = [
        model.generate(
            torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        for ids in QUESTIONS
    ]
    new = [row[0, len(ids) :].tolist() for row, ids in zip(written, QUESTIONS, strict=True)]
    newline = new[0][2]
    expected = [NewlineTokenizer(newline).decode(ids).lstrip().partition("\n")[0].rstrip() for ids in new]
    assert len(expected[0].split()) <= 2 and any(len(text.split()) == 9 for text in expected)
    one_by_one, _ = write(model, newline, [[i] for i in range(6)], leave=0)
    together, num_rows = write(model, newline, [list(range(6))], leave=0)
    joining, _ = write(model, newline, [[3, 0], [4, 5], [1, 2]], leave=2)
    assert one_by_one == together == joining == expected
    assert num_rows == sorted(num_rows, reverse=True)
    assert num_rows[0] == 6 > num_rows[-1], "a finished line leaves the batch"


@pytest.mark.parametrize(
    ("pieces", "goes_on"),
    [
        ([" Paris", ".\n"], [True, False]),
        (["\n", "\n", "Paris", "\n"], [True, True, True, False]),
        (["\nParis", " and"], [True, True]),
        ([" \n", "Paris\n"], [True, False]),
    ],
)
def test_a_line_ends_at_the_first_newline_after_text(pieces: list[str], goes_on: list[bool]) -> None:
    line = Line(budget=10)
    assert [line.add(7, piece, is_eos=False) for piece in pieces] == goes_on
    assert line.ids == [7] * len(pieces)


def test_a_line_ends_at_eos_and_at_its_budget() -> None:
    line = Line(budget=2)
    assert [line.add(7, "a", False), line.add(8, "b", False)] == [True, False]
    empty = Line(budget=2)
    assert not empty.add(0, "</s>", is_eos=True)
    assert empty.ids == []
