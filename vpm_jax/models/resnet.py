"""ResNet-18/34/50/101 that returns every stage (He et al., CVPR 2016), as re-ID uses it.

The last stage may keep its resolution (`last_stride=1`), any width is allowed, and the stride of a
bottleneck sits on its 3x3 convolution (torchvision) or on its first 1x1 (Caffe, Keras).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STEMS = {"7x7": (7, 2), "3x3": (3, 2), "4x4": (4, 4)}  # kernel and stride; "7x7" is followed by max pooling
BOTTLENECK = {18: False, 34: False, 50: True, 101: True}

# He et al., ICCV 2015, mode fan-out: what torchvision's ResNet and the released code use.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution without bias, padded to keep its size; kernel [k, k, in, out].

    A 1x1 convolution is written as the matrix product it is: XLA:CPU runs the weight gradient of the
    product up to twice as fast as that of the convolution, and GPU and TPU compile both alike.
    """

    channels: int
    size: int
    stride: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        k, s = self.size, self.stride
        kernel = self.param("kernel", kaiming_fan_out, (k, k, x.shape[-1], self.channels), self.param_dtype)
        kernel = kernel.astype(self.dtype)
        if k == 1:
            return x[:, ::s, ::s] @ kernel[0, 0]
        if k == s:  # patches: the same product after moving each into the channels
            b, h, w, c = x.shape
            x = jnp.pad(x, ((0, 0), (0, -h % k), (0, -w % k), (0, 0)))
            x = x.reshape(b, -(-h // k), k, -(-w // k), k, c).transpose(0, 1, 3, 2, 4, 5)
            return x.reshape(*x.shape[:3], -1) @ kernel.reshape(-1, self.channels)
        return lax.conv_general_dilated(
            x, kernel, (s, s), [(k // 2, k // 2)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or the bottleneck 1x1, 3x3, 1x1 with four times the width."""

    width: int
    stride: int
    bottleneck: bool
    stride_on: str
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        out = 4 * self.width if self.bottleneck else self.width
        if self.bottleneck:
            first, second = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
            layers = [(self.width, 1, first), (self.width, 3, second), (out, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (out, 3, 1)]
        y = x
        for i, (channels, size, stride) in enumerate(layers, 1):
            y = self.conv(channels, size, stride, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y)
            if i < len(layers):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = self.conv(out, 1, self.stride, name="conv_shortcut")(x)
            x = self.norm(name="bn_shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The convolutional layers of a ResNet.

    Called with images [B, H, W, 3] (normalised, RGB), returns a dict of feature maps: "stem" and
    "stage1" ... "stage4", each [B, h, w, C] in `dtype`. H and W need not be multiples of the stride.
    """

    depth: int = 50
    width: int = 64
    stem: str = "7x7"
    strides: tuple[int, int, int] = (1, 2, 2)  # of stages 1 to 3
    last_stride: int = 1
    stride_on: str = "3x3"
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = False) -> dict[str, Any]:
        conv = partial(Conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
            use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where the mean is large
        )
        stages = {}
        x = x.astype(self.dtype)
        size, stride = STEMS[self.stem]
        x = conv(self.width, size, stride, name="conv_stem")(x)
        x = stages["stem"] = nn.relu(norm(name="bn_stem")(x))
        if self.stem == "7x7":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        strides = (*self.strides, self.last_stride)
        for s, (blocks, stage_stride) in enumerate(zip(STAGE_BLOCKS[self.depth], strides, strict=True), 1):
            for b in range(blocks):
                x = Block(
                    width=self.width * 2 ** (s - 1),
                    stride=stage_stride if b == 0 else 1,
                    bottleneck=BOTTLENECK[self.depth],
                    stride_on=self.stride_on,
                    conv=conv,
                    norm=norm,
                    name=f"stage{s}_block{b + 1}",
                )(x)
            stages[f"stage{s}"] = x
        return stages


def feature_shape(
    height: int, width: int, stem: str = "7x7", last_stride: int = 1, strides: tuple[int, int, int] = (1, 2, 2)
) -> tuple[int, int]:
    """(h, w) of the last stage for an H x W image."""
    stem_stride = STEMS[stem][1] * (2 if stem == "7x7" else 1)
    for stride in (stem_stride, *strides, last_stride):
        height, width = -(-height // stride), -(-width // stride)
    return height, width
