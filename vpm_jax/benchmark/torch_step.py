"""The training step in fast PyTorch, for `benchmark step --against torch`.

Only this module imports PyTorch, and it is imported only for that option. It computes the same as `vpm_jax.models` and
`vpm_jax.losses`; tests compare both with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.benchmark.timing import clocked, matmul_size
from vpm_jax.errors import optional
from vpm_jax.machine import threads
from vpm_jax.models.resnet import BOTTLENECK, STAGE_BLOCKS, STEMS

with optional("A comparison with PyTorch", "-e '.[parity]'"):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F


# ---- The network -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block under torchvision's names."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool, stride_on: str, epsilon: float):
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
            layers = [(width, 1, first), (width, 3, second), (out, 1, 1)]
        else:
            layers = [(width, 3, stride), (out, 3, 1)]
        inside = channels
        for i, (outside, size, s) in enumerate(layers, 1):
            self.add_module(f"conv{i}", nn.Conv2d(inside, outside, size, s, padding=size // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outside, eps=epsilon))
            inside = outside
        self.downsample = None
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out, eps=epsilon))
        self.layers = len(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.layers + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.layers:
                y = F.relu(y, inplace=True)
        return F.relu(y.add_(x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNet(nn.Module):
    """`models.resnet.ResNet` without its intermediate stages: [B, 3, H, W] -> [B, C, h, w]."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        m = config.model
        size, stride = STEMS[m.stem]
        self.patches = size if size == stride else 0
        self.pool = m.stem == "7x7"
        padding = 0 if self.patches else size // 2
        self.conv1 = nn.Conv2d(3, m.width, size, stride, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(m.width, eps=m.bn_epsilon)
        channels = m.width
        for s, (blocks, stride) in enumerate(zip(STAGE_BLOCKS[m.depth], (*m.strides, m.last_stride), strict=True), 1):
            width, layers = m.width * 2 ** (s - 1), []
            for b in range(blocks):
                bottleneck = BOTTLENECK[m.depth]
                layers.append(Block(channels, width, stride if b == 0 else 1, bottleneck, m.stride_on, m.bn_epsilon))
                channels = width * (4 if bottleneck else 1)
            self.add_module(f"layer{s}", nn.Sequential(*layers))
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if self.patches:
            x = F.pad(x, (0, -x.shape[3] % self.patches, 0, -x.shape[2] % self.patches))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.pool:
            x = F.max_pool2d(x, 3, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Heads(nn.Module):
    """`models.vpm.IdentityHeads` of all regions, with batch norm over the visible examples."""

    def __init__(self, heads: int, channels: int, dim: int, classes: int, dropout: float, visible_only: bool):
        super().__init__()
        self.dropout, self.visible_only = dropout, visible_only
        self.reducer = nn.Parameter(torch.randn(heads, channels, dim) * (2 / dim) ** 0.5)
        self.scale, self.shift = nn.Parameter(torch.ones(heads, dim)), nn.Parameter(torch.zeros(heads, dim))
        self.classifier = nn.Parameter(torch.randn(heads, dim, classes) * 0.001)
        self.bias = nn.Parameter(torch.zeros(heads, classes))
        self.register_buffer("mean", torch.zeros(heads, dim))
        self.register_buffer("var", torch.ones(heads, dim))

    def forward(self, features: Tensor, visible: Tensor) -> Tensor:
        x = F.dropout(features, self.dropout, self.training)
        x = torch.einsum("bpc,pcd->bpd", x, self.reducer)
        weight = (visible if self.visible_only else torch.ones_like(visible))[..., None].to(x.dtype)
        count = weight.sum(0)
        divisor = count.clamp(min=1)
        mean = (weight * x).sum(0) / divisor
        var = (weight * (x - mean).square()).sum(0) / divisor
        with torch.no_grad():
            for running, value in ((self.mean, mean), (self.var, var)):
                running.copy_(torch.where(count > 0, 0.9 * running + 0.1 * value, running))
        x = (x - mean) * torch.rsqrt(var + 1e-5) * self.scale + self.shift
        return torch.einsum("bpd,pdk->bpk", x, self.classifier) + self.bias


class VPM(nn.Module):
    """`models.vpm.VPM` for training: the backbone in `dtype` through autocast, the rest in float32 (or float64)."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        m = config.model
        self.grid, self.locator, self.pool_gradient = tuple(m.grid), m.locator, m.pool_gradient
        self.locator_dropout, self.groups, self.global_head = m.locator_dropout, m.locator_groups, m.global_head
        self.dtype = getattr(torch, m.dtype)
        self.base = ResNet(config)
        regions, channels = m.grid[0] * m.grid[1], self.base.channels
        if m.locator != "stripes":
            inputs = channels // m.locator_groups if m.locator == "row" else channels
            self.locator_kernel = nn.Parameter(torch.randn(inputs, regions) * (m.locator_init_std or 0.01))
        if m.locator == "row":
            self.locator_bias = nn.Parameter(torch.zeros(regions))
        classes = m.num_identities + m.dummy_classes
        self.heads = Heads(
            regions + m.global_head, channels, m.head_dim, classes, m.head_dropout, m.head_bn_visible_only
        )
        if m.dtype == "float64":
            self.double()
        dtype = self.heads.bias.dtype
        mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (config.data.mean, config.data.std))
        self.register_buffer("image_mean", mean)
        self.register_buffer("image_std", std)

    def forward(self, image: Tensor, visible: Tensor) -> dict[str, Tensor]:
        """image uint8 [B, H, W, 3], visible bool [B, P]: the same names and shapes as the JAX model's."""
        x = image.permute(0, 3, 1, 2)  # already in channels_last memory
        x = (x.to(self.image_mean.dtype) / 255 - self.image_mean) / self.image_std
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            x = self.base(x)
        cells = x.to(self.image_mean.dtype).permute(0, 2, 3, 1)  # [B, h, w, C]
        logits = self.locate(cells)
        probability = logits.softmax(-1)
        visibility, weights = probability.sum((1, 2)), probability
        if not self.pool_gradient:
            visibility, weights = visibility.detach(), weights.detach()
        pooled = cells if weights.shape[2] == cells.shape[2] else cells.sum(2, keepdim=True)  # a row locator's
        sums = torch.bmm(weights.flatten(1, 2).transpose(1, 2), pooled.flatten(1, 2))
        features = sums / weights.sum((1, 2)).clamp(min=1e-12)[..., None]
        inputs = features
        if self.global_head:
            inputs = torch.cat([inputs, cells.mean((1, 2))[:, None]], 1)
            visible = torch.cat([visible, torch.ones_like(visible[:, :1])], 1)
        identity = self.heads(inputs, visible)
        return {
            "locator_logits": logits,
            "visibility": visibility,
            "region_features": features,
            "logits": identity,  # including the global head
        }

    def locate(self, cells: Tensor) -> Tensor:
        batch, h, w, channels = cells.shape
        if self.locator == "stripes":
            rows, cols = self.grid
            row = torch.arange(h, device=cells.device) * rows // h
            col = torch.arange(w, device=cells.device) * cols // w
            onehot = F.one_hot(row[:, None] * cols + col, rows * cols).to(cells.dtype)
            return (50 * onehot).expand(batch, -1, -1, -1)
        x = F.dropout(cells, self.locator_dropout, self.training)
        if self.locator == "pixel":
            return x @ self.locator_kernel
        x = x.reshape(batch, h, w, channels // self.groups, self.groups).mean((2, 4))[:, :, None]
        return x @ self.locator_kernel + self.locator_bias


# ---- The losses ------------------------------------------------------------------------------------------


def pair_weights(config: ConfigDict, visible: Tensor, visibility: Tensor) -> Tensor:
    """`losses.pair_weights`: [B, B, P]."""
    if config.loss.triplet_pairs == "visible":
        weights = (visible[:, None] & visible[None]).to(visibility.dtype)
    elif config.loss.triplet_pairs == "all":
        weights = visibility.new_ones(len(visible), *visible.shape)
    else:
        weights = visibility.detach()[:, None] * visibility.detach()[None]
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def triplet_loss(
    config: ConfigDict, features: Tensor, identity: Tensor, visible: Tensor, visibility: Tensor
) -> tuple[Tensor, Tensor]:
    """`losses.triplet_loss`: (total, count)."""
    weights, rows = pair_weights(config, visible, visibility), torch.arange(len(features), device=features.device)
    with torch.no_grad():
        a = features.transpose(0, 1)
        norms = a.square().sum(-1)
        local = (norms[:, :, None] + norms[:, None] - 2 * torch.bmm(a, a.transpose(1, 2))).clamp(min=0).sqrt()
        distance = (weights * local.permute(1, 2, 0)).sum(-1)
        comparable = weights.sum(-1) > 0
        same = identity[:, None] == identity[None]
        positive = same & comparable & (rows[:, None] != rows[None])
        negative = ~same & comparable
        mined = positive.any(1) & negative.any(1)
        nearest = distance.where(negative, torch.inf).argmin(1)
        farthest = distance.where(positive, -torch.inf).argmax(1)

    def distance_to(mate: Tensor) -> Tensor:
        weight = weights[rows, mate]
        squared = torch.where(weight[..., None] > 0, features - features[mate], 0).square().sum(-1)
        local = torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)
        return (weight * local).sum(-1)

    gap = torch.where(mined, distance_to(farthest) - distance_to(nearest) + config.loss.margin, 0)
    return F.relu(gap).sum(), mined.sum()


def make_loss(config: ConfigDict, triplet_weight: float) -> Callable[[VPM, dict[str, Tensor]], dict[str, Tensor]]:
    """(model, batch) -> the metrics of `step.make_step`, including "loss", without grad_norm and learning_rate."""
    c = config.loss

    def loss(model: VPM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        identity, visible, labels = batch["identity"], batch["visible"], batch["labels"]
        shown = torch.ones_like(visible) if c.identity_regions == "all" else visible
        out = model(batch["image"], shown)
        logits, locator = out["logits"], out["locator_logits"]
        region = F.cross_entropy(locator.flatten(0, 2), labels.flatten())
        if config.model.global_head:
            shown = torch.cat([shown, torch.ones_like(shown[:, :1])], 1)
        heads = logits.shape[1]
        entropy = F.cross_entropy(
            logits.flatten(0, 1),
            identity[:, None].expand(-1, heads).flatten(),
            reduction="none",
            label_smoothing=c.label_smoothing,
        )
        per_head, head_count = (entropy.view(-1, heads) * shown).sum(0), shown.sum(0)
        if c.identity_reduction == "image":
            identity_term = per_head.sum() / len(identity)
        else:
            identity_term = (per_head / head_count.clamp(min=1)).sum()
        features = out["region_features"]
        features = features * torch.rsqrt(features.square().sum(-1, keepdim=True).clamp(min=1e-24))
        triplet, anchors = triplet_loss(config, features, identity, visible, out["visibility"])
        triplet = triplet / anchors.clamp(min=1)
        with torch.no_grad():
            correct = (logits.argmax(-1) == identity[:, None]) & shown
            located = locator.argmax(-1) == labels
        return {
            "loss": c.region_weight * region + c.identity_weight * identity_term + triplet_weight * triplet,
            "loss_region": region.detach(),
            "loss_identity": identity_term.detach(),
            "loss_triplet": triplet.detach(),
            "accuracy_identity": correct.sum(0) / head_count.clamp(min=1),
            "accuracy_locator": located.float().mean(),
            "comparable": anchors / len(identity),
        }

    return loss


def optimizer(config: ConfigDict, model: VPM, learning_rate: float) -> torch.optim.SGD:
    """`optim.optimizer`: SGD with Nesterov momentum, weight decay on all parameters, and a separate backbone rate."""
    o, base = config.optim, list(model.base.parameters())
    new = [p for name, p in model.named_parameters() if not name.startswith("base.")]
    groups = [{"params": base, "lr": learning_rate * o.backbone_multiplier}, {"params": new, "lr": learning_rate}]
    return torch.optim.SGD(
        groups, learning_rate, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay, fused=True
    )


# ---- A side of the benchmark -----------------------------------------------------------------------------


def build(config_json: str, batch: dict[str, np.ndarray], compile: bool) -> tuple[dict[str, Any], dict[str, Callable]]:
    """The facts and the timed functions of a `step.Side`: {"step", "matmul"}, functions of the repetitions."""
    config = config_lib.from_json(config_json, "config")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads())
    torch.set_float32_matmul_precision("high")  # TF32, as JAX's default
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    dtype = getattr(torch, config.model.dtype)
    model = VPM(config).to(device, memory_format=torch.channels_last).train()
    on_device = {
        k: torch.from_numpy(v).to(device, torch.int64 if v.dtype == np.int32 else None) for k, v in batch.items()
    }
    rate, triplet_weight = config.stage2.learning_rate, config.stage2.triplet_weight
    loss, sgd, parameters = make_loss(config, triplet_weight), optimizer(config, model, rate), list(model.parameters())
    forward = torch.compile(loss) if compile else loss

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def step(repetitions: int) -> None:
        for _ in range(repetitions):
            sgd.zero_grad(set_to_none=True)
            metrics = forward(model, on_device)
            metrics["loss"].backward()
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            sgd.step()
        synchronize()

    size = matmul_size(device)
    facts: dict[str, Any] = {"limits": {"matmul": 2.0 * size**3}}
    if compile:
        facts["compiled"], _ = clocked(lambda: step(1))  # raises without a compiler
    a = torch.randn(size, size, device=device).to(dtype)

    def matmul(repetitions: int) -> None:
        for _ in range(repetitions):
            a @ a
        synchronize()

    return facts, {"step": step, "matmul": matmul}
