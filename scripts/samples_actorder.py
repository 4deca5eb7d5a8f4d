"""Make a small file whose columns are in groups in an order of their own, and what compressed-tensors makes of it.

    PYTHONPATH=WHEEL .venv/bin/python scripts/samples_actorder.py tests/corpus/quantized/compressed

WHEEL is compressed_tensors 0.12.2 unpacked: later ones write no such order (``actorder: group``) and do not read it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

GROUP = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight = torch.randn(24, 96, dtype=torch.bfloat16)
    order = torch.randperm(96)
    index = torch.empty(96, dtype=torch.int32)
    index[order] = torch.arange(96, dtype=torch.int32) // GROUP
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP, actorder="group")
    parts = weight.float()[:, order].unflatten(-1, (-1, GROUP))
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    scale = scale.bfloat16()
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    state = compressor.compress_weight(weight, scale, args, zero_point=zero, g_idx=index)
    state |= {"weight_scale": scale, "weight_g_idx": index}
    judged = compressor.decompress_weight(dict(state), args)
    save_file({f"m.{name}": one.contiguous() for name, one in state.items()}, out / "actorder.safetensors")
    save_file({"m.weight": judged.contiguous()}, out / "actorder.judge.safetensors")


if __name__ == "__main__":
    main()
