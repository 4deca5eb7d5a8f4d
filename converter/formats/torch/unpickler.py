"""A machine that reads a pickle as data: nothing is ever imported, constructed or called.

It walks the opcodes of protocols 0 to 5 (``Lib/pickletools.py`` of CPython describes each) over plain values. What a
global or a persistent id means is for the caller to say; the only functions applied are the caller's own. An object of
a class that the caller keeps becomes data, one of any other an inert one; a call of anything else is a refusal.

All pickles of a file draw on one budget of steps: each opcode takes one, and what copies or keeps more than a few dozen
bytes takes more, in that measure. So what a step takes at most, times the steps, is what a file takes at most.

Why not a subclass of ``pickle.Unpickler``: its memo grows to whatever index the file names (a five-byte opcode can
claim 32 GB), and its REDUCE, NEWOBJ and BUILD call what they find; here there is nothing to call.
"""

from __future__ import annotations

import codecs
import itertools
import re
import struct
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from sys import intern
from typing import Any, NamedTuple

from converter.errors import BadFile, HostileFile, Unsupported, Where
from converter.formats.torch.globals import HARMLESS, RECONSTRUCTORS, SYSTEM

MAX_PICKLE_NBYTES = 100_000_000  # as much as a safetensors header may take: it too only names and describes tensors
FREE_NBYTES = 32_000_000  # of a pickle; of 160,000 tensors it is shorter. What is more is memory too, and takes steps
MAX_OPCODES = 5_000_000  # a tensor takes about 30, so 160,000 tensors; a step takes up to 72 bytes, so within 512 MB
GLOBAL_STEPS = 50  # what a name in a module counts for: a pickle says each once
# How Python names the class that sharded tensors carry along: as an attribute of another.
_INNER_CLASS = ("torch.distributed._shard.sharded_tensor.api.ShardedTensor", "ProcessGroupState")
_OBJECT_STEPS = 4  # what an inert object counts for, and an empty list or dict: they take more memory than numbers
_CONTAINER_STEPS = 2
MAX_LONG_NBYTES = 16  # sizes and offsets fit in 8 bytes
_MAX_LINE_NBYTES = 48  # of a number in decimal digits
_MAX_NAME_LENGTH = 1_000  # of a module, and of a name in it: no code has longer ones, and they are spelled many times
_NBYTES_A_STEP = 64  # of bytes, and of text that takes a byte a character
_WIDE_NBYTES_A_STEP = 16  # of other text: it may take four bytes for each byte of the file
_SMALL_NBYTES = 1 << 16  # of a pickle whose memo is kept as it is
# What is looked at to find what the memo is asked for, and kept of it; names of 160,000 tensors hold as many letters.
_MAX_LETTERS = 1_000_000
_MAX_ASKED = 100_000


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert(dict[Any, Any]):
    """What stands for an object of a class that is never looked up; what is put into it is kept, and its state."""

    __slots__ = ("name", "state")
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None

    def __eq__(self, other: object) -> bool:
        return self is other

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Kept:
    """A class whose objects a pickle may make, and the caller wants: as data."""

    name: str

    def __str__(self) -> str:
        return self.name


class KeptObject:
    """An object of a class that is kept: what it was made of, and its state.

    It is the same as itself alone: of keys that are compared a file could choose such as all hash alike.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None


class Pickled(NamedTuple):
    """What a pickle holds, the bytes that it takes, and what it does with each global that is not the caller's.

    That is ``names`` it, ``makes`` an object of it, or ``calls`` it (as a function, which was not done).
    """

    value: Any
    nbytes: int
    foreign: dict[str, str]


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A function that a pickle may name, as one of ours that takes its arguments as data."""

    name: str
    rebuild: Callable[[tuple[Any, ...], Where], Any]
    count_steps: Callable[[tuple[Any, ...]], int]  # what a call copies or goes through, in steps

    def __str__(self) -> str:
        return self.name


Steps = Iterator[None]
"""What the pickles of one file may still take."""


def allow_steps() -> Steps:
    """Give the steps that one file may take."""
    return itertools.repeat(None, MAX_OPCODES)


def count_text_steps(encoded: bytes) -> int:
    """Say how many steps a text takes beside that of its opcode."""
    return len(encoded) // _NBYTES_A_STEP if encoded.isascii() else 1 + len(encoded) // _WIDE_NBYTES_A_STEP


def run_pickle(
    raw: bytes,
    where: Where,
    find: Callable[[Global, Where], Any],
    find_persistent: Callable[[Any, Where], Any],
    strip_code: bool,
    steps: Steps,
) -> Pickled:
    """Read the pickle that ``raw`` begins with; ``find`` gives what a global stands for, if only itself.

    ``find_persistent`` gives what a persistent id stands for. With ``strip_code`` the calls of functions that no
    checkpoint needs are left out. What it takes is taken from ``steps``. Raises BadFile where the stream is damaged and
    HostileFile where it goes beyond what a checkpoint needs.
    """
    if len(raw) > MAX_PICKLE_NBYTES:
        raise HostileFile(where, f"its pickle is {len(raw):,} bytes long, too long for a description of tensors")
    machine = _Machine(raw, where, find, find_persistent, strip_code, steps)
    if len(raw) > FREE_NBYTES:
        machine.charge(1 + (len(raw) - FREE_NBYTES) // _NBYTES_A_STEP)
    return Pickled(machine.run(), machine.place, machine.foreign)


def _find_asked(raw: bytes) -> Container[int]:
    """Give the places of the memo that a pickle may ask for, and more: what looks like a GET may be none.

    ``torch.save`` puts a dozen objects a tensor there, and asks for a few of the first tensors'.
    """
    if len(raw) <= _SMALL_NBYTES or raw.count(b"j") + raw.count(b"g") > _MAX_LETTERS:
        return _ALL
    asked = set(range(256))  # for BINGET
    numbers = itertools.chain(
        (_UINT4(raw, found.end())[0] for found in _LONG_BINGET.finditer(raw)),
        (int(found[1].replace(b"_", b"")) for found in _GET.finditer(raw)),
    )
    for number in numbers:
        asked.add(number)
        if len(asked) > _MAX_ASKED:
            return _ALL
    return asked


def _is_inner_class(of: Any, name: Any) -> bool:
    return type(of) is Kept and type(name) is str and (of.name, name) == _INNER_CLASS


def _name(value: Any) -> str:
    """Name a value without spelling it out: it may be nested a million deep."""
    return str(value) if isinstance(value, (Global, Kept, Rebuild)) else f"a value of type {type(value).__name__}"


class _Machine:
    """The stack, the memo and the place in the stream; one method a kind of opcode, listed in _OPCODES below."""

    __slots__ = (
        "asked", "far", "find", "find_persistent", "foreign", "marks", "memo", "place", "raw", "stack", "steps",
        "strip_code", "where",
    )  # fmt: skip

    def __init__(
        self,
        raw: bytes,
        where: Where,
        find: Callable[[Global, Where], Any],
        find_persistent: Callable[[Any, Where], Any],
        strip_code: bool,
        steps: Steps,
    ) -> None:
        self.raw = raw
        self.where = where
        self.find = find
        self.find_persistent = find_persistent
        self.place = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        # Numbers count up from 0, at times with gaps (``pickletools.optimize``) or from 1 (Python 2): what is numbered
        # beyond a gap is ``far``.
        self.memo: list[Any] = []
        self.far: dict[int, Any] = {}
        self.asked = _find_asked(raw)  # what is at other places of the memo is not kept
        self.steps = steps
        self.strip_code = strip_code
        self.foreign: dict[str, str] = {}

    def run(self) -> Any:  # noqa: C901, PLR0912, PLR0915
        raw, where, find_persistent = self.raw, self.where, self.find_persistent
        memo, far, marks, asked = self.memo, self.far, self.marks, self.asked
        place, stack = self.place, self.stack
        try:
            for _ in self.steps:
                code = raw[place]
                # Most opcodes of a state dict are these few; a method for each would take twice the time.
                if code == _LONG_BINPUT:
                    index = _UINT4(raw, place + 1)[0]
                    if index == len(memo) and not far:
                        top = stack[-1]
                        memo.append(top if index in asked else None)
                    else:
                        self.stack = stack
                        self.put(index)
                    place += 5
                elif code == _BININT1:
                    stack.append(raw[place + 1])
                    place += 2
                elif code == _BINGET:
                    index = raw[place + 1]
                    stack.append(memo[index] if index < len(memo) else far[index])
                    place += 2
                elif code == _MARK:
                    marks.append(stack)
                    stack = []
                    place += 1
                elif code == _TUPLE:
                    items = tuple(stack)
                    stack = marks.pop()
                    stack.append(items)
                    place += 1
                elif code == _TUPLE1:
                    stack[-1] = (stack[-1],)
                    place += 1
                elif code == _TUPLE2:
                    last = stack.pop()
                    stack[-1] = (stack[-1], last)
                    place += 1
                elif code == _REDUCE:
                    arguments = stack.pop()
                    stack[-1] = self.call(stack[-1], arguments)
                    place += 1
                elif code == _BINUNICODE:
                    begin = place + 5
                    end = begin + _UINT4(raw, place + 1)[0]
                    if end > len(raw):
                        raise ValueError("the stream ends early")
                    encoded = raw[begin:end]
                    if end - begin >= _NBYTES_A_STEP or not encoded.isascii():
                        self.charge_text(encoded)
                    stack.append(encoded.decode("utf-8", "surrogatepass"))
                    place = end
                elif code == _BININT2:
                    stack.append(raw[place + 1] | raw[place + 2] << 8)
                    place += 3
                elif code == _BINPERSID:
                    stack[-1] = find_persistent(stack[-1], where)
                    place += 1
                elif code == _NEWFALSE:
                    stack.append(False)
                    place += 1
                elif code == _EMPTY_TUPLE:
                    stack.append(())
                    place += 1
                elif code == _STOP:
                    self.place = place + 1
                    return stack.pop()
                else:
                    self.place, self.stack = place + 1, stack
                    _TABLE[code](self)
                    place, stack = self.place, self.stack
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            raise BadFile(where, f"its pickle is damaged near byte {place:,}", "Fetch the file again.") from error
        raise self.too_many_steps()

    def charge(self, count: int) -> None:
        """Take steps for what is copied or kept: one list may be handed to many calls."""
        if next(itertools.islice(self.steps, count - 1, None), self) is self:
            raise self.too_many_steps()

    def charge_text(self, encoded: bytes) -> None:
        count = count_text_steps(encoded)
        if count:
            self.charge(count)

    def too_many_steps(self) -> HostileFile:
        return HostileFile(self.where, f"its pickle takes more than {MAX_OPCODES:,} steps")

    # Reading arguments.

    def take(self, nbytes: int) -> bytes:
        end = self.place + nbytes
        if nbytes < 0 or end > len(self.raw):
            raise ValueError("the stream ends early")
        taken = self.raw[self.place : end]
        self.place = end
        return taken

    def take_uint(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def take_line(self) -> bytes:
        end = self.raw.index(b"\n", self.place)
        line = self.raw[self.place : end]
        self.place = end + 1
        return line

    def take_text_line(self) -> str:
        return self.take_line().decode("utf-8")

    def take_short_line(self) -> bytes:
        line = self.take_line()
        if len(line) > _MAX_LINE_NBYTES:
            raise HostileFile(self.where, f"its pickle holds a number of {len(line):,} digits")
        return line

    def take_number(self) -> int:
        number = int(self.take_short_line())
        if number < 0:
            raise ValueError("a number below 0")
        return number

    # Values.

    def push_int4(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def push_long(self, count_nbytes: int) -> None:
        nbytes = self.take_uint(count_nbytes)
        if nbytes > MAX_LONG_NBYTES:
            raise HostileFile(self.where, f"its pickle holds a whole number of {nbytes:,} bytes")
        self.stack.append(int.from_bytes(self.take(nbytes), "little", signed=True))

    def push_int_line(self) -> None:
        line = self.take_short_line().rstrip(b"L")
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def push_text(self, count_nbytes: int) -> None:
        begin = self.place + count_nbytes
        end = begin + int.from_bytes(self.raw[self.place : begin], "little")
        if end > len(self.raw):
            raise ValueError("the stream ends early")
        encoded = self.raw[begin:end]
        self.charge_text(encoded)
        self.stack.append(encoded.decode("utf-8", "surrogatepass"))
        self.place = end

    def push_bytes(self, count_nbytes: int) -> None:
        content = self.take(self.take_uint(count_nbytes))
        self.charge(1 + len(content) // _NBYTES_A_STEP)
        self.stack.append(content)

    def push_quoted_line(self) -> None:
        line = self.take_line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in b"'\"":
            raise ValueError("a string without quotes")
        self.charge(1 + len(line) // _NBYTES_A_STEP)
        encoded = codecs.escape_decode(line[1:-1])[0]
        self.charge_text(encoded)
        self.stack.append(encoded.decode("utf-8"))

    def push_text_line(self) -> None:
        line = self.take_line()
        self.charge(1 + len(line) // _WIDE_NBYTES_A_STEP)  # what is escaped is wide, though its spelling is not
        self.stack.append(line.decode("raw-unicode-escape"))

    def push_float(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def push_float_line(self) -> None:
        self.stack.append(float(self.take_short_line()))

    # Containers.

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def drop_to_mark(self) -> None:
        self.pop_mark()

    def push_tuple3(self) -> None:
        third, second = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], second, third)

    def push_empty_list(self) -> None:
        self.charge(_CONTAINER_STEPS)
        self.stack.append([])

    def push_empty_dict(self) -> None:
        self.charge(_CONTAINER_STEPS)
        self.stack.append({})

    def push_list(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def push_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append(self.fill({}, items))

    def append(self) -> None:
        item = self.stack.pop()
        self.append_to([item])

    def append_many(self) -> None:
        items = self.pop_mark()
        self.append_to(items)

    def append_to(self, items: list[Any]) -> None:
        top = self.stack[-1]
        if isinstance(top, Inert):
            self.charge(1 + len(items))  # each takes a number and a place beside its own
            top.update(enumerate(items, len(top)))
        elif type(top) is list:
            top.extend(items)
        else:
            raise TypeError("items for what is no list")

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def set_items(self) -> None:
        items = self.pop_mark()
        self.fill(self.stack[-1], items)

    def fill(self, target: Any, items: list[Any]) -> dict[Any, Any]:
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tensor has a key that is neither text nor a number. Of large numbers, or of tuples, a file could choose
            # such as all hash alike, and make the dict quadratic.
            kind = type(key)
            is_plain = kind is str or kind in (bytes, bool, type(None), KeptObject)
            if not (is_plain or (kind is int and abs(key) < 1 << 53)):
                self.charge(_OBJECT_STEPS)
                key = Inert(type(key).__name__)
            target[key] = value
        return target

    # Stack and memo.

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def put(self, index: int) -> None:
        if index < len(self.memo):
            self.memo[index] = self.stack[-1]
        elif index == len(self.memo) and not self.far:
            top = self.stack[-1]
            self.memo.append(top if index in self.asked else None)
        else:
            self.charge(1)
            self.far[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index] if index < len(self.memo) else self.far[index])

    def put_uint1(self) -> None:
        self.put(self.raw[self.place])
        self.place += 1

    def get_uint4(self) -> None:
        self.get(_UINT4(self.raw, self.place)[0])
        self.place += 4

    # Names and what they are applied to.

    def push_global(self, module: str, name: str) -> None:
        self.charge(GLOBAL_STEPS)
        if max(len(module), len(name)) > _MAX_NAME_LENGTH:
            raise HostileFile(self.where, f"its pickle spells a name of more than {_MAX_NAME_LENGTH:,} characters")
        found = self.find(Global(module, name), self.where)
        if type(found) is Global:
            self.foreign.setdefault(str(found), "names")
        self.stack.append(found)

    def push_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a global whose name is no text")
        self.push_global(module, name)

    def call(self, target: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            raise TypeError("arguments that are no tuple")
        if type(target) is Rebuild:
            count = target.count_steps(arguments)
            if count:
                self.charge(count)
            return target.rebuild(arguments, self.where)
        if type(target) is Global:
            if str(target) in RECONSTRUCTORS:
                return self.make(arguments[0], arguments[1:])
            if str(target) in HARMLESS:
                return self.make(target)
            if target.name == "getattr" and len(arguments) == 2 and _is_inner_class(*arguments):
                if self.foreign.get(str(target)) == "names":
                    del self.foreign[str(target)]  # by torch itself
                return Kept(f"{arguments[0].name}.{arguments[1]}")
        return self.leave_out(target, "calls")

    def make(self, of: Any, arguments: Any = ()) -> Inert | KeptObject:
        """Make what stands for a new object, which Python makes without a call of anything in the class's module."""
        if type(of) is Kept:
            self.charge(_OBJECT_STEPS)
            return KeptObject(of.name, arguments)
        if type(of) is not Global or (of.module.partition(".")[0] in SYSTEM and str(of) not in HARMLESS):
            return self.leave_out(of, "makes an object of")
        self.charge(_OBJECT_STEPS)
        name = intern(str(of))  # of a million objects it is kept once
        self.foreign[name] = "makes"
        return Inert(name)

    def leave_out(self, target: Any, what: str) -> Inert:
        if not self.strip_code:
            raise HostileFile(
                self.where,
                f"its pickle {what} {_name(target)}, which is no part of a state dict",
                "Nothing in it was run. --strip-code converts its tensors all the same.",
            )
        self.charge(_OBJECT_STEPS)
        name = intern(_name(target))
        self.foreign[name] = "calls"
        return Inert(name)

    def new_object(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], arguments)

    def new_object_ex(self) -> None:
        self.stack.pop()
        self.new_object()

    def call_marked(self) -> None:
        target, *arguments = self.pop_mark()
        self.stack.append(self.call(target, tuple(arguments)))

    def call_named(self) -> None:
        arguments = self.pop_mark()
        self.push_global(self.take_text_line(), self.take_text_line())
        self.stack[-1] = self.call(self.stack[-1], tuple(arguments))

    def build(self) -> None:
        # The attributes of a state dict (``_metadata``: module versions) have no place in safetensors, and no loader
        # needs them.
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) in (KeptObject, Inert):
            target.state = state
        elif type(target) is not dict or type(state) is not dict:
            self.leave_out(target, "sets the state of")

    def skip(self, nbytes: int) -> None:
        self.take(nbytes)

    def refuse_text_id(self) -> None:
        raise Unsupported(
            self.where,
            "names its storages in text (pickle protocol 0), which torch itself cannot load",
            "Save it again with torch.save.",
        )

    def refuse_extension(self) -> None:
        raise HostileFile(self.where, "its pickle uses the extension registry, which is no part of a state dict")


_STOP = ord(".")
_LONG_BINPUT = ord("r")
_BINGET = ord("h")
_BININT1 = ord("K")
_BININT2 = ord("M")
_EMPTY_TUPLE = ord(")")
_NEWFALSE = 0x89
_MARK = ord("(")
_TUPLE = ord("t")
_TUPLE1 = 0x85
_TUPLE2 = 0x86
_REDUCE = ord("R")
_BINUNICODE = ord("X")
_BINPERSID = ord("Q")
_UINT4 = struct.Struct("<I").unpack_from
_ALL = range(1 << 63)
_LONG_BINGET = re.compile(rb"j(?=.{4})", re.DOTALL)
_GET = re.compile(rb"g[\s+-]*(\d[\d_]{,%d})\s*\n" % _MAX_LINE_NBYTES)  # whatever ``int`` takes for a number
_Step = Callable[[_Machine], None]

_OPCODES: dict[str, _Step] = {
    "q": _Machine.put_uint1,
    "j": _Machine.get_uint4,
    "p": lambda m: m.put(m.take_number()),
    "g": lambda m: m.get(m.take_number()),
    "\x94": lambda m: m.put(len(m.memo) + len(m.far)),
    "J": _Machine.push_int4,
    "I": _Machine.push_int_line,
    "L": _Machine.push_int_line,
    "\x8a": lambda m: m.push_long(1),
    "\x8b": lambda m: m.push_long(4),
    "\x8c": lambda m: m.push_text(1),
    "\x8d": lambda m: m.push_text(8),
    "V": _Machine.push_text_line,
    # STRING opcodes hold what Python 2 called str; torch decodes them as UTF-8 (``torch.load(encoding=)``).
    "U": lambda m: m.push_text(1),
    "T": lambda m: m.push_text(4),
    "S": _Machine.push_quoted_line,
    "C": lambda m: m.push_bytes(1),
    "B": lambda m: m.push_bytes(4),
    "\x8e": lambda m: m.push_bytes(8),
    "\x96": lambda m: m.push_bytes(8),  # BYTEARRAY8
    "G": _Machine.push_float,
    "F": _Machine.push_float_line,
    "N": lambda m: m.stack.append(None),
    "\x88": lambda m: m.stack.append(True),
    "0": _Machine.pop,
    "1": _Machine.drop_to_mark,
    "2": lambda m: m.stack.append(m.stack[-1]),
    "\x87": _Machine.push_tuple3,
    "]": _Machine.push_empty_list,
    "l": _Machine.push_list,
    "a": _Machine.append,
    "e": _Machine.append_many,
    "}": _Machine.push_empty_dict,
    "d": _Machine.push_dict,
    "s": _Machine.set_item,
    "u": _Machine.set_items,
    "c": lambda m: m.push_global(m.take_text_line(), m.take_text_line()),
    "\x93": _Machine.push_stack_global,
    "b": _Machine.build,
    "\x80": lambda m: m.skip(1),  # PROTO
    "\x95": lambda m: m.skip(8),  # FRAME
    "P": _Machine.refuse_text_id,  # PERSID
    "i": _Machine.call_named,  # INST
    "o": _Machine.call_marked,  # OBJ
    "\x81": _Machine.new_object,
    "\x92": _Machine.new_object_ex,
    "\x82": _Machine.refuse_extension,  # EXT1, EXT2, EXT4
    "\x83": _Machine.refuse_extension,
    "\x84": _Machine.refuse_extension,
    "\x8f": _Machine.push_empty_list,  # EMPTY_SET: what is in a set is no weight
    "\x90": _Machine.append_many,  # ADDITEMS
    "\x91": _Machine.push_list,  # FROZENSET
}


def _unknown(machine: _Machine) -> None:
    raise ValueError("an opcode that is none, or that no checkpoint needs")


_TABLE: list[_Step] = [_OPCODES.get(chr(code), _unknown) for code in range(256)]
