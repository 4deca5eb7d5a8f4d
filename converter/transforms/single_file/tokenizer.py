"""CLIP's tokenizer, which all Stable Diffusion shares: its merges are shipped, and its vocabulary follows from them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence

from converter.storage import Place


def tokenizer_files(packed: Place, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Give the files for those of a pipeline's parts that are tokenizers, from CLIP's merges, gzipped."""
    with packed.open() as file:
        merges = gzip.decompress(b"".join(file.chunks()))
    vocabulary = json.dumps(_vocabulary(merges.decode().splitlines()[1:]), ensure_ascii=False).encode()
    for name in names:
        if name.startswith("tokenizer"):
            yield f"{name}/merges.txt", merges
            yield f"{name}/vocab.json", vocabulary


def _vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Number CLIP's tokens: every byte, the same at a word's end, what each merge gives, and the two marks.

    Bytes that do not print stand for themselves 256 higher (``clip/simple_tokenizer.py``).
    """
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, prints), *(chr(256 + count) for count in range(256 - len(prints)))]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(tokens)}
