"""scaling * (B @ A) of a LoRA adapter's factors, slice by slice: neither factor is ever whole in memory.

The product is taken in float64 and rounded once to float32, on a fixed grid of blocks: so an element's value
does not depend on how the tensor is sliced. Of a factor, only a panel (what some blocks need) is held at a
time. It is read again for every slice, for a factor may be as large as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.weights.floats import as_tensor
from pipeline.weights.source import TensorSource

if TYPE_CHECKING:
    import torch

GRID_ELEMENTS = 1 << 17
"""Elements of a block, at most: 1 MiB in float64. A block is as wide as the tensor, or as a panel where that
is less.
"""
PANEL_ELEMENTS = 1 << 20
"""Elements of a factor that are held at a time, at most: 8 MiB in float64. Of the one on the left, half as
many.
"""
BAND_ELEMENTS = 1 << 16
"""Elements that are read at a time, and then widened into their panel."""


@dataclass(frozen=True)
class Product:
    """A change of one tensor: `scaling` * `b` @ `a`, two tensors of `factors` (out x rank, rank x in)."""

    factors: TensorSource
    a: str
    b: str
    scaling: float
    is_transposed: bool
    """Whether the tensor has the product as in x out (GPT-2's Conv1D)."""

    def read(self, start: int, stop: int, room: torch.Tensor) -> torch.Tensor:
        """Elements [start, stop) of the flattened product, float32.

        `room`: float64, 1-D, `room_elements` or more, to be written over. Besides it, `working_bytes` of
        memory are taken.
        """
        import torch

        first, last = start // self._width, -(-stop // self._width)
        values = torch.empty(last - first, self._width)
        # Blocks begin at multiples of the grid, wherever the slice does: so an element is always computed in
        # the same product, whose last bits depend on the block's shape.
        grid = self._rows_of_block
        all_rows = range(first // grid * grid, min(-(-last // grid) * grid, self._height))
        for columns in _cut(range(self._width), self._columns_of_panel):
            right, room_left = _take(room, self._rank, len(columns))
            self._load_right(columns, right)
            for rows in _cut(all_rows, self._rows_of_panel):
                left, room_block = _take(room_left, len(rows), self._rank)
                self._load_left(rows, left)
                for block in _cut(rows, grid):
                    product, _ = _take(room_block, len(block), len(columns))
                    torch.mm(
                        left[block.start - rows.start : block.stop - rows.start], right, out=product
                    ).mul_(self.scaling)
                    wanted = range(max(first, block.start), min(last, block.stop))
                    place = values[wanted.start - first : wanted.stop - first, columns.start : columns.stop]
                    place.copy_(product[wanted.start - block.start : wanted.stop - block.start])
        return values.flatten()[start - first * self._width : stop - first * self._width]

    @property
    def room_elements(self) -> int:
        """For a panel of each factor, and a block."""
        rows, columns = min(self._rows_of_panel, self._height), self._columns_of_panel
        return self._rank * (rows + columns) + min(self._rows_of_block, rows) * columns

    def working_bytes(self, num_elements: int) -> int:
        """The most memory that reading so many elements takes besides the room.

        It holds the result, and what was just read of a factor.
        """
        num_rows = min(num_elements // self._width + 2, self._height)
        band = max(BAND_ELEMENTS, self._rank, self._columns_of_panel, min(self._rows_of_panel, self._height))
        return 4 * num_rows * self._width + 8 * band

    def _load_left(self, rows: range, panel: torch.Tensor) -> None:
        """Rows of the factor on the left to `panel`, rows x rank."""
        if self.is_transposed:
            self._load(self.a, range(self._rank), rows, panel.T)
        else:
            self._load(self.b, rows, range(self._rank), panel)

    def _load_right(self, columns: range, panel: torch.Tensor) -> None:
        """Columns of the factor on the right to `panel`, rank x columns."""
        if self.is_transposed:
            self._load(self.b, columns, range(self._rank), panel.T)
        else:
            self._load(self.a, range(self._rank), columns, panel)

    def _load(self, name: str, rows: range, columns: range, panel: torch.Tensor) -> None:
        """These rows and columns of a factor as it is stored, to `panel`.

        Whole rows lie one behind the other, and are read together.
        """
        width = self.factors.tensors[name].shape[1]
        for band in _cut(rows, max(1, BAND_ELEMENTS // width) if len(columns) == width else 1):
            first = band.start * width + columns.start
            values = self.factors.read(name, first, (band.stop - 1) * width + columns.stop)
            read = as_tensor(values, self.factors.tensors[name].dtype).view(len(band), len(columns))
            panel[band.start - rows.start : band.stop - rows.start].copy_(read)

    @cached_property
    def _rank(self) -> int:
        return self.factors.tensors[self.a].shape[0]

    @cached_property
    def _height(self) -> int:
        return self._out_and_in[self.is_transposed]

    @cached_property
    def _width(self) -> int:
        return self._out_and_in[not self.is_transposed]

    @property
    def _out_and_in(self) -> tuple[int, int]:
        return self.factors.tensors[self.b].shape[0], self.factors.tensors[self.a].shape[1]

    @property
    def _columns_of_panel(self) -> int:
        return min(self._width, max(1, PANEL_ELEMENTS // self._rank))

    @property
    def _rows_of_block(self) -> int:
        return max(1, min(GRID_ELEMENTS // self._width, PANEL_ELEMENTS // 2 // self._rank))

    @property
    def _rows_of_panel(self) -> int:
        return max(1, PANEL_ELEMENTS // 2 // self._rank // self._rows_of_block) * self._rows_of_block


def _take(room: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix at the beginning of `room`, and the room behind it."""
    return room[: height * width].view(height, width), room[height * width :]


def _cut(whole: range, size: int) -> Iterator[range]:
    """`whole` in consecutive parts of `size`, the last perhaps smaller."""
    return (whole[i : i + size] for i in range(0, len(whole), size))
