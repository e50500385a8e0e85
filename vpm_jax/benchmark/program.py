"""What a compiled program does to memory: its kernels, the bytes that they move, and its collectives.

Counted from the text of the optimized program: a kernel reads each operand once and writes its result once; a slice
reads only its part. Caches are ignored. What a TPU keeps in its vector memory moves no bytes, and what it pads to whole
tiles moves more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_ARRAY = re.compile(r"\b(" + "|".join(_BITS) + r")\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_MOVES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass
class Program:
    """Amounts of one device."""

    kernels: int = 0
    moved: float = 0.0  # bytes
    collectives: list[float] = field(default_factory=list)  # bytes of each one's operands
    cycles: float = 0.0  # of a TPU's cores, as its compiler estimates


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    line: str


def read(text: str) -> Program:
    """Counts the entry computation of an optimized program (`compiled.as_text()`)."""
    entry, computations = _computations(text)
    program, sizes = Program(), {}
    for instruction in _flat(entry, computations):
        size = sizes[instruction.name] = _bytes(instruction.type)
        opcode = instruction.opcode
        if opcode in _MOVES_NOTHING or opcode.endswith(("-done", "-update")):
            continue
        program.cycles += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', instruction.line)))
        read_bytes = sum(sizes.get(name, 0.0) for name in set(instruction.operands))
        if opcode in ("copy-start", "slice-start"):  # the type has both arrays, of which a slice reads only its part
            (one, one_near), (other, other_near), *_ = _arrays(instruction.type)
            program.kernels += 1
            program.moved += min(one, other) * ((not one_near) + (not other_near))
            continue
        if instruction.name.startswith(("slice", "wrapped_slice")) and read_bytes:
            read_bytes = sum(count for count, _ in _arrays(instruction.type))
        if any(opcode.startswith(name) for name in _COLLECTIVES):
            program.collectives.append(read_bytes)
            continue
        program.kernels += 1
        if opcode == "custom-call":  # without its workspace
            size -= sum(map(_bytes, re.findall(r"\b[su]8\[\d+\]", instruction.type)))
        elif opcode.endswith("-start"):  # the result's type repeats the operands
            size = read_bytes
        program.moved += read_bytes + size
    return program


def _bytes(types: str) -> float:
    """The bytes of all arrays in a type; none of those in a TPU's vector memory."""
    return sum(count for count, near in _arrays(types) if not near)


def _arrays(types: str) -> list[tuple[float, bool]]:
    """(bytes, whether a TPU keeps it near its cores) of all arrays in a type. Tiles pad the dimensions of a layout."""
    found = []
    for kind, shape, layout in _ARRAY.findall(types):
        sizes = [int(size) for size in shape.split(",") if size]
        if tile := re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout):
            order, tiles = (text.split(",") for text in tile.groups())
            for axis, unit in zip(map(int, order), map(int, reversed(tiles)), strict=False):
                sizes[axis] = -(-sizes[axis] // unit) * unit
        found.append((prod(sizes) * _BITS[kind] / 8, "S(" in layout))
    return found


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, current = "", ""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif current:
            found[current].append(line)
    return entry, found


def _flat(name: str, computations: dict[str, list[str]]) -> Iterator[_Instruction]:
    """The instructions of a computation and of those that it calls (command buffers)."""
    for line in computations[name]:
        if not (match := _INSTRUCTION.match(line)):
            continue
        types, rest = _split_type(match[2])
        opcode, _, arguments = rest.partition("(")
        called = re.search(r"to_apply=%([\w.\-]+)", line)
        if opcode == "call" and called:
            yield from _flat(called[1], computations)
        else:
            operands = re.findall(r"%([\w.\-]+)", _until_closed(arguments))
            yield _Instruction(match[1], types, opcode, operands, line)


def _split_type(text: str) -> tuple[str, str]:
    """The type of an instruction, which may be a tuple, and what follows."""
    if not text.startswith("("):
        types, _, rest = text.partition(" ")
        return types, rest
    types = f"({_until_closed(text[1:])})"
    return types, text[len(types) + 1 :]


def _until_closed(text: str) -> str:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:position]
    return text
