"""Make the samples of tests/corpus/quantized/{gptq,awq}: small weights, and what the real libraries make of them.

``NAME.safetensors`` is a linear module as the library has it in a file, with the ``quantization_config`` of its folder
in the header where there is one; ``NAME.judge.safetensors`` is the weight [out, in] that the library computes with.

The libraries need not be installed, as their extensions do not build everywhere: unpack gptqmodel 7.7.0, autoawq 0.2.9
and auto_gptq 0.7.1 (sdists, and a wheel) into one folder each of a common one. In an environment with torch 2.13.0,
transformers 5.24 and what gptqmodel imports at once (pip install --no-deps pypcre tokenicer logbar device-smi defuser
threadpoolctl accelerate), run::

    python scripts/samples_gptq.py FOLDER_OF_THE_THREE tests/corpus/quantized
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

IN, OUT, GROUP = 96, 64, 32
State = dict[str, torch.Tensor]


def main(sources: Path, out: Path) -> None:
    torch.manual_seed(19)
    sys.path.insert(0, str(next(sources.glob("gptqmodel*"))))
    make_gptqmodel(out / "gptq")
    make_auto_gptq(sources, out / "gptq")
    make_awq(sources, out / "awq")


def write(folder: Path, name: str, state: Mapping[str, torch.Tensor], weight: torch.Tensor, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"quantization_config": json.dumps(config)} if config else {}
    save_file({f"m.{end}": one.contiguous() for end, one in state.items()}, folder / f"{name}.safetensors", metadata)
    save_file({"m.weight": weight.contiguous()}, folder / f"{name}.judge.safetensors")


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def zeros_of_the_first_version(groups: int, outputs: int, bits: int) -> torch.Tensor:
    """Pack zero points less one, of 1 and more, one behind another from the lowest bits on."""
    stored = torch.randint(0, (1 << bits) - 1, (groups, outputs))
    streams = [sum(int(code) << (bits * at) for at, code in enumerate(row)) for row in stored]
    raw = b"".join(stream.to_bytes(outputs * bits // 8, "little") for stream in streams)
    return torch.frombuffer(bytearray(raw), dtype=torch.int32).reshape(groups, -1)


def scales(groups: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return (torch.rand(groups, OUT) * 0.02 + 0.001).to(dtype)


def make_gptqmodel(folder: Path) -> None:
    linear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    to_second_version = importlib.import_module("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module

    def make(name: str, bits: int, version: str, group: int = GROUP, order: str = "", **more: Any) -> None:
        size = IN if group == -1 else group
        groups = -(-IN // size)
        module = linear(
            bits=bits, group_size=group, sym=False, desc_act=bool(order), in_features=IN, out_features=OUT, bias=False
        )
        index = torch.arange(IN, dtype=torch.int32) // size
        zeros = words(groups, OUT * bits // 32)
        if version == "gptq":
            zeros = zeros_of_the_first_version(groups, OUT, bits)
        state = {
            "qweight": words(IN * bits // 32, OUT),
            "qzeros": zeros,
            "scales": scales(groups, more.pop("dtype", torch.float16)),
            "g_idx": index[torch.randperm(IN)] if order else index,
        }
        for end, one in state.items():
            assert getattr(module, end).shape == one.shape, (name, end)
            setattr(module, end, one.clone())
        if version == "gptq":
            to_second_version(module, bits, torch.int32)
        weight = module.dequantize_weight().T
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}
        write(folder, name, state, weight, **config, desc_act=bool(order))

    for bits in (2, 3, 4, 8):
        make(f"v1-{bits}", bits, "gptq")
        make(f"v2-{bits}", bits, "gptq_v2")
        make(f"act-order-{bits}", bits, "gptq_v2", order="any")
    make("one-group", 4, "gptq", group=-1)
    make("bf16", 4, "gptq_v2", dtype=torch.bfloat16)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_auto_gptq(sources: Path, folder: Path) -> None:
    """Pack as auto_gptq does, symmetrically, and have it multiply with the identity."""
    path = next(sources.glob("*/auto_gptq/nn_modules/qlinear/qlinear_cuda.py"))
    for bits in (2, 3, 4, 8):
        linear = torch.nn.Linear(IN, OUT, bias=False).half()
        module = load(path).QuantLinear(bits, GROUP, IN, OUT, bias=False)
        largest = linear.weight.data.float().reshape(OUT, -1, GROUP).abs().amax(-1)
        steps = (largest / (2 ** (bits - 1) - 0.5)).half().float()
        module.pack(linear, steps, torch.full_like(steps, 2 ** (bits - 1)), module.g_idx)
        state = {end: getattr(module, end) for end in ("qweight", "qzeros", "scales", "g_idx")}
        write(folder, f"auto_gptq-{bits}", state, module(torch.eye(IN).half()).T)


def make_awq(sources: Path, folder: Path) -> None:
    utils = load(next(sources.glob("autoawq*/awq/utils/packing_utils.py")))
    for name, group in (("gemm", GROUP), ("one-group", IN)):
        groups = IN // group
        state = {"qweight": words(IN, OUT // 8), "qzeros": words(groups, OUT // 8), "scales": scales(groups)}
        weight = utils.dequantize_gemm(state["qweight"], state["qzeros"], state["scales"], 4, group)
        write(folder, name, state, weight.T, quant_method="awq", bits=4, group_size=group, version="gemm")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
