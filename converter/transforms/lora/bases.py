"""The models that adapters are for: which modules they have, in Diffusers' names and in their trainer's.

The tables are those of the layouts. A name with underscores, as kohya has it, is looked up among them word by word, so
nothing is guessed of which underscore was a dot; and what is in no table is of no such model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from converter.transforms.layouts.flux import flux_rows
from converter.transforms.layouts.rows import Row, fill, find_leaf, tree_of
from converter.transforms.layouts.sd3 import sd3_rows
from converter.transforms.layouts.stable_diffusion import unet_rows

_LEAVES = (".*", ".weight")
_XL = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}

# The parts of a pipeline that an adapter may have pairs of, with what kohya's names begin with there. The second text
# encoder of Flux is a T5, which is the third of Stable Diffusion 3 (``networks/lora.py``, ``lora_flux.py``,
# ``lora_sd3.py`` of kohya-ss/sd-scripts).
ENCODERS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
T5_PREFIX = "lora_te3_"
DENOISER_PREFIXES = ("lora_unet_", "lora_transformer_")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

_CLIP = (
    *(f"encoder.layers.{{}}.self_attn.{which}_proj" for which in ("q", "k", "v", "out")),
    *("encoder.layers.{}.mlp.fc1", "encoder.layers.{}.mlp.fc2"),
)
_T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{which}" for which in ("q", "k", "v", "o")),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{which}" for which in ("wi", "wi_0", "wi_1", "wo")),
)


class Found(NamedTuple):
    """A module in a table: its row, its place among the parts (None for the whole), and what fills the holes."""

    row: Row
    place: int | None
    words: tuple[str, ...]

    @property
    def whole(self) -> str:
        """The path of the whole, in the trainer's names."""
        return fill(self.row.whole, self.words, 0)

    @property
    def paths(self) -> list[str]:
        """The paths of all parts, in Diffusers' names."""
        return [fill(part, self.words, 0) for part in self.row.parts]

    @property
    def path(self) -> str:
        """Its own path, of one that is a part."""
        return self.paths[self.place or 0]


@dataclass(frozen=True)
class Modules:
    """The modules of a model, to be found by their paths, with dots or with underscores."""

    by_dots: Any
    by_underscores: Any

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Modules:
        """Make them of the rows of a table; those are of tensors, and a module is what has a weight."""
        leaves = [(name, leaf) for row in map(_of_modules, rows) if row for name, leaf in _leaves_of(row)]
        return cls(tree_of(leaves), tree_of((name.replace("_", "."), leaf) for name, leaf in leaves))

    def find(self, path: str) -> Found | None:
        """Find a module by its path with dots."""
        return _found(find_leaf(self.by_dots, path.split(".")))

    def find_kohya(self, name: str) -> Found | None:
        """Find a module by its path with underscores."""
        return _found(find_leaf(self.by_underscores, name.split("_")))


def _of_modules(row: Row) -> Row | None:
    """Give the row of modules for one of their tensors; None for what has no weight."""
    names = [row.whole, *row.parts]
    if not all(name.endswith(_LEAVES) for name in names):
        return None
    whole, *parts = (name.rpartition(".")[0] for name in names)
    return Row(whole, tuple(parts), row.operation)


def _leaves_of(row: Row) -> Iterator[tuple[str, tuple[Row, int | None]]]:
    for place, part in enumerate(row.parts):
        yield part, (row, place)
    if row.parts != (row.whole,):
        yield row.whole, (row, None)


def _found(leaf: Any) -> Found | None:
    if leaf is None:
        return None
    (row, place), words = leaf
    return Found(row, place, words)


class Base(NamedTuple):
    """A kind of model that is trained: its name, the part of a pipeline that it is, and the rows of its table.

    ``original`` are the rows by which kohya names its modules as the trainer does; of Stable Diffusion 1 and 2 it takes
    Diffusers' names.
    """

    name: str
    part: str
    rows: tuple[Row, ...]
    original: tuple[Row, ...] = ()


FLUX, SD3, SD35_LARGE = "Flux", "Stable Diffusion 3", "Stable Diffusion 3.5 Large"


@cache
def bases() -> tuple[Base, ...]:
    """Give all kinds of models whose adapters are converted.

    Those of Stable Diffusion 3 differ in how many blocks they have, the last of which is another: 24, and 38. Of Flux
    the blocks are counted too, as HunyuanVideo and Qwen-Image have the same names, and more of them.
    """
    xl = tuple(unet_rows(_XL))
    flux = tuple(numbered for row in flux_rows({"guidance_embeds": True}) for numbered in _numbered(row))
    medium = tuple(sd3_rows({"num_layers": 24, "dual_attention_layers": range(24)}))
    large = tuple(sd3_rows({"num_layers": 38}))
    return (
        Base("Stable Diffusion", "unet", (*unet_rows({}), *xl), xl),
        Base(FLUX, "transformer", flux, flux),
        Base(SD3, "transformer", medium, medium),
        Base(SD35_LARGE, "transformer", large, large),
    )


def _numbered(row: Row) -> Iterator[Row]:
    """Give the rows for each block of Flux."""
    count = 0 if "{}" not in row.whole.split(".") else 38 if row.whole.startswith("single_blocks") else 19
    for number in range(count):
        words = (str(number),)
        yield Row(fill(row.whole, words, 0), tuple(fill(part, words, 0) for part in row.parts), row.operation)
    if not count:
        yield row


@cache
def modules_of(name: str) -> Modules:
    """Give the modules of a kind of model, by its name."""
    return Modules.of(next(base.rows for base in bases() if base.name == name))


@cache
def original_of(name: str, is_xl: bool = True) -> Modules:
    """Give the same by the rows by which its trainer names them; the UNet of Stable Diffusion 1 and 2 has others."""
    base = next(base for base in bases() if base.name == name)
    return Modules.of(base.original if is_xl or base.part != "unet" else unet_rows({}))


@cache
def clip_modules() -> Modules:
    """Give the modules of CLIP's text encoders: in version 5 of transformers some have no ``text_model.``."""
    names = [*_CLIP, "text_projection"]
    return Modules.of(
        Row(f"{path}.*", (f"{path if path == 'text_projection' else f'text_model.{path}'}.*",)) for path in names
    )


@cache
def t5_modules() -> Modules:
    """Give the modules of T5's encoder."""
    return Modules.of(Row(f"{path}.*", (f"{path}.*",)) for path in _T5)
