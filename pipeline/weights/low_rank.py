"""scaling * (B @ A) of a LoRA adapter's two factors where they lie in a file, in any slices: neither is ever whole in memory.

The product is taken in float64 and rounded once to float32, on a fixed grid of blocks, so that an element's value does not
depend on how the tensor is sliced. Of a factor, only a panel (what some blocks need) is held at a time, and it is read again for
every slice: a factor may be as large as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.weights.source import TensorSource

if TYPE_CHECKING:
    import torch

GRID_ELEMENTS = 1 << 17
"""Elements of a block, at most: 1 MiB in float64. A block is as wide as the tensor, or as a panel where that is less."""
PANEL_ELEMENTS = 1 << 20
"""Elements of a factor that are held at a time, at most: 8 MiB in float64. Of the one on the left, half as many."""


@dataclass(frozen=True)
class LowRank:
    """A change of one tensor: the product of `b` (out x rank) and `a` (rank x in), two tensors of `factors`, times `scaling`."""

    factors: TensorSource
    a: str
    b: str
    scaling: float
    is_transposed: bool
    """Whether the tensor has the product as in x out (GPT-2's Conv1D)."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened product, float32. Takes `working_bytes` of memory, the result included."""
        import torch

        first, last = start // self._width, -(-stop // self._width)
        values = torch.empty(last - first, self._width)
        grid = self._rows_of_block
        all_rows = range(first // grid * grid, min(-(-last // grid) * grid, self._height))
        for columns in _cut(range(self._width), self._columns_of_panel):
            right = self._right(columns)
            for rows in _cut(all_rows, self._rows_of_panel):
                left = self._left(rows)
                for block in _cut(rows, grid):
                    product = (left[block.start - rows.start : block.stop - rows.start] @ right).mul_(self.scaling)
                    wanted = range(max(first, block.start), min(last, block.stop))
                    place = values[wanted.start - first : wanted.stop - first, columns.start : columns.stop]
                    place.copy_(product[wanted.start - block.start : wanted.stop - block.start])
        return values.flatten()[start - first * self._width : stop - first * self._width]

    def working_bytes(self, num_elements: int) -> int:
        """The most memory that reading so many elements takes: the result, both panels, one of them as it is converted, and a block."""
        num_rows = min(num_elements // self._width + 2, self._height)
        left = 8 * self._rank * min(num_rows + 2 * self._rows_of_block, self._rows_of_panel, self._height)
        right = 8 * self._rank * self._columns_of_panel
        block = 8 * self._rows_of_block * self._columns_of_panel
        return 4 * num_rows * self._width + right + max(right, 2 * left + block)

    def _left(self, rows: range) -> torch.Tensor:
        """Rows of the factor on the left: rows x rank, float64."""
        if self.is_transposed:
            return self._part(self.a, range(self._rank), rows).T.contiguous()
        return self._part(self.b, rows, range(self._rank))

    def _right(self, columns: range) -> torch.Tensor:
        """Columns of the factor on the right: rank x columns, float64."""
        if self.is_transposed:
            return self._part(self.b, columns, range(self._rank)).T.contiguous()
        return self._part(self.a, range(self._rank), columns)

    def _part(self, name: str, rows: range, columns: range) -> torch.Tensor:
        """These rows and columns of a factor as it is stored, in float64."""
        import torch

        width = self.factors.tensors[name].shape[1]
        if len(columns) == width:
            return self.factors.read(name, rows.start * width, rows.stop * width).view(len(rows), width).double()
        part = torch.empty(len(rows), len(columns), dtype=torch.float64)
        for i, row in enumerate(rows):
            part[i] = self.factors.read(name, row * width + columns.start, row * width + columns.stop)
        return part

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


def _cut(whole: range, size: int) -> Iterator[range]:
    """`whole` in consecutive parts of `size`, the last perhaps smaller."""
    return (whole[i : i + size] for i in range(0, len(whole), size))
