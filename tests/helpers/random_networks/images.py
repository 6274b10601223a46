"""Convolutions, and steps on feature maps, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from torch import nn

from helpers.blocks.attention import ConvAttention
from helpers.blocks.convolutional import Bottleneck, C2f, ShuffleUnit, SqueezeExcite, SqueezeExciteLinear
from helpers.blocks.statistics import ChannelAttention, Pooled, SpatialGate
from helpers.random_networks.steps import (
    EXTREMES,
    ChannelsLast,
    Map,
    OverGroups,
    Parallel,
    Scaled,
    Shuffle,
    Split,
    Twice,
)

WIDTHS = (4, 8, 12)
Draw = Callable[..., Any]
Drawn = tuple[nn.Module, int, int]  # the module, its width and its side


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


def image_step(draw: Draw, c: int, side: int, depth: int, resize: bool = False) -> Drawn:
    """One step on [batch, c, side, side]."""
    kinds = ["conv"] * 3 + [
        "depthwise",
        "norm",
        "scale",
        "map",
        "excite",
        "bottleneck",
        "linear",
        "whole",
    ]
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
    if kind in _JOINED:
        return _JOINED[kind](draw, c, side, depth)
    return _SINGLE[kind](draw, c, side)


# -- one behind the other ---------------------------------------------------------------------------


def _conv(draw: Draw, c: int, side: int) -> Drawn:
    return *conv(draw, c), side


def _depthwise(draw: Draw, c: int, side: int) -> Drawn:
    factor = draw(st.sampled_from((1, 1, 2)))
    return nn.Conv2d(c, factor * c, 3, padding=1, groups=c), factor * c, side


def _norm(draw: Draw, c: int, side: int) -> Drawn:
    norms = [nn.BatchNorm2d(c), nn.GroupNorm(1, c), nn.InstanceNorm2d(c, affine=True), nn.PReLU(c)]
    return draw(st.sampled_from(norms)), c, side


def _scale(draw: Draw, c: int, side: int) -> Drawn:
    shapes = [(c, 1, 1), (1, c, 1, 1), (1,), (c, side, side), (1, 1, side)]
    return Scaled(*draw(st.sampled_from(shapes))), c, side


def _map(draw: Draw, c: int, side: int) -> Drawn:
    same = ("flip", "norm", "gate", "gate", "spatial", "spatial", "roll", "resize", *EXTREMES)
    how = draw(st.sampled_from((*same, "double", "interleave", "pad", *["halves"] * (c % 2 == 0))))
    out = {"double": 2 * c, "pad": c + 4, "halves": c // 2, "interleave": 2 * c}.get(how, c)
    if how == "resize" and side < 2:
        how = "flip"
    return Map(how), out, side


def _whole(draw: Draw, c: int, side: int) -> Drawn:
    """Every channel looks at all of them, or each at its own places."""
    steps = [SpatialGate(), ChannelAttention(), *([Pooled(c)] if side % 2 == 0 else [])]
    return draw(st.sampled_from(steps)), c, side


def _excite(draw: Draw, c: int, side: int) -> Drawn:
    return draw(st.sampled_from((SqueezeExcite, SqueezeExciteLinear)))(c, 4), c, side


def _bottleneck(draw: Draw, c: int, side: int) -> Drawn:
    return Bottleneck(c), c, side


def _linear(draw: Draw, c: int, side: int) -> Drawn:
    body = [nn.LayerNorm(c), nn.Linear(c, 12), nn.GELU(), nn.Linear(12, c)]
    return ChannelsLast(*body[draw(st.integers(0, 1)) :]), c, side


def _pool(draw: Draw, c: int, side: int) -> Drawn:
    return draw(st.sampled_from((nn.MaxPool2d, nn.AvgPool2d)))(2), c, side // 2


def _down(draw: Draw, c: int, side: int) -> Drawn:
    out = draw(st.sampled_from(WIDTHS))
    return nn.Conv2d(c, out, 2, stride=2), out, side // 2


def _shuffle(draw: Draw, c: int, side: int) -> Drawn:
    return Shuffle(draw(st.sampled_from((2, 4)))), c, side


def _unit(draw: Draw, c: int, side: int) -> Drawn:
    return ShuffleUnit(c), c, side


def _c2f(draw: Draw, c: int, side: int) -> Drawn:
    out = draw(st.sampled_from(WIDTHS))
    return C2f(c, out, draw(st.sampled_from((1, 2))), by_size=draw(st.booleans())), out, side


def _over(draw: Draw, c: int, side: int) -> Drawn:
    how = draw(st.sampled_from(("sum", "max", "softmax", "mean")))
    groups = draw(st.sampled_from((2, 4)))
    return OverGroups(groups, how), c // groups, side


def _attention(draw: Draw, c: int, side: int) -> Drawn:
    return ConvAttention(c), c, side


def _pixels(draw: Draw, c: int, side: int) -> Drawn:
    return nn.PixelShuffle(2), c // 4, 2 * side


def _up(draw: Draw, c: int, side: int) -> Drawn:
    groups = draw(st.sampled_from((1, 2, 4)))
    out = draw(st.sampled_from(WIDTHS))
    return nn.ConvTranspose2d(c, out, 2, 2, groups=groups), out, 2 * side


_SINGLE: dict[str, Callable[[Draw, int, int], Drawn]] = {
    "conv": _conv,
    "depthwise": _depthwise,
    "norm": _norm,
    "scale": _scale,
    "map": _map,
    "excite": _excite,
    "whole": _whole,
    "bottleneck": _bottleneck,
    "linear": _linear,
    "pool": _pool,
    "down": _down,
    "shuffle": _shuffle,
    "unit": _unit,
    "c2f": _c2f,
    "over": _over,
    "attention": _attention,
    "pixels": _pixels,
    "up": _up,
}


# -- side by side -----------------------------------------------------------------------------------


def _residual(draw: Draw, c: int, side: int, depth: int) -> Drawn:
    body, inner, _ = image_step(draw, c, side, depth - 1)
    back, _ = conv(draw, inner, c)
    join = draw(st.sampled_from(("add", "add", "sub", "gate", "max", "stack", "stack last")))
    return Parallel(join, nn.Identity(), nn.Sequential(body, back)), c, side


def _cat(draw: Draw, c: int, side: int, depth: int) -> Drawn:
    first, a, _ = image_step(draw, c, side, depth - 1)
    second, b, _ = image_step(draw, c, side, depth - 1)
    third = draw(st.booleans())
    branches = [first, second, *([nn.Identity()] if third else [])]
    return Parallel("cat", *branches), a + b + c * third, side


def _parallel(draw: Draw, c: int, side: int, depth: int) -> Drawn:
    first, a = conv(draw, c)
    second, _ = conv(draw, c, a)
    return Parallel(draw(st.sampled_from(("add", "gate", "stack"))), first, second), a, side


def _split(draw: Draw, c: int, side: int, depth: int) -> Drawn:
    count = draw(st.sampled_from([n for n in (2, 3, 4) if c % n == 0] or [1]))
    how = draw(st.sampled_from(("chunk", "split", "sizes", "view", "narrow")))
    part = c // count
    join = draw(st.sampled_from(("cat", "cat", "add", "gate")))
    plain = [draw(st.booleans()) for _ in range(count)]
    branches = [nn.Identity() if same else conv(draw, part, part)[0] for same in plain]
    return Split(how, part, join, *branches), c if join == "cat" else part, side


def _twice(draw: Draw, c: int, side: int, depth: int) -> Drawn:
    return Twice(conv(draw, c, c)[0], draw(st.booleans())), c, side


_JOINED: dict[str, Callable[[Draw, int, int, int], Drawn]] = {
    "residual": _residual,
    "cat": _cat,
    "parallel": _parallel,
    "split": _split,
    "twice": _twice,
}
