"""The steps that conversions have in common: where the output goes, each set made ready, the plan held once more."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from converter.errors import BadRequest, OutputExists, OutputRefused, Unsupported, name_some
from converter.libraries import library_of, loader_of, note_tag
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.companions import companions_in
from converter.models.component import Component, WeightSet
from converter.models.configs import read_json
from converter.models.growth import note_growth, refuse_growth
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.inventory import find_weight_sets
from converter.models.model import Model, open_model
from converter.models.names import WeightsName, is_other_file, is_training_state, parse_name
from converter.models.rest import is_linked
from converter.models.schemes import find_owners, quantized_in
from converter.models.select import Tied, TiedName, select_sets
from converter.plan.make import make_plan
from converter.plan.types import Order, Plan, Rest, Target, Writing
from converter.recipes.card import CARD, make_card
from converter.recipes.carry import find_copied, list_companions
from converter.recipes.outputs import CARDS, open_target, refuse_links
from converter.recipes.request import Request, names_file
from converter.run.staging import find_strangers
from converter.storage import FileRef, Place
from converter.storage.far import CommittedStore
from converter.tensors.base import Tensor, WeightsFile, find_ties
from converter.transforms.dtype import Casting, check_names, recast
from converter.transforms.layouts.arrange import with_layout
from converter.transforms.names import TensorNames, name_sets, rename_tensors

_NO_CONFIG = (
    "no config.json was found, and from_pretrained needs one: --config FOLDER takes it from the model that the run "
    "began with"
)

_MOST_NAMED = 5  # of what there is to choose from, or what stays behind

_Selected = Sequence[tuple[Component, WeightSet]]
_Opened = Sequence[tuple[Component, Checkpoint]]


class Job(NamedTuple):
    """A model that is to be converted, and where to; the request says by now what sets are called.

    ``named`` is the name of the one file that is written, if the output is one. ``carries`` where the output is another
    folder, and what else there is in the source goes along.
    """

    request: Request
    model: Model
    target: Target
    named: WeightsName | None
    carries: bool


def open_job(request: Request, model: Model | None = None) -> Job:
    """See what the source is, and where its conversion goes; of a source that a model is made of nothing goes along.

    Raises BadRequest or OutputRefused for an output that cannot be.
    """
    output, publishing = request.output, request.publishing
    if publishing.in_place and output is not None:
        raise BadRequest(output, "is given, and --in-place too", "Choose one.")
    if publishing.in_place and request.arranging.layout:
        problem = "has files of other names in another --layout, and --in-place replaces those of the same"
        raise BadRequest(request.source, problem, "Name a new folder: -o OUT.")
    check_places(request.source, output, publishing.delete_source)
    if model is not None:
        assert output is not None
        refuse_file(output)
        if request.names != TensorNames():
            raise BadRequest(request.source, "is written under other names already", "Rename what comes of it.")
        return Job(request, model, open_target(model, output, publishing.overwrite), None, carries=False)
    model = open_model(request.source)
    if request.config is not None:
        model = _with_config(model, request.config)
    output, named, model, request = _split_output(model, request)
    if named:  # one file, and nothing goes with it
        model = replace(model, components=tuple(replace(one, companions=()) for one in model.components))
    target = open_target(model, output, publishing.overwrite)
    is_elsewhere = output is not None and not output.is_same(model.root)
    request = _tagged(model, request, is_elsewhere)
    if request.casting.dtype and request.writing.variant == "none" and not is_elsewhere:
        raise BadRequest(request.source, "would hold two sets of untagged weights", "Use --variant none with -o OUT.")
    return Job(request, model, target, named, carries=is_elsewhere and model.kind != "file")


def _with_config(model: Model, folder: Place) -> Model:
    """Give a model of one component with the config, and what goes with it, that lie in a folder that was named."""
    if len(model.components) != 1:
        advice = "Name the folder of one of its components."
        raise BadRequest(folder, f"has one config, and {model.path} has {len(model.components)} components", advice)
    companions = companions_in(folder)
    config = next(read_json(file) for file in companions if file.name == "config.json")
    component = replace(model.components[0], config=config, companions=companions)
    return replace(model, components=(component,))


def select(job: Job, request: Request | None = None, **changes: Any) -> list[tuple[Component, WeightSet]]:
    """Select sets of a job's model as its request asks, or another, but for ``changes`` of the selection."""
    request = request or job.request
    selection = replace(request.selection, **changes)
    return select_sets(job.model, selection, request.writing.naming, request.publishing.keeps_output_last)


def open_sets(job: Job, selected: _Selected, named: bool = True) -> list[tuple[Component, Checkpoint]]:
    """Open sets that are selected, without what wrappers added to names; unless it is left to ``name_sets``, as asked.

    What has its own names then is brought into the layout that is asked for. Raises BadRequest for odd names.
    """
    reading = job.request.selection.reading
    opened = [(component, open_checkpoint(weight_set, reading)) for component, weight_set in selected]
    named_sets = name_sets(opened, job.request.names if named else TensorNames(), job.model.path)
    arranging = job.request.arranging
    return [(component, with_layout(checkpoint, component, arranging)) for component, checkpoint in named_sets]


def refuse_file(output: Place) -> None:
    """Raise BadRequest for an output that is a file by its name, where a whole folder is written."""
    if names_file(output) or (is_other_file(output.name) and not output.is_folder()):
        raise BadRequest(output, "is a file name, and what is written is a folder", "Name a folder for the output.")


def _split_output(model: Model, request: Request) -> tuple[Place | None, WeightsName | None, Model, Request]:
    """Tell an output folder from an output file; the latter gives a single set its name, and asks for one file.

    That set, of a folder, is the model then, as if its file had been named.
    """
    output, writing = request.output, request.writing
    parsed = parse_name(output.name) if output is not None and names_file(output) else None
    if output is None or parsed is None:
        if output and is_other_file(output.name) and not output.is_folder():
            advice = "Those end in .safetensors, .bin, .pt, .pth or .ckpt; or name a folder."
            raise BadRequest(output, "has an ending of files that wconv does not write", advice)
        return output, None, model, request
    if parsed.role != "single":
        advice = "Name a folder, in which shards and index get their names, or one file."
        raise BadRequest(output, f"is the name of {'a shard' if parsed.role == 'shard' else 'an index'}", advice)
    if writing.format and parsed.name.format != writing.format:
        problem = f"is no name for a {writing.format} file"
        raise BadRequest(output, problem, "Name a folder, or give it the right ending.")
    if writing.variant is not None and writing.variant != (parsed.name.variant or "none"):
        problem = f"is the whole name of a file, and --variant {writing.variant} would change it"
        raise BadRequest(output, problem, "Leave --variant out, or name a folder.")
    if model.kind != "file":
        model, request = _only_set(model, request, output)
    limit = math.inf if writing.max_shard_size is None else writing.max_shard_size
    single = replace(writing, variant=None, tag_dtype=False, max_shard_size=limit)
    return output.parent, parsed.name, model, replace(request, writing=single)


def _only_set(model: Model, request: Request, output: Place) -> tuple[Model, Request]:
    """Give a folder's one set that is selected as a model, as if its file had been named; the request then is of that.

    Raises BadRequest where there are several.
    """
    selected = select_sets(model, request.selection, request.writing.naming, request.publishing.keeps_output_last)
    if len(selected) > 1:
        raise BadRequest(output, *_why_not_one(model, selected))
    [(component, weight_set)] = selected
    component = replace(component, name="", weight_sets=(weight_set,))
    alone = Model(model.path, component.path, "file", (component,))
    return alone, replace(request, selection=replace(request.selection, components=()))


def _why_not_one(model: Model, selected: _Selected) -> tuple[str, str]:
    """Say that there are several sets, and how one is chosen: by its component, its variant, or its file."""
    components = sorted({component.name for component, _ in selected})
    variants = [one.name.variant or "none" for _, one in selected]
    files = [str(one.path) for _, one in selected]
    if len(components) > 1:
        choice, what, how = components, "components", "Choose with --component"
    elif len(set(variants)) == len(variants):
        choice, what, how = variants, "variants", "Choose with --from-variant"
    else:  # as model.safetensors and consolidated.safetensors
        choice, what, how = files, "names", "Name one of them as the source"
    problem = f"is one file, and {model.path} has weights of {len(choice)} {what}"
    return problem, f"{how} ({name_some(choice, _MOST_NAMED)}), or name a folder for the output."


def _note_left(model: Model) -> list[str]:
    """Note which files of a folder stay there, but for weights, where one file alone is written of it."""
    [component] = model.components
    if model.path.is_file() or not component.weight_sets:  # it is made of several folders
        return []
    own = {name for weight_set in component.weight_sets for name in weight_set.all_names}
    names = (entry.name for entry in component.path.entries() if entry.name not in own and entry.is_file())
    left = sorted(name for name in names if parse_name(name) is None and not is_training_state(name))
    what = f"{component.path} keeps {name_some(left, _MOST_NAMED)}"
    return [f"one file is written, and nothing goes with it: {what}"] if left else []


def _tagged(model: Model, request: Request, is_elsewhere: bool) -> Request:
    """Give a request with the variant of a recast where it leaves that open: a tag where loaders are asked for it.

    Users of Diffusers ask for one; in a new folder all others find plain names with no more words.
    """
    writing, dtype = request.writing, request.casting.dtype
    if not writing.tag_dtype or dtype is None or writing.variant is not None:
        return request
    loader = loader_of(model)
    library = loader.no_variants(model)
    if is_elsewhere and (library or not loader.tags_recasts):
        return replace(request, writing=replace(writing, variant="none"))
    tag = dtype.short_name
    if library and model.kind != "file":
        problem = f"is loaded by {library}, which finds no variants: weights tagged {tag} would not be found"
        raise BadRequest(model.path, problem, f"Use -o OUT for a new folder, or --variant {tag} all the same.")
    return replace(request, writing=replace(writing, variant=tag))


def make_ready(job: Job, opened: _Opened, request: Request | None = None) -> list[Order]:
    """Make opened sets ready to be written as the job's request asks, or another: their ties and dtypes.

    Raises BadRequest or Unsupported for what cannot be.
    """
    request = request or job.request
    check_names(job.model.path, (checkpoint for _, checkpoint in opened), request.casting)
    orders = [_make_ready(job, component, checkpoint, request) for component, checkpoint in opened]
    tied = request.writing.tied
    if isinstance(tied, TiedName) and not any(_stands_for_others(tied.name, order) for order in orders):
        problem = f"has no tied tensors of which one is named {tied.name!r}, as --tied has it"
        raise BadRequest(job.model.path, problem, "It takes a name as it is written, or first, or duplicate.")
    return orders


def _stands_for_others(name: str, order: Order) -> bool:
    return name in order.ties.values() or name in order.checkpoint.ties.values()


def _make_ready(job: Job, component: Component, checkpoint: Checkpoint, request: Request) -> Order:
    component = replace(component, more_fp32=_more_fp32(component, request)[0])
    name = job.named or request.writing.naming.of(checkpoint.name)
    if request.casting.dtype is None and checkpoint.weight_set.is_of_many and _are_fp32(checkpoint.tensors):
        note = "the weights are float32, as they were trained: --dtype bf16 halves the size"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    if job.named:
        checkpoint = replace(checkpoint, weight_set=replace(checkpoint.weight_set, name=job.named))
    is_beside = not job.target.is_new and component.path.is_same(job.target.folder / component.name)
    writing = replace(request.writing, tied=request.writing.tied or request.arranging.tied)
    return make_order(component, checkpoint, name, request.casting, writing, is_beside)


def _are_fp32(tensors: Sequence[Tensor]) -> bool:
    floating = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating]
    return bool(floating) and all(dtype.tag == "F32" for dtype in floating)


def make_order(
    component: Component,
    checkpoint: Checkpoint,
    name: WeightsName,
    casting: Casting,
    writing: Writing,
    is_beside: bool,
) -> Order:
    """Give a set as it is to be written under a name: cast, and with what is left out as tied."""
    checkpoint, ties = _find_ties(component, checkpoint, name, writing.tied)
    growth = _check_growth(checkpoint, ties, writing.expand)
    cast = recast(component, checkpoint, casting)
    if writing.max_shard_size is not None:
        cast = _kept_together(cast)
    notes = (*checkpoint.notes, *growth, *cast.notes[len(checkpoint.notes) :])
    return Order(component, replace(cast, notes=notes), name, ties, casting.dtype, is_beside)


def _kept_together(checkpoint: Checkpoint) -> Checkpoint:
    """Let what stands beside a quantized weight come into the shard that this comes into."""
    owners = find_owners(quantized_in(checkpoint), (tensor.name for tensor in checkpoint.tensors))
    if not owners:
        return checkpoint
    files = (
        replace(
            file,
            tensors=tuple(one._replace(beside=one.beside or owners.get(one.name, "")) for one in file.tensors),
        )
        for file in checkpoint.files
    )
    return replace(checkpoint, files=tuple(files))


def _more_fp32(component: Component, request: Request) -> tuple[tuple[str, ...], str]:
    """Give what a component's library keeps in float32 in a cast and the table lacks, and a note on that."""
    dtype = request.casting.dtype
    if dtype is None or dtype.bits >= 32 or not component.class_names:
        return (), ""
    # What asks a library starts programs, and looks its version up: no conversion but a cast loads that.
    from converter.libraries.ask import ask_kept

    return ask_kept(library_of(component), component.class_names, dtype)


def _find_ties(
    component: Component, checkpoint: Checkpoint, name: WeightsName, tied: Tied | TiedName | None
) -> tuple[Checkpoint, dict[str, str]]:
    """Map the names that are not written to those that are; in a torch file they stay, as a second name.

    A tensor comes under the one of its names that is asked for, that of a header's note too.
    """
    choice = None if isinstance(tied, TiedName) else tied
    if isinstance(tied, TiedName):
        checkpoint = _under_name(checkpoint, tied.name)
    if choice == "duplicate":
        return _under_all_names(checkpoint), {}
    same = find_ties(checkpoint.tensors)
    if isinstance(tied, TiedName) and tied.name in {*same, *same.values()}:
        kept, first, choice = tied.name, same.get(tied.name, tied.name), "first"
        same = {first: kept, **{one: kept if of == first else of for one, of in same.items()}}
        del same[kept]
    if name.format == "torch":
        return checkpoint, {**same, **checkpoint.ties}
    ties = same if (choice or library_of(component).ties(component, name)) == "first" else {}
    _refuse_format(checkpoint, ties)
    return checkpoint, ties


def _refuse_format(checkpoint: Checkpoint, ties: Container[str]) -> None:
    """Raise Unsupported for a name in a note on ties that is the one of another note."""
    if "format" in ties:
        raise Unsupported(checkpoint.weight_set.path, "has a tied tensor named 'format'", "Use --tied duplicate.")


def _under_name(checkpoint: Checkpoint, kept: str) -> Checkpoint:
    """Let a tensor that a header notes to have another name have that, and the note its own."""
    ties = checkpoint.ties
    if kept not in ties:
        return checkpoint
    of = ties[kept]
    _refuse_format(checkpoint, (of,))
    names = {name: name for name in (*(tensor.name for tensor in checkpoint.tensors), *ties)}
    origins = {new: old for old, new in checkpoint.renamed.items()}
    swapped = rename_tensors(checkpoint, {**names, of: kept, kept: of})
    return replace(swapped, renamed={**checkpoint.renamed, origins.get(of, of): kept})


def _under_all_names(checkpoint: Checkpoint) -> Checkpoint:
    """Let a tensor that a header notes to have other names come under each of them."""
    others: dict[str, list[str]] = {}
    for name, of in checkpoint.ties.items():
        others.setdefault(of, []).append(name)
    if not others:
        return checkpoint

    def spelled_out(file: WeightsFile) -> WeightsFile:
        tied = {name for names in others.values() for name in names}
        notes = {key: note for key, note in file.metadata.items() if key not in tied}
        tensors = (one._replace(name=name) for one in file.tensors for name in (one.name, *others.get(one.name, ())))
        return replace(file, tensors=tuple(tensors), metadata=notes)

    return replace(checkpoint, files=tuple(map(spelled_out, checkpoint.files)), is_renamed=True)


def _check_growth(checkpoint: Checkpoint, ties: Mapping[str, str], expand: bool) -> tuple[str, ...]:
    """Note how much more tensors take than what holds them; refuse what would fill a disk, but where that is asked."""
    read: list[Tensor] = [t for t in checkpoint.tensors if t.name not in ties and not t.is_made]
    if not expand:
        refuse_growth(checkpoint.weight_set.path, read)
    return note_growth(read)


def plan_job(job: Job, selected: _Selected, orders: Sequence[Order], rest: Rest | None = None) -> Plan:
    """Plan what a job comes to: its sets, what goes along with the ``rest``, and whether anything is in the way.

    Raises BadRequest, OutputRefused or Unsupported for what cannot or must not be done.
    """
    request, model, target, named, carries = job
    _refuse_removal(selected, request)
    rest = rest or Rest()
    copied, notes = list(rest.copied), list(rest.notes)
    if carries:
        along, left = find_copied(model, selected, target.folder, request.publishing.follow_links)
        rest, copied = _with_card(job, orders, rest, copied + along)
        notes = [*rest.notes, *left]
    elif named is None:
        along, told = list_companions([component for component, _ in selected])
        copied += ((name, file) for name, file in along if not (target.folder / name).is_taken())
        notes += told if along else []
    if named is not None:
        notes += _note_left(model)
    elif any(one.is_of_many and not component.config for component, one in selected):
        notes.append(_NO_CONFIG)
    notes += dict.fromkeys(note for component, _ in selected if (note := _more_fp32(component, request)[1]))
    notes += note_tag(model, request.writing.variant)
    notes += find_strangers(model.root, target.folder)
    target = replace(target, existing=_find_existing(target, (component for component, _ in selected)))
    rest = replace(rest, copied=copied, notes=tuple(notes))
    plan = make_plan(model, orders, target, request.writing, request.publishing, rest, request.casting.on_overflow)
    if named:
        _check_named(plan, named, request)
    if not plan.sets:
        _refuse_beside(selected, request)
    refuse_links(plan)
    if carries and not request.publishing.follow_links:
        _refuse_linked_configs(plan)
    return plan


def _refuse_removal(selected: _Selected, request: Request) -> None:
    """Raise BadRequest where files would be removed that hold more than the weights that are written."""
    for _, weight_set in selected if request.publishing.delete_source else ():
        if weight_set.is_of_many:
            advice = "Leave --delete-source out, and remove it yourself where nobody needs it."
            raise BadRequest(weight_set.path, "is of a training checkpoint, which holds more than weights", advice)


def _with_card(
    job: Job, orders: Sequence[Order], rest: Rest, copied: Sequence[tuple[str, FileRef]]
) -> tuple[Rest, list[tuple[str, FileRef]]]:
    """Add a model card where one is wanted; what a repository of the Hub has of its own is not written over."""
    others = dict(copied)
    card = make_card(job.model, job.target, orders, others.get(CARD))
    if card is not None:
        rest = replace(rest, generated={**rest.generated, CARD: card})
    folder = job.target.folder
    if isinstance(folder.store, CommittedStore) and not job.request.publishing.overwrite:
        kept = [name for name in CARDS if name in others and (folder / name).exists()]
        rest = replace(rest, notes=(*rest.notes, *(f"{folder / name} is there already, and stays" for name in kept)))
        others = {name: file for name, file in others.items() if name not in kept}
    return rest, list(others.items())


def _find_existing(target: Target, components: Iterable[Component]) -> dict[str, tuple[WeightSet, ...]]:
    folders = {component.name: target.folder / component.name for component in components}
    return {name: _sets_in(folder) for name, folder in folders.items() if folder.is_folder()}


def _sets_in(folder: Place) -> tuple[WeightSet, ...]:
    """List the sets in a folder, and with them what has the name of one and is no weight file, such as half of one."""
    found = find_weight_sets(folder)
    known = {name for weight_set in found for name in weight_set.all_names}
    others = ((entry, parse_name(entry.name)) for entry in folder.entries() if entry.name not in known)
    singles = ((entry, parsed.name) for entry, parsed in others if parsed and parsed.role == "single")
    return (*found, *(WeightSet(folder, name, (entry.name,)) for entry, name in singles if entry.is_file()))


def _check_named(plan: Plan, name: WeightsName, request: Request) -> None:
    """Raise BadRequest for a plan of more than the one file that is named."""
    if len(plan.files) > 1:
        limit = request.writing.max_shard_size
        problem = f"is one file, and shards of at most {limit:,.0f} bytes are {len(plan.files)}"
        advice = "Use --max-shard-size none, or name a folder."
        raise BadRequest(plan.target.folder / name.single, problem, advice)


def _refuse_beside(selected: _Selected, request: Request) -> None:
    """Refuse, where nothing is left to write, to pass over another form of weights whose output is there."""
    naming = request.writing.naming
    for component, read in selected:
        if any(other is not read and naming.of(other.name) == read.name for other in component.weight_sets):
            raise OutputExists(read.path, "exists", "Use --overwrite to write it again, or -o for a new folder.")


def _refuse_linked_configs(plan: Plan) -> None:
    """Raise OutputRefused where a config that is written anew lies elsewhere, by a link."""
    for name, _ in plan.generated:
        place = plan.source.root / name
        if place.is_file() and is_linked(plan.source, place):
            advice = "--follow-links takes what is in it along, with what changes."
            raise OutputRefused(place, "is a link out of the folder, and would be written anew", advice)


def into_one_set(request: Request, to_file: bool = False) -> Request:
    """Give a request for one safetensors set a component; of a folder into one file, too, if that may be.

    Raises WconvError for places that cannot be.
    """
    if request.output is None:
        raise BadRequest(request.source, "needs a folder to be written to", "Name a new one.")
    check_places(request.source, request.output)
    source, output = snapshot_of(request.source), request.output
    folder = [one for one in source.entries() if one.name.endswith(".gguf")] if source.is_folder() else []
    files = [source] if source.is_file() else list(filter(Place.is_file, folder))
    if files and _is_gguf(files[0]) and not (source.is_folder() and find_weight_sets(source)):
        advice = "Take the safetensors model that it was made from."
        raise Unsupported(files[0], "is a GGUF file, whose weights are quantized in a way of its own", advice)
    if not (source.is_file() or to_file):
        refuse_file(output)
    if output.is_same(source):
        # Its config.json would be another one, and one folder has one for all its weights.
        raise BadRequest(output, "is the source itself", "Name a new folder with -o.")
    if source.is_file() and output.is_same(source.parent):
        raise BadRequest(output, "is the folder of the source", "Name a new one, or a file: -o NEW.safetensors.")
    selection = replace(request.selection, every_variant=False)
    return replace(request, source=source, selection=selection, writing=replace(request.writing, format="safetensors"))


def _is_gguf(place: Place) -> bool:
    with place.open() as file:
        return file.read(0, 4) == b"GGUF"
