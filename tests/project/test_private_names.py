"""Private names of torch that no other test would miss: see docs/private-names.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ocsfast


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))


def test_constants_of_a_graph_follow_its_conversion() -> None:
    """By `Module._apply`, which `.to()`, `.half()` and `.cuda()` go through."""
    graph = ocsfast.as_graph(Scaled(), torch.randn(2, 4))
    constants = [v for v in vars(graph.graph_eval).values() if isinstance(v, Tensor)]
    assert {c.dtype for c in constants} == {torch.float32}
    graph.double()
    constants = [v for v in vars(graph.graph_eval).values() if isinstance(v, Tensor)]
    assert {c.dtype for c in constants} == {torch.float64}
