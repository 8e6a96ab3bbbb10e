"""What the pickle of a torch.save file says, read by a machine that can build nothing but data.

Python's own machine imports and calls whatever a pickle names, so a checkpoint can be a program. This
one knows the opcodes that torch.save writes for a state dict in protocols 2 to 5 (Python's pickletools
describes them), and of the names in it a list of storages and of functions that describe a tensor;
each stands for a record here, and none is imported or called. Anything else is refused by its name.
Every length is compared with what is left of the pickle before it is taken. Needs no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parallel.checkpoint.readers.pickled.names import NAMES, Function, PickledStorage, StorageClass
from parallel.errors import CheckpointError

# 150 bytes a tensor: room for some 28,000 of them in one file.
MOST_PICKLE_BYTES = 4 << 20
# A pickler hands over a thousand entries of a dictionary at a time, and nests a handful of marks.
_MOST_STACK = 10_000
_MOST_MARKS = 100
_LONGEST_LINE = 200
# Protocol 2 to 5: below are the textual ones of Python 1 and 2.
_PROTOCOLS = range(2, 6)
# Of a number: nothing in a tensor's description needs more.
_MOST_INTEGER_BYTES = 8


def read_pickle(data: bytes, path: Path) -> object:
    """The one value of a pickle: dictionaries, lists, tuples, numbers, strings, PickledTensors.

    Args:
        path: the file, for the errors.

    Raises:
        CheckpointError: the pickle is cut off or damaged, asks for something that is no part of a
            state dict, or names what would have to be run.
    """
    return _Machine(data, path).run()


class _Machine:
    """A stack, the places in it that MARK left, and the values that were put aside.

    Raises CheckpointError from every method.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        while (code := self.take(1)[0]) != _STOP:
            if code not in _OPCODES:
                raise self.refusal(f"the pickle instruction {_opcode_name(code)}")
            _OPCODES[code](self)
            if len(self.stack) > _MOST_STACK or len(self.marks) > _MOST_MARKS:
                raise self.damage("too much is left unfinished")
        if len(self.stack) != 1 or self.marks:
            raise self.damage("it ends in the middle")
        return self.stack[0]

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.data) - self.at:
            raise self.damage(
                f"{num_bytes:,} bytes are asked for, and {len(self.data) - self.at:,} left"
            )
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def unsigned(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.damage("a string is not UTF-8") from error

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_LINE)
        if end < 0:
            raise self.damage("a name has no end")
        text = self.text(end - self.at)
        self.at += 1
        return text

    def pop(self, kind: type | tuple[type, ...] = object) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damage("it takes more than it gave")
        value = self.stack.pop()
        if not isinstance(value, kind):
            raise self.damage(f"a {type(value).__name__} is where none may be")
        return value

    def pop_many(self, count: int) -> tuple[Any, ...]:
        at = len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise self.damage("it takes more than it gave")
        values = tuple(self.stack[at:])
        del self.stack[at:]
        return values

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.damage("a mark is missing")
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def put(self, place: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[place] = value

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise self.damage("a value is asked for that was not put aside")
        self.stack.append(self.memo[place])

    def integer(self) -> None:
        length = self.unsigned(1)
        if length > _MOST_INTEGER_BYTES:
            raise self.damage(f"a number has {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def set_items(self, items: list[Any]) -> None:
        target = self.pop(dict)
        if len(items) % 2:
            raise self.damage("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A key is hashed, and a tuple of tuples of itself would take for ever.
            if type(key) not in (str, int):
                raise self.refusal(f"a dictionary whose key is a {type(key).__name__}")
            if key in target:
                raise self.damage(f"two values are called {_shown(str(key))}")
            target[key] = value
        self.stack.append(target)

    def extend(self, items: list[Any]) -> None:
        target = self.pop(list)
        target.extend(items)
        self.stack.append(target)

    def name(self, module: str, name: str) -> None:
        """Put what a name stands for, or refuse it."""
        record = NAMES.get((module, name))
        if record is None:
            raise self.refusal(f"the name {_shown(f'{module}.{name}')}")
        self.stack.append(record)

    def reduce(self) -> None:
        arguments = self.pop(tuple)
        function = self.pop(Function)
        try:
            self.stack.append(function.describe(arguments))
        except ValueError as error:
            raise self.refusal(str(error)) from error

    def build(self) -> None:
        """The attributes of an OrderedDict: a state dict's `_metadata` are versions of modules."""
        state = self.pop(dict)
        if type(self.stack[-1] if self.stack else None) is not dict or set(state) - {"_metadata"}:
            raise self.refusal("an object with attributes of its own")

    def storage(self) -> None:
        """A persistent id: what torch.save writes in place of a storage's bytes."""
        match self.pop(tuple):
            case ("storage", StorageClass(dtype), str(key), str(), int(count)) if count >= 0:
                self.stack.append(PickledStorage(key, dtype, count))
            case _:
                raise self.refusal("a reference that is no storage of a known dtype")

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its pickle holds {what}, which is no part of a state dict of "
            "tensors; nothing of it was run; ask for the checkpoint as safetensors, or save its state "
            "dict alone."
        )

    def damage(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: its pickle is damaged at byte {self.at:,} ({what}); copy the file again."
        )


def _protocol(machine: _Machine) -> None:
    if (protocol := machine.unsigned(1)) not in _PROTOCOLS:
        raise machine.damage(f"its protocol is {protocol}")


def _frame(machine: _Machine) -> None:
    """How many bytes follow together; they are read as if they did not."""
    if machine.unsigned(8) > len(machine.data) - machine.at:
        raise machine.damage("a frame is cut off")


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


_STOP = ord(".")
_OPCODES: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord("}"): _push(lambda _: {}),
    ord("]"): _push(lambda _: []),
    ord(")"): _push(lambda _: ()),
    ord("t"): _push(lambda m: tuple(m.pop_mark())),
    0x85: _push(lambda m: m.pop_many(1)),
    0x86: _push(lambda m: m.pop_many(2)),
    0x87: _push(lambda m: m.pop_many(3)),
    ord("N"): _push(lambda _: None),
    0x88: _push(lambda _: True),
    0x89: _push(lambda _: False),
    ord("J"): _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    ord("K"): _push(lambda m: m.unsigned(1)),
    ord("M"): _push(lambda m: m.unsigned(2)),
    0x8A: _Machine.integer,
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("X"): _push(lambda m: m.text(m.unsigned(4))),
    0x8C: _push(lambda m: m.text(m.unsigned(1))),
    0x8D: _push(lambda m: m.text(m.unsigned(8))),
    ord("q"): lambda m: m.put(m.unsigned(1)),
    ord("r"): lambda m: m.put(m.unsigned(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.unsigned(1)),
    ord("j"): lambda m: m.get(m.unsigned(4)),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*reversed((m.pop(str), m.pop(str)))),
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.storage,
    ord("s"): lambda m: m.set_items(list(m.pop_many(2))),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    ord("a"): lambda m: m.extend([m.pop()]),
    ord("e"): lambda m: m.extend(m.pop_mark()),
}


def _opcode_name(code: int) -> str:
    import pickletools

    names = [opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)]
    return f"{names[0] if names else 'of no known name'} (0x{code:02x})"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _LONGEST_LINE else repr(text[:_LONGEST_LINE]) + "…"
