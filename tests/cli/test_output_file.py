"""``-o FILE``: what is named is what is written, or it is refused in one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_same, make_state, save, save_pipeline, save_safetensors_shards, snapshot

STATE = make_state()
INDEX = "shards/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("command", "source", "output", "holds"),
    [
        (("recast", "--dtype", "fp16"), "m.bin", "y.safetensors", torch.float16),
        (("recast", "--dtype", "bf16", "--variant", "none"), "m.bin", "y.safetensors", torch.bfloat16),
        (
            ("recast", "--dtype", "bf16", "--variant", "bf16"),
            "m.bin",
            "y.bf16.safetensors",
            torch.bfloat16,
        ),
        (("reshard", "--max-shard-size", "none"), "m.bin", "y.pt", torch.float32),
        (
            ("reshard", "--max-shard-size", "none"),
            INDEX,
            "y.safetensors",
            torch.float32,
        ),
        (("to-bin",), INDEX, "deep/down/y.ckpt", torch.float32),
    ],
)
def test_a_named_file_is_what_is_written(
    command: tuple[str, ...],
    source: str,
    output: str,
    holds: torch.dtype,
    wconv: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m.bin"))
    save_safetensors_shards(STATE, Path("shards"))
    before = snapshot(tmp_path)
    name, *options = command
    wconv(name, source, *options, "-o", output)
    assert {path for path in snapshot(tmp_path).keys() - before.keys() if Path(path).is_file()} == {output}
    is_torch = not output.endswith(".safetensors")
    state = torch.load(output, weights_only=True) if is_torch else load_file(output)
    assert_same(state, {key: tensor.to(holds) for key, tensor in STATE.items()})
    assert "Up to date" in wconv(name, source, *options, "-o", output).stdout


@pytest.mark.parametrize(
    ("args", "exit_code", "said"),
    [
        (("to-safetensors", "m.bin", "-o", "x.bin"), 2, "x.bin: is no name for a safetensors file. "),
        (("to-bin", "m.bin", "-o", "x.safetensors"), 2, "x.safetensors: is no name for a torch file. "),
        (("to-safetensors", "m.bin", "-o", "x.gguf"), 2, "x.gguf: has an ending of files that wconv does not write. "),
        (("to-safetensors", "m.bin", "-o", "x.Safetensors"), 2, "x.Safetensors: has an ending of files that wconv "),
        (("to-safetensors", "m.bin", "-o", "x.nemo"), 2, "x.nemo: has an ending of files that wconv does not write. "),
        (("to-safetensors", "m.bin", "-o", "x-00001-of-00002.safetensors"), 2, "is the name of a shard. "),
        (("to-safetensors", "m.bin", "-o", "x.safetensors", "--max-shard-size", "0.1KB"), 2,
         "x.safetensors: is one file, and shards of at most 100 bytes are 2. Use --max-shard-size none, or "),
        (("recast", "m.bin", "-o", "x.safetensors", "--dtype", "bf16", "--variant", "bf16"), 2,
         "x.safetensors: is the whole name of a file, and --variant bf16 would change it. Leave --variant out, "),
        (("to-safetensors", "two", "-o", "x.safetensors"), 2,
         "x.safetensors: is one file, and two has weights of 2 variants. Choose with --from-variant (fp16, none), or "),
        (("to-safetensors", "pipe", "-o", "x.safetensors"), 2, "(text_encoder, unet, vae), or name a folder "),
        (("quantize", "one", "-o", "x.safetensors"), 2, "x.safetensors: is a file name, and what is written is a "),
        (("to-safetensors", "m.bin", "-o", "there.safetensors"), 5,
         "there.safetensors: exists, and is not what would be written: there.safetensors has 5 bytes and not "),
        (("recast", "half.safetensors", "-o", "half.safetensors", "--dtype", "bf16"), 5,
         "half.safetensors: exists, and is not what would be written: "),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_was_named_is_refused(
    args: tuple[str, ...],
    exit_code: int,
    said: str,
    wconv: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m.bin"))
    save({name: tensor.half() for name, tensor in STATE.items()}, Path("half.safetensors"))
    Path("there.safetensors").write_text("hello")
    save_safetensors_shards(STATE, Path("one"))
    save(STATE, Path("two/model.safetensors"))
    save(STATE, Path("two/model.fp16.safetensors"))
    save_pipeline(Path("pipe"))
    before = snapshot(tmp_path)
    outcome = wconv(*args, exit_code=exit_code)
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before
