"""The pickle machine: plain values as Python reads them, and nothing else: no global, no call, no bomb.

Hostile pickles would make a folder, the canary, if anything of them were run; Python's own unpickler shows first that
they do.
"""

from __future__ import annotations

import functools
import marshal
import pickle
import struct
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.archives import (
    ORDERED_DICT,
    archive,
    call,
    items,
    name_of,
    number,
    pickled,
    state_dict,
    storage,
    tensor,
    text,
)
from support.odd_names import ODD_NAMES
from support.tiny import processor_time, read_file

from converter.errors import BadFile, HostileFile, Unsupported, WconvError
from converter.formats.torch import unpickler as pickle_machine
from converter.formats.torch.rebuild import parse_pickle
from converter.formats.torch.unpickler import Global, Inert, Kept, KeptObject, allow_steps, run_pickle

PATH = Path("model.bin")
MB = 1 << 20

REBUILD = name_of("torch._utils", "_rebuild_tensor_v2")
REBUILD_3 = name_of("torch._utils", "_rebuild_tensor_v3")
FROM_TYPE = name_of("torch._tensor", "_rebuild_from_type_v2")
PARAMETER = name_of("torch._utils", "_rebuild_parameter")
FLOAT_STORAGE, FLOAT32 = name_of("torch", "FloatStorage"), name_of("torch", "float32")
DICT_CLASS, SIZE_CLASS = name_of("collections", "OrderedDict"), name_of("torch", "Size")
SHAPE, STRIDES = items(number(4)), items(number(1))
NO_GRADIENT = (b"\x89", ORDERED_DICT)


def brief(raw: bytes) -> str:
    """Name a test by its bytes."""
    return repr(raw)[:50]


def parse(raw: bytes) -> Any:
    return parse_pickle(raw, PATH).value


def read(folder: Path, described: bytes) -> Any:
    """Read an archive with this pickle in it."""
    path = folder / "model.bin"
    path.write_bytes(archive(described))
    return read_file(path)


def exit_code_of(work: Callable[[], object]) -> int:
    """Give 0, or the exit code of the error of ours that came out."""
    try:
        work()
    except WconvError as error:
        return error.exit_code
    return 0


@contextmanager
def limits(nbytes: int = 32 * MB) -> Iterator[None]:
    """Hold what is done to some time of the processor, and to a peak of memory."""
    tracemalloc.start()
    try:
        with processor_time(20):
            yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


# Plain values

SCALARS = st.none() | st.booleans() | st.integers(-(2**120), 2**120) | st.floats(allow_nan=False) | ODD_NAMES
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(ODD_NAMES | st.integers(-(2**40), 2**40), inner, max_size=4)
        | inner.map(lambda value: [value, value])
    ),
    max_leaves=12,
)


@given(VALUES, st.integers(1, 5))
def test_plain_values_are_what_python_pickled(value: Any, protocol: int) -> None:
    assert parse(pickle.dumps(value, protocol)) == value


@given(VALUES)
def test_plain_values_of_protocol_0(value: Any) -> None:
    assert parse(pickle.dumps(value, 0)) == value


@given(st.binary(max_size=400), st.integers(3, 5))
def test_bytes(value: bytes, protocol: int) -> None:
    assert parse(pickle.dumps({"x": value}, protocol)) == {"x": value}


@pytest.mark.parametrize("protocol", range(6))
def test_many_values_need_wide_memo_places(protocol: int) -> None:
    value = {f"name {place}": (place, str(place % 7)) for place in range(1000)}
    assert parse(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"(](Vb\np1\nI7\np2\ng1\ng2\netp3\n.",  # Python 2 counts from 1
        b"(Vb\nq\x05Vc\nr\x06\0\0\0h\x05j\x06\0\0\0t.",
        b"(Vb\nq\x01Vc\nq\0Vd\nq\x02h\0h\x01h\x02t.",
        b"(Vb\nq\x01Vc\nq\x01h\x01t.",
        b"(Vb\nq\x03Vc\n\x94Vd\n\x94h\x01h\x03t.",
        b"(Vb\nq\0Vc\nr\0\0\0\0Vd\nq\x01h\0h\x01t.",
    ],
    ids=["python 2", "gap", "out of order", "twice", "counted after a gap", "overwritten"],
)
def test_the_memo_is_that_of_python(raw: bytes) -> None:
    assert parse(raw) == pickle.loads(raw)


@pytest.mark.parametrize(
    "raw", [b"h\0.", b"Nq\0h\x01.", b"Nq\x05h\x04.", b"Nq\0g-1\n.", b"Np-1\n.", b"Nj\0\0\0\0."], ids=brief
)
def test_a_memo_place_that_holds_nothing(raw: bytes) -> None:
    with pytest.raises(BadFile):
        parse(raw)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_an_ordered_dict(protocol: int) -> None:
    value = OrderedDict([("b", 1), ("a", OrderedDict())])
    parsed = parse(pickle.dumps(value, protocol))
    assert (parsed, list(parsed)) == ({"b": 1, "a": {}}, ["b", "a"])


def test_the_ordered_dict_of_python_2() -> None:
    raw = call(DICT_CLASS, b"](" + items(text("b"), number(1)) + b"]" + text("a") + b"aNae")
    assert parse(pickled(raw)) == {"b": 1, "a": None}


OPCODES = [
    b"I5\n.", b"I-5\n.", b"I00\n.", b"I01\n.", b"L5L\n.", b"L5\n.", b"K\xff.", b"M\xff\xff.", b"J\xff\xff\xff\xff.",
    b"\x8a\0.", b"\x8a\x01\xff.", b"\x8a\x02\xff\0.", b"\x8b\x01\0\0\0\x80.", b"F1.5\n.", b"F-inf\n.",
    b"G?\xf8\0\0\0\0\0\0.",
    b"N.", b"\x88.", b"\x89.", b"S'x'\n.", b'S"x"\n.', b"S'it\\'s'\n.", b"S'\\\\n\\x41\\n'\n.", b"U\x02\xc3\xa9.",
    b"T\x01\0\0\0x.",
    b"Vx\n.", b"Vcaf\xe9\n.", b"V\\u65e5\\u000a\\u005c\n.", b"X\x02\0\0\0\xc3\xa9.", b"X\x03\0\0\0\xed\xa0\x80.",
    b"\x8c\x01x.", b"\x8d\x01\0\0\0\0\0\0\0x.", b"C\x01\xff.", b"B\x01\0\0\0\xff.", b"\x8e\x01\0\0\0\0\0\0\0\xff.",
    b").", b"].", b"}.", b"(t.", b"(l.", b"(d.", b"(K\x01K\x02t.", b"(K\x01K\x02l.", b"(K\x01K\x02d.", b"K\x01\x85.",
    b"K\x01K\x02\x86.", b"K\x01K\x02K\x03\x87.", b"]K\x01a.", b"](K\x01K\x02e.", b"}K\x01K\x02s.",
    b"}(K\x01K\x02K\x03K\x04u.",
    b"K\x012\x86.", b"K\x01K\x020.", b"K\x01(K\x02K\x031.", b"(K\x01K\x020t.", b"K\x01(0.", b"]q\0h\0a0K\x05.",
    b"K\x05p0\n0g0\n.", b"K\x05q\x07" b"0h\x07.", b"K\x05r\x07\0\0\0" b"0j\x07\0\0\0.",
    b"K\x05\x94K\x06\x94" b"00h\0h\x01\x86.",
    b"\x80\x05\x95\x02\0\0\0\0\0\0\0K\x05.", b"K\x05. and more",
]  # fmt: skip


@pytest.mark.parametrize("raw", OPCODES, ids=brief)
def test_every_opcode_means_what_it_means_in_python(raw: bytes) -> None:
    assert parse(raw) == pickle.loads(raw, encoding="utf-8", errors="surrogatepass")


def test_a_list_that_holds_itself_is_no_trouble(tmp_path: Path) -> None:
    looped = b"]q\0h\0a"
    assert parse(pickled(looped))
    with pytest.raises(Unsupported):
        read(tmp_path, pickled(state_dict(("x", looped))))


# Malice


def getattr_chain(canary: str) -> bytes:
    module = call(name_of("importlib", "import_module"), text("os"))
    return call(call(name_of("builtins", "getattr"), module, text("mkdir")), text(canary))


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


MKDIR = name_of("os", "mkdir")


def import_os(canary: str) -> str:
    return f"__import__('os').mkdir({canary!r})"


def shell(canary: str) -> bytes:
    return text(f'mkdir "{canary}"')


def words(*pushed: bytes) -> bytes:
    """Push a list."""
    return b"](" + b"".join(pushed) + b"e"


def attribute(of: bytes, name: str) -> bytes:
    return call(name_of("builtins", "getattr"), of, text(name))


def as_bytes(raw: bytes) -> bytes:
    """Push bytes as protocol 2 does."""
    return call(name_of("_codecs", "encode"), text(raw.decode("latin1")), text("latin1"))


def nested_pickle(canary: str) -> bytes:
    return as_bytes(pickled(call(MKDIR, text(canary))))


def nested_archive(canary: str) -> bytes:
    return as_bytes(archive(pickled(call(MKDIR, text(canary)))))


def function_from_code(canary: str) -> bytes:
    code = marshal.dumps(compile(import_os(canary), "x", "eval"))
    loaded = call(name_of("marshal", "loads"), as_bytes(code))
    return call(call(name_of("types", "FunctionType"), loaded, b"}"))


# Each makes the canary when Python loads it; the error names what is beside it.
MORE_MALICE: dict[str, tuple[Callable[[str], bytes], str]] = {
    "exec": (lambda c: call(name_of("builtins", "exec"), text(import_os(c))), "builtins.exec"),
    "makedirs": (lambda c: call(name_of("os", "makedirs"), text(c)), "os.makedirs"),
    "posix": (lambda c: call(name_of("posix", "mkdir"), text(c)), "posix.mkdir"),
    "posix system": (lambda c: call(name_of("posix", "system"), shell(c)), "posix.system"),
    "spawn": (
        lambda c: call(name_of("os", "spawnvp"), number(0), text("mkdir"), words(text("mkdir"), text(c))), "os.spawnvp"
    ),
    "call": (lambda c: call(name_of("subprocess", "call"), words(text("mkdir"), text(c))), "subprocess.call"),
    "check_call": (
        lambda c: call(name_of("subprocess", "check_call"), words(text("mkdir"), text(c))), "subprocess.check_call"
    ),
    "getoutput": (lambda c: call(name_of("subprocess", "getoutput"), shell(c)), "subprocess.getoutput"),
    "dotted shutil": (
        lambda c: b"\x80\x04" + call(stack_global("shutil", "os.mkdir"), text(c)), "shutil.os.mkdir"
    ),
    "dotted torch": (
        lambda c: b"\x80\x04" + call(stack_global("torch.serialization", "os.mkdir"), text(c)),
        "torch.serialization.os.mkdir",
    ),
    "timeit": (
        lambda c: call(name_of("timeit", "timeit"), text(import_os(c)), text("pass"), MKDIR + b"0"
                       + name_of("time", "perf_counter"), number(1)), "timeit.timeit"
    ),
    "pager": (lambda c: call(name_of("pydoc", "pipepager"), text("x"), shell(c)), "pydoc.pipepager"),
    "reduce": (
        lambda c: call(name_of("functools", "reduce"), MKDIR, words(number(0o777)), text(c)), "functools.reduce"
    ),
    "map into a list": (
        lambda c: call(name_of("builtins", "list"), call(name_of("builtins", "map"), MKDIR, words(text(c)))),
        "builtins.map",
    ),
    "map into a deque": (
        lambda c: call(name_of("collections", "deque"), call(name_of("builtins", "map"), MKDIR, words(text(c)))),
        "builtins.map",
    ),
    "map into an ordered dict": (
        lambda c: call(DICT_CLASS, words()) + b"0" + call(
            name_of("builtins", "set"), call(name_of("builtins", "map"), MKDIR, words(text(c)))),
        "builtins.map",
    ),
    "method caller": (
        lambda c: call(
            call(name_of("operator", "methodcaller"), text("mkdir"), text(c)),
            call(name_of("importlib", "import_module"), text("os"))),
        "operator.methodcaller",
    ),
    "a path's method": (
        lambda c: call(attribute(call(name_of("pathlib", "Path"), text(c)), "mkdir")), "builtins.getattr"
    ),
    "a path's method, dotted": (
        lambda c: b"\x80\x04" + call(stack_global("pathlib", "Path.mkdir"), call(name_of("pathlib", "Path"), text(c))),
        "pathlib.Path.mkdir",
    ),
    "ctypes": (
        lambda c: call(attribute(call(name_of("ctypes", "CDLL"), b"N"), "mkdir"), as_bytes(c.encode()), number(0o777)),
        "ctypes.CDLL",
    ),
    "nested pickle": (lambda c: call(name_of("pickle", "loads"), nested_pickle(c)), "pickle.loads"),
    "nested pickle, by its C name": (lambda c: call(name_of("_pickle", "loads"), nested_pickle(c)), "_pickle.loads"),
    "code and a function": (function_from_code, "marshal.loads"),
    "numpy's exec": (
        lambda c: call(name_of("numpy.testing", "runstring"), text(import_os(c)), b"}"), "numpy.testing.runstring"
    ),
    "copyreg": (
        lambda c: call(call(
            name_of("copyreg", "__newobj__"), name_of("functools", "partial"), MKDIR, text(c))),
        "functools.partial",
    ),
    "partial": (lambda c: call(call(name_of("functools", "partial"), MKDIR, text(c))), "functools.partial"),
    "duplicated": (lambda c: MKDIR + b"20" + items(text(c)) + b"R", "os.mkdir"),
    "from a wide memo place": (
        lambda c: MKDIR + b"r\0\0\1\0" + b"0j\0\0\1\0" + items(text(c)) + b"R", "os.mkdir"
    ),
    "by a number in text": (lambda c: MKDIR + b"p7\n0g7\n" + items(text(c)) + b"R", "os.mkdir"),
    "in a list": (lambda c: words(call(MKDIR, text(c))), "os.mkdir"),
    "in a set": (lambda c: b"\x80\x04\x8f(" + call(MKDIR, text(c)) + b"\x90", "os.mkdir"),
    "as a value of an object": (
        lambda c: name_of("argparse", "Namespace") + b")\x81}" + text("x") + call(MKDIR, text(c)) + b"sb", "os.mkdir"
    ),
    "in the arguments of a date": (
        lambda c: call(name_of("fractions", "Fraction"), call(MKDIR, text(c)) + b"0" + number(1)), "os.mkdir"
    ),
}  # fmt: skip

MALICE: dict[str, tuple[Callable[[str], bytes], str]] = {
    **MORE_MALICE,
    "system": (lambda canary: call(name_of("os", "system"), text(f'mkdir "{canary}"')), "os.system"),
    "mkdir": (lambda canary: call(name_of("os", "mkdir"), text(canary)), "os.mkdir"),
    "eval": (
        lambda canary: call(name_of("builtins", "eval"), text(f"__import__('os').mkdir({canary!r})")),
        "builtins.eval",
    ),
    "exec, by Python 2's name": (
        lambda canary: call(name_of("__builtin__", "eval"), text(f"__import__('os').mkdir({canary!r})")),
        "__builtin__.eval",
    ),
    "getattr": (getattr_chain, "importlib.import_module"),
    "dotted": (
        lambda canary: b"\x80\x04" + call(stack_global("pathlib", "os.mkdir"), text(canary)),
        "pathlib.os.mkdir",
    ),
    "stack global": (lambda canary: b"\x80\x04" + call(stack_global("os", "mkdir"), text(canary)), "os.mkdir"),
    "stack global from the memo": (
        lambda canary: (
            b"\x80\x04" + text("mkdir") + b"\x94" + text("os") + b"\x9400" + call(b"h\x01h\0\x93", text(canary))
        ),
        "os.mkdir",
    ),
    "inst": (lambda canary: b"(" + text(canary) + b"ios\nmkdir\n", "os.mkdir"),
    "obj": (lambda canary: b"(" + name_of("os", "mkdir") + text(canary) + b"o", "os.mkdir"),
    "newobj": (
        lambda canary: name_of("functools", "partial") + items(name_of("os", "mkdir"), text(canary)) + b"\x81)R",
        "functools.partial",
    ),
    "newobj ex": (
        lambda canary: (
            b"\x80\x04" + name_of("functools", "partial") + items(name_of("os", "mkdir"), text(canary)) + b"}\x92)R"
        ),
        "functools.partial",
    ),
    "inside a state dict": (
        lambda canary: state_dict(("x", number(1)), ("y", call(name_of("os", "mkdir"), text(canary)))),
        "os.mkdir",
    ),
    "as a name": (lambda canary: b"}" + call(name_of("os", "mkdir"), text(canary)) + b"Ns", "os.mkdir"),
    "thrown away": (lambda canary: call(name_of("os", "mkdir"), text(canary)) + b"0}", "os.mkdir"),
    "in arguments": (
        lambda canary: call(DICT_CLASS, b"]" + call(name_of("os", "mkdir"), text(canary)) + b"0"),
        "os.mkdir",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="these reach a POSIX system")
@pytest.mark.parametrize(("make", "named"), MALICE.values(), ids=MALICE)
def test_nothing_of_it_is_run_and_the_error_names_it(tmp_path: Path, make: Callable[[str], bytes], named: str) -> None:
    canary = tmp_path / "canary"
    described = pickled(make(str(canary)))
    pickle.loads(described)
    assert canary.is_dir(), "Python itself runs this"
    canary.rmdir()
    with pytest.raises(HostileFile) as caught:
        read(tmp_path, described)
    assert named in str(caught.value)
    stripped = parse_pickle(described, PATH, strip_code=True)
    assert stripped.foreign[named] == "calls"
    assert not canary.exists()


def test_there_are_forty_ways_and_more() -> None:
    assert len(MALICE) >= 40


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch.storage", "_load_from_bytes"), ("torch._utils", "_import_dotted_name"), ("torch", "load"),
     ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch", "FloatStorage.from_file"), ("torch", "nn.Module"),
     ("torch.hub", "load"), ("torch.nn.modules.linear", "Linear"), ("numpy.core.multiarray", "_reconstruct.x"),
     ("collections", "namedtuple"), ("collections", "OrderedDict.update"), ("posix", "system"), ("nt", "system"),
     ("subprocess", "Popen"), ("pickle", "loads"), ("os.path", "os.system"), ("", ""), ("os\n", "system"),
     ("TORCH", "FloatStorage"), ("torch ", "FloatStorage"), ("torch", "floatstorage"), ("torch.cuda",
     "FloatStorage\0")],
)  # fmt: skip
def test_only_exact_names_of_the_table_are_known(module: str, name: str) -> None:
    raw = b"\x80\x04" + call(stack_global(module, name)) + b"."
    with pytest.raises(HostileFile) as caught:
        parse(raw)
    assert f"{module}.{name}" in str(caught.value)
    stripped = parse_pickle(raw, PATH, strip_code=True)
    assert (type(stripped.value), stripped.foreign) == (Inert, {f"{module}.{name}": "calls"})
    named = parse_pickle(b"\x80\x04" + stack_global(module, name) + b".", PATH)
    assert (str(named.value), named.foreign) == (f"{module}.{name}", {f"{module}.{name}": "names"})


@pytest.mark.parametrize(
    "raw",
    [
        call(text("os.system"), text("x")), call(b"}", text("x")), call(number(3)), call(b"N"), call(storage()),
        call(tensor()), call(FLOAT_STORAGE, number(3)), call(FLOAT32),
        DICT_CLASS + b"]R", DICT_CLASS + b"}R",
        DICT_CLASS + b")\x81", SIZE_CLASS + b")\x81",
        DICT_CLASS + b")}\x92", b"\x82\x01", b"\x83\x01\0", b"\x84\x01\0\0\0",
        tensor() + b"}b", storage() + b"}b", DICT_CLASS + b"}b",
        FLOAT_STORAGE + b"}b", text("x") + b"}b", b")}b", b"]}b", ORDERED_DICT + text("x") + b"b",
        ORDERED_DICT + items(b"}", b"}") + b"b",
    ],
    ids=brief,
)  # fmt: skip
def test_what_is_known_is_used_in_no_other_way(raw: bytes) -> None:
    with pytest.raises(WconvError) as caught:
        parse(pickled(raw))
    assert caught.value.exit_code == 3


def test_the_attributes_of_a_state_dict_are_let_go() -> None:
    attributes = b"}" + text("_metadata") + ORDERED_DICT + b"s"
    assert parse(pickled(ORDERED_DICT + attributes + b"b")) == {}


@pytest.mark.parametrize(
    "raw",
    [
        call(REBUILD), call(REBUILD, storage()), call(REBUILD, text("0"), number(0), SHAPE, STRIDES, *NO_GRADIENT),
        call(REBUILD, tensor(), number(0), SHAPE, STRIDES, *NO_GRADIENT),
        call(REBUILD, FLOAT_STORAGE, number(0), SHAPE, STRIDES, *NO_GRADIENT),
        call(REBUILD, storage(), b"N", SHAPE, STRIDES, *NO_GRADIENT),
        call(REBUILD, storage(), b"\x88", SHAPE, STRIDES, *NO_GRADIENT),
        call(REBUILD, storage(), number(0), number(4), number(1), *NO_GRADIENT),
        call(REBUILD, storage(), number(0), items(b"G" + struct.pack(">d", 4)), STRIDES, *NO_GRADIENT),
        call(REBUILD, storage(), number(0), items(b"\x88"), STRIDES, *NO_GRADIENT),
        call(REBUILD, storage(), number(0), items(text("4")), STRIDES, *NO_GRADIENT),
        call(REBUILD_3, storage(), number(0), SHAPE, STRIDES, *NO_GRADIENT),
        call(REBUILD_3, storage(), number(0), SHAPE, STRIDES, *NO_GRADIENT, text("float32")),
        call(REBUILD_3, text("0"), number(0), SHAPE, STRIDES, *NO_GRADIENT, FLOAT32),
        call(REBUILD_3, tensor(), number(0), SHAPE, STRIDES, *NO_GRADIENT, FLOAT32),
        call(REBUILD_3, b"N", number(0), SHAPE, STRIDES, *NO_GRADIENT, FLOAT32),
        call(PARAMETER, storage(), b"\x88", ORDERED_DICT),
        call(PARAMETER), call(SIZE_CLASS, number(3)),
        b"NQ", b")Q", text("stora") + b"Q", items(*[b"N"] * 5) + b"Q", items(text("module"), *[b"N"] * 4) + b"Q",
        items(text("storage"), text("FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q",
        items(text("storage"), FLOAT_STORAGE, number(0), text("cpu"), number(4)) + b"Q",
        items(text("storage"), FLOAT_STORAGE, text("0"), b"N", number(4)) + b"Q",
        items(text("storage"), FLOAT_STORAGE, text("0"), text("cpu"), text("4")) + b"Q",
        items(text("storage"), FLOAT_STORAGE, text("0"), text("cpu"), number(-4)) + b"Q",
        items(text("storage"), FLOAT_STORAGE, text("0"), text("cpu"), b"\x88") + b"Q",
    ],
    ids=brief,
)  # fmt: skip
def test_a_tensor_described_by_the_wrong_things(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(BadFile):
        read(tmp_path, pickled(state_dict(("x", raw))))


# Damage


@pytest.mark.parametrize("protocol", range(1, 6))
def test_truncated_anywhere_it_is_refused(protocol: int) -> None:
    raw = pickle.dumps({"a": [1, 2.5, "x", (None, True)], "b": {"c": -1, "long": 2**70}}, protocol)
    for nbytes in range(len(raw)):
        with pytest.raises(BadFile):
            parse(raw[:nbytes])


@pytest.mark.parametrize("code", [code for code in range(256) if code != ord(".")])
def test_an_opcode_with_nothing_to_work_on(code: int) -> None:
    one = bytes([code])
    for raw in (one, one + b".", b"(" + one + bytes(8) + b"."):
        assert exit_code_of(functools.partial(parse, raw)) in (0, 3, 4)


SNIPPETS = [
    b"(", b")", b"]", b"}", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"0", b"1", b"2", b"N", b"\x88", b"K\x01",
    b"K\x04",
    b"\x85", b"\x86", b"\x87", b"R", b"b", b"Q", b"o", b"\x81", b"\x93", b"q\0", b"q\x01", b"h\0", b"h\x01", b"\x94",
    b".",
    text("x"), text("storage"), text("0"), text("cpu"), text("torch"), text("float32"), items(number(4)),
    items(number(1)),
    FLOAT_STORAGE, FLOAT32, DICT_CLASS, REBUILD, REBUILD_3,
    SIZE_CLASS, PARAMETER, storage(), tensor(), ORDERED_DICT,
    state_dict(("x", tensor())),
]  # fmt: skip


@given(st.lists(st.sampled_from(SNIPPETS), max_size=14).map(b"".join))
@example(state_dict(("x", tensor())) * 2 + b"\x86")  # a pair of state dicts: --key is to choose one
def test_whatever_the_opcodes_only_errors_of_ours_come_out(scratch: Path, raw: bytes) -> None:
    assert exit_code_of(lambda: read(scratch, raw + b".")) in (0, 2, 3, 4)


@given(st.data())
def test_whatever_the_bytes_only_errors_of_ours_come_out(scratch: Path, data: st.DataObject) -> None:
    raw = bytearray(pickled(state_dict(("a", tensor()), ("b", tensor()))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert exit_code_of(lambda: read(scratch, bytes(raw))) in (0, 3, 4)


# Bombs: small files that ask for much memory or time


@pytest.mark.parametrize("place", [2**16, 2**27, 2**31, 2**32 - 1])
def test_a_memo_place_costs_what_it_holds(place: int) -> None:
    raw = b"N" + b"r" + struct.pack("<I", place) + b"j" + struct.pack("<I", place) + b"."
    with limits(nbytes=MB):
        assert parse(raw) is None
    with limits(nbytes=MB):
        assert parse(b"Np%d\ng%d\n." % (place, place)) is None


@pytest.mark.parametrize(
    "raw",
    [b"\x8b\xff\xff\xff\x7f.", b"\x8b" + struct.pack("<I", 2 * MB) + bytes(2 * MB) + b".",
     b"\x8a\xff" + bytes(255) + b".",
     b"L" + b"9" * 2 * MB + b"L\n.", b"I" + b"9" * 2 * MB + b"\n.", b"X\xff\xff\xff\xff.", b"B\xff\xff\xff\xff.",
     b"\x8d" + b"\xff" * 8 + b".", b"\x8e" + b"\xff" * 8 + b".", b"T\xff\xff\xff\x7f.", b"\x95" + b"\xff" * 8 + b".",
     b"c" + b"a" * 2 * MB, b"c" + b"a" * MB + b"\n" + b"b" * MB, b"V" + b"a" * 2 * MB, b"p" + b"9" * 2 * MB + b"\n"],
    ids=brief,
)  # fmt: skip
def test_a_length_that_is_a_lie_or_a_bomb(raw: bytes) -> None:
    with limits(), pytest.raises(BadFile):
        parse(raw)


@pytest.mark.parametrize("end", [b".", b"}b.", b")R.", b"\x81.", b"Q.", b"\x93.", b"s."], ids=brief)
@pytest.mark.parametrize(
    "nested",
    [b"N" + b"\x85" * 3000, b"]" * 3000 + b"a" * 2999, b"(" * 3000 + b"t" * 3000,
     b"}N" * 3000 + b"N" + b"s" * 3000],
    ids=["tuples of one", "lists", "tuples", "dicts"],
)  # fmt: skip
def test_deep_nesting(tmp_path: Path, nested: bytes, end: bytes) -> None:
    with limits(), pytest.raises(WconvError):
        read(tmp_path, nested + end)


FLAGGED = b"q\x30" + REBUILD + b"(" + storage() + number(0) + SHAPE + STRIDES + b"".join(NO_GRADIENT) + b"h\x30tR."


@pytest.mark.parametrize("end", [b".", b"}b.", b")R.", b"}" + b"22s.", b"\x85Q.", FLAGGED], ids=brief)
def test_a_value_that_is_small_until_it_is_spelled_out(tmp_path: Path, end: bytes) -> None:
    # Each list holds the one before twice: 2**22 items to print, if anybody did.
    doubled = b"]" + b"".join(
        b"q" + bytes([place]) + b"0]h" + bytes([place]) + b"ah" + bytes([place]) + b"a" for place in range(20)
    )
    with limits(), pytest.raises(WconvError):
        read(tmp_path, doubled + end)


def test_sizes_made_of_one_list_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each call would copy the list: a few MB of file, some GB of memory.
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_OPCODES", 200_000)
    made = b"]q\0(" + b"K\x01" * 20_000 + b"e" + SIZE_CLASS + b"q\x01" + b"]q\x02(" + b"h\x01h\0\x85R" * 400 + b"e."
    with limits(), pytest.raises(WconvError):
        parse(made)


def test_dicts_made_of_one_list_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_OPCODES", 200_000)
    pairs = b"".join(text(str(place)) + b"N\x86" for place in range(10_000))
    ordered = DICT_CLASS + b"q\x01"
    with limits(), pytest.raises(WconvError):
        parse(b"]q\0(" + pairs + b"e" + ordered + b"](" + b"h\x01h\0\x85R" * 400 + b"e.")


def test_tensors_of_one_long_shape_again_and_again() -> None:
    # The shape is looked through for every tensor: quadratic, if it may be of any length.
    shape = b"(" + b"K\x01" * 20_000 + b"tq\0"
    rebuilt = b"".join(
        [REBUILD, b"q\x01", storage(numel=1), b"q\x02", b"](", *[b"h\x01(h\x02K\0h\0h\0\x89NtR"] * 1000, b"e."]
    )
    with limits(), pytest.raises(WconvError):
        parse(shape + rebuilt)


def test_tensors_with_attributes_of_one_long_shape_again_and_again() -> None:
    shape = b"(" + b"K\x01" * 20_000 + b"tq\0"
    rebuilt = b"".join(
        [
            FROM_TYPE,
            b"q\x01",
            REBUILD,
            b"q\x02",
            name_of("torch", "Tensor"),
            b"q\x03",
            storage(numel=1),
            b"q\x04",
            b"](",
        ]
        + [b"h\x01(h\x02h\x03(h\x04K\0h\0h\0\x89NtNtR"] * 1000
        + [b"e."]
    )
    with limits(), pytest.raises(WconvError):
        parse(shape + rebuilt)


def test_attributes_of_attributes_of_a_tensor() -> None:
    # What rebuilds a tensor with attributes may name itself.
    head = FROM_TYPE + b"q\0" + name_of("torch", "Tensor") + b"q\x01" + REBUILD + b"q\x02"
    plain = b"(h\x02h\x01" + items(storage(), number(0), SHAPE, STRIDES, *NO_GRADIENT) + b"Nt"
    nested = b"(h\0h\x01" * 3000 + plain + b"Nt" * 3000
    with limits(), pytest.raises(WconvError):
        parse(head + b"h\0" + nested + b"R.")


def test_a_shape_of_many_numbers_takes_no_time(tmp_path: Path) -> None:
    shape = b"(" + number(2**62) * 50_000 + b"t"
    raw = call(REBUILD, storage(), number(0), shape, b"(" + b"K\0" * 50_000 + b"t", *NO_GRADIENT)
    with limits(), pytest.raises(WconvError):
        read(tmp_path, pickled(state_dict(("x", raw))))


def test_names_that_all_hash_alike() -> None:
    # Numbers that are alike modulo 2**61 - 1 make a dict quadratic.
    raw = b"}(" + b"".join(number(place * (2**61 - 1)) + b"N" for place in range(1, 40_000)) + b"u."
    with limits():
        assert exit_code_of(lambda: parse(raw)) in (0, 3, 4)


def test_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_OPCODES", 100)
    assert parse(b"N0" * 49 + b"N.") is None
    with pytest.raises(HostileFile, match="steps"):
        parse(b"N0" * 51 + b"N.")


@pytest.mark.parametrize("code", [b"]", b"}", b"}NNs"], ids=brief)
def test_all_the_steps_there_may_be_take_some_hundred_megabytes(code: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadFile):
            parse(code * 20_000)
        nbytes_a_step = tracemalloc.get_traced_memory()[1] / (20_000 * len(code))
    finally:
        tracemalloc.stop()
    assert nbytes_a_step * pickle_machine.MAX_OPCODES < 1024 * MB


LONG_SHAPE = b"(" + b"K\x01" * 100 + b"t"
AGAIN = {
    "pairs of a list": DICT_CLASS + b"q\x01](" + b"N\x85\x85" * 10 + b"e0](" + text("ab") * 300
    + b"eq\x020](" + b"h\x01h\x02\x85R" * 300 + b"e.",
    "pairs of a tuple": b"(" + (text("a") + b"N\x86") * 100 + b"tq\x020" + DICT_CLASS + b"q\x010]("
    + b"h\x01h\x02\x85R" * 300 + b"e.",
    "sizes": b"](" + b"N" * 500 + b"eq\x020" + SIZE_CLASS + b"q\x010](" + b"h\x01h\x02\x85R" * 300 + b"e.",
    "long shapes": REBUILD + b"q\x010" + items(storage(), number(0), LONG_SHAPE, LONG_SHAPE, *NO_GRADIENT)
    + b"q\x020](" + b"h\x01h\x02R" * 600 + b"e.",
    "long shapes of tensors with attributes": FROM_TYPE + b"q\x010" + items(REBUILD, name_of("torch", "Tensor"), items(
        storage(), number(0), LONG_SHAPE, LONG_SHAPE, *NO_GRADIENT), b"N") + b"q\x020](" + b"h\x01h\x02R" * 600 + b"e.",
    "wide text": text("a" * 200_000 + "\U0001f600") + b".",
    "escaped text": b"V" + b"a" * 200_000 + b"\\U0001f600\n.",
    "text": text("a" * 700_000) + b".",
    "quoted text": b"S'" + b"a" * 400_000 + b"'\n.",
    "bytes": b"B" + struct.pack("<I", 700_000) + bytes(700_000) + b".",
    "far places of the memo": b"N" + b"".join(b"r" + struct.pack("<I", place) for place in range(9, 6_000)) + b".",
    "items of an object": b"ca\nb\n)\x81(" + b"N" * 6_000 + b"e.",
    "keys that are no text": b"}(" + b")N" * 2_000 + b"u.",
    "a long pickle": b"N." + bytes(32_000_000 + 700_000),
}  # fmt: skip


@pytest.mark.parametrize("made", AGAIN)
def test_what_is_copied_or_kept_takes_steps(monkeypatch: pytest.MonkeyPatch, made: str) -> None:
    # Each has fewer opcodes than there are steps.
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_OPCODES", 10_000)
    with pytest.raises(HostileFile, match="steps"):
        parse(AGAIN[made])


@pytest.mark.parametrize("content", [b"B" + struct.pack("<I", 9) + bytes(9), text("ab" * 9), b"}", b"N"], ids=brief)
def test_sizes_and_dicts_are_made_of_lists_and_tuples_only(content: bytes) -> None:
    for made in (SIZE_CLASS, DICT_CLASS):
        with pytest.raises(BadFile):
            parse(made + content + b"\x85R.")


def test_a_long_name_is_not_spelled_again_and_again() -> None:
    with pytest.raises(HostileFile, match="name of more than"):
        parse(text("a" * 2_000) + b"2\x93.")
    made = parse(text("a" * 900) + b"q\x010h\x01h\x01\x93q\x020](" + b"h\x02)\x81" * 3 + b"e.")
    assert len({id(one.name) for one in made}) == 1


def test_a_long_key_is_cut_where_it_is_spelled(tmp_path: Path) -> None:
    inner = state_dict(("a", tensor())) + b"h\x01N" + b"s"
    two = b"}" + text("k" * 900) + b"q\x01" + inner + b"s" + text("j") + inner + b"s"
    with pytest.raises(WconvError) as caught:
        read(tmp_path, pickled(two))
    assert "k" * 200 in str(caught.value)
    assert "k" * 201 not in str(caught.value)


def test_tensors_are_counted_in_all_dicts_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = pickled(state_dict(("model", state_dict(("a", tensor()))), ("optimizer", state_dict(("b", tensor())))))
    read(tmp_path, two)
    monkeypatch.setattr("converter.formats.torch.state_dict.MAX_TENSORS", 1)
    with pytest.raises(HostileFile, match="more than 1 tensors"):
        read(tmp_path, two)


def test_the_names_of_tensors_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostileFile, match="names of 100,001 characters"):
        read(tmp_path, pickled(state_dict(("a" * 100_001, tensor()))))
    monkeypatch.setattr("converter.formats.torch.state_dict.MAX_NAMES_LENGTH", 10)
    with pytest.raises(HostileFile, match="names of 12 characters"):
        read(tmp_path, pickled(state_dict(("a" * 6, tensor()), ("b" * 6, tensor()))))


def test_an_empty_tensor_of_huge_numbers(tmp_path: Path) -> None:
    huge = tensor(shape=(2**62, 2**62, 0), strides=(1, 1, 1))
    with pytest.raises(BadFile, match="beyond torch's"):
        read(tmp_path, pickled(state_dict(("a", huge))))


def test_a_storage_with_a_long_key(tmp_path: Path) -> None:
    with pytest.raises(BadFile):
        read(tmp_path, pickled(state_dict(("a", tensor(storage(key="0" * 2_000))))))


def test_a_long_pickle_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_PICKLE_NBYTES", 10)
    assert parse(b"N0" * 4 + b"N.") is None
    with pytest.raises(HostileFile, match="too long"):
        parse(b"N0" * 5 + b"N.")


@dataclass(frozen=True)
class Entry:
    """An object that a reader may want."""

    name: str


class Pair(NamedTuple):
    """One whose values are what it is made of."""

    first: int
    second: int


GETS = {
    b"h\x05": 5, b"j\x05\0\0\0": 5, b"j\x06\x01\0\0": 0x106, b"j\x6a\x6a\0\0": 0x6A6A, b"j\x67\x0a\0\0": 0x0A67,
    b"g7\n": 7, b"g30000\n": 30_000, b"g 3_0_1\n": 301, b"g+302 \n": 302, b"g-0\n": 0, b"gjjjj\n": None,
    b"j\0\0\1\0": None,
}  # fmt: skip


@pytest.mark.parametrize("puts", ["numbered", "in order"])
def test_what_is_asked_for_is_kept_in_the_memo_of_a_long_pickle(puts: str) -> None:
    def put(place: int) -> bytes:
        return b"r" + place.to_bytes(4, "little") if puts == "numbered" else b"\x94"

    numbered = b"".join(text(f"weight j{place}") + put(place) + b"0" for place in range(31_000))
    for get, place in GETS.items():
        raw = b"\x80\x02" + numbered + b"(" + b"j\x07\x01\0\0" + get + b"t."
        if place is None:
            with pytest.raises(BadFile, match="damaged"):
                parse_pickle(raw, PATH)
        else:
            assert parse_pickle(raw, PATH).value == ("weight j263", f"weight j{place}")


@pytest.mark.parametrize("put", [b"r\x30\x75\0\0", b"\x94"])
def test_nothing_is_put_into_the_memo_where_there_is_nothing(put: bytes) -> None:
    numbered = b"".join(text(f"weight{place}") + b"r" + place.to_bytes(4, "little") + b"0" for place in range(30_000))
    raw = b"\x80\x02" + numbered + put + b"N."
    with pytest.raises(BadFile, match=f"damaged near byte {len(raw) - len(put) - 2:,}"):
        parse_pickle(raw, PATH)


@pytest.mark.parametrize("filler", [b"jg" * 600_000, b"".join(b"j" + struct.pack("<I", n) for n in range(110_000))])
def test_a_pickle_may_ask_for_anything_where_most_looks_like_it(filler: bytes) -> None:
    numbered = b"".join(b"I%d\nr" % place + place.to_bytes(4, "little") + b"0" for place in range(1_000))
    raw = b"\x80\x02B" + struct.pack("<I", len(filler)) + filler + b"0" + numbered + b"(j\xe6\3\0\0g999\nt."
    assert parse_pickle(raw, PATH).value == (998, 999)


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_a_class_that_is_kept_are_data(protocol: int) -> None:
    def find(named: Global, where: object) -> object:
        return Kept(named.name) if named.name in ("Entry", "Pair") else named

    raw = pickle.dumps({Entry("a"): Pair(1, 2), Entry("b"): Path()}, protocol)
    value = run_pickle(raw, "here", find, lambda identity, where: None, False, allow_steps()).value
    (a, pair), (b, path) = value.items()
    assert type(a) is type(b) is type(pair) is KeptObject
    assert (a.name, a.state, b.state) == ("Entry", {"name": "a"}, {"name": "b"})
    assert type(path) is Inert
    if protocol >= 2:
        assert (pair.name, pair.arguments) == ("Pair", (1, 2))
    else:
        assert (pair.name, pair.arguments[1]) == ("Pair", (1, 2))  # tuple, and what is in it


def test_a_class_that_is_kept_is_not_called() -> None:
    class Caller:
        def __reduce__(self) -> Any:
            return Entry, ("a",)

    with pytest.raises(HostileFile, match="calls"):
        run_pickle(pickle.dumps(Caller()), "here", lambda named, where: Kept(named.name), lambda i, w: None, False,
                   allow_steps())  # fmt: skip
