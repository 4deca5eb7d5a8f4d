"""Tiny random models, saved by the real libraries in the forms people have.

`MODELS` makes each model in memory with fixed seeds; `save_bin` writes one as single or sharded `.bin`. diffusers
components are written by diffusers itself. transformers 5 writes no `.bin`, so for its models the state dict goes
through `torch.save`, split as huggingface_hub splits it (which keeps tied tensors together), with the config and index
that transformers 4 wrote beside it. File names are spelled out here: these folders judge the converter, so they must
not be made by it.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from support.tiny import write_json

StateDict = dict[str, torch.Tensor]
MODEL_CLASSES = (ModelMixin, PreTrainedModel)
Model = Any  # one of these, or a pipeline of them

SHARDS = 3
CLIP_WIDTH = 32
CLIP_2_WIDTH = 40
VOCABULARY = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def clip_config(width: int = CLIP_WIDTH) -> CLIPTextConfig:
    """Return the config of a two-layer CLIP text model."""
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def make_clip(seed: int = 0) -> CLIPTextModel:
    """Make a CLIP text model."""
    torch.manual_seed(seed)
    return CLIPTextModel(clip_config()).eval()


def make_clip_with_projection(seed: int = 1) -> CLIPTextModelWithProjection:
    """Make the second text encoder of an SDXL pipeline."""
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(clip_config(CLIP_2_WIDTH)).eval()


def make_unet(context_width: int = CLIP_WIDTH, seed: int = 2, **wishes: Any) -> UNet2DConditionModel:
    """Make a UNet with one plain and one cross-attention level."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context_width,
        attention_head_dim=8,
        **wishes,
    ).eval()


def make_vae(seed: int = 3) -> AutoencoderKL:
    """Make an autoencoder that halves the image's sides."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


def make_safety_checker(seed: int = 4) -> StableDiffusionSafetyChecker:
    """Make a safety checker: a transformers model that a pipeline lists under its own module's name."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=1, image_size=30, patch_size=15
    )
    config = CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return StableDiffusionSafetyChecker(config).eval()


def make_t5(seed: int = 5) -> T5ForConditionalGeneration:
    """Make a T5 whose four embedding names share one tensor."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def make_llama(tied: bool, seed: int = 6) -> LlamaForCausalLM:
    """Make a Llama with or without tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer as transformers 4 did: vocab.json and merges.txt, which its readers need."""
    folder.mkdir(parents=True)
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(VOCABULARY)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "errors": "replace", **SPECIAL_TOKENS},
    )


def make_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer that `write_tokenizer` writes."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, **SPECIAL_TOKENS)


def make_scheduler() -> DDIMScheduler:
    """Make a scheduler as Stable Diffusion configures it."""
    return DDIMScheduler(steps_offset=1, clip_sample=False)


def make_sd(safety_checker: bool = True) -> StableDiffusionPipeline:
    """Make a Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        unet=make_unet(),
        vae=make_vae(),
        text_encoder=make_clip(),
        tokenizer=make_tokenizer(),
        scheduler=make_scheduler(),
        safety_checker=make_safety_checker() if safety_checker else None,
        feature_extractor=CLIPImageProcessorPil(size=30, crop_size=30) if safety_checker else None,
        requires_safety_checker=safety_checker,
    )


def make_sdxl() -> StableDiffusionXLPipeline:
    """Make an SDXL-like pipeline: two text encoders, and a UNet conditioned on sizes."""
    unet = make_unet(
        context_width=CLIP_WIDTH + CLIP_2_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_2_WIDTH,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=make_vae(),
        text_encoder=make_clip(),
        text_encoder_2=make_clip_with_projection(),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer(),
        scheduler=make_scheduler(),
    )


def make_gemma2(seed: int = 7) -> Gemma2Model:
    """Make the text encoder of a Sana pipeline."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
    )
    return Gemma2Model(config).eval()


def make_deep_vae(seed: int = 8) -> AutoencoderDC:
    """Make the autoencoder of a Sana pipeline, with one level of each kind."""
    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ).eval()


def make_sana(seed: int = 9) -> SanaPipeline:
    """Make a Sana pipeline."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=8,
    ).eval()
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "a", "b"]
    return SanaPipeline(
        tokenizer=GemmaTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]),
        text_encoder=make_gemma2(),
        vae=make_deep_vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def make_t5_tokenizer() -> T5Tokenizer:
    """Make a tokenizer of a few letters."""
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], extra_ids=0)


def make_t5_encoder(seed: int = 10) -> T5EncoderModel:
    """Make the third text encoder of a Stable Diffusion 3 pipeline."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def make_sd3(seed: int = 11) -> StableDiffusion3Pipeline:
    """Make a Stable Diffusion 3 pipeline, with its T5."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=2 * CLIP_2_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=make_clip_with_projection(),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_clip_with_projection(),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=make_t5_encoder(),
        tokenizer_3=make_t5_tokenizer(),
    )


def make_wan(seed: int = 12) -> WanPipeline:
    """Make a Wan pipeline: parts of its transformer stay float32 whatever the dtype, parts of its UMT5 in float16."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    text = UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return WanPipeline(
        tokenizer=make_t5_tokenizer(),
        text_encoder=UMT5EncoderModel(text).eval(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


MODELS: dict[str, Callable[[], Model]] = {
    "sd": make_sd,
    "sdxl": make_sdxl,
    "t5": make_t5,
    "llama_tied": lambda: make_llama(tied=True),
    "llama_untied": lambda: make_llama(tied=False),
    "clip": make_clip,
    "sana": make_sana,
    "sd3": make_sd3,
    "wan": make_wan,
}


def models_in(model: Model) -> dict[str, Model]:
    """Return what has weights by folder below the model's own: components of a pipeline, or the model itself."""
    if isinstance(model, DiffusionPipeline):
        return {name: part for name, part in model.components.items() if isinstance(part, MODEL_CLASSES)}
    return {"": model}


def state_as_published(model: PreTrainedModel) -> StateDict:
    """Return the state dict under the names that published files have.

    transformers 5 dropped CLIPTextModel's `text_model.` in memory; every older file has it, and `position_ids` too.
    """
    state = model.state_dict()
    if type(model) is not CLIPTextModel:
        return state
    published: Any = OrderedDict({"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)})
    published.update((f"text_model.{name}", tensor) for name, tensor in state.items())
    published._metadata = state._metadata
    return published


def shard_limit(state: Mapping[str, torch.Tensor], shards: int) -> int:
    """Return a `max_shard_size` that splits the state dict into so many shards."""
    nbytes = sum(tensor.nbytes for tensor in state.values())
    for limit in range(math.ceil(nbytes / shards), nbytes + 1, max(1, nbytes // 500)):
        if len(split_torch_state_dict_into_shards(dict(state), max_shard_size=limit).filename_to_tensors) == shards:
            return limit
    raise ValueError(f"no limit gives {shards} shards")


def save_bin(
    model: Model,
    folder: Path,
    shards: int = 1,
    variant: str | None = None,
    only_sharded: tuple[str, ...] = (),
) -> Path:
    """Write the model with all its weights in `.bin`; `only_sharded` names the components that are, when not all."""
    if isinstance(model, DiffusionPipeline):
        save_without_weights(model, folder)
    for name, part in models_in(model).items():
        count = shards if not only_sharded or name in only_sharded else 1
        save_model_bin(part, folder / name, count, variant)
    return folder


def save_without_weights(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write model_index.json, and of each component what is not weights."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, CLIPTokenizer):
            if not (folder / name).exists():
                write_tokenizer(folder / name)
        elif part is not None and not isinstance(part, MODEL_CLASSES):
            part.save_pretrained(folder / name)


def save_model_bin(model: Model, folder: Path, shards: int = 1, variant: str | None = None) -> None:
    """Write one model as `.bin`."""
    if isinstance(model, ModelMixin):
        limit = shard_limit(model.state_dict(), shards) if shards > 1 else "10GB"
        model.save_pretrained(folder, safe_serialization=False, max_shard_size=limit, variant=variant)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        save_state_bin(state_as_published(model), folder, "pytorch_model", shards, variant)


def save_state_bin(state: StateDict, folder: Path, stem: str, shards: int = 1, variant: str | None = None) -> None:
    """Write a state dict with torch.save, whole or in shards with an index; tied tensors stay aliased in one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    dotted = f".{variant}" if variant else ""
    if shards == 1:
        torch.save(state, folder / f"{stem}{dotted}.bin")
        return
    split = split_torch_state_dict_into_shards(
        state, max_shard_size=shard_limit(state, shards), filename_pattern=f"{stem}{dotted}{{suffix}}.bin"
    )
    for file_name, names in split.filename_to_tensors.items():
        torch.save({name: state[name] for name in names}, folder / file_name)
    index = {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename}
    write_json(folder / f"{stem}.bin.index{dotted}.json", index)


def save_safetensors(model: Model, folder: Path, shards: int = 1) -> Path:
    """Write the model with all its weights in safetensors, by the libraries' own `save_pretrained`."""
    if isinstance(model, DiffusionPipeline):
        save_without_weights(model, folder)
    for name, part in models_in(model).items():
        limit = shard_limit(part.state_dict(), shards) if shards > 1 else "10GB"
        part.save_pretrained(folder / name, max_shard_size=limit)
    return folder


def shake(model: Model, seed: int = 20) -> Model:
    """Make every parameter and buffer of floats random, so that a cast has something to round; give the model."""
    generator = torch.Generator().manual_seed(seed)
    for part in models_in(model).values():
        for tensor in part.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def respell_legacy(folder: Path, variant: str, index_too: bool = False) -> None:
    """Rename a variant's shards as diffusers up to 0.30 and transformers 4 wrote them.

    Shards become `stem-00001-of-00003.fp16.bin`; with `index_too` the index gets the older `stem.bin.fp16.index.json`.
    """
    for path in sorted(folder.glob(f"*.{variant}-*.bin")):
        path.rename(path.with_name(legacy_shard(path.name, variant)))
    for path in sorted(folder.glob(f"*.index.{variant}.json")):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {name: legacy_shard(file, variant) for name, file in index["weight_map"].items()}
        path.unlink()
        name = path.name.replace(f".index.{variant}.json", f".{variant}.index.json") if index_too else path.name
        write_json(path.with_name(name), index)


def legacy_shard(file_name: str, variant: str) -> str:
    """Move the variant of a shard's name behind its number."""
    return re.sub(rf"\.{variant}(-\d+-of-\d+)\.", rf"\1.{variant}.", file_name)


def save_sd_bin_sharded(folder: Path) -> Path:
    """Write the folder of the founding report: all weights in `.bin`, the UNet in three shards with an index."""
    return save_bin(make_sd(safety_checker=False), folder, SHARDS, only_sharded=("unet",))


def save_sd_bin_sharded_today(folder: Path) -> Path:
    """Load that folder with today's libraries and save it again as `.bin`: they write safetensors for text_encoder.

    Loaded and saved, not made: the text encoder then keeps its old names, which transformers 4 needs.
    """
    with tempfile.TemporaryDirectory() as old:
        pipeline = StableDiffusionPipeline.from_pretrained(save_sd_bin_sharded(Path(old)), use_safetensors=False)
    pipeline.save_pretrained(folder, safe_serialization=False)
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    save_model_bin(pipeline.unet, folder / "unet", SHARDS)
    return folder


@torch.no_grad()
def forward(model: Model) -> torch.Tensor:
    """Run the model once on fixed inputs; a pipeline makes latents in two steps."""
    dtype = model.dtype
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(2, len(VOCABULARY), (1, 7), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if isinstance(model, DiffusionPipeline):
        model.set_progress_bar_config(disable=True)
        return model(
            "a bad cafe", num_inference_steps=2, height=16, width=16, output_type="latent", generator=generator
        ).images
    if isinstance(model, UNet2DConditionModel):
        sizes = {"text_embeds": noise(1, CLIP_2_WIDTH), "time_ids": noise(1, 6)}
        context = noise(1, 7, model.config.cross_attention_dim)
        return model(noise(1, 4, 8, 8), 3, context, added_cond_kwargs=sizes).sample
    if isinstance(model, AutoencoderKL):
        return model(noise(1, 3, 16, 16)).sample
    if isinstance(model, StableDiffusionSafetyChecker):
        return model.visual_projection(model.vision_model(noise(1, 3, 30, 30))[1])
    if isinstance(model, T5ForConditionalGeneration):
        return model(input_ids=tokens, decoder_input_ids=tokens).logits
    return model(input_ids=tokens)[0]
