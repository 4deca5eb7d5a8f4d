"""``wconv prepare-coreml``: the exact call of Apple's script loads what it writes, and gives torch's ``.half()``.

And what is missing is said, a line for each thing, before anything is written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.original import as_original
from support.tiny import snapshot

from converter.doctor import diagnose

STEM = "diffusion_pytorch_model"


def save_as(form: str, model: Any, folder: Path, builders: Any) -> Path:
    """Save a pipeline as people have it; its tokenizer as transformers 4 wrote it."""
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(model, name, None) is not None:
            builders.write_tokenizer(folder / name)
    if form in ("bin", "bin-sharded", "mixed"):
        builders.save_bin(model, folder, 3 if form == "bin-sharded" else 1)
    if form in ("safetensors", "fp16-sharded"):
        builders.save_safetensors(model, folder)
    for name, part in builders.models_in(model).items():
        if form == "mixed" and name == "vae":
            # One part as safetensors, and the fp16 variant already there.
            part.save_pretrained(folder / name)
            (folder / name / f"{STEM}.bin").unlink()
            half = {key: tensor.half() for key, tensor in load_file(folder / name / f"{STEM}.safetensors").items()}
            save_file(half, folder / name / f"{STEM}.fp16.safetensors", metadata={"format": "pt"})
        if form == "fp16-sharded":
            part.half()
            limit = builders.shard_limit(part.state_dict(), 2)
            for path in (folder / name).glob("*.safetensors"):
                path.unlink()
            part.save_pretrained(folder / name, variant="fp16", max_shard_size=limit)
    return folder


def load_as_apple_does(folder: Path) -> Any:
    """Load a folder as ``get_pipeline`` of torch2coreml.py does; today's Diffusers calls ``torch_dtype`` otherwise."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float16, variant="fp16", use_safetensors=True)


def make(kind: str, builders: Any) -> Any:
    """Make a pipeline; SD 2 has another way to predict, and a wider text encoder's place taken by the same."""
    model = builders.MODELS["sdxl" if kind == "sdxl" else "sd"]()
    if kind == "sd2":
        model.scheduler.register_to_config(prediction_type="v_prediction")
        model.register_modules(safety_checker=None, feature_extractor=None)
        model.register_to_config(requires_safety_checker=False)
    return builders.shake(model)


@pytest.mark.parametrize("form", ["bin", "bin-sharded", "mixed", "safetensors", "fp16-sharded"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_script_loads_it(kind: str, form: str, builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    model = make(kind, builders)
    expected = {
        name: {key: tensor.half() for key, tensor in part.state_dict().items()}
        for name, part in builders.models_in(model).items()
    }
    source = save_as(form, model, tmp_path / "m", builders)
    before = snapshot(source)
    told = wconv("prepare-coreml", source, "-o", tmp_path / "out").stdout
    assert snapshot(source) == before
    assert f"--model-version {tmp_path / 'out'}" in told
    assert ("--xl-version" in told) == (kind == "sdxl")
    assert all(".fp16." in path.name for path in (tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("*.index*.json"))
    loaded = builders.models_in(load_as_apple_does(tmp_path / "out"))
    assert loaded.keys() == expected.keys()
    for name, part in loaded.items():
        state = part.state_dict()
        assert all(state[key].equal(tensor) for key, tensor in expected[name].items() if tensor.is_floating_point())
    assert diagnose(tmp_path / "out").is_healthy


def test_the_untagged_weights_are_kept_on_request(builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from diffusers import DiffusionPipeline

    model = make("sd1", builders)
    source = save_as("bin-sharded", model, tmp_path / "m", builders)
    wconv("prepare-coreml", source, "-o", tmp_path / "out", "--keep-default")
    load_as_apple_does(tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for name, part in builders.models_in(loaded).items():
        state = builders.models_in(model)[name].state_dict()
        assert all(tensor.equal(state[key]) for key, tensor in part.state_dict().items())
    assert diagnose(tmp_path / "out").is_healthy


def test_what_the_untagged_weights_replace_goes_with_its_index(
    builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    from diffusers import UNet2DConditionModel

    source = save_as("bin-sharded", make("sd1", builders), tmp_path / "m", builders)
    wconv("to-safetensors", source, "-o", tmp_path / "out")
    assert list((tmp_path / "out" / "unet").glob("*.index.json"))
    model = make("sd1", builders)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.fill_(7)
    other = save_as("safetensors", model, tmp_path / "other", builders)
    told = wconv("prepare-coreml", other, "-o", tmp_path / "out", "--keep-default", "--overwrite").stdout
    assert f"Removed unet/{STEM}.safetensors.index.json" in told
    assert not list((tmp_path / "out").rglob("*.index.json"))
    for variant in (None, "fp16"):
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", variant=variant)
        assert all(bool((parameter == 7).all()) for parameter in unet.parameters())
    assert "sets-twice" not in [finding.code for finding in diagnose(tmp_path / "out").findings]


def test_names_are_those_that_transformers_4_knows(builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    # As transformers 5 saves what it made itself; 4.44 to 4.51 load random weights of it, with a warning.
    source = save_as("safetensors", make("sd1", builders), tmp_path / "m", builders)
    told = wconv("prepare-coreml", source, "-o", tmp_path / "out").stdout
    assert "text_model. was put before names in model.safetensors, as transformers 4 needs it" in told
    names = load_file(tmp_path / "out" / "text_encoder" / "model.fp16.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    names = load_file(tmp_path / "out" / "safety_checker" / "model.fp16.safetensors")
    assert "vision_model.vision_model.post_layernorm.weight" in names
    assert "concept_embeds" in names
    model_index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert model_index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert "was put before" not in wconv("prepare-coreml", tmp_path / "out", "-o", tmp_path / "again").stdout


@pytest.fixture(scope="module")
def whole(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as("bin-sharded", make("sd1", builders), tmp_path_factory.mktemp("whole") / "m", builders)


MISSING = {
    "model_index.json": "it has no model_index.json",
    "tokenizer/vocab.json": "tokenizer/vocab.json: is not there",
    "tokenizer/merges.txt": "tokenizer/merges.txt: is not there",
    "scheduler/scheduler_config.json": "scheduler/scheduler_config.json: is not there",
    "feature_extractor/preprocessor_config.json": "preprocessor_config.json: is not there",
    f"unet/{STEM}-00002-of-00003.bin": "lacks 1 of 3 shards",
    "unet": "unet: is not there, and model_index.json names it",
    "vae": "vae: is not there, and model_index.json names it",
    "text_encoder": "text_encoder: is not there, and model_index.json names it",
    "safety_checker": "safety_checker: is not there, and model_index.json names it",
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_first(name: str, whole: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = shutil.copytree(whole, tmp_path / "m")
    path = source / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(tmp_path)
    said = wconv("prepare-coreml", source, "-o", tmp_path / "out", exit_code=3).stderr
    assert MISSING[name] in said
    assert len(said.splitlines()) == 1
    assert snapshot(tmp_path) == before
    shown = wconv("doctor", source, "--loader", "coreml", exit_code=3 if name == "model_index.json" else 1).stdout
    assert name == "model_index.json" or MISSING[name].partition(": ")[2] in shown


def test_all_that_is_missing_is_said_at_once(whole: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = shutil.copytree(whole, tmp_path / "m")
    (source / "tokenizer" / "vocab.json").unlink()
    shutil.rmtree(source / "scheduler")
    said = wconv("prepare-coreml", source, "-o", tmp_path / "out", exit_code=3).stderr
    assert "scheduler/scheduler_config.json: is not there" in said
    assert "Besides: tokenizer/vocab.json is not there." in said


def test_other_pipelines_are_refused(builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = save_as("safetensors", builders.make_sana(), tmp_path / "m", builders)
    said = wconv("prepare-coreml", source, "-o", tmp_path / "out", exit_code=4).stderr
    assert "is a SanaPipeline, and torch2coreml converts Stable Diffusion 1, 2 and XL" in said


def test_values_that_fp16_cannot_hold(whole: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = shutil.copytree(whole, tmp_path / "m")
    path = source / "text_encoder" / "pytorch_model-00001-of-00003.bin"
    state = torch.load(path)
    name = next(name for name in state if state[name].is_floating_point())
    state[name].view(-1)[0] = 1e5
    torch.save(state, path)
    before = snapshot(tmp_path)
    said = wconv("prepare-coreml", source, "-o", tmp_path / "out", exit_code=6).stderr
    assert f"{name} (1)" in said
    assert snapshot(tmp_path) == before
    wconv("prepare-coreml", source, "-o", tmp_path / "out", "--on-overflow", "saturate")
    assert load_file(tmp_path / "out" / "text_encoder" / "model.fp16.safetensors")[name].view(-1)[0] == 65504


def test_a_vae_that_overflows_as_it_runs(whole: Path, builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = save_as("bin", make("sdxl", builders), tmp_path / "m", builders)
    assert "--custom-vae-version" in wconv("prepare-coreml", source, "-o", tmp_path / "out").stdout
    config = source / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    assert "--custom-vae-version" not in wconv("prepare-coreml", source, "-o", tmp_path / "other").stdout
    assert "--custom-vae-version" not in wconv("prepare-coreml", whole, "-o", tmp_path / "sd1").stdout


def test_a_dry_run_writes_nothing(whole: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    assert "model.fp16.safetensors" in wconv("prepare-coreml", whole, "-o", tmp_path / "out", "--dry-run").stdout
    assert not list(tmp_path.iterdir())


COREML_PYTHON = Path(__file__).parents[1] / ".venv-coreml" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bin-sharded", "single file"])
def test_coremltools_takes_its_weights(form: str, builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    if not COREML_PYTHON.exists():
        pytest.skip("needs .venv-coreml, which make test-all installs")
    model = make("sd2", builders)
    source = save_as("bin-sharded", model, tmp_path / "m", builders)
    arguments: list[object] = [source]
    if form == "single file":
        parts = builders.models_in(model)
        states = {name: part.state_dict() for name, part in parts.items()}
        states["text_encoder"] = builders.state_as_published(model.text_encoder)
        state = as_original("sd1", states, {name: part.config for name, part in parts.items()})
        torch.save({"state_dict": state}, tmp_path / "model.ckpt")
        arguments = [tmp_path / "model.ckpt", "--config", source]
    wconv("prepare-coreml", *arguments, "-o", tmp_path / "out")
    (tmp_path / "packages").mkdir()
    program = Path(__file__).with_name("support") / "coreml_packages.py"
    command = [COREML_PYTHON, program, tmp_path / "out", tmp_path / "packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"text_encoder", "unet", "vae"}
    for name, (there, gone) in found.items():
        assert there
        # Only the decoder of an autoencoder is in its package.
        assert [key for key in gone if name != "vae" or key.startswith(("decoder.", "post_"))] == []
