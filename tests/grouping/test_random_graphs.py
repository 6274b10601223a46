"""Random networks: whatever the labels say may go, going equals zero.

OCSFAST_RANDOM_GRAPHS=2000 runs that many instead of a fixed few, all of them new each time.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers.blocks import (
    Bottleneck,
    C2f,
    ConvAttention,
    EagerAttention,
    EinsumAttention,
    FusedAttention,
    Glu,
    LayerScale,
    Mixer,
    RmsNorm,
    SeparateAttention,
    ShuffleUnit,
    SqueezeExcite,
    SqueezeExciteLinear,
    SwiGlu,
    channel_shuffle,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import by_labels
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.proof.trials import Trial
from ocsfast.grouping.scope import Scope
from ocsfast.ops.cost import build_cost_model

EXAMPLES = int(os.environ.get("OCSFAST_RANDOM_GRAPHS", "25"))
WIDTHS = (4, 8, 12)
Draw = Callable[..., object]
seen: Counter[str] = Counter()


# -- steps ----------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """Branches of the same input, joined."""

    def __init__(self, join: str, *branches: nn.Module) -> None:
        super().__init__()
        self.join = join
        self.branches = nn.ModuleList(branches)

    def extra_repr(self) -> str:
        return self.join

    def forward(self, x: Tensor) -> Tensor:
        return joined(self.join, [branch(x) for branch in self.branches], 1 if x.dim() == 4 else -1)


def joined(join: str, parts: list[Tensor], dim: int) -> Tensor:
    if join == "cat":
        return torch.cat(parts, dim)
    if join == "stack":
        return torch.stack(parts, dim).mean(dim if dim > 0 else -1)
    if join == "stack last":
        return torch.stack(parts, -1).sum(-1)
    out = parts[0]
    for part in parts[1:]:
        if join == "add":
            out = out + part
        elif join == "sub":
            out = out - part
        elif join == "gate":
            out = out * part.sigmoid()
        else:
            out = torch.maximum(out, part)
    return out


class Split(nn.Module):
    """Parts of the channels, each with a step of its own, joined."""

    def __init__(self, how: str, width: int, join: str, *branches: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.join = join
        self.width = width  # of each part
        self.branches = nn.ModuleList(branches)

    def extra_repr(self) -> str:
        return f"{self.how}, {self.join}"

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if x.dim() == 4 else -1
        count = len(self.branches)
        if self.how == "chunk":
            parts = x.chunk(count, dim)
        elif self.how == "split":
            parts = x.split(self.width, dim)
        elif self.how == "sizes":
            parts = x.split([self.width] * count, dim)
        elif self.how == "view":
            parts = x.unflatten(dim, (count, x.shape[dim] // count)).unbind(dim if dim > 0 else -2)
        else:
            parts = [x.narrow(dim, k * self.width, self.width) for k in range(count)]
        return joined(self.join, [f(part) for f, part in zip(self.branches, parts, strict=True)], dim)


class Twice(nn.Module):
    """The same module again and again."""

    def __init__(self, body: nn.Module, residual: bool) -> None:
        super().__init__()
        self.body = body
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.body(x))
        return x + y if self.residual else y


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return channel_shuffle(x, self.groups)


class Scaled(nn.Module):
    """A parameter for each channel, or for a place and a channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.shift = nn.Parameter(torch.zeros(shape[-3:]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class ChannelsLast(nn.Module):
    """ConvNeXt's way: norm and linear layers on the last dimension, then back."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OverGroups(nn.Module):
    """Channels as (groups, rest): a reduction over one of them."""

    def __init__(self, groups: int, how: str) -> None:
        super().__init__()
        self.groups = groups
        self.how = how

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.how}"

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w)
        if self.how == "sum":
            return x.sum(1)
        if self.how == "max":
            return x.amax(1)
        if self.how == "softmax":
            return (x * x.softmax(1)).sum(1)
        return x.mean(1)


class Map(nn.Module):
    """A function of the feature map alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flip":
            return x.flip(1)
        if self.how == "norm":
            return F.normalize(x, dim=1)
        if self.how == "gate":
            return x * torch.sigmoid(x.mean(1, keepdim=True))
        if self.how == "spatial":
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        if self.how == "roll":
            return x.roll(1, 1)
        if self.how == "double":
            return torch.cat((x, -x), 1)
        if self.how == "interleave":
            return x.repeat_interleave(2, 1)
        if self.how == "resize":
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
        if self.how == "pad":
            return F.pad(x, (0, 0, 0, 0, 0, 4))
        return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]


class Tokens(nn.Module):
    """Places become tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class ClassToken(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(torch.zeros(1, length + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.pos


class Pick(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first":
            return x[:, 0]
        if self.how == "flat":
            return x.flatten(1)
        if self.how == "max":
            return x.flatten(2).amax(2) if x.dim() == 4 else x.amax(1)
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class Watched(nn.Module):
    """A sequence that does more in training: further outputs, layers, noise and masks of its own."""

    def __init__(self, steps: list[nn.Module], taps: dict[int, tuple[str, int]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.taps = taps  # behind a step: what training does there, and the width there
        self.extra = nn.ModuleDict()
        for k, (how, width) in taps.items():
            if how in ("head", "head in training"):
                self.extra[str(k)] = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 4))
            elif how == "layer":
                self.extra[str(k)] = nn.Linear(width, width)
            elif how == "branch":
                body = nn.Sequential(nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
                self.extra[str(k)] = nn.Sequential(body, nn.Linear(6, width))

    def extra_repr(self) -> str:
        return str(self.taps)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        more = []
        for k, step in enumerate(self.steps):
            x = step(x)
            if k in self.taps:
                x = self.tapped(x, k, more)
        return [x, *more] if self.training and more else x

    def tapped(self, x: Tensor, k: int, more: list[Tensor]) -> Tensor:
        how, width = self.taps[k]
        layer = dict(self.extra.items()).get(str(k))
        dim = 1 if x.dim() == 4 else -1
        flat = x.mean((2, 3)) if x.dim() == 4 else x.mean(1)
        shape = (-1, width, 1, 1) if x.dim() == 4 else (-1, 1, width)
        if how == "head":
            more.append(layer(flat))
        elif how == "kept":
            self.kept = [x]
        elif not self.training:
            return x
        elif how == "head in training":
            more.append(layer(flat))
        elif how == "features":
            more.append(x)
        elif how == "noise":
            x = x + 0.1 * torch.randn_like(x)
        elif how == "dropout":
            x = F.dropout(x, 0.2, self.training)
        elif how == "mask":  # of a width that training code alone reads
            x = x * (torch.rand(width) > 0.1).view(shape)
        elif how == "mask by shape":
            x = x * x.new_empty(len(x), x.shape[dim]).bernoulli_(0.9).view(shape)
        elif how in ("layer", "branch"):
            x = x + layer(flat).view(shape)
        return x


TAPS = (
    *("head", "head", "head in training", "features", "kept"),
    *("noise", "dropout", "mask", "mask by shape", "layer", "branch"),
)


# -- drawing networks -------------------------------------------------------------------------------


def conv(draw: Draw, c: int, out: int | None = None) -> tuple[nn.Module, int]:
    """A convolution of some kind with norm and activation; groups where widths allow it."""
    out = out or draw(st.sampled_from(WIDTHS))
    kernel = draw(st.sampled_from((1, 3)))
    groups = draw(st.sampled_from([g for g in (1, 1, 1, 2, 4) if c % g == 0 and out % g == 0]))
    layers: list[nn.Module] = [nn.Conv2d(c, out, kernel, padding=kernel // 2, groups=groups)]
    norm = draw(st.sampled_from(("batch", "batch", "none", "layer", "group")))
    if norm == "batch":
        layers.append(nn.BatchNorm2d(out))
    elif norm != "none":
        layers.append(nn.GroupNorm(4 if norm == "group" and out % 4 == 0 else 1, out))
    layers.append(draw(st.sampled_from((nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Identity)))())
    return nn.Sequential(*layers), out


def image_step(
    draw: Draw, c: int, side: int, depth: int, resize: bool = False
) -> tuple[nn.Module, int, int]:
    """One step on [batch, c, side, side]: the module, its width and side."""
    kinds = ["conv"] * 3 + ["depthwise", "norm", "scale", "map", "excite", "bottleneck", "linear"]
    if depth > 0:
        kinds += ["residual"] * 2 + ["cat"] * 2 + ["parallel", "split", "split", "twice"]
    if side > 2 and resize:
        kinds += ["pool", "down"]
    if c % 4 == 0:
        kinds += ["shuffle", "unit", "c2f", "over", "attention"]
        if side < 8 and resize:
            kinds += ["pixels", "up"]
    kind = draw(st.sampled_from(kinds))
    if c > 32:
        kind = "conv"
    if kind == "conv":
        return *conv(draw, c), side
    if kind == "depthwise":
        factor = draw(st.sampled_from((1, 1, 2)))
        return nn.Conv2d(c, factor * c, 3, padding=1, groups=c), factor * c, side
    if kind == "norm":
        norms = [nn.BatchNorm2d(c), nn.GroupNorm(1, c), nn.InstanceNorm2d(c, affine=True), nn.PReLU(c)]
        return draw(st.sampled_from(norms)), c, side
    if kind == "scale":
        shapes = [(c, 1, 1), (1, c, 1, 1), (1,), (c, side, side), (1, 1, side)]
        return Scaled(*draw(st.sampled_from(shapes))), c, side
    if kind == "map":
        same = ("flip", "norm", "gate", "gate", "spatial", "spatial", "roll", "resize")
        how = draw(st.sampled_from((*same, "double", "interleave", "pad", *["halves"] * (c % 2 == 0))))
        out = {"double": 2 * c, "pad": c + 4, "halves": c // 2, "interleave": 2 * c}.get(how, c)
        if how == "resize" and side < 2:
            how = "flip"
        return Map(how), out, side
    if kind == "excite":
        made = (SqueezeExcite, SqueezeExciteLinear)
        return draw(st.sampled_from(made))(c, 4), c, side
    if kind == "bottleneck":
        return Bottleneck(c), c, side
    if kind == "linear":
        body = [nn.LayerNorm(c), nn.Linear(c, 12), nn.GELU(), nn.Linear(12, c)]
        return ChannelsLast(*body[draw(st.integers(0, 1)) :]), c, side
    if kind == "residual":
        body, inner, _ = image_step(draw, c, side, depth - 1)
        back, _ = conv(draw, inner, c)
        join = draw(st.sampled_from(("add", "add", "sub", "gate", "max", "stack", "stack last")))
        return Parallel(join, nn.Identity(), nn.Sequential(body, back)), c, side
    if kind == "cat":
        first, a, _ = image_step(draw, c, side, depth - 1)
        second, b, _ = image_step(draw, c, side, depth - 1)
        third = draw(st.booleans())
        branches = [first, second, *([nn.Identity()] if third else [])]
        return Parallel("cat", *branches), a + b + c * third, side
    if kind == "parallel":
        first, a = conv(draw, c)
        second, _ = conv(draw, c, a)
        return Parallel(draw(st.sampled_from(("add", "gate", "stack"))), first, second), a, side
    if kind == "split":
        count = draw(st.sampled_from([n for n in (2, 3, 4) if c % n == 0] or [1]))
        how = draw(st.sampled_from(("chunk", "split", "sizes", "view", "narrow")))
        part = c // count
        join = draw(st.sampled_from(("cat", "cat", "add", "gate")))
        plain = [draw(st.booleans()) for _ in range(count)]
        branches = [nn.Identity() if same else conv(draw, part, part)[0] for same in plain]
        return Split(how, part, join, *branches), c if join == "cat" else part, side
    if kind == "twice":
        return Twice(conv(draw, c, c)[0], draw(st.booleans())), c, side
    if kind == "pool":
        return draw(st.sampled_from((nn.MaxPool2d, nn.AvgPool2d)))(2), c, side // 2
    if kind == "down":
        out = draw(st.sampled_from(WIDTHS))
        return nn.Conv2d(c, out, 2, stride=2), out, side // 2
    if kind == "shuffle":
        return Shuffle(draw(st.sampled_from((2, 4)))), c, side
    if kind == "unit":
        return ShuffleUnit(c), c, side
    if kind == "c2f":
        out = draw(st.sampled_from(WIDTHS))
        return C2f(c, out, draw(st.sampled_from((1, 2))), by_size=draw(st.booleans())), out, side
    if kind == "over":
        how = draw(st.sampled_from(("sum", "max", "softmax", "mean")))
        groups = draw(st.sampled_from((2, 4)))
        return OverGroups(groups, how), c // groups, side
    if kind == "attention":
        return ConvAttention(c), c, side
    if kind == "pixels":
        return nn.PixelShuffle(2), c // 4, 2 * side
    groups = draw(st.sampled_from((1, 2, 4)))
    out = draw(st.sampled_from(WIDTHS))
    return nn.ConvTranspose2d(c, out, 2, 2, groups=groups), out, 2 * side


def token_step(draw: Draw, c: int, length: int) -> tuple[nn.Module, int]:
    """One step on [batch, length, 16]."""
    kind = draw(st.sampled_from(("attention", "attention", "mlp", "mlp", "mixer", "token", "linear")))
    norm = draw(st.sampled_from((nn.LayerNorm, nn.RMSNorm, RmsNorm)))(c)
    if kind == "token":
        return ClassToken(c, length), length + 1
    if kind == "mixer":
        return Mixer(c, length), length
    if kind == "linear":
        return nn.Sequential(nn.Linear(c, c), nn.GELU()), length
    if kind == "attention":
        body = draw(
            st.sampled_from(
                [
                    FusedAttention(c),
                    FusedAttention(c, scaled=False),
                    EinsumAttention(c),
                    EagerAttention(c, alibi=draw(st.booleans())),
                    SeparateAttention(rope=draw(st.booleans())),
                    SeparateAttention(2, "repeat_interleave"),
                    SeparateAttention(2, "expand", rope=draw(st.booleans())),
                    SeparateAttention(2, "enable_gqa"),
                    nn.TransformerEncoderLayer(c, 4, 24, batch_first=True),
                ]
            )
        )
    else:
        how = draw(st.sampled_from(("swiglu", "mlp", "glu", "chunk", "slice")))
        if how == "swiglu":
            body = SwiGlu(c)
        elif how == "mlp":
            body = nn.Sequential(nn.Linear(c, 12), nn.GELU(), nn.Linear(12, c))
        else:
            body = Glu(c, how=how)
    if draw(st.booleans()):
        body = LayerScale(body, c)
    if draw(st.booleans()):
        return Parallel("add", nn.Identity(), nn.Sequential(norm, body)), length
    return nn.Sequential(Parallel("add", nn.Identity(), body), norm), length


@st.composite
def networks(draw: Draw) -> nn.Module:
    torch.manual_seed(0)
    c, side = draw(st.sampled_from(WIDTHS)), 4
    steps: list[nn.Module] = [nn.Conv2d(3, c, 3, padding=1)]
    taps: dict[int, tuple[str, int]] = {}

    def tap() -> None:
        """Behind every third step training does something of its own."""
        if draw(st.integers(0, 2)) == 0:
            taps[len(steps) - 1] = (draw(st.sampled_from(TAPS)), c)

    for _ in range(draw(st.integers(1, 5))):
        step, c, side = image_step(draw, c, side, depth=2, resize=True)
        steps.append(step)
        if draw(st.booleans()):  # weights of one layer alone between two steps
            step, c = conv(draw, c)
            steps.append(step)
        tap()
    if draw(st.booleans()):
        length = side * side
        steps += [nn.Conv2d(c, 16, 1), Tokens()]
        for _ in range(draw(st.integers(1, 3))):
            step, length = token_step(draw, 16, length)
            steps.append(step)
            c = 16
            tap()
        how = draw(st.sampled_from(("mean", "first", "max", "flat")))
        features = c * length if how == "flat" else c
    else:
        how = draw(st.sampled_from(("mean", "flat", "max")))
        features = c * side * side if how == "flat" else c
    steps.append(Pick(how))
    if draw(st.booleans()):
        steps += [nn.Linear(features, 10), nn.ReLU()]
        features = 10
    steps.append(nn.Linear(features, 3))
    return Watched(steps, taps)


# -- the property -----------------------------------------------------------------------------------


def silent(difference: str | None) -> bool:
    """Whether a trial found other numbers, rather than module code that raised."""
    return difference is not None and difference.startswith(("outputs", "an output", "another number"))


def check(model: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4)
    families, setting = by_labels(model, (x,), {}, Scope())
    seen["networks"] += 1
    seen[f"{len(setting.runs)} graphs"] += 1
    if isinstance(model, Watched):
        seen.update(how for how, _ in model.taps.values())
    assert not families.notes, families.notes
    seen["families"] += len(families.families)
    with torch.no_grad():
        torch.manual_seed(1)
        trial = Trial(model, families, setting)
        able = []
        for f, family in enumerate(families.families):
            difference = trial.difference([f])
            assert not silent(difference), f"{family}: {difference}"
            if difference is None:
                able.append(f)
            else:
                seen["raised"] += 1
                seen[f"raised: {difference[:60]}"] += 1
        if not able:
            return
        difference = trial.difference(able)
        assert not silent(difference), f"all families: {difference}"
        if difference is not None:
            seen["raised together"] += 1
            return
        pruned = torch.zeros(families.num_groups, dtype=torch.bool)
        for f in able:
            family = families.families[f]
            pruned[family.first + torch.randperm(family.size)[: max(1, family.size // 3)]] = True
        subject = copy.deepcopy(model).eval()
        left = cut_model(subject, families, pruned)
        sizes = [f.size for f in left.families]
        predicted = build_cost_model(left, left.macs, "MACs")(torch.tensor(sizes))
        assert int(predicted) * 2 == count_macs(lambda: subject(x))


common = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "print_blob": True,
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, derandomize=True, phases=[Phase.generate], **common)
@given(networks())
def test_cutting_random_networks_equals_zeroing(model: nn.Module) -> None:
    check(model)


@pytest.mark.slow
@pytest.mark.skipif("OCSFAST_RANDOM_GRAPHS" not in os.environ, reason="set OCSFAST_RANDOM_GRAPHS=2000")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES, **common)
@given(networks())
def test_many_random_networks(model: nn.Module) -> None:
    check(model)
