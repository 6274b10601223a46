"""A model in DataParallel, or with parts in it, is pruned in place under its own names."""

from __future__ import annotations

import pytest
import torch
from helpers.networks import batch, net, sgd, train
from torch import nn
from torch.nn import functional as F

import ocsfast


class Scattering(nn.DataParallel):
    """A wrapper of one's own, whose pass is not to run while the model is traced or tried."""

    runs = True

    def forward(self, *inputs, **kwargs):
        assert self.runs
        return self.module(*inputs, **kwargs)


def gone(report):
    return report.stage == "pruned" and report.cost <= 0.5 * report.cost_dense


@pytest.mark.parametrize("wrapper", [nn.DataParallel, Scattering])
def test_a_model_in_a_wrapper_is_pruned_in_place(wrapper, tmp_path):
    model = wrapper(net())
    optimizer = sgd(model)
    for call in range(12):
        train(model, optimizer, 2, first=2 * call)
        report = ocsfast.step(model, 0.5, epochs=12)
    assert gone(report)
    assert model.module.fc1.in_features == model.module.fc1.weight.shape[1] < net().fc1.in_features
    train(model, optimizer, 1)
    ocsfast.save(model, tmp_path / "model.safetensors")
    fresh = wrapper(net())
    ocsfast.load(fresh, tmp_path / "model.safetensors")
    x = batch(0)[0]
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert ocsfast.inspect(model, x).gone > 0.4
    assert ocsfast.as_graph(model, x).conv1.weight is model.module.conv1.weight


class Parts(nn.Module):
    """Features in DataParallel and a classifier beside them, as in the ImageNet example."""

    def __init__(self):
        super().__init__()
        body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3))
        self.features, self.classifier = Scattering(body), nn.Linear(12, 4)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


def test_parts_in_a_wrapper_are_pruned_in_place():
    torch.manual_seed(0)
    model, x = Parts(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Scattering.runs = False
    try:
        found = ocsfast.inspect(model, x)
        pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x)
        graph = ocsfast.as_graph(model, x)
    finally:
        Scattering.runs = True
    assert [f.name for f in found.families] == ["features.module.0", "features.module.3"]
    assert graph.features.module.get_submodule("0").weight is model.features.module[0].weight
    assert "forward" not in vars(model.features)
    assert gone(pruner.cut())
    model(x).sum().backward()
    optimizer.step()
    assert model.features.module[0].out_channels < 16


def test_forward_gets_the_module_inside():
    model, x = nn.DataParallel(Parts()), torch.randn(2, 3, 8, 8)
    for forward in (lambda m, x: m(x), lambda m, x: m.classifier(m.features.module(x).mean((2, 3)))):
        assert len(ocsfast.inspect(model, x, forward=forward).families) == 2
