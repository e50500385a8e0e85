"""ONNX in float32, float16 and int8: accuracy, and rate beside JAX and PyTorch on one core.

    OMP_NUM_THREADS=1 taskset -c 1 python docs/results/onnx_variants.py --workdir runs/synthetic --name synthetic
    OMP_NUM_THREADS=1 taskset -c 1 python docs/results/onnx_variants.py --workdir runs/market_fast --name market_fast \\
        --test partial_reid --images 60

Needs onnx, onnxruntime and, for its rate, torch. Writes NAME.json into docs/results/onnx.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime import quantization
from onnxruntime.transformers.float16 import convert_float_to_float16

from vpm_jax import VPM, Description, export, metrics
from vpm_jax.benchmark.report import hardware, versions
from vpm_jax.benchmark.timing import best
from vpm_jax.data import datasets, sources
from vpm_jax.data.split import Split
from vpm_jax.images import read
from vpm_jax.matching import pairwise_distance
from vpm_jax.regions import WHOLE, Crop

FOLDER = Path(__file__).parent / "onnx"
BATCH = 16
Step = Callable[..., dict[str, Any]]


def inputs(model: VPM, split: Split, crop: Crop = WHOLE) -> tuple[np.ndarray, ...]:
    """The network's inputs for the images of a split, cropped."""
    return model.inputs([read(split.read(i), split.names[i], crop) for i in range(len(split))])


def describe(step: Step, arrays: tuple[np.ndarray, ...]) -> Description:
    parts = []
    for start in range(0, len(arrays[0]), BATCH):
        batch = [x[start : start + BATCH] for x in arrays]
        lacking = BATCH - len(batch[0])
        padded = [np.concatenate([x, x[-1:].repeat(lacking, 0)]) for x in batch] if lacking else batch
        out = step(*padded)
        kept = {key: np.asarray(out[key])[: len(batch[0])] for key in ("features", "visibility", "region_maps")}
        parts.append(Description(**kept))
    return Description.concatenate(parts)


def session(path: Path) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runtime = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names, outputs = ([x.name for x in side()] for side in (runtime.get_inputs, runtime.get_outputs))
    return lambda *arrays: dict(zip(outputs, runtime.run(outputs, dict(zip(names, arrays, strict=True))), strict=True))


def variants(folder: Path, model: VPM) -> dict[str, Path]:
    """{title: file} of the ONNX files to compare."""
    whole, prepared = folder / "float32.onnx", folder / "prepared.onnx"
    export.write_onnx(whole, model)
    files = {"float32": whole}
    proto = onnx.load(whole)

    files["float16 weights, computed in float32"] = folder / "weights16.onnx"
    export.write_onnx(folder / "weights16.onnx", model, "float16")

    # From the locator on, float16 overflows or underflows.
    convolutions = [i for i, node in enumerate(proto.graph.node) if node.op_type == "Conv"]
    tail = [node.name for node in proto.graph.node[convolutions[-1] :]] + [proto.graph.node[0].name]
    half = convert_float_to_float16(proto, keep_io_types=True, node_block_list=tail)
    onnx.save(half, folder / "float16.onnx")
    files["float16 up to the locator"] = folder / "float16.onnx"

    quantization.shape_inference.quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
    quantized = [node.name for node in proto.graph.node if node.op_type == "Conv"][:-1]  # all but the locator
    quantization.quantize_dynamic(
        prepared,
        folder / "dynamic.onnx",
        op_types_to_quantize=["Conv"],
        nodes_to_quantize=quantized,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
    )
    files["int8, dynamic"] = folder / "dynamic.onnx"
    export.write_onnx(folder / "static.onnx", model, "int8")
    files["int8, static"] = folder / "static.onnx"
    return files


def torch_step(folder: Path, model: VPM) -> Step:
    """The module of docs/sharing.md."""
    import torch

    page = (Path(__file__).parent.parent / "sharing.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^import ast\n.*?(?=^# The same in JAX)", page, re.M | re.S)
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)
    model.save_pretrained(folder / "saved")
    torch.set_num_threads(1)
    network = names["TorchVPM"](folder / "saved" / "model.safetensors").eval()

    def step(*arrays: np.ndarray) -> dict[str, Any]:
        with torch.inference_mode():
            features, visibility = network(*map(torch.from_numpy, arrays))
        return {"features": features.numpy(), "visibility": visibility.numpy()}

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--test", help="another test set than the run's")
    parser.add_argument("--images", type=int, default=0, help="use the first N identities' images only (default: all)")
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    model = VPM.load(args.workdir, "float32")
    data = model.config.data.copy_and_resolve_references()
    if args.test:
        data.name, data.root, data.holdout_identities = args.test, "", 0
    dataset = sources.load_test_set(data)
    query, gallery = dataset.query, dataset.gallery.take(dataset.gallery.identity != -1)
    if args.images:
        few = np.unique(query.identity)[: args.images]
        query, gallery = (x.take(np.isin(x.identity, few)) for x in (query, gallery))
    gammas = (1.0,) if args.test else (0.5, 1.0)
    whole, queries = inputs(model, gallery), {g: inputs(model, query, Crop(0, 0, g, 1)) for g in gammas}
    labels = query.identity, gallery.identity, query.camera, gallery.camera

    def accuracy(step: Step) -> dict[str, Any]:
        described = {"gallery": describe(step, whole), **{g: describe(step, x) for g, x in queries.items()}}
        result = {}
        for gamma in gammas:
            found = metrics.rank_metrics(
                pairwise_distance(model.config.match, described[gamma], described["gallery"]), *labels
            )
            result[gamma] = {"R-1": 100 * float(found["cmc"][0]), "mAP": 100 * found["mAP"]}
        vectors = model.embedding(Description.concatenate([described[g] for g in ("gallery", *gammas)]))
        return {"scores": result, "vectors": vectors}

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = variants(folder, model)
        steps: dict[str, tuple[Step, float | None]] = {"JAX, float32": (model.step, None)}
        steps |= {f"ONNX Runtime, {name}": (session(path), path.stat().st_size / 2**20) for name, path in files.items()}
        if find_spec("torch"):
            steps["PyTorch, float32"] = (torch_step(folder, model), None)
        sample = tuple(x[:BATCH] for x in whole)
        rows, figures, ours = [], {}, None
        for name, (step, size) in steps.items():
            started = time.monotonic()
            found = accuracy(step) if not name.startswith("PyTorch") else None
            rate = BATCH / best(lambda step=step: [np.asarray(x) for x in step(*sample).values()], args.seconds, "cpu")
            figures[name] = {"images/s of CPU": rate, "MiB": size}
            if found:
                ours = found["vectors"] if ours is None else ours
                cosine = (found["vectors"] * ours).sum(1)
                figures[name] |= {"scores": found["scores"], "cosine": [float(cosine.mean()), float(cosine.min())]}
            print(name, figures[name], f"{time.monotonic() - started:.0f} s", flush=True)
    for name, f in figures.items():
        scores = (
            [f"{s['R-1']:.1f} / {s['mAP']:.1f}" for s in f["scores"].values()] if "scores" in f else ["–"] * len(gammas)
        )
        cosine = f"{f['cosine'][0]:.5f} ({f['cosine'][1]:.4f})" if "cosine" in f else "–"
        size = f"{f['MiB']:.1f}" if f["MiB"] else "–"
        rows.append([name, f"{f['images/s of CPU']:.1f}", size, cosine, *scores])
    test = datasets.TITLES[dataset.name] + (f", {args.images} identities" if args.images else "")
    columns = [f"R-1 / mAP at gamma {g:g}" if not args.test else "R-1 / mAP" for g in gammas]
    record = {
        "table": [["", "images/s", "MiB", "cosine to JAX's vectors, mean (least)", *columns], *rows],
        "figures": figures,
        "test": f"{test}: {len(query)} queries, {len(gallery)} gallery images",
        "batch": BATCH,
        "model": {"source": model.source, "fingerprint": model.fingerprint, "image_size": model.image_size},
        "hardware": hardware(),
        "versions": f"{versions()}, onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}",
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(" | ".join(row) for row in record["table"]))


if __name__ == "__main__":
    main()
