"""sentence-transformers: a folder with a ``modules.json``, of a transformers model and layers of its own."""

from __future__ import annotations

from converter.libraries.transformers import Transformers
from converter.libraries.written import Written, is_found_plain
from converter.models.model import Model


class SentenceTransformers(Transformers):
    """A whole folder; each part by itself is as any other."""

    def no_variants(self, folder: Model) -> str:
        """See ``Module.load_torch_weights`` in ``sentence_transformers/base/modules/module.py``."""
        return "sentence-transformers"

    def load_folder(self, written: Written) -> list[str]:
        if not all(is_found_plain(written, one) for one in written.sets):
            return []
        imported = "from sentence_transformers import SentenceTransformer"
        return [imported, f"SentenceTransformer({str(written.folder)!r})"]


SENTENCE_TRANSFORMERS = SentenceTransformers()
