"""The repairs: what each changes of a folder's goals, and for which findings, in the order in which they are done.

Each asks the same facts as the check that finds what it mends, but of the goals as those before it have left them: what
one repair makes, another may have to mend. Values are read where it must be known whether two sets are the same, and
nothing is written. What nobody has decided stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath

from converter.doctor import facts
from converter.doctor.goals import Change, FolderGoals, Goal, PartGoals
from converter.dtypes import BY_ALIAS, DTYPES
from converter.formats import read_file
from converter.libraries import library_of
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.headers import LENIENT
from converter.models.inventory import Part
from converter.models.names import check_variant, parse_name, spelled_variant
from converter.models.sets import ListedSet
from converter.plan.make import join
from converter.recipes.verify import holds_values

Repair = Callable[[FolderGoals], None]
_PartRepair = Callable[[PartGoals], None]


def _in_each(repair: _PartRepair) -> Repair:
    """Give the repair of a folder that does one to each of its parts."""

    def change(folder: FolderGoals) -> None:
        for part in folder.parts:
            repair(part)

    return change


def _open(listed: ListedSet) -> Checkpoint:
    return open_checkpoint(listed.without_index)


# Which sets there are, and by what names.


def gather(goals: PartGoals) -> None:
    """Make a goal of each sound set, by the name that loaders look for; an index that names nothing goes."""
    part = goals.part
    for listed in part.sets:
        if facts.is_foreign(listed):
            _gather_foreign(goals, listed)
        elif not listed.file_names:
            goals.let_go(listed, "none of the files that it names is there")
        elif part.is_sound(listed) and not facts.repeated_name(part, listed):
            goals.sets.append(Goal(listed, facts.right_name(part, listed.name)))
        else:
            goals.left.append(listed)
    kept = {name for listed in goals.left for name in listed.file_names}
    goals.sets = [goal for goal in goals.sets if kept.isdisjoint(goal.source.file_names)]


def _gather_foreign(goals: PartGoals, listed: ListedSet) -> None:
    """Make a goal of the files of an index that names files of others, where all of its tensors stay in one set."""
    part = goals.part
    sets = [one for one in part.sound_sets if one is not listed and not facts.is_foreign(one)]
    if whole := _same_files(listed, sets):
        goals.let_go(replace(listed, file_names=()), f"it names the files of {spelled_variant(whole.name.variant)}")
        return
    others = [name for name in listed.file_names if name not in listed.own_names]
    own = ListedSet(listed.folder, listed.name, listed.own_names)
    others_stay = all(any(name in one.file_names for one in sets) for name in others)
    if _is_whole(own) and others_stay and facts.held_names(part, own).keys() == facts.held_names(part, listed).keys():
        goals.let_go(replace(listed, file_names=()), "it names files of another variant")
        goals.sets.append(Goal(own, facts.right_name(part, own.name)))
    elif not own.file_names and _is_of_one(others) and not any(one.name == listed.name for one in sets):
        # The files are named for a variant that has others: they take the name of their index.
        goals.sets.append(Goal(listed, facts.right_name(part, listed.name), is_renamed=True))
    else:
        goals.left.append(listed)


def _same_files(listed: ListedSet, sets: list[ListedSet]) -> ListedSet | None:
    """Give another set that has the same files, and no index or one of its own, where its name is no other's."""
    whole = next((one for one in sets if set(listed.file_names) == set(one.file_names)), None)
    rivals = [one for one in sets if whole and one.name == whole.name and one is not whole]
    return None if rivals else whole


def _is_whole(own: ListedSet) -> bool:
    parsed = [one for name in own.file_names if (one := parse_name(name))]
    return bool(parsed) and all(one.count in (0, len(parsed)) for one in parsed)


def _is_of_one(names: list[str]) -> bool:
    return len({parsed.name for name in names if (parsed := parse_name(name))}) == 1


def drop_strays(folder: FolderGoals) -> None:
    """Move shards away that no index names, where their set holds the same values, or where that is asked."""
    for goals in folder.parts:
        for stray in goals.part.strays:
            kept = next((goal.source for goal in goals.sets if goal.source.name == stray.name), None)
            if kept and folder.choices.drop_strays:
                goals.let_go(stray, "--drop-strays")
            elif kept and _holds_each(goals.part, kept, stray):
                goals.let_go(stray, f"{kept.label} holds the same values")


def _holds_each(part: Part, kept: ListedSet, stray: ListedSet) -> bool:
    if any(part.headers[name].error for name in stray.file_names):
        return False
    files = [read_file(stray.folder / name, LENIENT) for name in stray.file_names]
    shards = [Checkpoint(stray.without_index, (file,), {}) for file in files]
    return all(holds_values(_open(kept), shard) for shard in shards)


def drop_twins(folder: FolderGoals) -> None:
    """Of two sets that would have one name keep one; undecided ones stay, and so do training checkpoints."""
    keep = folder.choices.keep
    for goals in folder.parts:
        for goal in [goal for goal in goals.sets if not goal.source.is_of_many]:
            other = next((one for one in goals.sets if one is not goal and one.name == goal.name), None)
            if other is None or goal not in goals.sets:
                continue
            single, shards = sorted((goal.source, other.source), key=lambda one: (one.is_sharded, one.is_legacy))
            if keep in ("single", "shards"):
                goals.let_go(shards if keep == "single" else single, f"--keep {keep}")
            elif holds_values(_open(single), _open(shards)):
                goals.let_go(shards, f"{single.label} holds the same values")
            else:
                goals.left += (goal.source, other.source)
                goals.sets = [one for one in goals.sets if one is not goal and one is not other]


def drop_forms(folder: FolderGoals) -> None:
    """Of two forms of one variant move one away, where that is asked."""
    keep = folder.choices.keep
    if keep not in ("safetensors", "bin"):
        return
    for goals in folder.parts:
        by_name = {goal.name: goal for goal in goals.sets}
        for goal in list(goals.sets):
            safe = by_name.get(goal.name.in_format("safetensors"))
            if goal.name.format == "torch" and safe and not goal.source.is_of_many:
                goals.let_go((goal if keep == "safetensors" else safe).source, f"--keep {keep}")


# What becomes of the values of each.


def mend_tags(goals: PartGoals) -> None:
    """Take a tag off that names another dtype, where the untagged name is free; else cast, if both have one origin."""
    for goal in goals.sets:
        if goal.name.variant is None or not facts.belies_tag(goals.part, goal.source):
            continue
        untagged = replace(goal.name, variant=None)
        default = next((one for one in goals.sets if one.name == untagged), None)
        if default is None and not goals.has(None):
            goals.say(f"take the tag {goal.name.variant} off {goal.source.label}, which is of another dtype")
            goal.name = untagged
        elif default and holds_values(_open(default.source), _open(goal.source)):
            goals.say(f"cast {goal.source.label} to {goal.name.variant}")
            goal.change = Change(goal.name.tagged_dtype)


def convert_shards(goals: PartGoals) -> None:
    """Convert shards in a format that the model's library does not read in shards."""
    library = library_of(goals.part.component)
    for goal in list(goals.sets):
        if not library.reads_shards(goal.name.format) and goal.count > 1:
            _convert(goals, goal)


def _convert(goals: PartGoals, goal: Goal) -> None:
    safe = goal.name.in_format("safetensors")
    if not any(one.name == safe for one in goals.sets):
        goals.sets.append(Goal(goal.source, safe, Change(), is_new=True))
        goals.say(f"convert {goal.source.label} to safetensors")


def mend_headers(goals: PartGoals) -> None:
    """Write headers anew that lack what loaders look for."""
    for goal in goals.sets:
        if goal.change is None and facts.lacks_format(goals.part, goal.source):
            goal.change = Change()
            goals.say(f"write the header of {goal.source.label} anew")


# What the parts of a pipeline have in common.


def convert_mixed(folder: FolderGoals) -> None:
    """Convert what is .bin in some parts of a pipeline while others have safetensors."""
    by_name = {goals.part.name: goals for goals in folder.loaded} if folder.inventory.is_pipeline else {}
    variants = {goal.name.variant for goals in by_name.values() for goal in goals.sets}
    for variant in sorted(variants, key=lambda tag: tag or ""):
        forms = {name: [goal.name for goal in goals.sets] for name, goals in by_name.items()}
        for name in facts.lacks_safetensors(forms, variant):
            goals = by_name[name]
            tag = variant if goals.has(variant) else None
            for goal in [goal for goal in goals.sets if goal.name.variant == tag]:
                _convert(goals, goal)


def _wanted(folder: FolderGoals) -> set[str | None]:
    """Give the variants that all parts shall have, in a pipeline those that any has."""
    choices = folder.choices
    if choices.keep_default or choices.only_variant:
        return {choices.only_variant}
    loaded = folder.loaded if folder.inventory.is_pipeline else []
    return {goal.name.variant for goals in loaded for goal in goals.sets}


def make_variants(folder: FolderGoals) -> None:
    """Cast the variants that some parts lack, and the one that is asked for."""
    for variant in sorted(filter(None, {*_wanted(folder), folder.choices.make_variant})):
        dtype = BY_ALIAS.get(variant.lower())
        for goals in folder.loaded:
            default = goals.default()
            if dtype and default and not goals.has(variant):
                name = replace(default.name.in_format("safetensors"), variant=check_variant(variant))
                goals.sets.append(Goal(default.source, name, Change(dtype), is_new=True))
                goals.say(f"cast {default.source.label} to {variant}")


def make_default(folder: FolderGoals) -> None:
    """Write the untagged weights that some parts lack."""
    loaded = folder.loaded
    if None not in _wanted(folder) or not any(goals.has(None) for goals in loaded):
        return
    for goals in loaded:
        if not goals.has(None):
            goal = goals.sets[0]
            name = replace(goal.name.in_format("safetensors"), variant=None)
            goals.sets.append(Goal(goal.source, name, Change(DTYPES["F32"]), is_new=True))
            goals.say(f"write untagged weights from {goal.source.label}, in fp32")


def drop_variants(folder: FolderGoals) -> None:
    """Move all but one variant away, where that is asked, from the parts that have it."""
    choices = folder.choices
    if not choices.keep_default and choices.only_variant is None:
        return
    kept = spelled_variant(choices.only_variant)
    for goals in folder.loaded:
        for goal in list(goals.sets):
            if goal.name.variant != choices.only_variant and goals.has(choices.only_variant):
                goals.let_go(goal.source, f"only {kept} is to stay")


# How many files a set has, and what they and its index are called.


def merge_shards(goals: PartGoals) -> None:
    """Let shards become one file, where a loader wants it: old names of tensors, or a variant that is one file."""
    part = goals.part
    single = any(goal.name.variant and goal.count == 1 and not goal.is_new for goal in goals.sets)
    for goal in goals.sets:
        if goal.count < 2 or goal.name.format != "safetensors":
            continue
        old = library_of(part.component).find_old_name(part.component, facts.held_names(part, goal.source))
        if old or (single and goal.name.variant is None):
            goal.change = (goal.change or Change())._replace(is_merged=True)
            goals.say(f"merge the {goal.count} shards of {goal.name.single} into one file")


def name_files(goals: PartGoals) -> None:
    """Give files whose bytes stay the names that they should have, and a set of shards a right index."""
    for goal in goals.sets:
        listed = goal.source
        if goal.change is not None:
            continue
        if goal.is_renamed or goal.name != listed.name or listed.is_legacy:
            goal.is_renamed = True
            goals.say(f"rename {listed.label} to {goal.name.single if goal.count == 1 else goal.name.index}")
        elif listed.is_sharded and (listed.index is None or any(facts.index_faults(goals.part, listed))):
            goal.is_reindexed = True
            goals.say(f"write {goal.name.index} anew")


# What is no weights.


def rename_dotless(folder: FolderGoals) -> None:
    """Give files an ending over whose names Diffusers stumbles when it is asked for a variant."""
    inventory = folder.inventory
    for name in inventory.dotless if any(inventory.variants) else ():
        if (inventory.path / name).is_file():
            folder.renamed[name] = f"{name}.txt"
            folder.steps.append(f"rename {name} to {PurePosixPath(name).name}.txt")


def correct_dtypes(folder: FolderGoals) -> None:
    """Write the dtype of the weights into a config that names another."""
    for part in () if folder.inventory.is_pipeline else folder.inventory.parts:
        if dtypes := facts.config_dtype(part):
            folder.dtypes[part.name] = dtypes[1].torch_name
            folder.steps.append(f"write dtype {dtypes[1].torch_name} into {join(part.name, 'config.json')}")


_OF_INDEXES = (
    "index-missing", "index-unreadable", "index-ghost", "index-orphan", "index-misplaced", "index-metadata",
    "index-size",
)  # fmt: skip
_OF_VARIANTS = ("variant-partial", "default-partial", "variant-single")
REPAIRS: tuple[tuple[Repair, tuple[str, ...]], ...] = (
    (_in_each(gather), ("index-dangling", "index-foreign", "name-unread")),
    (drop_strays, ("shards-stray",)),
    (drop_twins, ("sets-twice",)),
    (drop_forms, ("forms-differ", "forms-redundant")),
    (_in_each(mend_tags), ("dtype-tag",)),
    (drop_variants, _OF_VARIANTS),  # before any is converted that is not to stay
    (_in_each(convert_shards), ("bin-sharded",)),
    (_in_each(mend_headers), ("header-format",)),
    (convert_mixed, ("forms-mixed",)),
    (make_variants, ("variant-partial",)),
    (make_default, ("default-partial",)),
    (drop_variants, _OF_VARIANTS),
    (_in_each(merge_shards), ("variant-single", "old-attention")),
    (_in_each(name_files), ("name-legacy", "name-unread", "index-foreign", "dtype-tag", *_OF_INDEXES)),
    (rename_dotless, ("entry-dotless",)),
    (correct_dtypes, ("config-dtype",)),
)
"""In their order: each repair, and the codes of what it mends."""


def repair(folder: FolderGoals) -> None:
    """Carry out all repairs on a folder's goals."""
    for change, _ in REPAIRS:
        change(folder)
