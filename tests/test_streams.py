"""What is far comes in few streams, each byte as it is, with little that nobody reads and little held at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stores import StoreInMemory

from converter.dtypes import DTYPES
from converter.errors import SystemRefused
from converter.storage import FileRef, Info, OpenFile, Place
from converter.storage import far as far_module
from converter.storage import streams as planning
from converter.storage.base import Tag
from converter.storage.far import FarFile
from converter.storage.streams import HELD_NBYTES, Range, Stream, count_streams, plan_streams
from converter.tensors.base import ByteRange, TensorSource
from converter.tensors.derived import Box, Boxes
from converter.tensors.reader import RangeReader
from converter.tensors.view import View, contiguous_strides

KB, MB = 1 << 10, 1 << 20
DATA = random.Random(0).randbytes(1 << 16)


class FarInMemory(FarFile):
    """A file that counts what it is asked for, and what of that was taken."""

    def __init__(self, data: bytes, ref: FileRef | None = None, part_nbytes: int = 1000) -> None:
        super().__init__(ref or FileRef(Place(StoreInMemory({}), "file"), "tag"), len(data))
        self.data = data
        self.part_nbytes = part_nbytes
        self.asked: list[tuple[int, int]] = []
        self.taken = 0

    def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
        self.asked.append((begin, end))
        assert 0 <= begin < end <= self.nbytes
        for at in range(begin, end, self.part_nbytes):
            part = self.data[at : min(end, at + self.part_nbytes)]
            self.taken += len(part)
            yield memoryview(part)

    @property
    def held_nbytes(self) -> int:
        return self._held.nbytes


@pytest.fixture
def in_kb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kilobytes be what megabytes are, so that much happens in a small file."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (far_module, planning):
        monkeypatch.setattr(module, "HELD_NBYTES", HELD_NBYTES >> 10)
    monkeypatch.setattr(planning, "GAP_NBYTES", 64)
    monkeypatch.setattr(planning, "_WASTED_NBYTES", KB)
    monkeypatch.setattr(planning, "_TINY_NBYTES", 0)
    monkeypatch.setattr(planning, "_HELD_TIMES", tuple(time >> 20 for time in planning._HELD_TIMES))


def read_in_parts(file: OpenFile, wanted: Sequence[tuple[int, int]], size: int) -> None:
    """Read what was announced, and hold it against what there is."""
    for offset, nbytes in wanted:
        for at in range(offset, offset + nbytes, size):
            count = min(size, offset + nbytes - at)
            assert file.read(at, count) == DATA[at : at + count]


ranges = st.lists(st.tuples(st.integers(0, len(DATA) + 100), st.integers(0, 5000)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(expected=ranges, reads=ranges, follows=st.booleans(), size=st.integers(1, 3000), part=st.integers(1, 3000))
def test_whatever_is_read_it_is_right(
    expected: list[tuple[int, int]], reads: list[tuple[int, int]], follows: bool, size: int, part: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        file = FarInMemory(DATA, part_nbytes=part)
        file.expect(expected)
        if follows:
            reads = expected[: len(expected) // 2] + reads + expected[len(expected) // 2 :]
        for offset, nbytes in reads:
            for at in range(offset, offset + nbytes, max(size, nbytes // 20 + 1)):
                count = min(max(size, nbytes // 20 + 1), offset + nbytes - at)
                assert file.read(at, count) == DATA[at : at + count]
                assert file.read_small(at, 7) == DATA[at : at + 7]
                assert file.held_nbytes <= HELD_NBYTES >> 10
                assert len(file._open) <= far_module._MAX_OPEN


@st.composite
def laid_out(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw parts of a file that do not overlap, in any order, with gaps of any kind."""
    at, parts = 0, []
    for _ in range(draw(st.integers(1, 60))):
        at += draw(st.sampled_from([0, 0, 0, 1, 16, 60, 70, 500]))
        nbytes = draw(st.sampled_from([1, 4, 30, 200, 2000, 6000]))
        if at + nbytes > len(DATA):
            break
        parts.append((at, nbytes))
        at += nbytes
    order = draw(st.sampled_from(["as it lies", "swapped", "any"]))
    if order == "swapped":
        parts = [part for place in range(0, len(parts), 2) for part in reversed(parts[place : place + 2])]
    elif order == "any":
        parts = draw(st.permutations(parts))
    return parts


@settings(max_examples=100, deadline=None)
@given(parts=laid_out(), size=st.integers(1, 3000), part=st.integers(1, 3000))
def test_what_was_announced_comes_once(parts: list[tuple[int, int]], size: int, part: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        file = FarInMemory(DATA, part_nbytes=part)
        file.expect(parts)
        read_in_parts(file, parts, size)
        wanted = sum(nbytes for _, nbytes in parts)
        assert len(file.asked) <= len(parts)
        assert len(file.asked) == count_streams((0, *one) for one in parts)
        assert wanted <= sum(end - begin for begin, end in file.asked) == file.taken
        assert file.taken <= wanted + KB + wanted // 64
        assert file.held_nbytes == 0
        assert file._open == []


def in_file(sizes: Sequence[int], gap: int = 80) -> list[tuple[int, int]]:
    """Lay parts of some sizes out, a short gap between two."""
    at, parts = 0, []
    for nbytes in sizes:
        parts.append((at, nbytes))
        at += nbytes + gap
    return parts


def count(parts: Sequence[tuple[int, int]]) -> int:
    return count_streams((0, *part) for part in parts)


def test_what_lies_in_order_is_one_stream() -> None:
    assert count(in_file([100, 40 * MB, 3 * MB, 10] * 50)) == 1
    assert count(in_file([100] * 20_000)) == 1


@pytest.mark.parametrize(("nbytes", "most"), [(10 * KB, 1), (4 * MB, 1), (23 * MB, 1), (25 * MB, 21)])
def test_biases_before_their_weights(nbytes: int, most: int) -> None:
    parts = in_file([nbytes, KB] * 20)
    swapped = [part for place in range(0, 40, 2) for part in (parts[place + 1], parts[place])]
    assert count(swapped) <= most


@pytest.mark.parametrize(("width", "a_layer"), [(256, 0.3), (512, 0.5), (1024, 3), (4096, 7)])
def test_layers_of_a_llama(width: int, a_layer: float) -> None:
    layers, inner = 32, 11 * width // 4
    names = ["q", "k", "v", "o", "gate", "up", "down", "1", "2"]
    sizes = [2 * width * (width if name in "qkvo" else 1 if name in "12" else inner) for name in names]
    parts = in_file(sizes * layers)
    written = ["1", "down", "gate", "up", "2", "k", "o", "q", "v"]
    order = [9 * layer + names.index(name) for layer in sorted(range(layers), key=str) for name in written]
    assert count([parts[place] for place in order]) <= a_layer * layers


def test_many_small_parts_that_are_held_are_soon_read() -> None:
    parts = [(at, 3) for at in range(0, len(DATA) - 4, 4)]
    random.Random(0).shuffle(parts)
    file = FarInMemory(DATA)
    file.expect(parts)
    read_in_parts(file, parts, 10)
    assert len(file.asked) == 1


def test_no_order_takes_more_than_is_held() -> None:
    parts = in_file([3 * MB] * 100)
    random.Random(0).shuffle(parts)
    planned = plan_streams((0, *part) for part in parts)[0]
    assert sum(stream.end - stream.begin for stream in planned) <= 1.05 * 300 * MB
    assert len(planned) <= len(parts)


def test_gaps_are_few() -> None:
    parts = in_file([KB] * 1000, gap=50 * KB)
    planned = plan_streams((0, *part) for part in parts)[0]
    taken = sum(stream.end - stream.begin for stream in planned)
    assert taken <= 1000 * KB * 1.05 + MB
    assert len(planned) > 900
    # Among much that is read they cost little.
    assert count([*parts, (100 * MB, 5000 * MB)]) == 2


def test_files_share_what_is_held() -> None:
    wanted = [(name, offset, nbytes) for offset, nbytes in reversed(in_file([5 * MB] * 6)) for name in "abc"]
    held = {name: [part for one in found for part in one.held] for name, found in plan_streams(wanted).items()}
    assert sum(end - begin for found in held.values() for begin, end in found[:1]) <= HELD_NBYTES
    assert all(stream.end <= 31 * MB for found in plan_streams(wanted).values() for stream in found)


def test_a_stream_says_where_it_leads() -> None:
    stream = Stream(0, 300 * KB, (Range(KB, 100 * KB), Range(150 * KB, 200 * KB)))
    assert stream.reaches(0, 150 * KB)
    assert stream.reaches(0, 264 * KB)
    assert not stream.reaches(0, 265 * KB)
    assert not stream.reaches(0, 300 * KB)
    assert not stream.reaches(200 * KB, 100 * KB)


def test_a_stream_that_ends_early() -> None:
    class Short(FarInMemory):
        def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
            return super().fetches(begin, end - 1)

    with pytest.raises(SystemRefused, match="ended while it was read, before all of it was there"):
        Short(DATA).read(0, 100)


@dataclass(eq=False)
class FarStoreInMemory(StoreInMemory):
    """A store of files that count; all that were opened are kept."""

    opened: list[FarInMemory] = field(default_factory=list)

    is_far = True

    def stat(self, key: str) -> Info | None:
        return super().stat(key)

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        self.opened.append(FarInMemory(self.files[place.key], FileRef(place, tag)))
        return self.opened[-1]

    @property
    def asked(self) -> list[tuple[int, int]]:
        return [one for file in self.opened for one in file.asked]


def read_announced(sources: Sequence[TensorSource], size: int = 1 << 19) -> list[bytes]:
    """Read tensors as a task does."""
    found = []
    with RangeReader() as reader:
        reader.expect(part for source in sources for part in source.extents(0, nbytes_of(source)))
        for source in sources:
            raw = memoryview(bytearray(nbytes_of(source)))
            step = max(size, source.window)
            for begin in range(0, len(raw), step):
                source.read(begin, raw[begin : begin + step], reader)
            found.append(bytes(raw))
    return found


def nbytes_of(source: TensorSource) -> int:
    count = 1
    for length in source.shape:
        count *= length
    return source.dtype.nbytes(count)


def view_of(store: FarStoreInMemory, key: str, shape: tuple[int, ...]) -> View:
    storage = ByteRange(FileRef(Place(store, key), "tag"), 0, len(store.files[key]))
    return View(DTYPES["F32"], shape, storage, 0, contiguous_strides(shape))


def test_many_files_are_read_in_turn_without_being_opened_twice() -> None:
    store = FarStoreInMemory({f"{number}": DATA for number in range(20)})
    rows = [view_of(store, f"{number}", (4, 4096)).box((row, 0), (1, 4096)) for row in range(4) for number in range(20)]
    assert read_announced(rows) == [DATA[row * 16384 : (row + 1) * 16384] for row in range(4) for _ in range(20)]
    assert len(store.opened) == 20
    assert sum(end - begin for begin, end in store.asked) == 20 * len(DATA)


VIEWS: dict[str, Callable[[View], View]] = {
    "transposed": lambda view: view.permuted((1, 0)),
    "columns": lambda view: view.box((0, 3), (view.shape[0], 2)),
    "one column": lambda view: view.box((0, 3), (view.shape[0], 1)),
    "every other row": lambda view: view._replace(
        shape=(view.shape[0] // 2, view.shape[1]), strides=(2 * view.shape[1], 1)
    ),
}


@pytest.mark.parametrize("way", VIEWS)
@pytest.mark.parametrize(("shape", "most"), [((300, 200), 1), ((3000, 2000), 15)], ids=["small", "large"])
def test_what_is_gathered_takes_few_requests(way: str, shape: tuple[int, int], most: int) -> None:
    import numpy as np

    raw = np.random.default_rng(0).integers(0, 256, shape[0] * shape[1] * 4, dtype=np.uint8).tobytes()
    store = FarStoreInMemory({"w": raw})
    view = VIEWS[way](view_of(store, "w", shape))
    steps = [4 * stride for stride in view.strides]
    whole = np.frombuffer(raw, "u4")[view.start :]
    expected = np.lib.stride_tricks.as_strided(whole, view.shape, steps).tobytes()
    assert read_announced([view]) == [expected]
    assert len(store.asked) <= most
    assert sum(end - begin for begin, end in store.asked) <= most * len(raw)


def test_boxes_of_many_files() -> None:
    store = FarStoreInMemory(dict.fromkeys("abcd", DATA))
    parts = [view_of(store, name, (128, 128)) for name in "abcd"]
    for starts, shape in (
        ([(0, 0), (128, 0), (256, 0), (384, 0)], (512, 128)),
        ([(0, 0), (0, 128), (0, 256), (0, 384)], (128, 512)),
    ):
        store.opened.clear()
        boxes = tuple(Box(start, part) for start, part in zip(starts, parts, strict=True))
        [found] = read_announced([Boxes(DTYPES["F32"], shape, boxes)], size=50_000 // 16 * 16)
        rows = [DATA[row * 512 : row * 512 + 512] for row in range(128)]
        assert found == (b"".join(4 * row for row in rows) if shape[1] == 512 else 4 * DATA)
        assert len(store.asked) <= 4
