"""What is typed by those who have not read the help: the command or option that is meant, to be named in the error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_COMMANDS = {
    "cast": ("recast",),
    "check": ("doctor", "verify"),
    "compare": ("verify",),
    "convert": ("to-safetensors", "to-diffusers", "to-single-file", "convert-lora"),
    "diff": ("verify",),
    "extract": ("to-safetensors --only", "to-single-file MODEL/vae"),
    "fix": ("doctor --fix",),
    "fuse": ("merge-lora", "reshard --experts fused"),
    "info": ("inspect",),
    "lora": ("merge-lora", "convert-lora"),
    "merge": ("merge-lora", "reshard --max-shard-size none"),
    "prune": ("to-safetensors --drop", "to-diffusers"),
    "rename": ("to-safetensors --rename", "rename-variant"),
    "shard": ("reshard",),
    "show": ("inspect",),
    "split": ("reshard",),
    "to-checkpoint": ("to-single-file",),
    "to-ckpt": ("to-single-file",),
    "to-comfyui": ("to-single-file", "convert-lora --to kohya"),
    "to-hf": ("to-safetensors --layout transformers", "to-diffusers"),
    "to-single": ("to-single-file",),
}
# Only what the command has is named, of these.
_OPTIONS = {
    "--adapter": ("ADAPTER after BASE",),
    "--alpha": ("ADAPTER:WEIGHT",),
    "--base": ("BASE as the first argument",),
    "--bf16": ("--dtype bf16",),
    "--component": ("--without", "SRC/vae in place of SRC"),
    "--ema-only": ("--ema",),
    "--exclude": ("--drop", "--without"),
    "--force": ("--overwrite",),
    "--fp16": ("--dtype fp16",),
    "--half": ("--dtype fp16",),
    "--lora": ("ADAPTER after BASE",),
    "--no-ema": ("--drop model_ema",),
    "--no-t5": ("--without text_encoder_3",),
    "--no-text-encoders": ("--without text-encoders",),
    "--no-vae": ("--without vae",),
    "--only": ("--without", "SRC/vae in place of SRC"),
    "--out": ("--output",),
    "--precision": ("--dtype",),
    "--prefix": ("--strip-prefix", "--add-prefix"),
    "--ratio": ("ADAPTER:WEIGHT",),
    "--scale": ("ADAPTER:WEIGHT",),
    "--shard-size": ("--max-shard-size",),
    "--threads": ("--workers",),
    "--variant": ("--from-variant",),
    "--weight": ("ADAPTER:WEIGHT",),
    "--without-vae": ("--without vae",),
}


def guess_command(typed: str, names: Iterable[str]) -> str:
    """Ask whether a command is meant that there is; nothing where none seems to be.

    >>> guess_command("to-safetensor", ["to-safetensors", "recast"])
    " Did you mean 'to-safetensors'?"
    """
    typed = typed.lower().replace("_", "-")
    meant = _COMMANDS.get(typed) or get_close_matches(typed, list(names))
    return _asked(meant)


def guess_option(typed: str, options: Iterable[str], metavars: Iterable[str]) -> str:
    """Ask whether an option or argument is meant that a command has; nothing where none is known.

    >>> guess_option("--half", ["--dtype", "--help"], [])
    " Did you mean '--dtype fp16'?"
    """
    has = {*options, *(word for metavar in metavars for word in metavar.strip("[].").replace("[:", " ").split())}
    return _asked([one for one in _OPTIONS.get(typed, ()) if _subject(one) in has])


def _asked(meant: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""


def _subject(guess: str) -> str:
    """Give the option or argument that a guess is about."""
    return guess.split()[0].partition(":")[0].partition("/")[0]
