"""Each convolution of the backbone alone: forward pass and both gradients, compared with the matmul limit.

Their total time is a lower bound for a training step with these kernels.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.benchmark.report import Report, Row, align, number
from vpm_jax.benchmark.step import batch_size, fixed
from vpm_jax.benchmark.timing import best

HELP = "each convolution of the backbone alone, compared with the matmul limit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=cli.positive, help="images (default: the batch of the config's stage 2)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each pass (default: %(default)s)")


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    from vpm_jax import models
    from vpm_jax.benchmark.limits import accelerator, matmul_limit

    config = fixed(config)
    batch = batch_size(args, config)
    dtype = models.compute_dtype(config.model.dtype).name
    peak, limit_is = matmul_limit(dtype, args.clock)
    table: list[tuple[str, ...]] = [
        ("convolution", "cells", "count", "forward", "by input", "by kernel", "ms per step")
    ]
    total, flops = 0.0, 0.0
    for conv, count in distinct(config, batch).items():
        seconds = passes(conv, dtype, args)
        name = f"{conv.size}x{conv.size}, {conv.shape[-1]} to {conv.channels}"
        name += f", stride {conv.stride}" * (conv.stride > 1)
        rates = [f"{conv.flops / s / 1e9:,.0f}" if s else "–" for s in seconds]
        table.append(
            (name, "x".join(map(str, conv.shape[1:3])), f"{count}", *rates, f"{1e3 * count * sum(seconds):.1f}")
        )
        total, flops = total + count * sum(seconds), flops + count * conv.flops * sum(s > 0 for s in seconds)
    images = batch / total
    row = Row(f"convolutions of a step {dtype}", images, "images/s", images * peak * total / flops, limit_is)
    summary = f"All: {total:.3g} s for {flops / 1e9:,.4g} GFLOP, {flops / total / 1e9:,.0f} GFLOP/s, "
    summary += f"{flops / total / peak:.0%} of {limit_is}: at most {number(images)} images/s."
    lines = [f"{batch} images of {config.data.height} x {config.data.width}, {dtype}; rates in GFLOP/s."]
    return Report([row], lines, f"{align(table)}\n{summary}", accelerator(), config.to_dict())


def passes(conv: Convolution, dtype: str, args: argparse.Namespace) -> list[float]:
    """Seconds of the forward pass, the input gradient (0 for the stem, which needs none) and the kernel gradient."""
    import jax
    from jax import Array

    from vpm_jax.models.resnet import convolve

    random = np.random.default_rng(0)
    x = jax.device_put(random.normal(size=conv.shape).astype(dtype))
    kernel = jax.device_put(random.normal(size=(conv.size, conv.size, conv.shape[-1], conv.channels)).astype(dtype))

    def forward(x: Array, kernel: Array, _: Any = None) -> Array:
        return convolve(x, kernel, conv.stride)

    def by_input(x: Array, kernel: Array, g: Array) -> Any:
        return jax.vjp(lambda x: forward(x, kernel), x)[1](g)

    def by_kernel(x: Array, kernel: Array, g: Array) -> Any:
        return jax.vjp(lambda kernel: forward(x, kernel), kernel)[1](g)

    g = jax.jit(forward)(x, kernel)

    def seconds(function: Callable[..., Any]) -> float:
        compiled = jax.jit(function).lower(x, kernel, g).compile()
        return best(lambda: jax.block_until_ready(compiled(x, kernel, g)), args.seconds, args.clock)

    return [seconds(forward), 0.0 if conv.is_stem else seconds(by_input), seconds(by_kernel)]


class Convolution(NamedTuple):
    """The arguments of a call of `models.resnet.convolve`."""

    shape: tuple[int, ...]  # [B, h, w, in]
    size: int  # of the kernel
    channels: int  # out
    stride: int
    is_stem: bool

    @property
    def flops(self) -> float:
        """FLOPs of one pass."""
        b, h, w, c = self.shape
        return 2.0 * b * -(-h // self.stride) * -(-w // self.stride) * c * self.channels * self.size**2


def distinct(config: ConfigDict, batch: int) -> Counter[Convolution]:
    """The convolutions of the backbone, from the stem on, and how often each occurs."""
    import flax.linen as nn
    import jax

    from vpm_jax import models
    from vpm_jax.models.resnet import Conv

    counts: Counter[Convolution] = Counter()

    def record(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        conv = context.module
        if isinstance(conv, Conv):
            (b, h, w, c), size, stride = args[0].shape, conv.size, conv.stride
            if size == stride:  # patches
                h, w, c, size, stride = -(-h // size), -(-w // size), c * size**2, 1, 1
            counts[Convolution((b, h, w, c), size, conv.channels, stride, conv.name == "conv_stem")] += 1
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((batch, config.data.height, config.data.width, 3), np.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(models.create(config).init, jax.random.key(0), images)
    return counts
