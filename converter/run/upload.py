"""Carries a Plan out into a store that is far: a task is a whole file, which one worker streams there.

A file appears when all of it is there and right, and not at all after an error. What others would take for a set comes
last: configs, then indexes, or the one commit of a repository. A file is written with a note of what it was made of;
the same command, after a run that was stopped, keeps those with its own notes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from converter import __version__
from converter.errors import BadFile, LossyCast, OutputRefused, SystemRefused, WconvError
from converter.formats import WRITERS
from converter.plan.types import Plan, PlannedFile
from converter.run.journal import is_index
from converter.run.parts import (
    CHUNK_NBYTES,
    Piece,
    Step,
    carry,
    check_record,
    combine,
    compare_piece,
    cut_pieces,
    find_unread,
    too_large_error,
)
from converter.run.tasks import Call, Tasks
from converter.run.watch import advance
from converter.storage import FileRef, Place, Store
from converter.storage.far import PART_NBYTES, CommittedStore, Publication, Receipt, WritableStore, Writer, at_once
from converter.storage.streams import count_streams
from converter.tensors.reader import are_far

_T = TypeVar("_T")
_SMALL_NBYTES = 1 << 20  # what is copied with what comes last
_HELD_NBYTES = 1 << 25  # of that, the smallest
_LAST = ("model_index.json",)


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to be written at ``place``: a planned one, or a copy. ``note`` says what it is made of.

    Values that are too large for a cast are an error, unless they ``may_overflow``. What is in the way is an error,
    unless it is replaced.
    """

    place: Place
    note: str
    nbytes: int
    planned: PlannedFile | None = None
    copied: FileRef | None = None
    may_overflow: bool = False
    replaces: bool = False


class Uploaded(NamedTuple):
    """What became of a file; it ``was_there`` where an earlier run had written it."""

    receipt: Receipt
    too_large: Counter[str]
    was_there: bool = False


def upload_plan(plan: Plan, tasks: Tasks, request: str, verify: bool) -> tuple[int, Counter[str], str]:
    """Write what a plan says; give the bytes that were there, what was too large for a cast, and what is to be told.

    Raises what a source is wrong with, OutputRefused where somebody else has written there, and SystemRefused for a
    store that says no.
    """
    store = _store_of(plan)
    folder = plan.target.folder
    uploads, texts = _split(plan, request)
    commits = isinstance(store, CommittedStore)
    written: list[Receipt] = []
    reused, too_large, has_begun = 0, Counter[str](), False
    try:
        store.get_ready()
        has_begun = True
        store.withdraw([(folder / name).key for name in plan.replaced if is_index(name)])
        for one in tasks.run(_calls(upload_file, uploads), plan.window):
            written += [one.receipt]
            tasks.name_file(f"{len(written):,} of {len(uploads):,}: {one.receipt.name}")
            reused += one.receipt.nbytes if one.was_there else 0
            too_large += one.too_large
        if verify and not commits:
            tasks.finish(_calls(compare_file, (upload for upload in uploads if upload.planned)), plan.window)
        if store.keeps_notes:
            gone = _look_again(store, uploads)
            if gone:
                del written[: len(gone)]
                raise SystemRefused(gone[0], "was written, and is not there any more", "Run this again.")
        removed = [(folder / name).key for name in plan.replaced if name not in plan.names]
        told = store.publish(Publication(written, texts, removed, _message(plan), plan.overwrite))
    except BaseException as error:
        store.snapshot.forget()
        if isinstance(error, WconvError) and not commits:
            notes = {upload.place.key: upload.note for upload in uploads} | {key: note for key, _, note in texts}
            if has_begun and plan.replaced:
                error.advice = f"{error.advice} What was there before may not be whole any more.".strip()
            _settle(store, error, notes, len(written), len(uploads))
        raise
    return reused, too_large, told


def _look_again(store: WritableStore, uploads: Sequence[Upload]) -> list[Place]:
    """Give the files that have gone since they were written; raises OutputRefused for one that is another by now."""
    found = list(at_once(store.stored, (upload.place.key for upload in uploads)))
    for upload, stored in zip(uploads, found, strict=True):
        if stored is not None and (stored[0].nbytes, stored[1]) != (upload.nbytes, upload.note):
            advice = "Run this again when nobody else writes there."
            raise OutputRefused(upload.place, "was written over while this ran", advice)
    return [upload.place for upload, stored in zip(uploads, found, strict=True) if stored is None]


def _settle(store: WritableStore, error: WconvError, notes: Mapping[str, str], written: int, of: int) -> None:
    """Take back what a run has written that came to an error of its source, or say what is kept after any other."""
    if isinstance(error, BadFile | OutputRefused | LossyCast):
        try:  # what is wrong with one may be wrong with all; a task that was past its end has told nobody
            found = at_once(store.note_of, notes)
            store.withdraw([key for (key, note), there in zip(notes.items(), found, strict=True) if there == note])
        except WconvError:
            error.advice = f"{error.advice} What was written before is still there.".strip()
    elif written:
        kept = f"{written:,} of {of:,} files are whole there, and are kept by the same command."
        error.advice = f"{error.advice} {kept}".strip()


def _split(plan: Plan, request: str) -> tuple[list[Upload], list[tuple[str, bytes, str]]]:
    """Give what is streamed, the largest first, and what comes last: keys with content and notes, in order."""
    folder = plan.target.folder
    notes = notes_of(plan, request)
    may_overflow = plan.on_overflow != "error"
    uploads = [
        Upload(folder / one.path, notes[one.path], one.nbytes, one, None, may_overflow, plan.overwrite)
        for one in plan.files
    ]
    texts = []
    room = _HELD_NBYTES
    sizes = {name: info.nbytes if (info := file.place.info()) else 0 for name, file in plan.copied}
    for name, file in sorted(plan.copied, key=lambda one: (sizes[one[0]], one[0])):
        nbytes = sizes[name]
        room -= nbytes
        if nbytes > _SMALL_NBYTES or room < 0:
            uploads.append(Upload(folder / name, notes[name], nbytes, None, file, replaces=plan.overwrite))
        else:
            texts.append((name, _content(file), notes[name]))
    texts += [(name, content, notes[name]) for name, content in (*plan.generated, *plan.indexes)]
    texts.sort(key=lambda text: text[0].rpartition("/")[2] in _LAST)
    uploads.sort(key=lambda upload: -upload.nbytes)
    return uploads, [((folder / name).key, content, note) for name, content, note in texts]


def _content(file: FileRef) -> bytes:
    opened = file.open()
    try:
        content = b"".join(opened.chunks())
        opened.check()
        return content
    finally:
        opened.close()


def _calls(function: Callable[[Upload, int], _T], uploads: Iterable[Upload]) -> Iterator[Call[Upload, _T]]:
    return (Call(function, upload, upload.nbytes, str(upload.place), advances=True) for upload in uploads)


def _message(plan: Plan) -> str:
    """Say what a commit is of."""
    names = sorted({planned.name.variant or "" for planned in plan.sets} - {""})
    what = f"{' and '.join(names)} weights" if names else "weights"
    forms = " and ".join(sorted({file.format for file in plan.files}))
    source = plan.source.path
    commit = f" at {source.store.commit_id}" if source.store.commit_id else ""
    # Where it lies on this machine is nobody's business.
    return f"Add {what} in {forms}" + (f", converted from {source}{commit}" if source.store.is_far else "")


def notes_of(plan: Plan, request: str) -> dict[str, str]:
    """Give the note of each file: of what was asked of which wconv, of what it is made of, and how it begins."""
    asked = f"{__version__} {request}"
    notes = {planned.path: _digest(asked, planned.path, _made_of(planned), planned.header) for planned in plan.files}
    notes |= {
        name: _digest(asked, name, str(file.place).encode(), repr(file.tag).encode()) for name, file in plan.copied
    }
    return notes | {name: _digest(asked, name, content) for name, content in plan.texts}


def _made_of(planned: PlannedFile) -> bytes:
    """Sum up how each tensor of a file comes about; of a store counts how it is spelled, and not how it was found."""
    found = hashlib.sha256()
    places: dict[Store, str] = {}
    for tensor, _ in planned.tensors:
        text = repr(tensor.source)
        for store in dict.fromkeys(storage.file.place.store for storage in tensor.source.inputs()):
            text = text.replace(places.setdefault(store, repr(store)), store.spell(""))
        found.update(text.encode("utf-8", "surrogateescape"))
    return found.digest()


def _digest(request: str, name: str, *parts: bytes) -> str:
    found = hashlib.sha256()
    for part in (request.encode("utf-8", "surrogateescape"), name.encode("utf-8", "surrogateescape"), *parts):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def find_other(plan: Plan, request: str) -> tuple[list[str], list[str]]:
    """Say which files of a plan are not there as this very request writes them, and what else lies at the target."""
    store = _store_of(plan)
    notes = notes_of(plan, request)
    there = dict(_files_in(plan.target.folder))
    known = [name for name in notes if name in there]
    found = dict(zip(known, at_once(store.note_of, (there[name].key for name in known)), strict=True))
    lacking = [name for name, note in notes.items() if found.get(name) != note]
    # A single file may go into a folder that holds others.
    is_shared = plan.source.kind == "file"
    theirs = (name for name in there if name not in notes and (name in plan.replaced or not is_shared))
    strange = [*theirs, *(name for name in known if found[name] != notes[name])]
    return lacking, strange


def _files_in(folder: Place) -> Iterator[tuple[str, Place]]:
    for entry in folder.entries():
        if entry.is_folder():
            yield from ((f"{entry.name}/{name}", place) for name, place in _files_in(entry))
        else:
            yield entry.name, entry


class Traffic(NamedTuple):
    """What goes over a network: bytes, and in about how many requests."""

    nbytes: int
    requests: int


def traffic_of(plan: Plan) -> tuple[Traffic | None, Traffic | None]:
    """Say what a plan will read of a store that is far, and send to one; what was read for planning is not counted."""
    read = sent = None
    is_sent = plan.target.folder.store.is_far
    copied = [(file.place.store.is_far, info.nbytes) for _, file in plan.copied if (info := file.place.info())]
    if any(is_far for is_far, _ in copied) or are_far(
        tensor.source for file in plan.written for tensor, _ in file.tensors
    ):
        nbytes = requests = 0
        for planned in plan.written:
            place = plan.target.folder / planned.path
            pieces = [_whole(planned, place)] if is_sent else cut_pieces(planned, place)
            for piece in pieces:
                wanted = [
                    (file, offset, count)
                    for step in piece.steps
                    for file, offset, count, *_ in step.tensor.source.extents(step.begin, step.end)
                ]
                nbytes += sum(count for _, _, count in wanted)
                requests += count_streams(wanted)
        far = [count for is_far, count in copied if is_far]
        read = Traffic(nbytes + sum(far), requests + len(far))
    if is_sent:
        sizes = [planned.nbytes for planned in plan.written] + [count for _, count in copied]
        texts = [len(content) for _, content in plan.texts]
        parts = sum(3 + -(-nbytes // PART_NBYTES) for nbytes in sizes) + len(texts)
        sent = Traffic(sum(sizes) + sum(texts), parts)
    return read, sent


def _whole(planned: PlannedFile, place: Place) -> Piece:
    return Piece(place, tuple(Step(tensor, at, 0, tensor.nbytes) for tensor, at in planned.tensors if tensor.nbytes))


def _store_of(plan: Plan) -> WritableStore:
    store = plan.target.folder.store
    assert isinstance(store, WritableStore)
    return store


# On a worker.


def upload_file(upload: Upload, chunk_nbytes: int = CHUNK_NBYTES) -> Uploaded:
    """Write a file, unless it is there. Raises BadFile for a source that is damaged, LossyCast, OutputRefused."""
    place, store = upload.place, upload.place.store
    assert isinstance(store, WritableStore)
    if _is_done(upload, store):
        advance(upload.nbytes)
        return Uploaded(Receipt(place.key, upload.nbytes), Counter(), was_there=True)
    too_large = Counter[str]()
    with store.writer(place.key, upload.nbytes, upload.note) as out:
        if upload.planned:
            too_large = _stream(upload, upload.planned, out, chunk_nbytes)
        else:
            _copy(upload, out)
        if upload.nbytes > PART_NBYTES:  # that has taken time
            _is_done(upload, store)
    assert out.receipt is not None
    if upload.planned and not isinstance(store, CommittedStore):
        _check_head(place, upload.planned)
    return Uploaded(out.receipt, too_large)


def _is_done(upload: Upload, store: WritableStore) -> bool:
    """Say whether a file is there as it would be written; raises OutputRefused for another that must stay."""
    stored = store.stored(upload.place.key) if store.keeps_notes else None
    if stored is None:
        return False
    info, note = stored
    is_ours = info.nbytes == upload.nbytes and note == upload.note
    if not is_ours and not upload.replaces:
        problem = "was made while this ran"
        raise OutputRefused(upload.place, problem, "Use --overwrite to replace it, or another -o.")
    return is_ours


def _copy(upload: Upload, out: Writer) -> None:
    assert upload.copied is not None
    file = upload.copied.open()
    try:
        for chunk in file.chunks():
            out.write(memoryview(chunk))
            advance(len(chunk))
        file.check()
    finally:
        file.close()


def _stream(upload: Upload, planned: PlannedFile, out: Writer, chunk_nbytes: int) -> Counter[str]:
    """Write all of a file, and raise before its end what makes it wrong."""
    piece = _whole(planned, upload.place)
    in_order = _InOrder(out, _frame_of(planned, piece, chunk_nbytes))
    report = carry(piece, chunk_nbytes, in_order.write)
    in_order.finish(planned.nbytes)
    if report.too_large and not upload.may_overflow:
        raise too_large_error(upload.place, [planned], report.too_large)
    for record in find_unread([planned], report.read):
        check_record(record, chunk_nbytes)
    return report.too_large


def _frame_of(planned: PlannedFile, piece: Piece, chunk_nbytes: int) -> Iterator[tuple[int, bytes]]:
    """Give all that is no tensor's bytes, in order. A format that begins with sums of those reads them first."""
    frame = WRITERS[planned.format].frame
    if frame is None:
        return iter([(0, planned.header)])
    crcs: dict[int, int] = {}
    if piece.steps:
        report = carry(Piece(piece.place, piece.steps, with_crcs=True), chunk_nbytes, lambda *_: advance(0))
        crcs = {part.offset: part.crc32 for part in report.written}
    return iter(
        sorted(frame(planned.specs, planned.ties, [crcs.get(offset, combine(())[0]) for _, offset in planned.tensors]))
    )


class _InOrder:
    """Hands over what comes at offsets of a file, and what goes between, one after another."""

    def __init__(self, out: Writer, frame: Iterator[tuple[int, bytes]]) -> None:
        self._out = out
        self._frame = frame
        self._next = next(frame, None)
        self._at = 0

    def write(self, offset: int, chunk: memoryview, _: str = "") -> None:
        """Take what is at an offset; what lies before has come by then."""
        self._fill(offset)
        self._put(chunk)

    def finish(self, nbytes: int) -> None:
        """Write the rest, up to the size of the file."""
        self._fill(nbytes)

    def _fill(self, offset: int) -> None:
        while self._next is not None and self._next[0] < offset:
            at, raw = self._next
            self._next = next(self._frame, None)
            self._put(memoryview(bytes(at - self._at)))
            self._put(memoryview(raw))
        self._put(memoryview(bytes(offset - self._at)))

    def _put(self, data: memoryview) -> None:
        if data:
            self._out.write(data)
            self._at += len(data)
        advance(len(data))


def _check_head(place: Place, planned: PlannedFile) -> None:
    """Read back how a file begins and hold it against the plan."""
    store = place.store
    assert isinstance(store, WritableStore)
    stored = store.stored(place.key)
    if stored is None or stored[0].nbytes != planned.nbytes:
        raise SystemRefused(place, "was written, and is not there as it was", "Run this again.")
    file = store.open(place, stored[0].tag)
    try:
        is_planned = file.read(0, len(planned.header)) == planned.header
    finally:
        file.close()
    if not is_planned:
        raise SystemRefused(place, "was written, and begins otherwise", "Run this again with --overwrite.")


def compare_file(upload: Upload, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Read a file back and hold it against its source; raises MismatchError where they differ."""
    assert upload.planned is not None
    compare_piece(_whole(upload.planned, upload.place), chunk_nbytes)
    advance(upload.nbytes)
