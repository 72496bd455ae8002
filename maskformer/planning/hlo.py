"""Read as much of a compiled HLO's text as collectives need: computations, who calls whom and how often, shapes.

The format is XLA's `HloModule.to_string`; what is read here are names, shapes and attributes, never metadata.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

# Bytes of one element; a sub-byte type counts as whole bytes, which overstates it.
WIDTHS = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name, opcode: as in `%name = shape opcode(...)`.
      shape: its result's, as text; of a tuple with its parentheses.
      rest: everything from the operands on.
    """

    name: str
    opcode: str
    shape: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The text of `name=value` where the value has no comma outside of brackets; None where it is not given."""
        found = re.search(rf"[ ,]{name}=", self.rest)
        return None if found is None else _balanced(self.rest[found.end() :])

    @property
    def arrays(self) -> list[int]:
        """Bytes of each array of the result, without padding; scalars of synchronisation included."""
        return array_bytes(self.shape)


@dataclasses.dataclass(frozen=True)
class Module:
    """A module's computations by name, the entry's name, and how often each computation runs in one call of the entry.

    Attributes:
      unknown_loops: names of `while` instructions whose trip count is not written; they count once.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    runs: dict[str, int]
    unknown_loops: tuple[str, ...]

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of all that run."""
        for name, count in self.runs.items():
            for instruction in self.computations[name]:
                yield name, instruction, count


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array in a shape's text, layouts ignored.

    >>> array_bytes("(f32[4,16]{1,0:T(8,128)}, bf16[8]{0}, u32[]{:S(2)})")
    [256, 16, 4]
    """
    return [
        WIDTHS[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(shape)
        if kind in WIDTHS
    ]


def parse(text: str) -> Module:
    """Read a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = header[2]
                computations[current] = []
                entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            if read := _instruction(found[2], found[3]):
                computations[current].append(read)
    if entry is None:
        raise ValueError("the compiled program's text has no entry computation; this XLA writes it in another form")
    runs: dict[str, int] = {}
    unknown: list[str] = []
    _count(computations, entry, 1, runs, unknown)
    return Module(computations, entry, runs, tuple(unknown))


def _instruction(name: str, text: str) -> Instruction | None:
    shape = _closed(text) if text.startswith("(") else text.partition(" ")[0]
    found = re.match(r" ?([a-z][\w\-]*)\(", text[len(shape) :])
    if found is None:
        return None
    # Metadata and the backend's own configuration are long, and hold text that looks like attributes.
    rest = text[len(shape) + found.end() - 1 :].partition(", metadata=")
    tail = rest[2].partition("backend_config=")
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', tail[2] or rest[0])
    kept = rest[0] + (f", known_trip_count={known[1]}" if known else "")
    return Instruction(name, found[1], shape, kept)


def _closed(text: str) -> str:
    """`text` up to the end of the bracket that it begins with."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return text[: index + 1]
    return text


def _balanced(text: str) -> str:
    """`text` up to the first comma, or closing bracket, that no bracket holds."""
    depth = 0
    for index, letter in enumerate(text):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
            if depth < 0:
                return text[:index]
        elif letter == "," and depth == 0:
            return text[:index]
    return text


def _count(
    computations: dict[str, list[Instruction]], name: str, times: int, runs: dict[str, int], unknown: list[str]
) -> None:
    runs[name] = runs.get(name, 0) + times
    for instruction in computations[name]:
        if instruction.opcode == "while":
            body, condition = instruction.attribute("body"), instruction.attribute("condition")
            trips = _trips(computations, instruction, condition)
            if trips is None:
                unknown.append(instruction.name)
            for called in (body, condition):
                _count(computations, _NAME.match(called)[1], times * (trips or 1), runs, unknown)  # type: ignore
        else:
            # What a reduction applies to each pair of elements is no program of its own.
            for called in _called(instruction):
                if called in computations and not instruction.opcode.startswith(("reduce", "all-reduce", "scatter")):
                    _count(computations, called, times, runs, unknown)


def _called(instruction: Instruction) -> list[str]:
    return [name for group in _CALLED.findall(instruction.rest) for name in _NAME.findall(group)]


def _trips(
    computations: dict[str, list[Instruction]], instruction: Instruction, condition: str | None
) -> int | None:
    """How often a `while` runs its body: as the compiler says, or from the constant that its counter is below."""
    if (known := instruction.attribute("known_trip_count")) is not None:
        return int(known)
    body = {one.name: one for one in computations.get(_NAME.match(condition or "")[1], [])}  # type: ignore[index]
    for one in body.values():
        if one.opcode == "compare" and "direction=LT" in one.rest:
            for operand in _NAME.findall(one.rest[: one.rest.index(")")]):
                if operand in body and body[operand].opcode == "constant":
                    return int(re.match(r"\((\d+)\)", body[operand].rest)[1])  # type: ignore[index]
    return None
