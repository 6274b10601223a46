"""Sizes that only other code than the traced forward pass reads: they follow the cut all the same."""

import copy
import logging

import pytest
import torch
from helpers.networks import BATCH, sgd
from torch import nn

import ocsfast
from ocsfast.grouping.trace.export import trace


def families_of(model, x):
    return ocsfast.group(model.eval(), x)


def unread(families):
    return {(a.module, a.name): a.groups for a in families.attributes if not a.read}


def cut(model, x, share=0.4, **options):
    torch.manual_seed(0)
    families = families_of(model, x)
    pruned = torch.rand(families.num_groups) < share
    ocsfast.cut_model(model, families, pruned, **options)
    return families, pruned


@pytest.mark.parametrize("name", ["repvgg_a0", pytest.param("mobileone_s0", marks=pytest.mark.slow)])
def test_reparameterized_after_the_cut(name):
    timm = pytest.importorskip("timm")
    from timm.utils.model import reparameterize_model

    model, x = timm.create_model(name, num_classes=7), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for module in model.modules():  # statistics of their own, which a wrong index would mix up
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
    cut(model, x)
    assert model.num_features < {"repvgg_a0": 1280, "mobileone_s0": 1024}[name]
    model.eval().double()
    x = x.double()
    before = model(x)
    torch.testing.assert_close(reparameterize_model(model)(x), before, rtol=1e-9, atol=1e-11)


class Conv(nn.Module):
    def __init__(self, ins, outs, k=1, s=1):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(outs)

    def forward(self, x):
        return nn.functional.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c, shortcut):
        super().__init__()
        self.cv1, self.cv2, self.add = Conv(c, c, 3), Conv(c, c, 3), shortcut

    def forward(self, x):
        out = self.cv2(self.cv1(x))
        return x + out if self.add else out


class C2f(nn.Module):
    """As ultralytics' block: `c` is read where the model is exported, by `split`, and nowhere else."""

    def __init__(self, ins, outs, n=2, shortcut=True):
        super().__init__()
        self.c = outs // 2
        self.cv1 = Conv(ins, 2 * self.c)
        self.cv2 = Conv((2 + n) * self.c, outs)
        self.m = nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))

    def forward_split(self, x):
        y = list(self.cv1(x).split((self.c, self.c), 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


def c2f(shortcut=True):
    torch.manual_seed(0)
    body = Conv(3, 16, 3, 2), C2f(16, 32, shortcut=shortcut), C2f(32, 32, shortcut=shortcut)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))


def split_of(model, x):
    """The model's outputs on its export path."""
    for block in (model[1], model[2]):
        block.forward = block.forward_split
    try:
        return model(x)
    finally:
        for block in (model[1], model[2]):
            del block.forward


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_size_of_the_export_path(shortcut, tmp_path):
    model, x = c2f(shortcut), torch.randn(BATCH, 3, 16, 16)
    average = copy.deepcopy(model)
    families, _ = cut(model, x, copies=[average])
    assert set(unread(families)) == {("1", "c"), ("2", "c")}
    for each in (model, average):
        for block in (each[1], each[2]):
            assert block.c < 16
            assert 2 * block.c == block.cv1.conv.out_channels
    assert torch.equal(split_of(model, x), model(x))
    ocsfast.save(model, tmp_path / "model")
    for fill in (
        lambda fresh: ocsfast.load(fresh, tmp_path / "model"),
        lambda fresh: (ocsfast.fit_on_load(fresh, x), fresh.load_state_dict(model.state_dict())),
    ):
        fresh = c2f(shortcut)
        fill(fresh)
        assert torch.equal(split_of(fresh.eval(), x), model(x))


class Named(nn.Module):
    """Numbers that equal a width: some count it, some do not."""

    def __init__(self, ins=8, hidden=8, outs=8):
        super().__init__()
        self.in_channels, self.out_channels, self.mid_channels = ins, outs, hidden
        self.num_heads = self.vocab_size = self.kernel = 8
        self.scale = 8  # which the forward pass computes with
        self.a = nn.Conv2d(ins, outs, 3, padding=1)

    def forward(self, x):
        return self.a(x).relu() * (1 / self.scale)


def named():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), Named(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def test_which_numbers_follow(caplog):
    model, x = named(), torch.randn(BATCH, 3, 8, 8)
    families = families_of(model, x)
    first, second = (f.first for f in families.families)
    found = unread(families)
    assert {name for _, name in found} == {"in_channels", "out_channels"}
    assert found["1", "in_channels"].tolist() == list(range(first, first + 8))
    assert found["1", "out_channels"].tolist() == list(range(second, second + 8))
    listed = {a.name: sorted(a.groups.tolist()) for a in families.unsure}
    names = "mid_channels", "num_heads", "vocab_size", "kernel"
    assert listed == {name: list(range(16)) for name in names}
    optimizer = sgd(model)
    pruner = ocsfast.attach(model, 0.4, optimizer=optimizer, example_inputs=x, total_steps=10)
    with caplog.at_level(logging.INFO, logger="ocsfast"):
        report = pruner.cut()
    said = "1.mid_channels = 8, 1.num_heads = 8, 1.vocab_size = 8, 1.kernel = 8"
    assert ", ".join(report.stale) == said
    assert f"reads them: {said}" in caplog.text
    assert (model[1].in_channels, model[1].out_channels) == (
        model[1].a.in_channels,
        model[1].a.out_channels,
    )
    assert model[1].num_heads == model[1].mid_channels == model[1].scale == 8
    state = pruner.state_dict()
    other = named()
    again = ocsfast.attach(other, 0.4, optimizer=sgd(other), example_inputs=x, total_steps=10)
    again.load_state_dict(state)
    assert again.history[-1].stale == report.stale


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.passed = self.unread = self.divided = 6
        self.pair, self.compared = (6, 6), 3
        self.one, self.other = 6, 4

    def forward(self, x):
        x = self.a(x) if self.compared > 1 and self.one != self.other else x
        return x.view(-1, self.passed, 6 // self.divided).expand(-1, self.pair[1], 1)


def test_what_counts_as_read():
    """What reaches an operator or is computed with; nothing that torch itself compares meanwhile."""
    read = trace(Reads(), (torch.randn(3, 4),), {}, training=False).read
    assert read == {("", "passed"), ("", "divided"), ("", "pair[1]"), ("", "compared")} | {
        ("", "one"),
        ("", "other"),
    }


def test_what_stays_of_that_size():
    """One axis of the size that stays, or a counter that has moved on: nothing follows."""
    model, x = named(), torch.randn(BATCH, 3, 8, 8)
    model[1].a = nn.Conv2d(8, 8, 3, groups=8)
    assert ("1", "mid_channels") in unread(families_of(model, x))
    model[1].register_buffer("table", torch.zeros(8, dtype=torch.long))
    assert "mid_channels" in {a.name for a in families_of(model, x).unsure}
    model, x = named(), torch.randn(BATCH, 3, 8, 8)
    families = families_of(model, x)
    model[1].in_channels = 9
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    pruned[0] = True
    ocsfast.cut_model(model, families, pruned)
    assert model[1].in_channels == 9
