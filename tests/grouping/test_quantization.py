"""Models that learn to be quantized are pruned, trained on and converted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn import functional as F

import ocsfast
from ocsfast import GroupingError


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.a, self.an, self.ar = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.b, self.bn, self.br = nn.Conv2d(16, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()
        self.c, self.cn = nn.Conv2d(24, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.add, self.o = torch.ao.nn.quantized.FloatFunctional(), nn.Linear(16, 4)

    def forward(self, x):
        x = self.ar(self.an(self.a(self.quant(x))))
        y = self.cn(self.c(self.br(self.bn(self.b(x)))))
        return self.dequant(self.o(self.add.add(x, y).mean((2, 3))))


def preparing(fused):
    """The model, prepared for training with per-channel weights."""
    torch.manual_seed(0)
    layers = [["a", "an", "ar"], ["b", "bn", "br"], ["c", "cn"]]
    model = quantization.fuse_modules_qat(Residual(), layers)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    if not fused:  # modules that branch on the numbers in their buffers
        of_weights = quantization.default_per_channel_weight_fake_quant
        model.qconfig = quantization.QConfig(quantization.default_fake_quant, of_weights)
    return quantization.prepare_qat(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [True, False])
def test_training_for_quantization_follows_a_cut(fused):
    model, x, y = preparing(fused), torch.randn(4, 3, 8, 8), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train(steps):
        for _ in range(steps):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(GroupingError, match=r"a\.weight_fake_quant has no scale for each channel yet"):
        ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x)
    train(2)
    report = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=x).cut()
    assert report.cost <= 0.5 * report.cost_dense
    left, observer = len(model.b.weight), model.b.weight_fake_quant
    assert left < 24
    held = (observer.scale, observer.zero_point, observer.activation_post_process.min_val)
    assert [len(tensor) for tensor in held] == [left] * 3
    train(2)
    before = model.eval()(x)
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
        converted = quantization.convert(model)
        assert float((converted(x) - before).abs().max() / before.abs().max()) < 0.3
        with pytest.raises(GroupingError, match="its part a is quantized"):
            ocsfast.inspect(converted, x)


def test_scales_that_are_learned_go_with_their_channels():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.scale, self.zero = nn.Parameter(torch.rand(16) + 0.1), nn.Parameter(torch.zeros(16))

        def forward(self, x):
            quantize = torch._fake_quantize_learnable_per_channel_affine
            weight = quantize(self.a.weight, self.scale, self.zero, 0, -128, 127, 1.0)
            return self.o(F.relu(F.linear(x, weight, self.a.bias)))

    found = ocsfast.inspect(Learned(), torch.randn(2, 8))
    assert (found.families[0].groups, found.prunable > 0.9) == (16, True)
