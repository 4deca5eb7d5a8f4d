"""The model card of a repository that is written to the Hub: what the weights in it are made from, and how.

One that comes along with the source keeps its words, and gets a section. One that is there is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from converter import __version__
from converter.errors import BadFile
from converter.models.model import Model
from converter.plan.types import Order, Target
from converter.storage import FileRef
from converter.storage.far import CommittedStore

CARD = "README.md"
_MAX_NBYTES = 1_000_000


def make_card(model: Model, target: Target, orders: Iterable[Order], carried: FileRef | None) -> bytes | None:
    """Give the card that a new repository gets; None where it has one, and elsewhere than on the Hub.

    ``carried`` is the source's own; one that is longer than a card can be goes along as it is. Raises BadFile for one
    that is no text.
    """
    folder = target.folder
    if not isinstance(folder.store, CommittedStore) or folder.key != "." or (folder / CARD).exists():
        return None
    section = _section(model, orders)
    if carried is None:
        name = folder.store.loaders_name or folder.name
        return (_base(model) + f"# {name.rpartition('/')[2]}\n\n{section}").encode()
    file = carried.open()
    try:
        if file.nbytes > _MAX_NBYTES:
            return None
        text = b"".join(file.chunks()).decode()
        file.check()
    except UnicodeDecodeError:
        raise BadFile(carried.place, "is no text", "Mend it, or take it away.") from None
    finally:
        file.close()
    return f"{text.rstrip()}\n\n{section}".encode()


def _base(model: Model) -> str:
    """Give the lines by which the Hub shows a model beside the one that it is made from."""
    source = model.root.store.loaders_name
    return f"---\nbase_model: {source}\n---\n\n" if source else ""


def _section(model: Model, orders: Iterable[Order]) -> str:
    place = model.path
    commit = place.store.commit_id
    origin = f"`{place}`" + (f" at commit `{commit}`" if commit else "") if place.store.is_far else "a folder"
    lines = []
    for order in orders:
        dtypes = sorted({tensor.dtype.short_name for tensor in order.checkpoint.tensors})
        where = f"`{order.component.name}`: " if order.component.name else ""
        lines.append(
            f"- {where}{order.name.format}, {', '.join(dtypes)}, from `{order.checkpoint.weight_set.path.name}`\n"
        )
    return f"## Conversion\n\nThe weights were converted by wconv {__version__} from {origin}:\n\n{''.join(lines)}"
