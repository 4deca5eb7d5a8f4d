"""What the doctor can find: one row a code, with how grave it is and what it means; docs/findings.rst is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from converter.models.faults import ADVICE
from converter.storage import Place

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding: ``effect`` is what happens in which loader, ``mending`` what can be done about it."""

    severity: Severity
    title: str
    effect: str
    mending: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the doctor saw: ``problem`` is said of ``path``."""

    code: str
    path: Place
    component: str
    problem: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.code]

    @property
    def severity(self) -> Severity:
        return self.kind.severity


KINDS: dict[str, Kind] = {
    "file-damaged": Kind(
        "error", "A weight file that is cut short, damaged, or something else",
        "Every loader that picks it fails; torch with mmap may load garbage.", ADVICE["file-damaged"],
    ),
    "file-unread": Kind(
        "error", "A valid file of another kind, under a name that loaders look for",
        "from_pretrained picks it and fails.",
        "Put weights in its place, or give it a name of its own.",
    ),
    "file-other": Kind(
        "note", "A valid file of another kind: TorchScript, a whole module, an exported program",
        "from_pretrained does not look for it; what wrote it reads it.",
        "wconv reads state dicts: save that of what it holds.",
    ),
    "training-piece": Kind(
        "error", "A part of a checkpoint, as distributed training wrote it",
        "No loader of models reads it: it holds one rank's rows, or tensors without elements, under the names of the "
        "whole.",
        "Only all parts make a model. wconv to-safetensors puts them together where they are checkpoints of "
        "torch.distributed.checkpoint, FSDP or ZeRO, and all there; others need the tool that is named.",
    ),
    "training-checkpoint": Kind(
        "note", "A checkpoint of a training run, which no loader of models opens",
        "from_pretrained does not find it; what trained it goes on from it.",
        "wconv to-safetensors SRC -o NEW makes a model of it, with config and tokenizer, and without the optimizer.",
    ),
    "shard-missing": Kind(
        "error", "A set of which shards are missing",
        "Every loader that picks the set fails (FileNotFoundError).", ADVICE["shard-missing"],
    ),
    "component-missing": Kind(
        "error", "A part that model_index.json names has no folder, or no weights",
        "DiffusionPipeline.from_pretrained fails, or takes weights from the folder above.",
        ADVICE["component-missing"],
    ),
    "config-unreadable": Kind(
        "error", "A config.json or model_index.json that is no JSON object",
        "from_pretrained fails, in every library.", ADVICE["config-unreadable"],
    ),
    "download-partial": Kind(
        "warning", "What a download that was not finished left behind",
        "Loaders pass it over; the file it was to become is missing or old.",
        "Finish the download, or remove the file.",
    ),
    "index-dangling": Kind(
        "error", "An index of which no shard is there",
        "Diffusers follows the index and fails (FileNotFoundError), even with a good file beside it; transformers "
        "fails where there is no single file. The official writers leave such indexes behind.",
        "--fix moves the index away.",
    ),
    "index-unreadable": Kind(
        "error", "An index that is no JSON, or no map from names to files beside it",
        "Both libraries fail when they open it.", ADVICE["index-unreadable"],
    ),
    "index-foreign": Kind(
        "error", "An index that names files of another variant, or of several",
        "Loaders read every file that the index names; of a tensor that is in two of them the last one wins, so that "
        "a float32 model silently gets the rounded values.",
        "--fix gives each variant an index of its own, where all its tensors are in files of its own.",
    ),
    "index-missing": Kind(
        "error", "Shards without an index",
        "Both libraries fail: no file named ... found.", "--fix makes the index.",
    ),
    "index-ghost": Kind(
        "warning", "An index that lists tensors which no shard holds",
        "Loaders go on, with a warning at most, and the tensor keeps its random values.",
        "--fix makes the index anew from the shards; if the tensors should be there, fetch the shards again.",
    ),
    "index-orphan": Kind(
        "error", "Shards that hold tensors which the index does not list",
        "Diffusers takes these tensors for missing and leaves them random.",
        "--fix makes the index anew from the shards.",
    ),
    "index-misplaced": Kind(
        "warning", "An index that says of tensors that they are in another shard than they are",
        "Diffusers and transformers load it all the same; other readers look in the wrong file.",
        "--fix makes the index anew from the shards.",
    ),
    "tensor-twice": Kind(
        "error", "A tensor that two shards of a set hold",
        "Loaders take the value of the shard that comes last; other readers refuse the set.",
        "Find out which of the shards belong together, and fetch these again.",
    ),
    "index-metadata": Kind(
        "error", "An index without metadata",
        "Both libraries fail (KeyError: 'metadata').", "--fix makes the index anew from the shards.",
    ),
    "index-size": Kind(
        "warning", "An index whose total_size is not that of its tensors",
        "Loaders do not look; tools that plan memory by it do.", "--fix makes the index anew from the shards.",
    ),
    "sets-twice": Kind(
        "error", "Two sets of one variant in one form",
        "Diffusers loads the one with the index, transformers the single file.",
        "--fix moves the shards away where both hold the same values; else --keep single or --keep shards decides.",
    ),
    "shards-stray": Kind(
        "warning", "Shards that no index names",
        "Loaders pass them over; they take room, and a merge by hand would mix them in.",
        "--fix moves them away where the set holds the same values; --drop-strays, whatever they hold.",
    ),
    "variant-partial": Kind(
        "warning", "A variant that only some parts of a pipeline have",
        "Asked for it, Diffusers loads the untagged weights of the other parts (a mixture, fetched in full from the "
        "Hub), or fails where those are missing too.",
        "--fix casts the missing ones from the untagged weights; --keep-default moves the variant away.",
    ),
    "default-partial": Kind(
        "error", "Untagged weights that only some parts of a pipeline have",
        "Without variant= Diffusers fails: no file named ....",
        "--fix writes them from the variant; --only-variant TAG moves the untagged ones away.",
    ),
    "variant-single": Kind(
        "warning", "A variant in one file beside untagged shards",
        "Diffusers before 0.33 fetches both from the Hub, and warns of a mixture.",
        "--fix merges the untagged weights into one file; --only-variant TAG moves them away.",
    ),
    "name-legacy": Kind(
        "warning", "File names in a spelling that is no longer written",
        "Diffusers still reads them, with a FutureWarning, from local folders only; transformers does not.",
        "--fix renames the files.",
    ),
    "name-unread": Kind(
        "error", "Weights under a name that no loader looks for",
        "The model's library does not find them: no file named ... found.",
        "--fix renames the files, where the right name is free.",
    ),
    "entry-dotless": Kind(
        "error", "A name without a dot in a folder that holds a part of a pipeline",
        "Diffusers dies of it when it is asked for a variant: IndexError: list index out of range.",
        "--fix renames a file to .txt; move a folder elsewhere by hand.",
    ),
    "component-unnamed": Kind(
        "warning", "A folder with weights that model_index.json does not name",
        "Diffusers does not load it.", "Move it elsewhere, or name it in model_index.json.",
    ),
    "bin-sharded": Kind(
        "error", "Sharded .bin in a Diffusers model, and no safetensors",
        "Diffusers fails: no file named diffusion_pytorch_model.bin. Core ML conversion does too.",
        "--fix converts it to safetensors.",
    ),
    "forms-mixed": Kind(
        "error", "Safetensors in some parts of a pipeline, only .bin in others",
        "From the Hub, Diffusers fetches .bin for all parts, and fails for those that have safetensors only.",
        "--fix converts the .bin ones to safetensors.",
    ),
    "forms-differ": Kind(
        "warning", "The same weights as .bin and as safetensors, with different tensors",
        "Which ones are loaded depends on the loader and on use_safetensors=.",
        "--keep safetensors or --keep bin decides; the other set is moved away.",
    ),
    "forms-redundant": Kind(
        "note", "The same weights as .bin and as safetensors",
        "Loaders take the safetensors.", "'--fix --keep safetensors' moves the .bin away.",
    ),
    "dtype-tag": Kind(
        "warning", "A tag that names another dtype than the tensors have",
        "The files are larger than their name says, or have lost more.",
        "--fix takes the tag away where the untagged name is free; else casts them, if the untagged weights are the "
        "same.",
    ),
    "dtype-mixed": Kind(
        "note", "Tensors of several floating dtypes, other than what the model's library keeps in float32",
        "Loaders cast them to one dtype.", "'wconv recast' makes them one.",
    ),
    "config-dtype": Kind(
        "warning", "A config.json that names a dtype which none of the weights has",
        "transformers goes by the config: bfloat16 weights are loaded as float32, in twice the memory.",
        "--fix writes the dtype of the weights into config.json.",
    ),
    "quantized": Kind(
        "note", "Weights in 8 bits or fewer, with their scales beside them",
        "Only what knows the form reads them; a cast would ruin them, and wconv refuses it.",
        "'wconv dequantize SRC -o NEW' makes bf16, fp16 or fp32 of it; where it does not know the form, what loads it "
        "is named. All other commands copy such weights as they are.",
    ),
    "quantized-unsaid": Kind(
        "warning", "Quantized weights, and a config.json that does not say so",
        "The model's library takes the packed numbers for the weights, or leaves the weights random; scales are not "
        "used.",
        "Put back the quantization_config that the model had, or have 'wconv dequantize SRC -o NEW' make plain numbers "
        "of it, which needs no config.",
    ),
    "scales-missing": Kind(
        "error", "Quantized weights without scales, in a model that has scales for others or says that it is quantized",
        "Loaders take the codes for the weights, or random numbers for the scales: the model gives nonsense, mostly "
        "without a word. bitsandbytes fails.",
        "Fetch all files of the model again, the index too.",
    ),
    "scales-stray": Kind(
        "error", "Scales of weights that are not there",
        "The weights are left random; often a shard is missing.", "Fetch all files of the model again.",
    ),
    "scales-unused": Kind(
        "warning", "Scales beside weights that are plain numbers",
        "No loader applies them. Where the weights were cast from codes, and not dequantized, it gives nonsense.",
        "Take the quantized model from where it came, and have 'wconv dequantize' make numbers of it.",
    ),
    "scales-misfit": Kind(
        "error", "Quantized weights and scales that do not fit each other",
        "Loaders fail, or give other numbers than the weights had. 'wconv dequantize' refuses them.",
        "Fetch the file again, or quantize the model again.",
    ),
    "scales-cast": Kind(
        "warning", "Scales in a dtype that no library writes them in",
        "They were rounded when something cast the whole model; weights are off by that much, and bitsandbytes fails "
        "or gives nonsense.",
        "Take the model from where it came. wconv casts no scales.",
    ),
    "config-scheme": Kind(
        "error", "A quantization_config that names another scheme than the weights are in",
        "The loader looks for other scales, and fails or leaves them random.",
        "Put back the config.json that came with the weights, or have 'wconv dequantize SRC -o NEW' make plain "
        "numbers, which goes by the weights.",
    ),
    "config-quantized": Kind(
        "error", "A quantization_config, and weights that are not quantized",
        "bitsandbytes fails; compressed-tensors gives NaN, as scales are missing; float8 and MXFP4 are loaded where "
        "they would be dequantized.",
        "Take the quantization_config out of config.json, or fetch the weights that it belongs to.",
    ),
    "config-shape": Kind(
        "error", "Tensors of another shape than the class in config.json gives them",
        "from_pretrained fails, or leaves weights random.", "Find the config.json that belongs to these weights.",
    ),
    "shapes-unknown": Kind(
        "note", "A class in config.json that its library cannot make, so that shapes were not held against it",
        "Often the library is too old or too new for the model; what it says is named.",
        "Install the version that config.json names, and look again.",
    ),
    "old-attention": Kind(
        "error", "Old attention names in shards",
        "Diffusers renames them only in a single file; in shards they are not used, and the weights stay random.",
        "--fix merges the shards into one file.",
    ),
    "names-wrapped": Kind(
        "error", "Tensors under names that a wrapper gives, such as module. or _orig_mod.",
        "Loaders find none of them under its own name, and the weights stay random.",
        "'wconv to-safetensors SRC -o NEW' takes it off.",
    ),
    "header-format": Kind(
        "warning", "A safetensors header without a format",
        "accelerate warns; older transformers refuse the file.", "--fix writes the header anew.",
    ),
    "pickle-code": Kind(
        "warning", "A pickle that names or calls more than tensors need",
        "torch.load(weights_only=True) refuses it; without that, it runs code when it is loaded.",
        "'wconv to-safetensors --strip-code' takes the tensors alone.",
    ),
    "values-nan": Kind("warning", "NaN among the values", "The model gives NaN.", "Fetch the weights again."),
    "values-inf": Kind("warning", "Infinite values", "The model gives NaN.", "Fetch the weights, or cast them anew."),
    "scales-odd": Kind(
        "error", "Scales that are NaN or infinite", "All weights that they scale are NaN.",
        "Fetch the weights again, or quantize the model again.",
    ),
    "scales-zero": Kind(
        "note", "Scales that are zero",
        "All weights that they scale are zero: meant so where these were pruned, else they were too small for a cast.",
        "",
    ),
    "values-zero": Kind("note", "Tensors of nothing but zeros", "Often meant so; else they were never trained.", ""),
    "values-equal": Kind("note", "Tensors with the same values", "They could be tied.", ""),
}  # fmt: skip
