"""Pickles as data: a reader of the few opcodes that numpy (`np.save` of a dictionary) and the reference write.

Nothing in a file is called. Its stream is taken down as a tree, in which a name or a call is only a note (`_Call`);
the few calls that stand for arrays, numbers and bytes are then understood here, and all others are refused. What comes
out are dicts, lists, tuples, texts, bytes, numbers, None and numpy arrays of numbers (views of the file's bytes).

Each claim is held against the file: lengths, shapes, depth, and how much its references would unfold to.
"""

import re
from dataclasses import dataclass
from math import prod
from struct import Struct
from struct import error as StructError
from typing import Any

import numpy as np

# Numbers that numpy knows on this machine, by what files call them without the byte order: f8, i2, b1, ...
NUMBERS = frozenset(np.dtype(kind).str[1:] for kind in "?bBhHiIlLqQefdg")
MAX_AXES, MAX_DEPTH, MAX_INT_BYTES = 32, 24, 16
_ATOMS = frozenset((int, str, float, bool, type(None)))
ORDERS = ("<", ">", "|", "=")
_LONGEST_NAME = 200
_TEXTS = re.compile(r"U[1-9]\d{0,4}")

_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
_PACKED = {ord("M"): Struct("<H"), ord("J"): Struct("<i"), ord("G"): Struct(">d")}
# Opcodes and the bytes of the number that follows.
_TEXT = ord("X")
_SIZED = {_TEXT: 4, ord("C"): 1, ord("B"): 4, 0x96: 8}  # text, bytes, bytes, a bytearray
_PUT = {ord("q"): 1, ord("r"): 4}
_SKIPPED = {0x80: 1, 0x95: 8}  # PROTO, FRAME


@dataclass(eq=False, slots=True)
class _Call:
    """A name of the file; with `args` what it calls by that name, with `state` what it then sets on the result."""

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None


_NAMES = {
    ("numpy", "ndarray"): _Call("ndarray"),
    ("numpy", "dtype"): _Call("dtype"),
    ("_codecs", "encode"): _Call("encode"),  # protocol 2 spells bytes so
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Call("array") for core in ("core", "_core")},  # numpy 1 and 2
    **{(f"numpy.{core}.multiarray", "scalar"): _Call("scalar") for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Call("frombuffer") for core in ("core", "_core")},  # protocol 5
}


def read_pickle(data: bytes, start: int = 0) -> Any:
    """The value of the pickle (protocol 2 to 5) that is `data` from `start` to its end.

    Raises:
        ValueError: it is cut or malformed, names or asks for anything but the above, or claims more than it holds.
    """
    try:
        return _Values(2 * (len(data) - start)).of(_tree(data, start))
    except (IndexError, KeyError, StructError):
        raise ValueError("it is cut, or no pickle") from None


def shaped(content: bytes | memoryview, dtype: np.dtype, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    """The bytes as an array, neither copied nor writable. ValueError where they are not what dtype and shape need."""
    if len(shape) > MAX_AXES or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise ValueError(f"a shape of {len(shape)} axes that no array has")
    if prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes for shape {shape} of {dtype}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _tree(data: bytes, pos: int) -> Any:
    """What the stream builds, calls as notes. This is a pickle machine (see `pickletools`), commonest opcodes first.

    What a length claims beyond the file is only sliced off: the next opcode is then not there.
    """
    view = memoryview(data)
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: list[Any] = []
    while True:
        code = data[pos]
        pos += 1
        if code == 0x4B:  # BININT1
            stack.append(data[pos])
            pos += 1
        elif code == 0x8C:  # SHORT_BINUNICODE
            end = pos + 1 + data[pos]
            stack.append(data[pos + 1 : end].decode())
            pos = end
            if data[pos] == 0x94:  # as nearly always
                memo.append(stack[-1])
                pos += 1
        elif code == 0x94:  # MEMOIZE
            memo.append(stack[-1])
        elif code == 0x68:  # BINGET
            stack.append(memo[data[pos]])
            pos += 1
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == 0x28:  # MARK
            below.append(stack)
            stack = []
        elif code in _PACKED:
            form = _PACKED[code]
            stack += form.unpack_from(data, pos)
            pos += form.size
        elif code == 0x86:  # TUPLE2
            last = stack.pop()
            stack[-1] = (stack[-1], last)
        elif code == 0x85:  # TUPLE1
            stack[-1] = (stack[-1],)
        elif code == 0x87:  # TUPLE3
            last, middle = stack.pop(), stack.pop()
            stack[-1] = (stack[-1], middle, last)
        elif code == 0x74:  # TUPLE
            items, stack = stack, below.pop()
            stack.append(tuple(items))
        elif code == 0x52:  # REDUCE
            args, name = stack.pop(), stack[-1]
            if type(name) is not _Call or name.args is not None or type(args) is not tuple:
                raise ValueError("it calls what is no name")
            stack[-1] = _Call(name.name, args)
        elif code == 0x62:  # BUILD
            state, call = stack.pop(), stack[-1]
            if type(call) is not _Call or call.args is None or call.state is not None:
                raise ValueError("it sets the state of what is no array")
            call.state = state
        elif code in _SIZED:
            begin = pos + _SIZED[code]
            pos = begin + int.from_bytes(data[pos:begin], "little")
            stack.append(data[begin:pos].decode() if code == _TEXT else view[begin:pos])
        elif code == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack[-1] = _named(stack[-1], name)
        elif code == 0x5D:  # EMPTY_LIST
            stack.append([])
        elif code == 0x65 or code == 0x61:  # APPENDS, APPEND
            items, stack = (stack, below.pop()) if code == 0x65 else ([stack.pop()], stack)
            if type(stack[-1]) is not list:
                raise ValueError("it appends to what is no list")
            stack[-1] += items
        elif code == 0x7D:  # EMPTY_DICT
            stack.append({})
        elif code == 0x75:  # SETITEMS
            items, stack = stack, below.pop()
            _set(items, stack[-1])
        elif code == 0x73:  # SETITEM
            last = stack.pop()
            _set([stack.pop(), last], stack[-1])
        elif code == 0x8A:  # LONG1
            begin, pos = pos + 1, pos + 1 + data[pos]
            if pos - begin > MAX_INT_BYTES:
                raise ValueError(f"a whole number of {pos - begin} bytes")
            stack.append(int.from_bytes(data[begin:pos], "little", signed=True))
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[int.from_bytes(data[pos : pos + 4], "little")])
            pos += 4
        elif code in _PUT:
            begin, pos = pos, pos + _PUT[code]
            if int.from_bytes(data[begin:pos], "little") != len(memo):
                raise ValueError("it numbers its references out of order")
            memo.append(stack[-1])
        elif code == 0x63:  # GLOBAL
            module, name = data[pos : pos + _LONGEST_NAME].split(b"\n")[:2]
            stack.append(_named(module.decode(), name.decode()))
            pos += len(module) + len(name) + 2
        elif code in _SKIPPED:
            pos += _SKIPPED[code]
        elif code == 0x2E:  # STOP
            if len(stack) != 1 or below or pos != len(data):
                raise ValueError("it goes on behind its end")
            return stack[0]
        else:
            raise ValueError(f"the opcode {bytes([code])!r}")


def _named(module: Any, name: Any) -> _Call:
    if type(module) is not str or type(name) is not str:
        raise ValueError("a name that is no text")
    if (module, name) not in _NAMES:
        raise ValueError(f"it names {module[:_LONGEST_NAME]}.{name[:_LONGEST_NAME]}")
    return _NAMES[module, name]


def _set(items: list[Any], target: Any) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("it sets keys of what is no dictionary")
    for key in items[::2]:
        # Larger numbers could be chosen so that all fall into one place of the table.
        if type(key) is not str and (type(key) is not int or abs(key) >= 1 << 32):
            raise ValueError(f"a key that is a {type(key).__name__}")
    target.update(zip(items[::2], items[1::2], strict=True))


class _Values:
    """Makes values of a tree, at most `left` of them: a reference counts as often as it is used."""

    def __init__(self, left: int) -> None:
        self.left = left

    def of(self, node: Any, depth: int = 0) -> Any:
        kind = type(node)
        if kind in _ATOMS:
            return node
        if kind is _Call:
            return self._called(node, depth + 1)
        self._spend(len(node), depth)
        if kind is memoryview:
            return bytes(node)
        if kind is dict:
            return {key: self.of(item, depth + 1) for key, item in node.items()}
        return kind([item if type(item) in _ATOMS else self.of(item, depth + 1) for item in node])

    def _spend(self, count: int, depth: int) -> None:
        self.left -= count
        if depth > MAX_DEPTH or self.left < 0:
            raise ValueError("references that lead into themselves, or unfold to more than the file holds")

    def _called(self, call: _Call, depth: int) -> Any:
        self._spend(1, depth)
        name, args, state = call.name, call.args, call.state
        if name == "array" and args and type(args[0]) is _Call and args[0].name == "ndarray":
            if type(state) is tuple and len(state) == 5 and type(state[3]) is bool:
                return self._array(state[2], state[4], state[1], state[3], depth)
        elif name == "scalar" and args and len(args) == 2 and state is None:
            value = self._array(*args, (), False, depth)
            return value.item() if isinstance(value, np.ndarray) else value
        elif name == "frombuffer" and args and len(args) == 4 and args[3] in ("C", "F") and state is None:
            return self._array(args[1], args[0], args[2], args[3] == "F", depth)
        elif name == "encode" and args and len(args) == 2 and type(args[0]) is str and args[1] == "latin1":
            self._spend(len(args[0]), depth)
            return args[0].encode("latin-1")
        raise ValueError(f"a call of {name} that is not understood")

    def _array(self, dtype: Any, content: Any, shape: Any, fortran: bool, depth: int) -> Any:
        """An array of numbers; of texts and objects what it holds: the one item, or a list of them."""
        kind, order = _dtype(dtype)
        if type(content) is _Call:  # bytes of protocol 2
            content = self.of(content, depth)
        if type(shape) is tuple and isinstance(content, bytes | memoryview):
            if kind in NUMBERS:
                return shaped(content, np.dtype(order + kind), shape, fortran)
            if _TEXTS.fullmatch(kind):
                self._spend(len(content), depth)
                return _texts(bytes(content), 4 * int(kind[1:]), "utf-32-be" if order == ">" else "utf-32-le", shape)
        elif kind in ("O8", "O4") and type(content) is list and shape in ((len(content),), ()):
            items = self.of(content, depth)
            if shape or len(items) == 1:
                return items if shape else items[0]
        raise ValueError(f"an array of dtype {kind[:_LONGEST_NAME]!r} and a {type(content).__name__}")


def _texts(content: bytes, width: int, encoding: str, shape: tuple[Any, ...]) -> str | list[str]:
    texts = [content[at : at + width].decode(encoding).rstrip("\0") for at in range(0, len(content), width)]
    if len(content) % width or shape not in ((len(texts),), ()) or (shape == () and len(texts) != 1):
        raise ValueError(f"{len(content)} bytes for a row of texts of {width} bytes")
    return texts if shape else texts[0]


def _dtype(call: Any) -> tuple[str, str]:
    """What a dtype calls itself, and its byte order."""
    if type(call) is _Call and call.name == "dtype" and call.args and type(call.args[0]) is str:
        state = call.state
        if type(state) is tuple and state[:1] == (3,) and state[2:5] == (None, None, None) and state[1] in ORDERS:
            return call.args[0], state[1]
    raise ValueError("a dtype that is not understood")
