"""A machine that reads a pickle as data: nothing is ever imported, constructed or called.

It walks the opcodes of protocols 0 to 5 (``Lib/pickletools.py`` of CPython describes each) over plain values. What a
global or a persistent id means is for the caller to say; the only functions applied are the caller's own.

Why not a subclass of ``pickle.Unpickler``: its memo grows to whatever index the file names (a five-byte opcode can
claim 32 GB), and its REDUCE, NEWOBJ and BUILD call what they find; here there is nothing to call.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import BadFile, HostileFile, Unsupported

MAX_PICKLE_NBYTES = 100_000_000  # as much as a safetensors header may take: it too only names and describes tensors
MAX_OPCODES = 7_000_000  # a tensor takes about 35, so 200,000 tensors; keeps the values within 512 MB
MAX_LONG_NBYTES = 16  # sizes and offsets fit in 8 bytes


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Rebuild:
    """A function that a pickle may name, as one of ours that takes its arguments as data."""

    name: str
    rebuild: Callable[[tuple[Any, ...], Path], Any]

    def __str__(self) -> str:
        return self.name


def run_pickle(
    raw: bytes, path: Path, find: Callable[[Global, Path], Any], find_persistent: Callable[[Any, Path], Any]
) -> Any:
    """Give the value of a pickle; ``find`` gives what a global stands for, ``find_persistent`` a persistent id.

    Raises BadFile where the stream is damaged and HostileFile where it goes beyond what a checkpoint needs.
    """
    if len(raw) > MAX_PICKLE_NBYTES:
        raise HostileFile(path, f"its pickle is {len(raw):,} bytes long, too long for a description of tensors")
    return _Machine(raw, path, find, find_persistent).run()


def _name(value: Any) -> str:
    """Name a value without spelling it out: it may be nested a million deep."""
    return str(value) if isinstance(value, (Global, Rebuild)) else f"a value of type {type(value).__name__}"


class _Machine:
    """The stack, the memo and the place in the stream; one method a kind of opcode, listed in _OPCODES below."""

    __slots__ = ("charged", "far", "find", "find_persistent", "marks", "memo", "path", "place", "raw", "stack")

    def __init__(
        self,
        raw: bytes,
        path: Path,
        find: Callable[[Global, Path], Any],
        find_persistent: Callable[[Any, Path], Any],
    ) -> None:
        self.raw = raw
        self.path = path
        self.find = find
        self.find_persistent = find_persistent
        self.place = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        # Numbers count up from 0, at times with gaps (``pickletools.optimize``) or from 1 (Python 2): what is numbered
        # beyond a gap is ``far``.
        self.memo: list[Any] = []
        self.far: dict[int, Any] = {}
        self.charged = 0

    def run(self) -> Any:
        raw, path, find_persistent = self.raw, self.path, self.find_persistent
        memo, far, marks = self.memo, self.far, self.marks
        place, stack = self.place, self.stack
        try:
            for _ in range(MAX_OPCODES):
                code = raw[place]
                # Most opcodes of a state dict are these few; a method for each would take twice the time.
                if code == _LONG_BINPUT:
                    index = _UINT4(raw, place + 1)[0]
                    if index == len(memo) and not far:
                        memo.append(stack[-1])
                    else:
                        self.stack = stack
                        self.put(index)
                    place += 5
                elif code == _BINGET:
                    index = raw[place + 1]
                    stack.append(memo[index] if index < len(memo) else far[index])
                    place += 2
                elif code == _BININT1:
                    stack.append(raw[place + 1])
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
                    stack.append(raw[begin:end].decode("utf-8", "surrogatepass"))
                    place = end
                elif code == _BINPERSID:
                    stack[-1] = find_persistent(stack[-1], path)
                    place += 1
                elif code == _STOP:
                    return stack.pop()
                else:
                    self.place, self.stack = place + 1, stack
                    _TABLE[code](self)
                    place, stack = self.place, self.stack
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            raise BadFile(path, f"its pickle is damaged near byte {place:,}", "Fetch the file again.") from error
        raise HostileFile(path, f"its pickle takes more than {MAX_OPCODES:,} steps")

    def charge(self, steps: int) -> None:
        """Count what a call copies as steps: one list may be handed to many calls."""
        self.charged += steps
        if self.charged > MAX_OPCODES:
            raise HostileFile(self.path, f"its pickle takes more than {MAX_OPCODES:,} steps")

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

    def take_number(self) -> int:
        number = int(self.take_line())
        if number < 0:
            raise ValueError("a number below 0")
        return number

    # Values.

    def push_uint2(self) -> None:
        self.stack.append(self.take_uint(2))

    def push_int4(self) -> None:
        self.stack.append(int.from_bytes(self.take(4), "little", signed=True))

    def push_long(self, count_nbytes: int) -> None:
        nbytes = self.take_uint(count_nbytes)
        if nbytes > MAX_LONG_NBYTES:
            raise HostileFile(self.path, f"its pickle holds a whole number of {nbytes:,} bytes")
        self.stack.append(int.from_bytes(self.take(nbytes), "little", signed=True))

    def push_int_line(self) -> None:
        line = self.take_line().rstrip(b"L")
        if len(line) > 3 * MAX_LONG_NBYTES:
            raise HostileFile(self.path, f"its pickle holds a whole number of {len(line):,} digits")
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def push_text(self, count_nbytes: int) -> None:
        begin = self.place + count_nbytes
        end = begin + int.from_bytes(self.raw[self.place : begin], "little")
        if end > len(self.raw):
            raise ValueError("the stream ends early")
        self.stack.append(self.raw[begin:end].decode("utf-8", "surrogatepass"))
        self.place = end

    def push_bytes(self, count_nbytes: int) -> None:
        self.stack.append(self.take(self.take_uint(count_nbytes)))

    def push_quoted_line(self) -> None:
        line = self.take_line()
        if len(line) < 2 or line[0] != line[-1] or line[0] not in b"'\"":
            raise ValueError("a string without quotes")
        self.stack.append(codecs.escape_decode(line[1:-1])[0].decode("utf-8"))

    def push_text_line(self) -> None:
        self.stack.append(self.take_line().decode("raw-unicode-escape"))

    def push_float(self) -> None:
        self.stack.append(struct.unpack(">d", self.take(8))[0])

    def push_float_line(self) -> None:
        self.stack.append(float(self.take_line()))

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

    def push_list(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def push_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append(self.fill({}, items))

    def append(self) -> None:
        item = self.stack.pop()
        self.list_on_top().append(item)

    def append_many(self) -> None:
        items = self.pop_mark()
        self.list_on_top().extend(items)

    def list_on_top(self) -> list[Any]:
        top = self.stack[-1]
        if type(top) is not list:
            raise TypeError("items for what is no list")
        return top

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [key, value])

    def set_items(self) -> None:
        items = self.pop_mark()
        self.fill(self.stack[-1], items)

    def fill(self, target: Any, items: list[Any]) -> dict[Any, Any]:
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Of numbers, a file could choose such as all hash alike, and make the dict quadratic.
            if type(key) not in (str, bytes, bool, type(None)) and not (type(key) is int and abs(key) < 1 << 53):
                raise Unsupported(self.path, f"its pickle has a dict with an odd key of type {type(key).__name__}")
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
            self.memo.append(self.stack[-1])
        else:
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
        self.stack.append(self.find(Global(module, name), self.path))

    def push_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a global whose name is no text")
        self.push_global(module, name)

    def call(self, target: Any, arguments: Any) -> Any:
        if not isinstance(target, Rebuild) or type(arguments) is not tuple:
            raise HostileFile(self.path, f"its pickle calls {_name(target)}, which is no part of a state dict")
        if arguments and type(arguments[0]) is list:
            self.charge(len(arguments[0]))
        return target.rebuild(arguments, self.path)

    def build(self) -> None:
        # The attributes of a state dict (``_metadata``: module versions) have no place in safetensors, and no loader
        # needs them.
        state = self.stack.pop()
        if type(self.stack[-1]) is not dict or type(state) is not dict:
            raise HostileFile(self.path, f"its pickle sets the state of {_name(self.stack[-1])}")

    def skip(self, nbytes: int) -> None:
        self.take(nbytes)

    def refuse(self) -> None:
        raise HostileFile(self.path, "its pickle makes objects, which is no part of a state dict")

    def refuse_inst(self) -> None:
        self.push_global(self.take_text_line(), self.take_text_line())
        self.refuse()


_STOP = ord(".")
_LONG_BINPUT = ord("r")
_BINGET = ord("h")
_BININT1 = ord("K")
_MARK = ord("(")
_TUPLE = ord("t")
_TUPLE1 = 0x85
_TUPLE2 = 0x86
_REDUCE = ord("R")
_BINUNICODE = ord("X")
_BINPERSID = ord("Q")
_UINT4 = struct.Struct("<I").unpack_from
_Step = Callable[[_Machine], None]

_OPCODES: dict[str, _Step] = {
    "q": _Machine.put_uint1,
    "j": _Machine.get_uint4,
    "p": lambda m: m.put(m.take_number()),
    "g": lambda m: m.get(m.take_number()),
    "\x94": lambda m: m.put(len(m.memo) + len(m.far)),
    "M": _Machine.push_uint2,
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
    "G": _Machine.push_float,
    "F": _Machine.push_float_line,
    "N": lambda m: m.stack.append(None),
    "\x88": lambda m: m.stack.append(True),
    "\x89": lambda m: m.stack.append(False),
    "0": _Machine.pop,
    "1": _Machine.drop_to_mark,
    "2": lambda m: m.stack.append(m.stack[-1]),
    ")": lambda m: m.stack.append(()),
    "\x87": _Machine.push_tuple3,
    "]": lambda m: m.stack.append([]),
    "l": _Machine.push_list,
    "a": _Machine.append,
    "e": _Machine.append_many,
    "}": lambda m: m.stack.append({}),
    "d": _Machine.push_dict,
    "s": _Machine.set_item,
    "u": _Machine.set_items,
    "c": lambda m: m.push_global(m.take_text_line(), m.take_text_line()),
    "\x93": _Machine.push_stack_global,
    "b": _Machine.build,
    "\x80": lambda m: m.skip(1),  # PROTO
    "\x95": lambda m: m.skip(8),  # FRAME
    "i": _Machine.refuse_inst,
    "o": _Machine.refuse,  # OBJ
    "\x81": _Machine.refuse,  # NEWOBJ
    "\x92": _Machine.refuse,  # NEWOBJ_EX
    "\x82": _Machine.refuse,  # EXT1, EXT2, EXT4
    "\x83": _Machine.refuse,
    "\x84": _Machine.refuse,
}


def _unknown(machine: _Machine) -> None:
    raise ValueError("an opcode that is none, or that no checkpoint needs")


_TABLE: list[_Step] = [_OPCODES.get(chr(code), _unknown) for code in range(256)]
