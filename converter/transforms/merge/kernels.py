"""Numbers of a LoRA: its factors in float32, and their product, added block by block.

What BLAS gives for an element depends on the shape of the matrices that it is in: kernels for the last rows and columns
add up in another order. So each block of a tensor is always computed whole, whatever part of it is asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from converter.tensors.view import blocks_of

TILE = 1 << 14  # columns at a time: what is computed stays in a processor's cache
_LIMIT = np.float32(1e15)  # no product of two such numbers overflows, nor does the sum over any rank


def scale_factor(numbers: memoryview, scale: float) -> bool:
    """Multiply float32 numbers by ``scale``; say whether they are finite, and small enough to be multiplied again."""
    found = np.frombuffer(numbers, "<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        if scale != 1:
            found *= np.float32(scale)
        return not len(found) or bool(max(found.max(), -found.min()) < _LIMIT)


def add_product(
    out: memoryview, first: int, shape: tuple[int, int], left: memoryview, right: memoryview, room: memoryview
) -> None:
    """Add ``left @ right``, a block of ``shape``, to the float32 numbers of it from the ``first`` on.

    ``right`` has the width of the block, and ``room`` is for a tile of it.
    """
    height, width = shape
    numbers: Any = np.frombuffer(out, "<f4")
    factors: Any = np.frombuffer(left, "<f4").reshape(height, -1)
    others: Any = np.frombuffer(right, "<f4").reshape(-1, width)
    boxes, done = [], 0
    for (row, column), (rows, columns) in blocks_of(shape, first, len(numbers)):
        part = numbers[done : done + rows * columns].reshape(rows, columns)
        boxes.append((row, column, part))
        done += rows * columns
    for begin in range(0, width, TILE):
        end = min(width, begin + TILE)
        needed = [box for box in boxes if box[1] < end and begin < box[1] + box[2].shape[1]]
        if not needed:
            continue
        tile = np.frombuffer(room, "<f4")[: height * (end - begin)].reshape(height, end - begin)
        np.matmul(factors, others[:, begin:end], out=tile)
        for row, column, part in needed:
            low, high = max(begin, column), min(end, column + part.shape[1])
            part[:, low - column : high - column] += tile[row : row + len(part), low - begin : high - begin]
