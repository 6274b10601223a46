"""The proof catches every wrong label: mutate one vector at a time, each must be seen."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn

from ocsfast.errors import StateError
from ocsfast.grouping import Choice, by_labels
from ocsfast.grouping.proof import Trial

torchvision = pytest.importorskip("torchvision")


class LayerNormNet(nn.Module):
    """Norms over a pruned dimension, a gate, a concatenation, a flatten, a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Linear(8, 8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.narrow = nn.Conv2d(12, 6, 1)
        self.mixed = nn.Linear(14 * 4, 10)
        self.layer_norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        y = self.narrow(self.grouped(x).relu())
        x = nn.functional.adaptive_avg_pool2d(torch.cat([x, y], 1), 2)
        return self.head(self.layer_norm(self.mixed(x.flatten(1))))


def resnet():
    return torchvision.models.resnet18(weights=None)


def convnext():
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(12, 20, 1), block(20, None, 1)])


def mobile():
    blocks = [[1, 16, 1, 1], [3, 24, 2, 2]]
    return torchvision.models.MobileNetV2(width_mult=0.5, inverted_residual_setting=blocks)


def mutations(families):
    """Each label vector shifted by one group, and each vector dropped."""
    for n, axis in enumerate(families.axes):
        live = axis.groups[axis.groups >= 0]
        shifted = axis.groups.clone()
        shifted[axis.groups >= 0] = live.roll(1)
        if not torch.equal(shifted, axis.groups):
            others = families.axes[:n], families.axes[n + 1 :]
            yield (
                f"shift {axis.tensor}[{axis.axis}]",
                (*others[0], replace(axis, groups=shifted), *others[1]),
            )
            yield f"drop {axis.tensor}[{axis.axis}]", (*others[0], *others[1])


@pytest.mark.parametrize(
    ("make", "side"), [(LayerNormNet, 8), (resnet, 32), (convnext, 32), (mobile, 32)]
)
def test_every_mutation_is_caught(make, side):
    torch.manual_seed(3)
    model = make()
    x = torch.randn(2, 3, side, side)
    families, setting = by_labels(model, (x,), {}, Choice())
    with torch.no_grad():
        trial = Trial(model, families, setting)
        everything = range(len(families.families))
        assert trial.difference(everything) is None
        for f in everything:  # and one family at a time
            assert trial.difference([f]) is None
        missed, count = [], 0
        for name, axes in mutations(families):
            count += 1
            trial.families = replace(families, axes=axes)
            with suppress(StateError):  # a cut that refuses contradictory labels has caught them too
                if trial.difference(everything) is None:
                    missed.append(name)
    assert count > 20
    assert not missed


def test_families_survive_where_others_are_refused():
    families, _ = by_labels(LayerNormNet(), (torch.randn(2, 3, 8, 8),), {}, Choice())
    names = [family.name for family in families.families]
    # The grouped convolution ties what it reads and what it makes: whole groups of both go together.
    assert names == ["stem", "narrow", "mixed"]
    assert families.families[0].layers == ("stem", "gate", "grouped")
    left = families.without({0: "test"})
    assert [f.name for f in left.families] == names[1:]
    assert left.num_groups == families.num_groups - families.families[0].size
    assert left.frozen[-1].where == names[0]
    for axis in left.axes:
        assert int(axis.groups.max()) < left.num_groups
