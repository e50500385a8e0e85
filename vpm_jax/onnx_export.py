"""The network as ONNX: convolutions with batch norm folded in, locator, Eqs. 1 to 3, and the embedding.

Maps are [b, channels, h, w] inside the graph. Needs the packages onnx and onnxruntime (the extra "onnx").
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.api import VPM
from vpm_jax.errors import UserError, optional
from vpm_jax.geometry import STEMS, feature_map_shape
from vpm_jax.models.resnet import BOTTLENECK, STAGE_BLOCKS
from vpm_jax.models.vpm import MaskedBatchNorm
from vpm_jax.pretrained.weights import IMAGENET_MEAN, IMAGENET_STD

OPSET, IR_VERSION = 18, 8  # ONNX 1.13, which older runtimes read too
INPUTS = ("images", "valid")  # the second for a model of padded images only
LAYOUTS = ("nhwc", "nchw")  # of images: uint8 [b, H, W, 3]; float32 [b, 3, H, W], see `feed`


def packages() -> tuple[Any, Any]:
    """(onnx, onnxruntime). Raises UserError if they are not installed."""
    with optional("ONNX", "onnx onnxruntime"):
        import onnx
        import onnxruntime
    return onnx, onnxruntime


def feed(inputs: Sequence[np.ndarray], layout: str) -> tuple[np.ndarray, ...]:
    """`VPM.inputs` as a file takes them: with "nchw", normalized by the mean and standard deviation of ImageNet."""
    images, *valid = inputs
    if layout == "nchw":
        scaled = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
        images = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)
    return images, *valid


def serialize(
    model: VPM,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    about: Mapping[str, str],
    kernels: str = "float32",
    layout: str = "nhwc",
) -> bytes:
    """The model as an ONNX file.

    Args:
      model: with variables.
      inputs, outputs: {"dtype", "shape"} by name, in order; a dimension that is a string may vary.
      about: the metadata of the file.
      kernels: the dtype in which kernels are stored; everything is computed in float32.
      layout: of the images, one of LAYOUTS.
    """
    onnx, _ = packages()
    graph = _Graph(onnx, np.dtype(kernels))
    images, *valid = inputs
    values = _outputs(graph, model, _pixels(graph, model.config, images, layout), *valid)
    for name in outputs:
        graph.nodes.append(onnx.helper.make_node("Identity", [values[name]], [name]))

    def declared(arrays: Mapping[str, Any]) -> list[Any]:
        kind = onnx.helper.np_dtype_to_tensor_dtype
        return [
            onnx.helper.make_tensor_value_info(name, kind(np.dtype(array["dtype"])), array["shape"])
            for name, array in arrays.items()
        ]

    whole = onnx.helper.make_graph(graph.nodes, "vpm", declared(inputs), declared(outputs), graph.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    proto = onnx.helper.make_model(whole, opset_imports=[opset], ir_version=IR_VERSION, producer_name="vpm_jax")
    onnx.helper.set_model_props(proto, dict(about))
    return proto.SerializeToString()


def quantized(data: bytes, images: Sequence[np.ndarray], about: Mapping[str, str]) -> bytes:
    """An ONNX file with its convolutions in int8, except the locator; what follows them stays float32.

    Args:
      data: a file of `serialize`.
      images: from `feed`, like those to come, to find the range of every activation (calibration).
      about: the metadata of the file.
    """
    onnx, _ = packages()
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            count = len(images[0])
            slices = (slice(i, i + 4) for i in range(0, count, 4))  # every activation is kept meanwhile
            self.batches = (dict(zip(INPUTS, (x[rows] for x in images), strict=False)) for rows in slices)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    nodes = onnx.load_from_string(data).graph.node
    last = max(number for number, node in enumerate(nodes) if node.op_type == "Conv")
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (str(Path(folder) / name) for name in ("whole.onnx", "prepared.onnx", "small.onnx"))
        Path(whole).write_bytes(data)
        quantization.shape_inference.quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            small,
            Reader(),
            op_types_to_quantize=["Conv", "Add", "MaxPool"],
            nodes_to_exclude=[node.name for node in nodes[last:]],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        proto = onnx.load(small)
    onnx.helper.set_model_props(proto, dict(about))
    return proto.SerializeToString()


def runtime_step(data: bytes, layout: str = "nhwc") -> Callable[..., dict[str, np.ndarray]]:
    """An ONNX file as a function of `VPM.inputs`, in ONNX Runtime on the CPU: {output name: array}.

    Raises:
      UserError: if ONNX Runtime cannot read it.
    """
    _, onnxruntime = packages()
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot read the export ({reason}): it was not kept; try another "
            "version of onnx and onnxruntime.",
            code="wrong-export",
        ) from None
    inputs, outputs = ([x.name for x in side()] for side in (session.get_inputs, session.get_outputs))

    def run(*arrays: np.ndarray) -> dict[str, np.ndarray]:
        given = dict(zip(inputs, feed(arrays, layout), strict=True))
        return dict(zip(outputs, session.run(outputs, given), strict=True))

    return run


class _Graph:
    """ONNX nodes in the order of execution. Calling it appends one."""

    def __init__(self, onnx: Any, kernels: np.dtype):
        self.onnx, self.nodes, self.constants, self.kernels = onnx, list[Any](), list[Any](), kernels

    def __call__(self, operator: str, *inputs: str | np.ndarray | float | list[int], **attributes: Any) -> str:
        """Appends a node, with arrays and numbers as constants (float32, or int64 for lists); its output's name."""
        output = f"{operator}_{len(self.nodes)}"
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        self.nodes.append(self.onnx.helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def halves(self, x: str) -> tuple[str, str]:
        """The first and the second half of a batch."""
        outputs = f"first_{len(self.nodes)}", f"second_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node("Split", [x], outputs, axis=0, num_outputs=2))
        return outputs

    def _constant(self, value: np.ndarray | float | list[int]) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.asarray(value, np.int64 if isinstance(value, list) else np.float32)
        stored = array.astype(self.kernels) if array.ndim == 4 else array
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(stored), name))
        # Runtimes fold the conversion of a constant when they load the file.
        return name if stored.dtype == array.dtype else self("Cast", name, to=self.onnx.TensorProto.FLOAT)


def _pixels(g: _Graph, config: ConfigDict, images: str, layout: str) -> str:
    """What the network takes, [b, 3, H, W]."""
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    if layout == "nchw":
        scale, shift = np.array(IMAGENET_STD) / std, (np.array(IMAGENET_MEAN) - mean) / std
    else:
        images = g("Transpose", g("Cast", images, to=g.onnx.TensorProto.FLOAT), perm=[0, 3, 1, 2])
        scale, shift = 1 / (255 * std), -mean / std
    return g("Add", g("Mul", images, scale.reshape(3, 1, 1)), shift.reshape(3, 1, 1))


def _outputs(g: _Graph, model: VPM, images: str, valid: str | None = None) -> dict[str, str]:
    """The names of the outputs of `step.make_feature_step` with region maps, and of both embeddings."""
    config = model.config
    if config.eval.flip:  # the mirror images are the second half of the batch
        images = g("Concat", images, _mirror(g, images, 3), axis=0)
        valid = valid and g("Concat", valid, _mirror(g, valid, 2), axis=0)
    features, visibility, probability = _network(g, model, images, valid)
    if config.eval.flip:
        grid = np.arange(model.grid.count).reshape(config.model.grid)
        mirrored = grid[:, ::-1].reshape(-1).tolist()

        def average(x: str, is_map: bool = False) -> str:
            straight, other = g.halves(x)
            other = g("Gather", other, mirrored, axis=1)
            other = _mirror(g, other, 3) if is_map else other
            return g("Mul", g("Add", straight, other), 0.5)

        features, visibility, probability = average(features), average(visibility), average(probability, True)
    features = _unit(g, features)
    share = _unit(g, _match_visibility(g, visibility, config.match.visibility))
    weighted = g("Mul", features, g("Unsqueeze", share, [2]))
    return {
        "embedding": g("Flatten", weighted, axis=1),
        "features": features,
        "visibility": visibility,
        "region_maps": g("Transpose", probability, perm=[0, 2, 3, 1]),
        "embedding_whole": g("Mul", g("Flatten", features, axis=1), model.grid.count**-0.5),
    }


def _mirror(g: _Graph, x: str, axis: int) -> str:
    return g("Slice", x, [-1], [np.iinfo(np.int64).min], [axis], [-1])


def _unit(g: _Graph, x: str) -> str:
    """x scaled to unit length along the last axis; zero stays zero."""
    squared = g("ReduceSum", g("Mul", x, x), [-1], keepdims=1)
    return g("Div", x, g("Sqrt", g("Max", squared, 1e-24)))


def _match_visibility(g: _Graph, visibility: str, mode: str) -> str:
    """`matching.match_visibility`, [b, P]."""
    if mode == "soft":
        return visibility
    if mode == "saturated":
        mean = g("ReduceMean", visibility, [-1], keepdims=1)
        return g("Min", g("Div", visibility, g("Max", mean, float(np.finfo(np.float32).tiny))), 1.0)
    least = {"uniform": -np.inf, "binary": 1.0}[mode]
    return g("Cast", g("GreaterOrEqual", visibility, least), to=g.onnx.TensorProto.FLOAT)


def _network(g: _Graph, model: VPM, images: str, valid: str | None) -> tuple[str, str, str]:
    """`models.VPM`: features before normalization [b, P, C], visibility [b, P], probability [b, P, h, w or 1]."""
    config, params, stats = model.config, model.trained_variables["params"], model.trained_variables["batch_stats"]
    regions = model.grid.count
    float_ = g.onnx.TensorProto.FLOAT
    stages = _backbone(g, images, config, params["backbone"], stats["backbone"])
    feature_map = stages[-1]
    cells = covered = None
    by_row = config.model.locator == "row"
    if valid is not None:
        covered = g("Unsqueeze", g("Cast", valid, to=float_), [1])  # [b, 1, h, w]
        cells = g("ReduceMax", covered, [3], keepdims=1) if by_row else covered

    logits = _locator(g, model, stages[config.model.locator_stage - 1], images, covered)
    log_probability = g("LogSoftmax", logits, axis=1)
    if cells is not None:
        log_probability = g("Where", g("Cast", cells, to=g.onnx.TensorProto.BOOL), log_probability, -np.inf)
    probability = g("Exp", log_probability)
    visibility = g("ReduceSum", probability, [2, 3], keepdims=0)
    likeliest = g("ReduceMax", log_probability, [2, 3], keepdims=1)
    weights = g("Exp", g("Sub", log_probability, g("Max", likeliest, float(np.finfo(np.float32).min))))
    total = g("Unsqueeze", g("ReduceSum", weights, [2, 3], keepdims=0), [2])
    height, width = feature_map_shape(config)
    if covered is None:
        weights = g("Expand", weights, [1, 1, height, width])
    else:
        weights = g("Mul", weights, covered)
        total = g("Where", g("Greater", total, 0.0), total, 1.0)
    flat = [g("Reshape", y, [0, 0, height * width]) for y in (weights, feature_map)]
    features = g("Div", g("MatMul", flat[0], g("Transpose", flat[1], perm=[0, 2, 1])), total)
    if config.match.feature == "after":
        scale, shift = _affine(params["neck"], stats["neck"], MaskedBatchNorm.epsilon)
        features = g("Add", g("Mul", features, scale[:regions]), shift[:regions])
    return features, visibility, probability


def _backbone(g: _Graph, x: str, config: ConfigDict, params: Any, stats: Any) -> list[str]:
    """The maps of the four stages."""
    m = config.model

    def convolve(x: str, path: tuple[str, ...], suffix: str, stride: int, pads: list[int] | None = None) -> str:
        p, s = params, stats
        for name in path:
            p, s = p[name], s[name]
        kernel = np.asarray(p[f"conv{suffix}"]["kernel"], np.float64)
        scale, shift = _affine(p[f"bn{suffix}"], s[f"bn{suffix}"], m.bn_epsilon)
        pads = pads or [len(kernel) // 2] * 4
        return g("Conv", x, _oihw(kernel * scale), shift, strides=[stride] * 2, pads=pads)

    size, stride = STEMS[m.stem]
    patches = [0, 0, -config.data.height % size, -config.data.width % size] if size == stride else None
    x = g("Relu", convolve(x, (), "_stem", stride, patches))
    if m.stem == "7x7":
        x = g("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    stages = []
    for s, blocks in enumerate(STAGE_BLOCKS[m.depth], 1):
        for b in range(1, blocks + 1):
            path = (f"stage{s}_block{b}",)
            stride = (*m.strides, m.last_stride)[s - 1] if b == 1 else 1
            strides = [stride, 1]
            if BOTTLENECK[m.depth]:
                strides = [stride, 1, 1] if m.stride_on == "1x1" else [1, stride, 1]
            y = x
            for i, step in enumerate(strides, 1):
                y = convolve(y, path, str(i), step)
                y = g("Relu", y) if i < len(strides) else y
            if "conv_shortcut" in params[path[0]]:
                x = convolve(x, path, "_shortcut", stride)
            x = g("Relu", g("Add", x, y))
        stages.append(x)
    return stages


def _locator(g: _Graph, model: VPM, x: str, images: str, covered: str | None) -> str:
    """`models.VPM.locate`: the logits [b, P, h, w or 1]."""
    m, params = model.config.model, model.trained_variables["params"]
    if m.locator == "stripes":
        h, w = feature_map_shape(model.config)
        rows, cols = model.grid.rows, model.grid.cols
        stripes = (np.arange(h) * rows // h)[:, None] * cols + np.arange(w) * cols // w
        batch = g("Concat", g("Shape", images, start=0, end=1), [1, 1, 1], axis=0)
        return g("Expand", 50 * np.eye(model.grid.count)[stripes].transpose(2, 0, 1)[None], batch)
    kernel = np.asarray(params["locator_kernel"], np.float64)
    if m.locator == "row":
        if covered is None:
            x = g("ReduceMean", x, [3], keepdims=1)
        else:
            counts = g("Max", g("ReduceSum", covered, [3], keepdims=1), 1.0)
            x = g("Div", g("ReduceSum", g("Mul", x, covered), [3], keepdims=1), counts)
        kernel = (kernel / m.locator_groups).repeat(m.locator_groups, axis=0)  # the mean over a group
        return g("Conv", x, _oihw(kernel[None, None]), params["locator_bias"])
    if m.locator_hidden:
        hidden, bias = params["locator_hidden_kernel"], params["locator_hidden_bias"]
        x = g("Relu", g("Conv", x, _oihw(hidden), bias, pads=[1] * 4))
    return g("Conv", x, _oihw(kernel[None, None]))


def _affine(params: Any, stats: Any, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Batch norm at test time as x * scale + shift."""
    scale = np.asarray(params["scale"], np.float64) / np.sqrt(np.asarray(stats["var"], np.float64) + epsilon)
    return scale, params.get("bias", 0) - stats["mean"] * scale


def _oihw(kernel: np.ndarray) -> np.ndarray:
    return np.asarray(kernel).transpose(3, 2, 0, 1)
