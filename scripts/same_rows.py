"""The command lines that `same_bytes.py` runs in two trees, and what differs on purpose between them.

A row is a source, which is a function of `same_sources.py` and is written to the folder src, and the commands that are
then run one after another. A change is listed by the last commit of those that made it.
"""

from __future__ import annotations

from typing import NamedTuple

ROWS = """
bin_file            | to-safetensors src
bin_file            | to-safetensors src -o out --json
bin_file            | to-safetensors src/pytorch_model.bin -o out.safetensors
bin_file            | to-safetensors src -o out; to-safetensors src -o out
bin_file            | to-safetensors src -o out --dry-run --json
bin_file            | to-safetensors src --delete-source --verify
bin_file            | to-safetensors src -o out --max-shard-size 0.07KB
bin_file            | to-safetensors src -o out --variant ema
bin_file            | to-safetensors src -o out --variant fp16
bin_shards          | to-safetensors src
bin_shards          | to-safetensors src -o out --verify
bin_shards          | to-safetensors src -o out --max-shard-size none
bin_shards          | to-safetensors src/pytorch_model.bin.index.json -o out
old_torch           | to-safetensors src -o out
big_endian          | to-safetensors src -o out
deflated            | to-safetensors src -o out
views               | to-safetensors src -o out
views               | to-safetensors src -o out --tied first
views               | to-safetensors src -o out --tied duplicate
lazy_views          | to-safetensors src/model.pt -o out.safetensors
dtypes_bin          | to-safetensors src -o out
large               | to-safetensors src -o out --memory 4MB
behind_links        | to-safetensors src/model -o out
training            | to-safetensors src/last.ckpt -o out.safetensors
two_states          | to-safetensors src/model.pt -o out.safetensors
two_states          | to-safetensors src/model.pt -o out.safetensors --key ema
prefixed            | to-safetensors src -o out --strip-prefix module.
foreign             | to-safetensors src/model.pt -o out.safetensors
calls               | to-safetensors src/model.pt -o out.safetensors
calls               | to-safetensors src/model.pt -o out.safetensors --strip-code
sparse              | to-safetensors src -o out
sparse              | to-safetensors src -o out --skip-unreadable
whole_module        | to-safetensors src/model.pt -o out.safetensors
damaged             | to-safetensors src -o out
cut_short           | to-safetensors src -o out
shard_missing       | to-safetensors src -o out
llama_tied_bin      | to-safetensors src -o out
t5_bin              | to-safetensors src -o out
clip_bin            | to-safetensors src
gpt2_bin            | to-safetensors src -o out
sd_bin              | to-safetensors src -o out --json
sd_bin              | to-safetensors src --component unet --max-shard-size none
sdxl_bin            | to-safetensors src -o out
pipeline_fp16       | to-safetensors src
legacy_names        | to-safetensors src -o out
safetensors_file    | to-bin src
safetensors_shards  | to-bin src -o out
dtypes              | to-bin src -o out
sana                | to-bin src -o out
bin_file            | to-safetensors src -o out; to-bin out -o back; verify src back --json
safetensors_file    | recast src --dtype bf16
safetensors_file    | recast src --dtype fp16 -o out --json
safetensors_file    | recast src --dtype fp8_e4m3fn -o out
odd_values          | recast src --dtype fp8_e5m2
odd_values          | recast src --dtype fp8_e4m3fn --on-overflow inf
safetensors_file    | recast src --dtype fp32 -o out
safetensors_file    | recast src --dtype bf16 --keep-fp32 a -o out
safetensors_file    | recast src --dtype bf16 -o out.safetensors
bin_shards          | recast src --dtype bf16 --variant none -o out
odd_values          | recast src --dtype bf16
odd_values          | recast src --dtype fp16 -o out
odd_values          | recast src --dtype fp8_e4m3fn -o out --on-overflow saturate
odd_values          | recast src --dtype fp8_e5m2 -o out --on-overflow inf
too_large           | recast src --dtype fp16 -o out
too_large           | recast src --dtype fp16 -o out --on-overflow saturate
too_large           | recast src --dtype fp16 -o out --on-overflow inf
dtypes              | recast src --dtype fp16 -o out
dtypes              | recast src --dtype fp32 -o out
dtypes_bin          | recast src --dtype bf16 -o out
big_endian          | recast src --dtype bf16 -o out
views               | recast src --dtype fp16 -o out
lazy_views          | recast src/model.pt --dtype bf16 -o out.safetensors
large               | recast src --dtype bf16 -o out --memory 4MB
llama_tied          | recast src --dtype bf16
llama_untied        | recast src --dtype bf16
llama_untied        | recast src --dtype fp16 -o out
llama_untied        | recast src --dtype fp8_e4m3fn -o out
t5                  | recast src --dtype fp16 -o out
t5                  | recast src --dtype bf16 -o out
clip                | recast src --dtype bf16 -o out
sd_bin              | recast src --dtype fp16
sana                | recast src --dtype bf16 -o out --json
sana                | recast src --dtype bf16 --component transformer
wan                 | recast src --dtype bf16 -o out
wan                 | recast src --dtype fp16 -o out
sd3                 | recast src --dtype fp16 -o out
safetensors_file    | recast src --dtype int8 -o out
safetensors_shards  | reshard src --max-shard-size none -o out
safetensors_shards  | reshard src --max-shard-size none --in-place
safetensors_file    | reshard src --max-shard-size 0.07KB --in-place
bin_shards          | reshard src --max-shard-size 0.13KB -o out
bin_shards          | reshard src --max-shard-size 0.13KB --in-place --json
llama_tied_bin      | reshard src --max-shard-size 30KB -o out
sd_bin              | reshard src --max-shard-size none -o out
pipeline_fp16       | rename-variant src --from fp16 --to none
pipeline_fp16       | rename-variant src --from fp16 --to bf16 --component unet
legacy_names        | rename-variant src --from fp16 --to fp16
bin_shards          | rename-variant src --from none --to fp16
bin_shards          | rename-variant src --from fp16 --to none
llama_untied        | quantize src -o out --json
llama_untied        | quantize src -o out; verify src out --quantized --json
llama_untied        | quantize src -o out --include mlp --dtype bf16
llama_untied        | quantize src -o out --skip layers\\.0\\. --max-shard-size 30KB
llama_tied_bin      | quantize src -o out; dequantize out -o back --dtype fp16
gpt2                | quantize src -o out; dequantize out -o back --dtype fp32
gpt2_bin            | quantize src -o out --dtype fp16
t5                  | quantize src -o out
sana                | quantize src -o out; dequantize out -o back --dtype bf16
sana                | quantize src -o out --component transformer --dtype fp16
clip_bin            | quantize src -o out
bin_file            | quantize src -o out
llama_untied        | dequantize src -o out --dtype fp16
sd_bin              | prepare-coreml src -o out
sd                  | prepare-coreml src -o out --keep-default --json
sdxl                | prepare-coreml src -o out --verify
sana                | prepare-coreml src -o out
sd1_ckpt            | prepare-coreml src/model.ckpt --config src/config -o out
sd1_ckpt            | prepare-coreml src/model.ckpt --config src/config -o out --ema
sd1_safetensors     | prepare-coreml src/model.safetensors --config src/config -o out --keep-default
sd2_ckpt            | prepare-coreml src/model.ckpt --config src/config -o out
sdxl_safetensors    | prepare-coreml src/model.safetensors --config src/config -o out --ema
sd1_ckpt            | prepare-coreml src/model.ckpt -o out
bin_shards          | to-safetensors src -o out; verify src out --json
safetensors_file    | recast src --dtype bf16 -o out; verify src out --cast --json
safetensors_file    | recast src --dtype bf16 -o out; verify src out
no_index            | doctor src --json; doctor src --fix; doctor src
wrong_index         | doctor src --json; doctor src --fix
wrong_size          | doctor src --json; doctor src --fix; doctor src --undo
index_cut_short     | doctor src --json; doctor src --fix
shard_missing       | doctor src --json; doctor src --fix
set_twice           | doctor src --json; doctor src --fix
index_of_nothing    | doctor src --json; doctor src --fix
legacy_names        | doctor src --json; doctor src --fix
partial_variant     | doctor src --json; doctor src --fix --make-variant fp16
partial_variant     | doctor src --fix --keep-default
not_numbers         | doctor src --deep --json
damaged             | doctor src --json
llama_untied        | doctor src --deep --json
sana                | doctor src --json
sd_bin              | doctor src --loader diffusers --json
sd_bin              | doctor src --loader coreml --json
pipeline_fp16       | doctor src --loader diffusers --variant fp16 --json
sd_bin              | inspect src --json
views               | inspect src --tensors --json
training            | inspect src/last.ckpt --json
dtypes              | inspect src --tensors
llama_tied          | inspect src --json
"""


class Row(NamedTuple):
    """A line of the table."""

    source: str
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {'; '.join(self.commands)}"


class Change(NamedTuple):
    """What differs on purpose: in rows that a pattern is found in, which facts (each must differ), and why."""

    rows: str
    facts: tuple[str, ...]
    why: str


_JSON = r"(to-safetensors|recast|reshard|quantize|prepare-coreml) [^;]*--json"
# Recasts to a new folder with the names of transformers, or with none, that are not refused and cast all they can.
_RECAST_OUT = (
    r"^(?!dtypes|views|bin_shards|too_large: .*out$|sana|sd3|wan).*"
    r": recast src --dtype (?!int8|fp8\S* -o out$)[^;]+ -o out( |;|$)"
)
_KEPT = ("out/model.*.safetensors", "out/model.safetensors")

# By the last commit of those that made them: what has it must not differ in them.
CHANGES: dict[str, tuple[Change, ...]] = {
    "68e9a04": (
        Change(_JSON, ("stdout 1#*#kept", "stdout 1#carried_nbytes", "stdout 1#up_to_date"), "JSON says more"),
        Change(rf"^(?!.*--dry-run).*{_JSON}", ("stdout 1#too_large",), "JSON counts values that were too large"),
        Change("inspect .*--json", ("stdout 1#training_state", "stdout 1#linked"), "JSON says more"),
        Change(
            _RECAST_OUT,
            ("out/model.*.safetensors is now out/model.safetensors",),
            "a new folder gets plain names",
        ),
        Change("lazy_views: recast", ("out.bf16.safetensors is now out.safetensors",), "-o names the file"),
        Change(
            "file: recast [^;]*--json", ("stdout 1#*variant", "stdout 1#*path", "stdout 1#load_with#1"), "plain names"
        ),
        Change("^dtypes.*: recast", _KEPT, "plain names; floats of 8 bits are cast like any other"),
        Change(r": recast src --dtype fp8\S* -o out$", _KEPT, "plain names; 8 bits leave norms and biases as they are"),
        Change("^views: .* -o out$", ("out/model.safetensors",), "ties of a lone file are written under each name"),
        Change("^views: recast", ("out/model.fp16.safetensors",), "plain names"),
        Change(r"^(llama_untied|t5|clip): recast .*(bf16|fp16) -o", ("out/config.json#dtype",), "as it is written"),
        Change("^llama_tied_bin: quantize", ("back/config.json#torch_dtype",), "config.json names the dtype"),
        Change("^gpt2_bin: quantize", ("out/config.json#torch_dtype",), "config.json names the dtype"),
        Change("^bin_shards: reshard .* --json", ("stdout 1#load_with#*",), "lines that load every shard"),
        Change("-o out; to-safetensors", ("exit 2",), "a finished command typed again says that all is up to date"),
        Change(
            "bin_file.* --variant fp16", ("exit 1", "out", "out/*"), "no tag of a dtype that the file does not hold"
        ),
        Change("sparse.*--skip", ("exit 1", "out", "out/model.safetensors"), "the option is new"),
        Change("^wrong_index: doctor", ("stdout 1#findings#1#mending",), "--drop-strays is new"),
        Change(r"^(?!wrong_|shard_).*: doctor .*--fix", (".wconv-undo/*",), "what --fix keeps lies in another layout"),
        Change("^legacy_names: doctor|--make-variant", ("exit 2",), "exits 1 where a loader that is shown fails"),
        Change("--fix --keep-default", ("exit 1",), "exits 1 where a loader that is shown fails"),
    ),
}


def rows_of(table: str) -> list[Row]:
    """Read the table."""
    halves = (line.split("|") for line in table.strip().splitlines())
    return [Row(source.strip(), tuple(map(str.strip, commands.split(";")))) for source, commands in halves]
