"""Sizes that a model's code writes out are attributes of its graph, so that more of it may go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.blocks import make
from helpers.choices import predicted_macs, third
from torch import Tensor, nn
from torch.nn import functional as F

import ocsfast
from ocsfast.core.families import Families
from ocsfast.cut.removal import cut_model
from ocsfast.cut.sizes import size_attributes
from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.scope import Scope


def test_halves_of_a_chunk_are_families_of_their_own():
    case = make("c2f_chunk")
    (x,) = case.args
    assert [f.size for f in group(case.model, (x,)).families if f.name == "body.cv1.conv"] == [6]
    graph = ocsfast.as_graph(case.model, x)
    families = group(graph, (x,))
    halves = [f for f in families.families if f.name == "body.cv1.conv"]
    assert [f.size for f in halves] == [6, 6]
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    pruned[halves[0].first : halves[0].first + 4] = True
    left = cut_model(graph, families, pruned)
    assert graph.body.cv1.conv.weight.shape[0] == 8
    assert counted_macs(graph, x) == predicted_macs(left) * len(x)
    graph.train()(x).sum().backward()


def test_a_view_with_its_sizes_written_out_is_cut():
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(5, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.embed(x).view(x.shape[0], -1, 4, 16).transpose(1, 2)
            y = F.scaled_dot_product_attention(heads, heads, heads)
            return self.out(y.transpose(1, 2).reshape(x.shape[0] * 7, 64)).view(-1, 7, 3)

    x = torch.randn(2, 7, 5)
    assert not group(Literal(), (x,)).families
    graph = ocsfast.as_graph(Literal(), x)
    families = group(graph, (x,))
    assert names(families) == {"embed head": 4}
    cut_model(graph, families, third(families))
    assert graph.train()(torch.randn(5, 7, 5)).shape == (5, 7, 3)
    assert graph.embed.weight.shape == (48, 5)
    # Attention's scale is that of the width it was trained with, so positions within heads may go too.
    graph = ocsfast.as_graph(Literal(), x)
    inner = group(graph, (x,), scope=Scope(kinds=("head_dim",)))
    assert names(inner) == {"embed head_dim": 16}


def test_every_literal_is_an_attribute_of_its_own():
    x = torch.randn(2, 3, 8, 8)
    graph = ocsfast.as_graph(make("c2f_chunk").model, x)
    sizes = size_attributes(graph.graph_eval)
    assert sizes == {"chunk_split_sizes[0]": 6, "chunk_split_sizes[1]": 6}
    assert size_attributes(graph) == size_attributes(graph.body.cv1) == {}


def test_torchvisions_vision_transformer_loses_heads_and_width():
    """Heads and width, which the checks of nn.MultiheadAttention hold in the module."""
    kinds = {f.kind for f in ocsfast.inspect(vision_transformer(), IMAGES).families}
    assert kinds == {"neuron"}
    graph = ocsfast.as_graph(vision_transformer(), IMAGES)
    families = group(graph, (IMAGES,))
    layer = "encoder.layers.encoder_layer_{}"
    assert names(families) == {
        "conv_proj width": 32,
        **{f"{layer.format(k)}.self_attention head": 4 for k in range(2)},
        **{f"{layer.format(k)}.mlp.0 neuron": 64 for k in range(2)},
    }
    left = cut_model(graph, families, third(families))
    assert predicted_macs(left) * 4 == counted_macs(graph, IMAGES)


def test_sizes_that_training_alone_has_are_cut_too():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            if self.training:
                x = x * torch.full((16,), 0.5, device=x.device)
            return self.second(x)

    x = torch.randn(2, 4)
    graph = ocsfast.as_graph(Auxiliary(), x)
    families = group(graph, (x,))
    cut_model(graph, families, third(families))
    assert graph.graph_train.full_size == [graph.first.weight.shape[0]] == [11]
    assert graph.train()(torch.randn(3, 4)).shape == (3, 3)


def test_outputs_that_need_not_keep_their_shape():
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.first(x)
            return {"hidden": hidden, "logits": self.second(hidden.view(-1, 2, 8).flatten(1))}

    x = torch.randn(2, 4)
    graph = ocsfast.as_graph(Features(), x)
    assert not group(graph, (x,)).families
    families = group(graph, (x,), scope=Scope(outputs=("logits",)))
    assert [f.size for f in families.families] == [2]
    cut_model(graph, families, torch.tensor([True, False]))
    assert graph.train()(x)["hidden"].shape == (2, 8)


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vision_transformer(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(seed)
    model = models.VisionTransformer(32, 8, 2, 4, 32, 64, dropout=dropout, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, which would hide all before it
    return model


def counted_macs(model: nn.Module, *args: Any) -> int:
    return count_macs(lambda: model.eval()(*args))


def names(families: Families) -> dict[str, int]:
    return {f"{f.name} {f.kind}": f.size for f in families.families}
