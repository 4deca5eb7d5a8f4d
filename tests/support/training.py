"""Checkpoints that training libraries wrote, from the corpus, and what the libraries' own readers make of them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

CORPUS = Path(__file__).parents[1] / "corpus" / "training"
NAMES = sorted(path.stem for path in CORPUS.glob("*.zip"))


def unpack(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor], list[str]]:
    """Unpack a sample and give its checkpoint, the reader's tensors, and their names in the reader's order."""
    sample = folder / name
    with zipfile.ZipFile(CORPUS / f"{name}.zip") as archive:
        archive.extractall(sample)
    order = json.loads((sample / "order.json").read_text())
    return sample / "checkpoint", load_file(sample / "judge.safetensors"), order
