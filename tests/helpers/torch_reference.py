"""VPM in plain PyTorch, both recipes, written from the paper: what the tests compare the JAX model with.

It shares no code with the package, and prefers the obvious to the fast. Everything runs in float64. It writes the
golden arrays, for where PyTorch is not installed:

    python tests/helpers/torch_reference.py
"""

from __future__ import annotations

import numpy as np
import parity_cases as cases
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --- the network (Section 3.1) --------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with torchvision's names: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool, stride_on: str):
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
            self.conv1 = nn.Conv2d(channels, width, 1, first, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, second, padding=1, bias=False)
            self.conv3 = nn.Conv2d(width, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet without its classifier; the last stage keeps its resolution. [B, 3, H, W] -> every stage's output."""

    def __init__(self, depth: int, width: int, stride_on: str = "3x3"):
        super().__init__()
        bottleneck = depth == 50
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, (blocks, stride) in enumerate(zip({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth], (1, 2, 2, 1))):  # noqa: B905
            layers = []
            for block in range(blocks):
                stage_width = width * 2**stage
                layers.append(Block(channels, stage_width, stride if block == 0 else 1, bottleneck, stride_on))
                channels = stage_width * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        stages = {"stem": F.relu(self.bn1(self.conv1(x)))}
        x = F.max_pool2d(stages["stem"], 3, 2, padding=1)
        for stage in (1, 2, 3, 4):
            x = stages[f"stage{stage}"] = getattr(self, f"layer{stage}")(x)
        return stages


def normalize(image: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float64 [B, 3, H, W], as torchvision's ToTensor and Normalize do."""
    x = torch.from_numpy(image).double().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (cases.MEAN, cases.STD))
    return (x - mean) / std


def drop(x: Tensor, kept: np.ndarray | None) -> Tensor:
    """Dropout with a given mask; none without."""
    return x if kept is None else x * torch.from_numpy(kept) / (1 - cases.DROPOUT)


class Head(nn.Module):
    """IP_i of Eq. 6: dense without bias, batch norm, dense to the identities. [n, C] -> [n, K]"""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.reducer = nn.Linear(channels, cases.HEAD_DIM, bias=False)
        self.bn = nn.BatchNorm1d(cases.HEAD_DIM)
        self.classifier = nn.Linear(cases.HEAD_DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.bn(self.reducer(x)))


class PaperVPM(nn.Module):
    """Equations 1 to 3 and 6, a head per region whose batch norm sees the images that show the region alone."""

    def __init__(self, base: nn.Module, channels: int):
        super().__init__()
        self.base = base
        self.locator = nn.Conv2d(channels, cases.REGIONS, 1, bias=False)
        self.heads = nn.ModuleList(Head(channels, cases.IDENTITIES) for _ in range(cases.REGIONS))

    def forward(self, image: Tensor, visible: Tensor, kept: dict) -> dict[str, Tensor]:
        T = self.base(image)["stage4"]  # [B, C, h, w]
        logits = self.locator(T)
        probability = logits.softmax(dim=1)  # Eq. 1, [B, P, h, w]
        visibility = probability.sum(dim=(2, 3))  # Eq. 2
        features = torch.einsum("bphw,bchw->bpc", probability, T) / visibility[..., None]  # Eq. 3
        x = drop(features, kept.get("dropout"))
        # An invisible region has no logits: they are left NaN, so that a loss that used them would show.
        identity_logits = torch.full((*visible.shape, cases.IDENTITIES), torch.nan, dtype=torch.float64)
        for i, head in enumerate(self.heads):
            identity_logits[visible[:, i], i] = head(x[visible[:, i], i])
        return {
            "locator_logits": logits.permute(0, 2, 3, 1),
            "probability": probability.permute(0, 2, 3, 1),
            "visibility": visibility,
            "region_features": features,
            "logits": identity_logits,
        }


class ReleasedVPM(nn.Module):
    """The released recipe: a locator of rows, a pooling without gradient, one more head on the global average."""

    def __init__(self, base: nn.Module, channels: int):
        super().__init__()
        self.base = base
        self.locator = nn.Conv2d(channels // cases.GROUPS, cases.REGIONS, 1)
        classes = cases.IDENTITIES + cases.DUMMY
        self.heads = nn.ModuleList(Head(channels, classes) for _ in range(cases.REGIONS + 1))

    def forward(self, image: Tensor, visible: Tensor, kept: dict) -> dict[str, Tensor]:
        T = self.base(image)["stage4"]  # [B, C, h, w]
        mask = kept.get("locator_dropout")
        x = drop(T, None if mask is None else mask.transpose(0, 3, 1, 2).copy())
        x = torch.stack([group.mean(dim=1) for group in x.split(cases.GROUPS, dim=1)], dim=1)  # [B, C/8, h, w]
        logits = self.locator(x.mean(dim=3, keepdim=True))  # [B, P, h, 1]
        probability = logits.softmax(dim=1)
        score = probability.detach()
        visibility = score.sum(dim=(2, 3))
        weight = score / score.sum(dim=2, keepdim=True)  # over the rows
        features = torch.einsum("bph,bch->bpc", weight[..., 0], T.sum(dim=3))
        x = torch.cat([features, T.mean(dim=(2, 3))[:, None]], dim=1)
        x = drop(x, kept.get("dropout"))
        identity_logits = torch.stack([head(x[:, i]) for i, head in enumerate(self.heads)], dim=1)
        return {
            "locator_logits": logits.permute(0, 2, 3, 1),
            "probability": probability.permute(0, 2, 3, 1),
            "visibility": visibility,
            "region_features": features,
            "logits": identity_logits[:, : cases.REGIONS],
            "global_logits": identity_logits[:, cases.REGIONS],
        }


# --- the losses (Section 3.3) -----------------------------------------------------------------------------


def region_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 5, its mean over the cells (of a row locator: over the rows)."""
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten())


def identity_loss_by_image(logits: Tensor, identity: Tensor, visible: Tensor, smoothing: float = 0.0) -> Tensor:
    """Eq. 6: the sum over an image's visible regions, the mean over the images."""
    total = torch.zeros([], dtype=torch.float64)
    for a in range(len(identity)):
        for i in torch.nonzero(visible[a])[:, 0]:
            total = total + F.cross_entropy(logits[a, i], identity[a], label_smoothing=smoothing)
    return total / len(identity)


def identity_loss_by_region(logits: Tensor, identity: Tensor, visible: Tensor) -> Tensor:
    """Released: per head the mean over the images that show its region, the sum of the heads."""
    shown = [visible[:, i] for i in range(visible.shape[1])]
    return sum(F.cross_entropy(logits[s, i], identity[s]) for i, s in enumerate(shown))


def hardest(identity: Tensor, distance: dict[tuple[int, int], Tensor], margin: float) -> Tensor:
    """Batch-hard triplets: the mean of [D_ap - D_an + margin]+ over the anchors with a positive and a negative."""
    terms = []
    for a in range(len(identity)):
        near = [d for (first, b), d in distance.items() if first == a and identity[b] == identity[a]]
        far = [d for (first, b), d in distance.items() if first == a and identity[b] != identity[a]]
        if near and far:
            terms.append(F.relu(max(near) - min(far) + margin))
    return torch.stack(terms).mean()


def triplet_loss(features: Tensor, identity: Tensor, visible: Tensor, margin: float = 1.0) -> Tensor:
    """Eq. 7 on L2-normalised features. Two images without a shared region have no distance."""
    features, distance = F.normalize(features, dim=2), {}
    for a in range(len(features)):
        for b in range(len(features)):
            shared = visible[a] & visible[b]
            if a != b and shared.any():
                distance[a, b] = (features[a] - features[b])[shared].norm(dim=1).mean()
    return hardest(identity, distance, margin)


def soft_triplet_loss(features: Tensor, identity: Tensor, visibility: Tensor, margin: float = 1.0) -> Tensor:
    """Released: each region weighs by the two images' visibility scores, as in Eq. 4."""
    features, scores, distance = F.normalize(features, dim=2), visibility.detach(), {}
    for a in range(len(features)):
        for b in range(len(features)):
            if a != b:
                weight = scores[a] * scores[b] / (scores[a] * scores[b]).sum()
                distance[a, b] = (weight * (features[a] - features[b]).norm(dim=1)).sum()
    return hardest(identity, distance, margin)


def paper_losses(out: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "region": region_loss(out["locator_logits"], batch["labels"]),
        "identity": identity_loss_by_image(out["logits"], batch["identity"], batch["visible"]),
        "triplet": triplet_loss(out["region_features"], batch["identity"], batch["visible"]),
    }


def released_losses(out: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = torch.cat([out["logits"], out["global_logits"][:, None]], dim=1)
    shown = torch.cat([batch["visible"], torch.ones_like(batch["visible"][:, :1])], dim=1)
    return {
        "region": region_loss(out["locator_logits"], batch["labels"]),
        "identity": identity_loss_by_region(logits, batch["identity"], shown),
        "triplet": soft_triplet_loss(out["region_features"], batch["identity"], out["visibility"]),
    }


MODELS = {"paper": PaperVPM, "released": ReleasedVPM}
LOSSES = {"paper": paper_losses, "released": released_losses}
REGION_WEIGHT = {"paper": 1.0, "released": 0.5}


# --- training ---------------------------------------------------------------------------------------------


def new_optimizer(model: nn.Module) -> torch.optim.SGD:
    """SGD with Nesterov momentum and weight decay on every parameter; the backbone learns at a tenth of the rate."""
    new = [p for name, p in model.named_parameters() if not name.startswith("base.")]
    groups = [{"params": list(model.base.parameters()), "multiplier": 0.1}, {"params": new, "multiplier": 1.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)


def filled(model: nn.Module) -> nn.Module:
    """The model in float64 with the weights of the comparison."""
    model = model.double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(cases.weight(name, tuple(tensor.shape))))
    return model


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(v).long() if v.dtype == np.int32 else torch.from_numpy(v) for k, v in batch.items()}


def train(recipe: str) -> dict[str, np.ndarray]:
    """Ten steps: each step's losses, the first step's gradients, the state after one step and after all."""
    model = filled(MODELS[recipe](ResNet(18, cases.WIDTH), 8 * cases.WIDTH)).train()
    results: dict[str, np.ndarray] = {}

    def count(name: str):  # of the values behind each of a batch norm's statistics
        def hook(module, inputs, output):
            results[f"samples/{name}"] = np.array(inputs[0].numel() / inputs[0].shape[1])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_hook(count(name))

    for step, (rate, triplet_weight, restart) in enumerate(cases.SCHEDULES[recipe]):
        if restart:
            optimizer = new_optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        batch = tensors(cases.batch(recipe, step))
        out = model(normalize(batch["image"].numpy()), batch["visible"], {})
        losses = LOSSES[recipe](out, batch)
        loss = REGION_WEIGHT[recipe] * losses["region"] + losses["identity"] + triplet_weight * losses["triplet"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        results[f"losses/{step}"] = np.array([x.item() for x in (loss, *losses.values())])
        if step in (0, cases.STEPS - 1):
            done = step + 1
            for name, p in model.named_parameters():
                if step == 0:
                    results[f"gradient/{name}"] = p.grad.numpy().copy()
                results[f"momentum {done}/{name}"] = optimizer.state[p]["momentum_buffer"].numpy().copy()
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    results[f"state {done}/{name}"] = value.numpy().copy()
    return results


# --- the parts --------------------------------------------------------------------------------------------


class Given(nn.Module):
    """In place of the backbone: the image is the feature map."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"stage4": x}


def backbone(depth: int, stride_on: str) -> dict[str, np.ndarray]:
    """Every stage of a ResNet in eval mode, [B, h, w, C]."""
    model = filled(nn.ModuleDict({"base": ResNet(depth, cases.WIDTH, stride_on)})).eval()
    with torch.no_grad():
        stages = model["base"](normalize(cases.images("backbone", 2)))
    return {name: x.permute(0, 2, 3, 1).numpy() for name, x in stages.items()}


def parts(recipe: str) -> dict[str, np.ndarray]:
    """Locator, pooling and heads on a given feature map, dropout with given masks: outputs, losses, gradients."""
    model = filled(MODELS[recipe](Given(), 8 * cases.WIDTH))
    batch = tensors(cases.batch(recipe, 0))
    T = torch.from_numpy(cases.feature_map(recipe)).permute(0, 3, 1, 2).requires_grad_()
    everywhere = torch.ones_like(batch["visible"])
    with torch.no_grad():
        out = model.eval()(T, everywhere, {})
    results = {f"eval/{name}": x.numpy() for name, x in out.items()}

    out = model.train()(T, batch["visible"], cases.dropout(recipe))
    shown = batch["visible"] if recipe == "paper" else everywhere
    for name, x in out.items():
        results[f"train/{name}"] = x.detach().numpy() if name != "logits" else x[shown].detach().numpy()
    wanted = {"feature_map": T} | dict(model.named_parameters())
    for kind, loss in LOSSES[recipe](out, batch).items():
        results[f"loss/{kind}"] = loss.detach().numpy()
        gradients = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True, allow_unused=True)
        for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
            gradient = torch.zeros_like(x) if gradient is None else gradient
            gradient = gradient.permute(0, 2, 3, 1) if name == "feature_map" else gradient
            results[f"gradient of {kind}/{name}"] = gradient.numpy()
    return results


def variants() -> dict[str, np.ndarray]:
    """Losses of the ablations, and their gradients by what they are computed from."""
    draw = cases.random("variants")
    features = torch.from_numpy(draw.normal(size=(cases.BATCH, cases.REGIONS, 5))).requires_grad_()
    logits = torch.from_numpy(draw.normal(size=(cases.BATCH, cases.REGIONS, cases.IDENTITIES))).requires_grad_()
    batch = tensors(cases.batch("paper", 0))
    identity, visible = batch["identity"], batch["visible"]
    everywhere = torch.ones_like(visible)
    losses = {
        "smoothing": (identity_loss_by_image(logits, identity, visible, smoothing=0.1), logits),
        "MVPM-3": (identity_loss_by_image(logits, identity, everywhere), logits),
        "MVPM-2": (triplet_loss(features, identity, everywhere), features),
        "margin": (triplet_loss(features, identity, visible, margin=0.3), features),
    }
    results = {}
    for name, (loss, x) in losses.items():
        results[name] = loss.detach().numpy()
        results[f"gradient of {name}"] = torch.autograd.grad(loss, x)[0].numpy()
    return results


def everything() -> dict[str, np.ndarray]:
    """All the results, by name."""
    results = {}
    for depth, stride_on in cases.BACKBONES:
        results |= {f"backbone {depth} {stride_on}/{k}": v for k, v in backbone(depth, stride_on).items()}
    for recipe in cases.RECIPES:
        results |= {f"{recipe} parts/{k}": v for k, v in parts(recipe).items()}
        results |= {f"{recipe} train/{k}": v for k, v in train(recipe).items()}
    return results | {f"variants/{k}": v for k, v in variants().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases.save(everything())
    print(f"{cases.GOLDEN}: {cases.GOLDEN.stat().st_size:,} bytes")
