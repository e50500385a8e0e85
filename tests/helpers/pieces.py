"""Alternatives for pieces of the training step, compiled for a TPU that is not there: bytes and estimated cycles.

    python tests/helpers/pieces.py --target v5e:2x2 --json docs/results/elsewhere/v5e-pieces.json

64 images on one chip, forward and backward. The compiler gives no estimate for reduce-window and select-and-scatter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import SingleDeviceSharding

from vpm_jax.benchmark import elsewhere, program
from vpm_jax.benchmark.report import Report, Row, text, to_json
from vpm_jax.models import resnet


def windows(x: Array) -> Array:
    """`max_pool` as other platforms compute it."""
    return reduce(jnp.maximum, resnet._windows(x))


def space_to_depth(x: Array, kernel: Array) -> Array:
    """The stem's 7x7 convolution with stride 2 as a 4x4 convolution of 12 channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, c, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * c, -1)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), [(2, 1), (2, 1)], dimension_numbers=numbers)


def dropout(key: Array, x: Array) -> Array:
    """`models.vpm.ExampleDropout` of the feature map."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(x)))
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, x.shape[1:]))(keys)
    return jnp.where(keep, x / 0.5, 0)


def pooling(probability: Array, x: Array, precision: str) -> Array:
    """Eq. 3 without its denominator."""
    return jnp.einsum("bnp,bnc->bpc", probability, x.astype(jnp.float32), precision=precision)


def both_ways(function: Callable[..., Array], *arguments: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function and its gradient by the last argument, and the arguments with a cotangent."""

    def run(*inputs: Array) -> tuple[Array, ...]:
        y, back = jax.vjp(partial(function, *inputs[:-2]), inputs[-2])
        return y, *back(inputs[-1])

    return run, (*arguments, jax.eval_shape(function, *arguments))


def pieces() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    stem, images, feature_map = shaped(64, 192, 64, 64), shaped(64, 384, 128, 3), shaped(64, 24, 8, 2048)
    kernel, cells = shaped(7, 7, 3, 64), shaped(64, 192, 2048)
    probability = shaped(64, 192, 6, dtype=jnp.float32)
    keys = {
        name: shaped(dtype=jax.random.key(0, impl=impl).dtype) for name, impl in (("threefry", None), ("rbg", "rbg"))
    }
    windowed, distribute = jax.custom_vjp(windows), lambda residual, g: (resnet._distribute(*residual, g),)
    windowed.defvjp(lambda x: ((y := windows(x)), (x, y)), distribute)
    return {
        "max pooling, windows": both_ways(windowed, stem),
        "max pooling, XLA's own": both_ways(resnet._reduce_window, stem),
        "stem, 7x7": both_ways(partial(resnet._convolve, stride=2), images, kernel),
        "stem, space to depth": both_ways(space_to_depth, images, kernel),
        "dropout of T, threefry": (dropout, (keys["threefry"], feature_map)),
        "dropout of T, rbg": (dropout, (keys["rbg"], feature_map)),
        "Eq. 3, highest precision": both_ways(partial(pooling, precision="highest"), probability, cells),
        "Eq. 3, default precision": both_ways(partial(pooling, precision="default"), probability, cells),
        "top 10 of 256 x 65,536": (lambda x: lax.top_k(x, 10), (shaped(256, 65536, dtype=jnp.float32),)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v5e:2x2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    chip = SingleDeviceSharding(elsewhere.topology(args.target, 1)[0])
    rows = []
    for name, (function, arguments) in pieces().items():
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip) for x in arguments]
        amounts = program.read(jax.jit(function).lower(*placed).compile().as_text())
        rows += [
            Row(f"{name}: bytes", amounts.moved / 1e9, "GB"),
            Row(f"{name}: cycles", amounts.cycles / 1e6, "million"),
        ]
    report = Report(rows, [f"Compiled for one chip of {args.target}."])
    print(text(report))
    if args.json:
        args.json.write_text(to_json(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
