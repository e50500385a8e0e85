"""What a compiled program does to memory: its kernels, the bytes that they move, and its collectives.

Counted from the text of the optimized program: a kernel reads each operand once and writes its result once; a slice
reads only its part. Caches are ignored. What a TPU keeps in its vector memory moves no bytes, except between devices,
and what it pads to whole tiles moves more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_ARRAY = re.compile(r"\b(" + "|".join(_BITS) + r")\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", re.MULTILINE)
_MOVES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass
class Program:
    """Amounts of one device."""

    kernels: int = 0
    moved: float = 0.0  # bytes
    collectives: list[float] = field(default_factory=list)  # bytes of each one's operands
    cycles: float = 0.0  # of a TPU's cores, as its compiler estimates


def read(text: str) -> Program:
    """Counts the entry computation of an optimized program (`compiled.as_text()`)."""
    computations = {"ENTRY" if entry else name: body for entry, name, body in _COMPUTATION.findall(text)}
    program, arrays = Program(), {}
    for name, types, opcode, rest in _instructions("ENTRY", computations):
        results = arrays[name] = _arrays(types)
        if opcode in _MOVES_NOTHING or opcode.endswith(("-done", "-update")):
            continue
        program.cycles += sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', rest)))
        operands = set(re.findall(r"%([\w.\-]+)", re.split(r"\)(?:, |$)", rest, maxsplit=1)[0]))
        inputs = [array for operand in operands for array in arrays.get(operand, ())]
        if opcode.startswith(_COLLECTIVES):
            program.collectives.append(sum(size for size, _ in inputs))
            continue
        program.kernels += 1
        if opcode in ("copy-start", "slice-start"):  # the type has both arrays, of which a slice reads only its part
            (one, one_near), (other, other_near), *_ = results
            program.moved += min(one, other) * ((not one_near) + (not other_near))
            continue
        bytes_read, bytes_written = _far(inputs), _far(results)
        if name.startswith(("slice", "wrapped_slice")) and bytes_read:
            bytes_read = sum(size for size, _ in results)
        if opcode == "custom-call":  # without its workspace
            bytes_written -= _far(_arrays(" ".join(re.findall(r"\b[su]8\[\d+\]", types))))
        elif opcode.endswith("-start"):  # the result's type repeats the operands
            bytes_written = bytes_read
        program.moved += bytes_read + bytes_written
    return program


def _instructions(name: str, computations: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, opcode, operands and attributes) in a computation and in those that it calls (command buffers)."""
    for instruction in _INSTRUCTION.findall(computations[name]):
        called = re.search(r"to_apply=%([\w.\-]+)", instruction[3])
        if instruction[2] == "call" and called:
            yield from _instructions(called[1], computations)
        else:
            yield instruction


def _far(arrays: list[tuple[float, bool]]) -> float:
    """The bytes of arrays outside a TPU's vector memory."""
    return sum(size for size, near in arrays if not near)


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
