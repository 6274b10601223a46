"""Inputs and outputs of every kind: nested, by name, in dataclasses, without a batch dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.blocks.attention import EagerAttention
from helpers.blocks.parts import Case, Conv, Sequence, image


class Named(NamedTuple):
    maps: Tensor
    aux: dict[str, Any]


def nested_outputs() -> Case:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Conv(3, 8, 3)
            self.body = Conv(8, 8, 3)
            self.head = nn.Conv2d(8, 4, 1)
            self.aux = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Named:
            x = self.body(self.stem(x))
            return Named(self.head(x), {"aux": [self.aux(x), None], "stride": 1, "none": None})

    return Case(Outputs(), image())


@dataclass
class Detections:
    """An output that torch.export is told how to take apart."""

    boxes: Tensor
    scores: Tensor | None = None


torch.export.register_dataclass(Detections)


def dataclass_output() -> Case:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Conv(3, 8, 3)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Detections:
            return Detections(self.head(self.stem(x)))

    return Case(Boxes(), image())


def several_inputs() -> Case:
    class Fused(nn.Module):
        """An image, ids, a number, a flag and an option that is None."""

        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(Conv(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.words = nn.EmbeddingBag(11, 8)
            self.time = nn.Linear(1, 8)
            self.mlp = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))

        def forward(
            self,
            image: Tensor,
            ids: Tensor,
            *,
            time: Tensor,
            scale: float = 1.0,
            mode: str = "cat",
            extra: Any = None,
        ) -> Tensor:
            assert mode == "cat"
            assert extra is None
            a = self.visual(image) + self.time(time[:, None])
            return self.mlp(torch.cat([a * scale, self.words(ids)], 1))

    kwargs = {"time": torch.rand(2), "scale": 0.5, "mode": "cat", "extra": None}
    return Case(Fused(), (*image(), torch.randint(11, (2, 6))), kwargs)


def mixed_leading_sizes() -> Case:
    """A mask without a batch dimension beside a batch of three."""

    class Causal(Sequence):
        body: EagerAttention

        def forward(self, x: Tensor, mask: Tensor, step: Tensor) -> Tensor:  # type: ignore[override]
            x, body = self.embed(x), self.body
            projections = (body.query, body.key, body.value)
            q, k, v = (body.transpose_for_scores(f(self.norm(x))) for f in projections)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5).transpose(1, 2)
            return self.head(body.dense(x.reshape(*x.shape[:2], body.all_head_size)) * step)

    mask = torch.ones(7, 7).tril().bool()
    model = Causal(EagerAttention())
    del model.last
    return Case(model, (torch.randn(3, 7, 7), mask, torch.tensor(2.0)))


def nested_inputs() -> Case:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lateral = nn.ModuleList([Conv(3, 8), Conv(5, 8)])
            self.out = nn.Conv2d(8, 2, 3, padding=1)

        def forward(self, inputs: dict[str, Any]) -> Tensor:
            fine, (coarse,) = inputs["fine"], inputs["rest"]
            a, b = self.lateral[0](fine), self.lateral[1](coarse)
            return self.out(a + F.interpolate(b, size=a.shape[-2:], mode="nearest"))

    return Case(Pyramid(), ({"fine": image()[0], "rest": [image(5, 4)[0]], "name": "x"},))
