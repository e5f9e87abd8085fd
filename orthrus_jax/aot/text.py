"""Read a compiled program's text: kernels, loops, copies, and the compiler's own cycles.

XLA prints a program as computations of instructions. This module finds the loop that decodes, and
adds up what one turn of it does. Knows the text alone: no chips, no models, no seconds.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

LARGE = 1 << 19  # bytes: a copy from here on is reported
UPDATE = "dynamic-update-slice"
FAST_MEMORY = "S(1)"  # in a shape: a TPU's own, into which the compiler fetches ahead
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}  # others name theirs: bf16, s32
NO_KERNEL = {  # names, control flow, and the ends of what was begun elsewhere
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "add-dependency", "opt-barrier", "partition-id", "replica-id"),
    *("copy-done", "async-done", "async-update", "slice-done", "all-gather-done", "domain"),
}
MOVES = {  # an array made by nothing but these is a copy
    *("parameter", "constant", "bitcast", "copy", "transpose", "reshape", "convert", "tuple"),
    *("slice", "dynamic-slice", "concatenate", "pad", "get-tuple-element"),
}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\](\{[^}]*\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ORIGIN = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
      name: unique in the program.
      shape: what it makes, as the text has it.
      opcode: such as "fusion".
      rest: of its line: operands, attributes, metadata.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def origin(self) -> str:
        """The path of jax functions and modules that it comes from; "" if none is known."""
        found = _ORIGIN.search(self.rest)
        return found[1] if found else ""

    def called(self, role: str) -> list[str]:
        """Names of the computations that it calls in a role such as "body"."""
        return [
            name.strip("% ")
            for attribute, names in _CALLED.findall(self.rest)
            if attribute == role
            for name in names.strip("{}").split(",")
        ]


class Turn(NamedTuple):
    """What one turn of a loop does, or a program without one, inner loops by their trip count.

    Attributes:
      kernels: launches: all but names and control flow, conditions of inner loops included.
      layer_kernels: those of them that come from a layer of the transformer.
      cycles: estimated by the compiler (TPU; else 0).
      inner_loops: loops inside, each once.
      made: bytes of arrays of LARGE bytes or more that kernels leave in memory.
      copies: names and shapes of copies of LARGE bytes or more, each once.
    """

    kernels: int
    layer_kernels: int
    cycles: int
    inner_loops: int
    made: int
    copies: tuple[str, ...]


class Text:
    """A compiled program, parsed.

    A loop whose trip count is known at run time only is taken to run `trips` times.
    """

    def __init__(self, text: str, trips: int = 1) -> None:
        self.trips = trips
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif made := _INSTRUCTION.match(line):
                current.append(Instruction(*made.groups()))

    def loop(self) -> str | None:
        """The body of the decoding loop: the first loop that the program's entry runs."""
        todo = [self.entry]
        while todo:
            for instruction in self.computations[todo.pop(0)]:
                if instruction.opcode == "while":
                    return instruction.called("body")[0]
                if instruction.opcode == "call":
                    todo += instruction.called("to_apply")
        return None

    def turn(self, name: str) -> Turn:
        """Add up a computation and what it calls."""
        kernels = layers = cycles = loops = made = 0
        copies: list[str] = []
        for instruction in self.computations[name]:
            for callee, times in self._run(instruction):
                part = self.turn(callee)
                kernels += times * part.kernels
                layers += times * part.layer_kernels
                cycles += times * part.cycles
                loops += part.inner_loops
                made += times * part.made
                copies += part.copies
            loops += instruction.opcode == "while"
            if found := _CYCLES.search(instruction.rest):
                cycles += int(found[1])
            if instruction.opcode not in NO_KERNEL:
                kernels += 1
                layers += "layers" in instruction.origin
                made += self._made(instruction)
            if self._copies(instruction):
                copies.append(f"{instruction.name}: {instruction.shape}")
        return Turn(kernels, layers, cycles, loops, made, tuple(copies))

    def large_copies(self) -> tuple[str, ...]:
        """Copies of LARGE bytes or more, wherever they are made."""
        return self.turn(self.entry).copies

    def _run(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """The computations of its own kernels that an instruction runs, and how often."""
        if instruction.opcode == "while":
            found = _TRIPS.search(instruction.rest)
            for role in ("body", "condition"):
                for name in instruction.called(role):
                    yield name, int(found[1]) if found else self.trips
        elif instruction.opcode == "call":
            for name in instruction.called("to_apply"):
                yield name, 1
        elif instruction.opcode == "conditional":  # the dearest branch
            roles = ("branch_computations", "true_computation", "false_computation")
            names = [name for role in roles for name in instruction.called(role)]
            yield max(names, key=lambda n: (self.turn(n).cycles, self.turn(n).kernels)), 1

    def _made(self, instruction: Instruction) -> int:
        """Bytes of a large array that a kernel makes in memory and does not update in place."""
        size = nbytes(instruction.shape)
        parts = [instruction, *self._fused(instruction)]
        in_place = any(p.opcode == UPDATE and nbytes(p.shape) == size for p in parts)
        return 0 if size < LARGE or in_place or FAST_MEMORY in instruction.shape else size

    def _copies(self, instruction: Instruction) -> bool:
        if nbytes(instruction.shape) < LARGE or FAST_MEMORY in instruction.shape:
            return False
        if instruction.opcode in ("copy", "transpose", "copy-start"):
            return True
        inside = self._fused(instruction)
        return bool(inside) and all(part.opcode in MOVES for part in inside)

    def _fused(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of a fusion; none of anything else."""
        names = instruction.called("calls") if instruction.opcode == "fusion" else []
        return [part for name in names for part in self.computations.get(name, [])]


def nbytes(shape: str) -> int:
    """Bytes of the largest array of a shape as the text has it."""

    def size(dtype: str, dims: str) -> int:
        named = re.search(r"\d+", dtype)
        bits = ITEM_BITS.get(dtype) or int(named[0] if named else 0)
        return math.prod(int(n) for n in dims.split(",") if n) * bits // 8

    return max((size(dtype, dims) for dtype, dims, _ in _ARRAY.findall(shape)), default=0)
