"""Random networks: steps on images, then on tokens, that training does more in than inference."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from helpers.blocks.attention import EagerAttention, EinsumAttention, FusedAttention, SeparateAttention
from helpers.blocks.gates import Glu, LayerScale, Mixer, RmsNorm, SwiGlu
from helpers.blocks.recurrent import Stepwise
from helpers.blocks.statistics import Clusters, Distances
from helpers.random_networks.images import WIDTHS, Draw, conv, image_step
from helpers.random_networks.steps import ClassToken, Parallel, Pick, Tokens
from helpers.random_networks.taps import TAPS, Watched


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
        how = draw(st.sampled_from(("swiglu", "mlp", "glu", "chunk", "slice", "whole", "whole")))
        if how == "swiglu":
            body = SwiGlu(c)
        elif how == "whole":
            body = draw(st.sampled_from((Clusters, Distances, Stepwise)))(c)
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
