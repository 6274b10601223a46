"""The proof catches every wrong label: mutate one vector at a time, each must be seen."""

import os
import random
from dataclasses import replace

import pytest
import torch
from helpers.blocks.attention import SeparateAttention
from helpers.blocks.convolutional import C2f, UNet
from helpers.blocks.gates import Mixer, SwiGlu, Vit
from helpers.blocks.parts import Classifier, Conv, Sequence
from helpers.blocks.recurrent import Cells, Packed
from helpers.blocks.statistics import ChannelAttention, Clusters, Distances, Pooled, SpatialGate
from torch import nn
from torch.utils import _pytree as pytree

from ocsfast.core.errors import StateError
from ocsfast.grouping.engines import by_labels
from ocsfast.grouping.proof.trials import Trial
from ocsfast.grouping.proof.weights import random_input
from ocsfast.grouping.scope import Scope

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
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)


def convnext():
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(12, 20, 1), block(20, None, 1)])


def mobile():
    blocks = [[1, 16, 1, 1], [3, 24, 2, 2]]
    return torchvision.models.MobileNetV2(width_mult=0.5, inverted_residual_setting=blocks)


def vit():
    return Vit(16)


def grouped_query():
    """Two residual blocks with rotary positions, half as many heads for keys and values."""
    attention = SeparateAttention(2, "expand", rope=True)
    return Sequence(nn.Sequential(attention, nn.RMSNorm(16), SwiGlu()))


def yolo():
    return Classifier(nn.Sequential(C2f(8, 12), Conv(12, 12, 3, 2), C2f(12, 8, 1, by_size=True)), 8, 8)


def shuffle():
    return torchvision.models.ShuffleNetV2([1, 2, 1], [8, 16, 16, 16, 24], num_classes=5)


def densenet():
    return torchvision.models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5)


def mobile_v3():
    """Squeeze and excite, hard swish."""
    config = torchvision.models.mobilenetv3.InvertedResidualConfig
    plain = config(16, 3, 16, 16, True, "RE", 2, 1, 1.0)
    wide = config(16, 5, 24, 24, True, "HS", 1, 1, 1.0)
    return torchvision.models.MobileNetV3([plain, wide], last_channel=20, num_classes=5)


def mixer():
    return Sequence(nn.Sequential(Mixer(), Mixer()))


def unet():
    return UNet(4)


def over_channels():
    """Extremes and a softmax over channels, places of maxima."""
    return Classifier(
        nn.Sequential(SpatialGate(), Conv(8, 8, 3), ChannelAttention(), Pooled(8), Conv(8, 6)), 8, 6
    )


def over_features():
    return Sequence(nn.Sequential(Clusters(), Distances()))


def cells():
    return Cells()


def packed():
    return Packed(nn.LSTM)


def swin():
    timm = pytest.importorskip("timm")
    return timm.models.SwinTransformer(
        *(16, 2, 3, 5), embed_dim=8, depths=(2, 1), num_heads=(2, 4), window_size=4
    )


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 17}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def t5():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 17}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return transformers.T5EncoderModel(config)


class Vae(nn.Module):
    """What it samples is multiplied by one head and added to the other; a learned scale divides."""

    def __init__(self):
        super().__init__()
        self.encode, self.mean, self.deviation = nn.Linear(7, 12), nn.Linear(12, 6), nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.ones(12))
        self.decode, self.out = nn.Linear(6, 12), nn.Linear(12, 7)

    def forward(self, x):
        x = self.encode(x).relu() / self.scale
        mean = self.mean(x)
        z = mean + torch.randn_like(mean) * self.deviation(x).exp()
        return self.out(self.decode(z).relu())


def image(side):
    return torch.randn(2, 3, side, side)


MODELS = {
    LayerNormNet: lambda: image(8),
    resnet: lambda: image(32),
    convnext: lambda: image(32),
    mobile: lambda: image(32),
    vit: lambda: image(8),
    grouped_query: lambda: torch.randn(2, 6, 7),
    yolo: lambda: image(8),
    shuffle: lambda: image(32),
    densenet: lambda: image(32),
    mobile_v3: lambda: image(32),
    mixer: lambda: torch.randn(2, 6, 7),
    unet: lambda: image(12),
    over_channels: lambda: image(8),
    over_features: lambda: torch.randn(2, 6, 7),
    cells: lambda: torch.randn(2, 3, 7),
    packed: lambda: (torch.randint(20, (2, 6)), torch.tensor([4, 6])),
    swin: lambda: image(16),
    llama: lambda: torch.randint(17, (2, 6)),
    t5: lambda: torch.randint(17, (2, 6)),
    Vae: lambda: torch.randn(2, 7),
}
# Mutations of one model: a fixed sample, or all of them.
MOST = 10_000 if "OCSFAST_ALL_MUTATIONS" in os.environ else 12
TRIES = 6


def mutations(families):
    """Each label vector shifted by one group, and each vector dropped."""
    for n, axis in enumerate(families.axes):
        live = axis.groups[axis.groups >= 0]
        shifted = axis.groups.clone()
        shifted[axis.groups >= 0] = live.roll(1)
        others = families.axes[:n], families.axes[n + 1 :]
        if not torch.equal(shifted, axis.groups):
            moved = replace(axis, groups=shifted)
            yield f"shift {axis.tensor}[{axis.axis}]", (*others[0], moved, *others[1])
        yield f"drop {axis.tensor}[{axis.axis}]", (*others[0], *others[1])


def exact(trial):
    """The families that the module's own code lets go, and that go exactly; no other is silent."""
    failed = {}
    for f in range(len(trial.families.families)):
        difference = trial.difference([f])
        if difference is not None:
            assert not difference.startswith(("outputs", "an output")), difference
            failed[f] = difference
    return trial.families.without(failed)


def caught(trial):
    """How many tries it takes to see that something is wrong; 0: it is never seen.

    One try may miss a shift between two units that the input at hand leaves dead (ReLU), so each
    has an input, and a cut, of its own.
    """
    for number in range(1, TRIES + 1):
        try:
            if trial.difference(range(len(trial.families.families))) is not None:
                return number
        except StateError:  # a cut that refuses contradictory labels has caught them too
            return number
        trial.inputs = pytree.tree_map(random_input, (trial.setting.args, trial.setting.kwargs))
    return 0


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_every_mutation_is_caught(make):
    torch.manual_seed(3)
    model, x = make(), MODELS[make]()
    families, setting = by_labels(model, x if isinstance(x, tuple) else (x,), {}, Scope())
    with torch.no_grad():
        trial = Trial(model, families, setting)
        families = trial.families = exact(trial)
        assert trial.difference(range(len(families.families))) is None
        every = list(mutations(families))
        assert len(every) > 20
        tries = {}
        for name, axes in random.Random(0).sample(every, min(MOST, len(every))):
            trial.families = replace(families, axes=axes)
            tries[name] = caught(trial)
    print(f"{len(tries)} of {len(every)} mutations,", sum(n == 1 for n in tries.values()), "at once")
    assert not [name for name, number in tries.items() if number == 0]
    assert sum(number == 1 for number in tries.values()) >= 0.8 * len(tries)


def test_families_survive_where_others_are_refused():
    families, _ = by_labels(LayerNormNet(), (torch.randn(2, 3, 8, 8),), {}, Scope())
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
