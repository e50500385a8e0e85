"""Files as torch.save writes them, byte by byte and without PyTorch; and weights to put into them."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


# ---- Pickle instructions (protocol 2) ----


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def items(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + items(*arguments) + b"R"


def dictionary(values: dict[str, bytes], ordered: bool = False) -> bytes:
    start = call(name("collections", "OrderedDict")) if ordered else b"}"
    return start + b"(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def program(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def storage(kind: str, key: str, count: int, legacy: bool = False) -> bytes:
    identifier = [text("storage"), name("torch", kind), text(key), text("cpu"), number(count)]
    return items(*identifier, *([b"N"] if legacy else [])) + b"Q"


def tensor(stored: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    sizes = items(*map(number, shape)), items(*map(number, strides))
    return call(rebuild, stored, number(offset), *sizes, b"\x89", call(name("collections", "OrderedDict")))


# ---- Files ----


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def state_dict(arrays: dict[str, np.ndarray], legacy: bool = False) -> tuple[bytes, dict[str, bytes]]:
    """(instructions, bytes of each storage); every other tensor of rank 2 and more lies transposed in memory."""
    values, storages = {}, {}
    for i, (key, x) in enumerate(arrays.items()):
        x = np.asarray(x)
        memory, strides = x, contiguous(x.shape)
        if x.ndim >= 2 and i % 2:
            memory = x.T
            strides = contiguous(memory.shape)[::-1]
        storages[str(i)] = np.ascontiguousarray(memory).tobytes()
        values[key] = tensor(storage(STORAGES[x.dtype], str(i), x.size, legacy), 0, x.shape, strides)
    metadata = dictionary({"_metadata": dictionary({"": dictionary({"version": number(1)})}, ordered=True)})
    return dictionary(values, ordered=True) + metadata + b"b", storages


def write_zip(path: Path, value: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program(value))
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, value: bytes, storages: dict[str, bytes], sizes: dict[str, int]) -> Path:
    magic = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    system = dictionary({"protocol_version": number(1001), "little_endian": b"\x88"})
    file = io.BytesIO()
    file.write(program(b"\x8a\x0a" + magic) + program(number(1001)) + program(system) + program(value))
    file.write(program(b"](" + b"".join(map(text, storages)) + b"e"))
    for key, data in storages.items():
        file.write(struct.pack("<q", len(data) // sizes[key]) + data)
    path.write_bytes(file.getvalue())
    return path


def save(path: Path, arrays: dict[str, np.ndarray], legacy: bool = False, wrap: str = "") -> Path:
    """torch.save(arrays), or torch.save({wrap: arrays, "epoch": 3})."""
    value, storages = state_dict(arrays, legacy)
    if wrap:
        value = dictionary({"epoch": number(3), wrap: value})
    if not legacy:
        return write_zip(path, value, storages)
    sizes = {str(i): np.asarray(x).dtype.itemsize for i, x in enumerate(arrays.values())}
    return write_legacy(path, value, storages, sizes)


# ---- Weights ----


def resnet(depth: int = 18, width: int = 4, classes: int = 5, counters: bool = True, dtype=np.float32) -> dict:
    """Random weights by torchvision's names, in its order."""
    random = np.random.default_rng(depth)
    tensors: dict[str, np.ndarray] = {}

    def convolution(layer, size, channels, out):
        scale = np.sqrt(2 / (channels * size**2))
        tensors[f"{layer}.weight"] = random.normal(0, scale, (out, channels, size, size)).astype(dtype)

    def norm(layer, out):
        for leaf, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3)):
            tensors[f"{layer}.{leaf}"] = random.uniform(low, high, out).astype(dtype)
        tensors[f"{layer}.running_var"] = random.uniform(1e-4, 2, out).astype(dtype)
        if counters:
            tensors[f"{layer}.num_batches_tracked"] = np.array(7, np.int64)

    convolution("conv1", 7, 3, width)
    norm("bn1", width)
    channels = width
    for stage, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]):
        narrow = width * 2**stage
        sizes = [(3, narrow), (3, narrow)] if depth == 18 else [(1, narrow), (3, narrow), (1, 4 * narrow)]
        for block in range(blocks):
            prefix, inside = f"layer{stage + 1}.{block}", channels
            for i, (size, out) in enumerate(sizes, 1):
                convolution(f"{prefix}.conv{i}", size, inside, out)
                norm(f"{prefix}.bn{i}", out)
                inside = out
            if block == 0 and (stage or depth != 18):
                convolution(f"{prefix}.downsample.0", 1, channels, inside)
                norm(f"{prefix}.downsample.1", inside)
            channels = inside
    if classes:
        tensors["fc.weight"] = random.normal(0, 0.1, (classes, channels)).astype(dtype)
        tensors["fc.bias"] = random.normal(0, 1, classes).astype(dtype)
    return tensors


def released(regions: int = 3, dim: int = 6, classes: int = 5, prefix: str = "module.") -> dict[str, np.ndarray]:
    """Random weights by the released code's names: base, local_mask, and regions + 1 instances."""
    random = np.random.default_rng(1)
    tensors = {f"base.{key}": x for key, x in resnet(50, classes=10, counters=False).items()}
    for n in range(regions + 1):
        tensors[f"instance.{n}.1.weight"] = random.normal(0, 0.1, (dim, 128))
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"instance.{n}.2.{leaf}"] = random.uniform(0.5, 1.5, dim)
        tensors[f"instance.{n}.3.weight"] = random.normal(0, 0.1, (classes, dim))
        tensors[f"instance.{n}.3.bias"] = random.normal(0, 1, classes)
    tensors["local_mask.weight"] = random.normal(0, 0.5, (regions, 16, 1, 1))
    tensors["local_mask.bias"] = random.normal(0, 0.5, regions)
    return {prefix + key: x.astype(np.float32) for key, x in tensors.items()}
