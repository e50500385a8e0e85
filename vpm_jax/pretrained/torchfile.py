"""Reads the tensors of PyTorch's .pth files, without PyTorch and without executing pickles.

A .pth file is a pickle, a program that may call anything. This reader interprets only the instructions that a state
dict needs and the names in `_GLOBALS`, builds plain data from them, and rejects any other file. It never imports or
calls a name from the file.

Two formats are supported: the zip of PyTorch 1.6 and later, and the older sequence of pickles (PyTorch 1.0, and
torchvision's oldest weights).
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vpm_jax.errors import UserError, first_line

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ADVICE = 'save only the weights, with torch.save(model.state_dict(), "weights.pth") or as .safetensors'

# Where checkpoints keep their state dict; of a teacher and a student, the teacher is the one to use.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net", "network", "teacher")


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict, by name, in their own dtypes (bfloat16 is ml_dtypes').

    The state dict may also be under one of STATE_DICTS in a checkpoint. Tensors are read-only and share memory as
    they did in PyTorch.

    Raises:
      UserError: if the file is damaged, needs anything other than tensors, or holds no state dict.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file) if is_zip else _read_legacy(file)
    except _Refused as refused:
        raise UserError(f"{path} {refused}: {ADVICE}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # damaged bytes raise many types in zipfile, pickletools and struct
        raise UserError(f"{path} is damaged or truncated ({first_line(error)}): fetch or save it again.") from None


class _Refused(Exception):
    """The reason for rejecting the file, as the predicate of a sentence about it."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int  # elements


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


_IGNORED = object()  # stands for harmless values beside the weights


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _Refused("has a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _Refused("has a tensor of an impossible shape")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.count:
        raise _Refused(f"has a tensor that ends past its storage of {storage.count} numbers")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# The names that a file may use. Functions of this module stand in for PyTorch's; a dtype stands for a storage class.
_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    **{f"torch.{name}": np.dtype(dtype) for name, dtype in _STORAGES.items()},
    # Scores, arguments and the like in a checkpoint, which are not read.
    **dict.fromkeys(
        (
            "_codecs.encode",
            "argparse.Namespace",
            "collections.Counter",
            "collections.defaultdict",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy.dtype",
            "numpy.ndarray",
            "torch.Size",
            "torch.device",
            *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8")),
        ),
        _IGNORED,
    ),
}


def _call(function: Any, arguments: Any) -> Any:
    if function is _IGNORED:
        return _IGNORED
    if not any(function is known for known in (dict, _tensor, _parameter)):
        raise _Refused("calls something that is not a function")
    return function(*arguments)


def _storage(identifier: Any) -> _Storage:
    kind, dtype, key, _, count, *view = identifier
    if kind != "storage" or not isinstance(dtype, np.dtype) or type(count) is not int or view not in ([], [None]):
        raise _Refused("has a storage of an unknown kind")
    return _Storage(str(key), dtype, count)


def _update(target: Any, items: list[tuple[Any, Any]]) -> None:
    if target is not _IGNORED:
        if type(target) is not dict:
            raise _Refused("puts items into something that is not a dictionary")
        target.update(items)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": lambda: (),
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: _IGNORED,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _unpickle(stream: Any, storages: dict[str, _Storage] | None = None) -> Any:
    """Interprets the pickle at the stream's position, and collects its storages in `storages`, by key."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    def pop(count: int) -> list[Any]:
        if len(stack) < count:
            raise ValueError("the stack is empty")
        items = stack[-count:]
        del stack[-count:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(int(name[-1]))))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else since_mark()
            if type(stack[-1]) is list:
                stack[-1].extend(items)
            elif stack[-1] is not _IGNORED:
                raise _Refused("appends to something that is not a list")
        elif name == "SETITEM":
            key, value = pop(2)
            _update(stack[-1], [(key, value)])
        elif name == "SETITEMS":
            items = since_mark()
            _update(stack[-1], list(zip(items[::2], items[1::2], strict=True)))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            full = argument.replace(" ", ".", 1) if name == "GLOBAL" else ".".join(map(str, pop(2)))
            if full not in _GLOBALS:
                raise _Refused(f"asks for {full[:100]!r}, which weights do not need; none of it was run")
            stack.append(_GLOBALS[full])
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = pop(2)
            stack.append(_call(function, arguments))
        elif name == "BUILD":  # an OrderedDict's _metadata, a Namespace's arguments
            target, _ = pop(2)
            if type(target) is not dict and target is not _IGNORED:
                raise _Refused("changes something that is not a dictionary")
            stack.append(target)
        elif name == "BINPERSID":
            stack.append(_storage(pop(1)[0]))
            if storages is not None:
                storages[stack[-1].key] = stack[-1]
        elif name == "STOP":
            return pop(1)[0]
        else:
            raise _Refused(f"has the pickle instruction {name}, which weights do not need; none of it was run")
    raise ValueError("the pickle has no end")


def _arrays(checkpoint: Any, storage_bytes: Callable[[_Storage], Any]) -> dict[str, np.ndarray]:
    """The arrays of the state dict in `checkpoint`; `storage_bytes` returns the bytes of a storage."""
    state = checkpoint
    for _ in range(3):  # they may be nested
        for key in STATE_DICTS:
            if type(state) is dict and type(state.get(key)) is dict:
                state = state[key]
                break
    if type(state) is not dict or not any(isinstance(x, _Tensor) for x in state.values()):
        content = ", ".join(str(k)[:30] for k in list(state)[:5]) if type(state) is dict else type(state).__name__
        raise _Refused(f"holds no state dict ({content})")
    wrong = [str(name)[:60] for name, x in state.items() if not isinstance(x, _Tensor) or not isinstance(name, str)]
    if wrong:
        raise _Refused(f"has {len(wrong)} entries beside its tensors ({', '.join(wrong[:5])})")
    flat: dict[str, np.ndarray] = {}
    arrays = {}
    for name, x in state.items():
        storage = x.storage
        if storage.key not in flat:
            data = storage_bytes(storage)
            if len(data) != storage.count * storage.dtype.itemsize:
                raise _Refused(f"is damaged: {name} has {len(data)} bytes of {storage.count * storage.dtype.itemsize}")
            flat[storage.key] = np.frombuffer(data, storage.dtype)
        if (flat[storage.key].dtype, flat[storage.key].size) != (storage.dtype, storage.count):
            raise _Refused(f"is damaged: the storage of {name} has two sizes or dtypes")
        # `_tensor` has checked that the view stays inside `storage.count`.
        strides = [s * storage.dtype.itemsize for s in x.strides]
        start = flat[storage.key][x.offset :] if math.prod(x.shape) else flat[storage.key][:0]
        arrays[name] = np.lib.stride_tricks.as_strided(start, x.shape, strides, writeable=False)
    return arrays


def _read_zip(file: io.BufferedReader) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise _Refused("is a zip, but not one that torch.save wrote")
        folder = programs[0].removesuffix("data.pkl")

        def entry(name: str) -> bytes:
            info = archive.getinfo(folder + name)
            if info.compress_type != zipfile.ZIP_STORED:  # torch.save does not compress; guards against zip bombs
                raise _Refused(f"is a compressed zip ({name}), which torch.save does not write")
            return archive.read(info)

        if folder + "byteorder" in archive.namelist() and entry("byteorder") != b"little":
            raise _Refused("was saved on a big-endian machine, which is not supported")
        return _arrays(_unpickle(io.BytesIO(entry("data.pkl"))), lambda storage: entry(f"data/{storage.key}"))


def _read_legacy(file: io.BufferedReader) -> dict[str, np.ndarray]:
    try:
        magic = _unpickle(file)
    except Exception:
        magic = None
    if magic != LEGACY_MAGIC:
        raise _Refused("is not in torch.save's zip format or its older one")
    _unpickle(file)  # the protocol's version
    system = _unpickle(file)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise _Refused("was not saved on a little-endian machine")
    storages: dict[str, _Storage] = {}
    checkpoint = _unpickle(file, storages)
    keys = [str(key) for key in _unpickle(file)]
    data, start = memoryview(file.read()), 0
    contents: dict[str, memoryview] = {}
    for key in keys:  # each storage: its number of elements, then its bytes
        (count,) = struct.unpack_from("<q", data, start)
        end = start + 8 + count * storages[key].dtype.itemsize
        if not start + 8 <= end <= len(data):
            raise EOFError(f"storage {key} ends past the file's end")
        contents[key], start = data[start + 8 : end], end
    return _arrays(checkpoint, lambda storage: contents[storage.key])
