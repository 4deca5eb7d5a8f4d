"""What of a checkpoint is quantized, in how many bits a weight, and what is plain: by its header alone, mostly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from converter.errors import WconvError
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.schemes import find_belongings, quantized_in
from converter.tensors.base import Tensor
from converter.transforms.quantize import find_unasked
from converter.transforms.quantize.restore import Found


class Share(NamedTuple):
    """The weights in one scheme: how many tensors, and the bytes that they take with all that is beside them.

    ``parameters`` is how many numbers they stand for, None where that is not known.
    """

    scheme: str
    weights: int
    parameters: int | None
    nbytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """The bits that are stored for each number."""
        return round(8 * self.nbytes / self.parameters, 4) if self.parameters else None


class Stock(NamedTuple):
    """What a checkpoint holds: the shares of its schemes, the largest first, and its other tensors.

    ``error`` is why nothing could be made of what is quantized.
    """

    shares: Sequence[Share]
    plain: Sequence[Tensor]
    error: WconvError | None = None

    @property
    def parameters(self) -> int | None:
        """The numbers that all of it stands for, None where that is not known."""
        counts = [share.parameters for share in self.shares]
        known = [count for count in counts if count is not None]
        return sum(known) + sum(tensor.numel for tensor in self.plain) if len(known) == len(counts) else None


def take_stock(component: Component, checkpoint: Checkpoint) -> Stock:
    """Say what of a component's checkpoint is quantized.

    Reads the few bytes beside weights that say how these are quantized, where a scheme has such.
    """
    found = quantized_in(checkpoint)
    if not found:
        return Stock((), checkpoint.tensors)
    try:
        restored = find_unasked(component, checkpoint)
    except WconvError as error:
        belongings = find_belongings(found, (tensor.name for tensor in checkpoint.tensors))
        inside = [tensor for tensor in checkpoint.tensors if tensor.name in belongings]
        label = " and ".join(dict.fromkeys(one.scheme.label for one in found))
        share = Share(label, len({one.weight for one in found}), None, sum(tensor.nbytes for tensor in inside))
        return Stock((share,), [one for one in checkpoint.tensors if one.name not in belongings], error)
    plain = [one for one in checkpoint.tensors if one.name not in restored.weights and one.name not in restored.beside]
    return Stock(sorted(_shares_of(restored), key=lambda share: -share.nbytes), plain)


def _shares_of(found: Found) -> Iterable[Share]:
    labels = dict.fromkeys(module.scheme.label for module in found.modules.values())
    for label in labels:
        names = [name for name, module in found.modules.items() if module.scheme.label == label]
        shapes = (found.weights[name].source.shape for name in names)
        tensors = (one for name in names for one in (found.modules[name].weight, *found.modules[name].beside.values()))
        yield Share(label, len(names), sum(map(math.prod, shapes)), sum(tensor.nbytes for tensor in tensors))
