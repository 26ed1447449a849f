"""The pickles of CIFAR's archives, interpreted opcode by opcode: nothing is unpickled.

Such a file is one dictionary of numbers, texts, flat lists of these, and one array of bytes. Only
the opcodes that Python 2 and 3 write for such dictionaries are interpreted, and an array is built
from bytes in the file, so that no pickle can run code, forge a pointer or grow in memory.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any, NamedTuple

import numpy as np

__all__ = ["interpret_pickle"]


class _Global(NamedTuple):
    """A name that a pickle refers to; nothing is imported."""

    module: str
    name: str


class _StackMark:
    """Start of the items of a tuple, list or dictionary on the stack."""


class _DtypeSpec(NamedTuple):
    """``numpy.dtype(spec)`` before its state."""

    spec: str


class _EmptyArray(NamedTuple):
    """The array of ``numpy…_reconstruct`` before its state."""


_RECONSTRUCT = frozenset(
    _Global(module, "_reconstruct")
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
)
_FROM_BUFFER = frozenset(  # how protocol 5 writes an array
    _Global(module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")
)
_SCALAR = frozenset(  # how NumPy's own numbers are written, such as those of a list of labels
    _Global(module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")
)
_NDARRAY, _DTYPE = _Global("numpy", "ndarray"), _Global("numpy", "dtype")
_ENCODE = _Global("_codecs", "encode")  # how Python 3 writes bytes in protocol 2
_ALLOWED_GLOBALS = _RECONSTRUCT | _FROM_BUFFER | _SCALAR | {_NDARRAY, _DTYPE, _ENCODE}
_SPEC = re.compile(r"[|<>=]?[biu][1248]")

# Opcodes that push their argument
_CONSTANTS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
    ]
)
_PYTHON2_TEXT = frozenset(("STRING", "BINSTRING", "SHORT_BINSTRING"))
_MAX_BUILDS = 16  # an array and its type are two
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def interpret_pickle(content: bytes) -> dict[bytes, Any]:
    """Return the dictionary of a pickle of CIFAR.

    Args:
        content: Bytes of the pickle.

    Returns:
        Fields by name: numbers, texts as bytes, lists of these, arrays of whole numbers.

    Raises:
        ValueError: The pickle has other content or opcodes.

    Example:
        >>> import pickle
        >>> interpret_pickle(pickle.dumps({"labels": [1, 2], b"title": "a"}, protocol=2))
        {b'labels': [1, 2], b'title': b'a'}
    """
    machine = _PickleMachine()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "STOP":
            return machine.result()
        machine.step(opcode.name, argument)
    raise ValueError("it has no end")


class _PickleMachine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.builds = 0

    def result(self) -> dict[bytes, Any]:
        """Return the dictionary on the stack.

        Raises:
            ValueError: The stack does not hold one dictionary alone.
        """
        content = self._pop()
        if self.stack or not isinstance(content, dict):
            raise ValueError("it is not one dictionary")
        return content

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _PYTHON2_TEXT:
            self.stack.append(argument.encode("latin-1"))
        elif name in _LITERALS:
            self.stack.append(_LITERALS[name])
        elif name in _TUPLES:
            self.stack.append(tuple([self._pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(argument)] = self._top()
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self.memo[int(argument)])
        elif handler := getattr(self, f"_do_{name.lower()}", None):
            handler(argument)
        else:
            raise ValueError(f"it uses the opcode {name}")

    def _top(self) -> Any:
        if not self.stack:
            raise ValueError("it takes what it has not put")
        return self.stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self.stack.pop()
        return value

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while not isinstance(item := self._pop(), _StackMark):
            items.append(item)
        return items[::-1]

    def _do_proto(self, argument: int) -> None:
        if argument > 5:
            raise ValueError(f"it is of protocol {argument}")

    def _do_frame(self, argument: int) -> None:
        """Frames are for streams."""

    def _do_mark(self, _: None) -> None:
        self.stack.append(_StackMark())

    def _do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self._top()

    def _do_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _do_empty_list(self, _: None) -> None:
        self.stack.append([])

    def _do_empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def _do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _do_list(self, _: None) -> None:
        items = self._pop_to_mark()
        self.stack.append([])
        self._extend(items)

    def _do_dict(self, _: None) -> None:
        items = self._pop_to_mark()
        self.stack.append({})
        self._update(items)

    def _do_append(self, _: None) -> None:
        self._extend([self._pop()])

    def _do_appends(self, _: None) -> None:
        self._extend(self._pop_to_mark())

    def _do_setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _do_setitems(self, _: None) -> None:
        self._update(self._pop_to_mark())

    def _do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_global(module, name)

    def _do_stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it refers to what is no name")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        if _Global(module, name) not in _ALLOWED_GLOBALS:
            raise ValueError(f"it asks for {module}.{name}")
        self.stack.append(_Global(module, name))

    def _do_reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        if function in _RECONSTRUCT and _match_arguments(arguments, (_NDARRAY,), (0,), (b"b", "b")):
            self.stack.append(_EmptyArray())
        elif function == _DTYPE and isinstance(arguments, tuple) and len(arguments) == 3:
            self.stack.append(_DtypeSpec(_decode_text(arguments[0])))
        elif (
            function == _ENCODE
            and isinstance(arguments, tuple)
            and len(arguments) == 2
            and arguments[1] in ("latin1", "latin-1")
            and isinstance(arguments[0], str)
        ):
            self.stack.append(arguments[0].encode("latin-1"))
        elif function in _SCALAR and isinstance(arguments, tuple) and len(arguments) == 2:
            self.stack.append(_build_number(*arguments))
        elif function in _FROM_BUFFER and isinstance(arguments, tuple) and len(arguments) == 4:
            self._count_build()
            raw, kind, shape, order = arguments
            content = bytes(raw) if isinstance(raw, bytearray) else raw
            self.stack.append(_build_array((1, shape, kind, order == "F", content)))
        else:
            raise ValueError(f"it calls {_describe(function)} with other arguments than an array's")

    def _do_build(self, _: None) -> None:
        state, value = self._pop(), self._pop()
        self._count_build()
        if not isinstance(state, tuple):
            raise ValueError("it gives a state that is none")
        if isinstance(value, _DtypeSpec) and len(state) >= 3 and state[0] == 3:
            built: Any = _build_dtype(value, _decode_text(state[1]))
        elif isinstance(value, _EmptyArray) and len(state) == 5:
            built = _build_array(state)
        else:
            raise ValueError("it gives a state to what has none")
        self.stack.append(built)
        for key, entry in self.memo.items():  # memoised before its state was set
            if entry is value:
                self.memo[key] = built

    def _count_build(self) -> None:
        self.builds += 1
        if self.builds > _MAX_BUILDS:
            raise ValueError("it holds too many arrays")

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list) or not all(_is_plain(item) for item in items):
            raise ValueError("it holds a list of neither numbers nor text")
        target.extend(item.encode() if isinstance(item, str) else item for item in items)

    def _update(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it fills what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            name = key.encode() if isinstance(key, str) else key
            if not isinstance(name, bytes) or name in target:
                raise ValueError("it has a field without a name, or twice")
            if not (_is_plain(value) or isinstance(value, list | np.ndarray)):
                raise ValueError(f"its field {name!r} holds {_describe(value)}")
            target[name] = value.encode() if isinstance(value, str) else value


def _match_arguments(arguments: Any, *allowed: tuple[Any, ...]) -> bool:
    """Tell whether arguments are a tuple of allowed values, or of tuples with one of them."""
    if not isinstance(arguments, tuple) or len(arguments) != len(allowed):
        return False
    values = [v[0] if isinstance(v, tuple) and len(v) == 1 else v for v in arguments]
    return all(
        isinstance(value, int | str | bytes | _Global) and value in options
        for value, options in zip(values, allowed, strict=True)
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | str | bytes)


def _describe(value: Any) -> str:
    return f"{value.module}.{value.name}" if isinstance(value, _Global) else type(value).__name__


def _decode_text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise ValueError("it holds an array of no type")
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _build_dtype(kind: _DtypeSpec, order: str) -> np.dtype[Any]:
    if not _SPEC.fullmatch(kind.spec) or order not in ("<", ">", "|", "="):
        raise ValueError(f"it holds an array of {kind.spec!r}")
    return np.dtype(kind.spec).newbyteorder(order)  # type: ignore[arg-type]


def _build_number(kind: Any, raw: Any) -> int:
    if isinstance(raw, str):
        raw = raw.encode("latin-1")
    if not isinstance(kind, np.dtype) or not isinstance(raw, bytes) or len(raw) != kind.itemsize:
        raise ValueError("it holds a number whose type and bytes do not fit")
    return int(np.frombuffer(raw, kind)[0])


def _build_array(state: tuple[Any, ...]) -> np.ndarray[Any, np.dtype[Any]]:
    _, shape, kind, fortran, raw = state
    if not isinstance(kind, np.dtype):
        raise ValueError("it holds an array of no type")
    if isinstance(raw, str):
        raw = raw.encode("latin-1")
    if (
        not isinstance(raw, bytes)
        or not isinstance(shape, tuple)
        or not 1 <= len(shape) <= 4
        or not all(isinstance(length, int) and 0 < length <= len(raw) for length in shape)
        or np.prod([float(length) for length in shape]) * kind.itemsize != len(raw)
    ):
        raise ValueError("it holds an array whose shape and bytes do not fit")
    # a copy, which may be written to
    flat = np.frombuffer(bytearray(raw), kind)
    if kind.kind == "b":
        flat = flat.view(np.uint8) != 0
    return flat.reshape(shape, order="F" if fortran is True else "C")
