"""Exports a trained model: python -m vpm_jax.export --workdir runs/market --output market.stablehlo

  stablehlo    the whole network, uint8 [b, H, W, 3] -> features, visibility and region maps, for any b, on CPU, GPU and
               TPU. It needs only JAX, not this package; FILE.json beside it documents inputs and outputs.
  onnx         the same network for ONNX Runtime, in float32, with one vector per image as the first output and one for
               galleries of whole people as the last; needs the packages onnx and onnxruntime. --layout nchw takes
               images as trackers feed them
  safetensors  the parameters for PyTorch, as written by python -m vpm_jax.convert

vpm_jax.VPM.load reads StableHLO and safetensors. A file is kept only if its outputs match the live model's.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpm_jax import cli, models, onnx_export, parallel, pretrained, step
from vpm_jax.api import VPM, sidecar
from vpm_jax.data.sources import load_dataset
from vpm_jax.description import Description
from vpm_jax.disk import replacing, sealed, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.matching import embedding, match_visibility
from vpm_jax.pretrained import own
from vpm_jax.pretrained.weights import IMAGENET_MEAN, IMAGENET_STD

PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("features", "visibility", "region_maps")
FORMATS = {"stablehlo": ".stablehlo", "onnx": ".onnx", "safetensors": ".safetensors"}
DTYPES = {"stablehlo": ("float32", "bfloat16"), "onnx": ("float32", "float16", "int8"), "safetensors": ("float32",)}
# The largest accepted difference from the live model, in multiples of the model's own sensitivity to rounding (see
# `rounding`). Correct exports are within 1; swapped channels give 20 in bfloat16 and 500,000 in float32.
MOST = 8.0
CALIBRATION = 128  # training images that an int8 export is calibrated on
FURTHEST = 0.2  # the largest accepted mean distance of the vectors of an int8 export; 0.03 is usual


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.export", description=__doc__)
    parser.add_argument(
        "--workdir", type=cli.path, required=True, help="a training run, or a .safetensors written by vpm_jax"
    )
    parser.add_argument(
        "--output", type=cli.path, required=True, metavar="FILE", help="ends in .stablehlo, .onnx or .safetensors"
    )
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: from the extension of --output")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="bfloat16: what a .stablehlo computes in; float16: how a .onnx stores its kernels, in half the size; "
        "int8: what the convolutions of a .onnx compute in, calibrated on the run's training images; otherwise "
        "everything is float32 (default: float32)",
    )
    parser.add_argument(
        "--layout",
        choices=onnx_export.LAYOUTS,
        default="nhwc",
        help="the images a .onnx takes: nhwc, uint8 RGB [b, H, W, 3]; nchw, float32 RGB [b, 3, H, W], normalized by "
        "the mean and standard deviation of ImageNet, as trackers feed them (default: nhwc)",
    )
    args = parser.parse_args(argv)
    kind = {suffix: name for name, suffix in FORMATS.items()}.get(args.output.suffix.lower())
    if kind is None or args.format not in (None, kind):
        expected = FORMATS[args.format] if args.format else " or ".join(FORMATS.values())
        raise UserError(f"--output {args.output}: expected a file name that ends in {expected}.")
    if args.dtype not in DTYPES[kind]:
        raise UserError(f"--dtype {args.dtype}: expected {' or '.join(DTYPES[kind])} for a {FORMATS[kind]}.")
    if args.layout != "nhwc" and kind != "onnx":
        raise UserError(f"--layout {args.layout}: expected only for a .onnx, not for a {FORMATS[kind]}.")
    cli.check_output("--output", args.output)
    parallel.prepare_backend()
    if kind == "stablehlo":
        write_stablehlo(args.output, VPM.load(args.workdir, args.dtype))
    elif kind == "onnx":
        write_onnx(args.output, VPM.load(args.workdir, "float32"), args.dtype, args.layout)
    else:
        write_safetensors(args.output, args.workdir)
    return 0


def write_stablehlo(path: Path, model: VPM) -> float:
    """Writes `model` as StableHLO, with `path`.json beside it; returns the largest difference from the model.

    The parameters are constants of the program. It takes `VPM.inputs`: uint8 [b, H, W, 3] and, for a model of padded
    images, bool [b, h, w]. It returns a dict of the arrays of a `Description`.

    Raises:
      UserError: if its outputs differ from the model's (nothing is written then), or the file cannot be written.
    """
    from jax import export  # needs flatbuffers

    (b,) = export.symbolic_shape("b")
    inputs = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in model.inputs(_test_images(model)[:1])]
    network = functools.partial(step.make_feature_step(model.config, region_maps=True), model.trained_variables)
    exported = export.export(jax.jit(network), platforms=PLATFORMS)(*inputs)
    with replacing(path) as temporary:
        temporary.write_bytes(exported.serialize())
        data = temporary.read_bytes()
        error = compare(model, jax.jit(export.deserialize(bytearray(data)).call))
    about = _about(model, "stablehlo") | {"max_difference": error, "sha256": hashlib.sha256(data).hexdigest()}
    about |= {"platforms": PLATFORMS, "jax": jax.__version__}
    write_atomically(sidecar(path), json.dumps(sealed(about), indent=1) + "\n")
    height, width = model.image_size
    print(f"Wrote {path} ({len(data) / 2**20:.1f} MiB) and {sidecar(path).name}: {_summary(error)}.")
    print("Run it with JAX (and flatbuffers) alone:\n  import jax, jax.export")
    print(f"  model = jax.jit(jax.export.deserialize(bytearray(open({path.name!r}, 'rb').read())).call)")
    valid = ", valid" * (len(inputs) > 1)
    print(f"  out = model(images{valid})  # uint8 [b, {height}, {width}, 3] RGB{valid} -> {', '.join(OUTPUTS)}")
    return error


def write_onnx(path: Path, model: VPM, kernels: str = "float32", layout: str = "nhwc") -> float:
    """Writes `model` as ONNX, for ONNX Runtime; returns the largest difference from the model.

    It takes `VPM.inputs`, images in `layout` (`onnx_export.feed`), as "images" and, for a model of padded images,
    "valid", for any batch size. It returns "embedding", float32 [b, P * C] (`VPM.embedding`), the arrays of a
    `Description`, and "embedding_whole", which is `VPM.embedding` with whole=True. The metadata holds what is in the
    JSON beside a .stablehlo, each entry as JSON. `kernels` is the dtype of the kernels. With int8, convolutions compute
    in int8, calibrated on images of the run's training set, and the difference is that of vectors.

    Raises:
      UserError: as `write_stablehlo`, and without the packages onnx and onnxruntime.
    """
    about = _about(model, "onnx") | {"kernels": kernels}
    if layout == "nchw":
        about["input"] |= {"dtype": "float32", "shape": ["b", 3, *model.image_size], "values": "(x / 255 - mean) / std"}
        about["input"] |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    image = dict(about["input"])
    inputs = [image, image.pop("valid")] if "valid" in image else [image]
    regions, channels = about["output"]["features"]["shape"][1:]
    vector = {"dtype": "float32", "shape": ["b", regions * channels]}
    about["output"] = {"embedding": vector} | about["output"] | {"embedding_whole": vector}
    about["meaning"]["embedding"] = "[image, region * channel], of unit length; an inner product is a similarity"
    about["meaning"]["embedding_whole"] = (
        "the same of an image that shows a whole person: give it for all images of a gallery, and embedding for queries"
    )
    named = dict(zip(onnx_export.INPUTS, inputs, strict=False))
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    if kernels == "int8":
        images = _training_inputs(model)
        whole = onnx_export.serialize(model, named, about["output"], text, layout=layout)
        data = onnx_export.quantized(whole, onnx_export.feed(images, layout), text)
        error = _vector_difference(model, _checked_embedding(model, onnx_export.runtime_step(data, layout)), images)
        summary = f"vectors of {len(images[0])} training images differ from the live model's by {error:.1e} on average"
    else:
        data = onnx_export.serialize(model, named, about["output"], text, kernels, layout)
        error = compare(model, _checked_embedding(model, onnx_export.runtime_step(data, layout)), kernels)
        summary = _summary(error)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    print(f"Wrote {path} ({len(data) / 2**20:.1f} MiB): {summary}.")
    print(f"Inputs {', '.join(named)}; outputs {', '.join(about['output'])}; metadata {', '.join(text)}.")
    return error


def _training_inputs(model: VPM) -> tuple[np.ndarray, ...]:
    """`VPM.inputs` of some images of the run's training set."""
    train = load_dataset(model.config.data).train
    chosen = np.linspace(0, len(train) - 1, min(CALIBRATION, len(train))).astype(int)
    return model.inputs(train.read(i) for i in chosen)


def _vector_difference(model: VPM, step: Callable[..., dict[str, Any]], images: Sequence[np.ndarray]) -> float:
    """The mean distance of the embeddings of the model and of `step`. Raises UserError if it is above FURTHEST."""
    differences: list[np.ndarray] = []
    for start in range(0, len(images[0]), 16):
        batch = [x[start : start + 16] for x in images]
        out = model.step(*batch)
        ours = model.embedding(Description(np.asarray(out["features"]), np.asarray(out["visibility"])))
        differences.extend(np.linalg.norm(ours - step(*batch)["embedding"], axis=1))
    mean = float(np.mean(differences))
    if not mean <= FURTHEST:
        raise _wrong(f"vectors differ from the model's by {mean:.2f} of their length, expected at most {FURTHEST}")
    return mean


def _checked_embedding(model: VPM, step: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`step`, which raises UserError if the embeddings are not those of its features and visibility."""

    def checked(*inputs: np.ndarray) -> dict[str, Any]:
        out = step(*inputs)
        for name, mode in (("embedding", model.config.match.visibility), ("embedding_whole", "uniform")):
            expected = embedding(out["features"], match_visibility(out["visibility"], mode))
            difference = np.abs(out[name] - expected).max()
            if not difference <= 1e-5:
                raise _wrong(f"{name} differs from that of its features by {difference:.1e}, expected at most 1e-5")
        return out

    return checked


def _about(model: VPM, kind: str) -> dict[str, Any]:
    """What is written with a program: its source, inputs and outputs."""
    height, width = model.image_size
    inputs = model.inputs(_test_images(model)[:1])
    outputs = model.step(*inputs)
    image: dict[str, Any] = {
        "dtype": "uint8",
        "shape": ["b", height, width, 3],
        "channels": "RGB",
        "values": "0 to 255",
    }
    if len(inputs) > 1:
        image |= {
            "fit": "the image keeps its aspect ratio; it is as high as the input if its height is at least aspect "
            "times its width, else as wide; the rest is fill, and valid is false for cells less than half covered",
            **{key: model.config.data[key] for key in ("aspect", "place")},
            "fill": np.rint(255 * np.array(model.config.data.mean)).astype(int).tolist(),
            "valid": {"dtype": "bool", "shape": ["b", *inputs[1].shape[1:]]},
        }
    return {
        "format": f"vpm_jax {kind} 1",
        "fingerprint": model.fingerprint,
        "source": model.source,
        "dtype": model.config.model.dtype,
        "input": image,
        "output": {name: {"dtype": "float32", "shape": ["b", *outputs[name].shape[1:]]} for name in OUTPUTS},
        "meaning": {
            "features": "[image, region, channel], of unit length (Eq. 3)",
            "visibility": "[image, region], in cells of the feature map (Eq. 2)",
            "region_maps": "[image, row, column, region], probabilities (Eq. 1)",
            "distance": "of a and b: sum(a.visibility * b.visibility * |a.features - b.features|) / "
            "sum(a.visibility * b.visibility), sums over regions (Eq. 4)",
        },
        "config": own.without_paths(model.config).to_dict(),
    }


def write_safetensors(path: Path, source: Path) -> float:
    """Writes the parameters of a run as `vpm_jax.convert`; returns the largest difference from the live model.

    Raises:
      UserError: as `write_stablehlo`.
    """
    live, differences = VPM.load(source, "float32"), []
    weights = pretrained.load(f"vpm:{source}")
    own.write_for_torch(
        path, weights, check=lambda file: differences.append(compare(live, VPM.load(file, "float32").step))
    )
    print(f"Read again and compared: {_summary(differences[0])}.")
    return differences[0]


def compare(model: VPM, step: Callable[..., dict[str, Any]], dtype: str = "") -> float:
    """The largest difference between the outputs of the model and of `step`, for two batch sizes.

    Visibility is compared as a fraction of the map. `dtype` is what the parameters were rounded to; default: what the
    model computes in.

    Raises:
      UserError: if rounding does not explain the difference (see `rounding`).
    """
    inputs = model.inputs(_test_images(model))
    ours = model.step(*inputs)
    moved = rounding(model, inputs, dtype)
    worst = 0.0
    for count in (1, len(inputs[0])):
        for name, difference in _differences(ours, step(*(x[:count] for x in inputs)), count).items():
            allowed = MOST * moved[name][:count]
            wrong = np.flatnonzero(~(difference <= allowed))  # true for NaN
            if len(wrong):
                raise _wrong(
                    f"{name} differ from the model's by {difference[wrong[0]]:.1e}, expected at most "
                    f"{allowed[wrong[0]]:.1e} from rounding"
                )
            worst = max(worst, float(difference.max()))
    return worst


def _wrong(found: str) -> UserError:
    return UserError(
        f"The export's {found}: it was not kept; try another version of JAX or ONNX Runtime, and please report this.",
        code="wrong-export",
    )


def rounding(model: VPM, inputs: Sequence[np.ndarray], dtype: str = "") -> dict[str, np.ndarray]:
    """The change of each output of each image, [N], when parameters are perturbed by their rounding error.

    A different order of summation acts like slightly different parameters (backward error). Its effect depends on the
    model and the image: with large locator logits, the last bit can flip an undecided cell. Hence the tolerance is
    measured on the model itself; it is at least the outputs' own precision.
    """
    random = np.random.default_rng(1)
    unit = float(jnp.finfo(models.compute_dtype(dtype or model.config.model.dtype)).eps)
    network = jax.jit(step.make_feature_step(model.config, region_maps=True))

    def rounded(x: np.ndarray) -> np.ndarray:
        return (x * (1 + unit * random.uniform(-1, 1, np.shape(x)))).astype(x.dtype)

    count = len(inputs[0])
    most = dict.fromkeys(OUTPUTS, np.full(count, np.finfo(np.float32).eps, np.float64))
    exact = network(model.variables, *inputs)
    for _ in range(3):
        moved = _differences(exact, network(jax.tree.map(rounded, model.variables), *inputs), count)
        most = {name: np.maximum(most[name], moved[name]) for name in OUTPUTS}
    return most


def _differences(ours: dict[str, Any], theirs: dict[str, Any], count: int) -> dict[str, np.ndarray]:
    """The largest difference of each output in each of the first `count` images, [count]."""
    result = {}
    for name in OUTPUTS:
        x, y = (np.asarray(out[name], np.float64)[:count] for out in (ours, theirs))
        result[name] = np.abs(x - y).reshape(count, -1).max(axis=1) / (x[0].sum() if name == "visibility" else 1.0)
    return result


def _test_images(model: VPM) -> list[np.ndarray]:
    """Three images, one whole and two cropped, of coarse patterns and noise, to exercise the locator."""
    random = np.random.default_rng(0)
    height, width = model.image_size
    coarse = random.integers(0, 256, (3, 6, 3, 3), np.uint8)
    images = coarse.repeat(-(-height // 6), 1)[:, :height].repeat(-(-width // 3), 2)[:, :, :width]
    images = images // 2 + random.integers(0, 128, images.shape, np.uint8)
    if model.config.data.fit == "stretch":
        return list(images)
    return [images[0], images[1][: height // 2 + 1], images[2][:, : width // 2 + 1]]


def _summary(difference: float) -> str:
    return f"at most {difference:.1e} from the live model (features, probabilities, fractions of the map)"


if __name__ == "__main__":
    cli.run(main)
