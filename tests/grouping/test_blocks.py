"""Hand-made blocks: what of each may go, that it goes exactly, and why the rest stays."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.blocks import BLOCKS, make
from helpers.blocks.parts import Case, image, tokens
from helpers.choices import predicted_macs, third
from helpers.trees import tensors
from torch import Tensor, nn

from ocsfast.core.errors import GroupingError, StateError
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import count_macs

# What may go of each block: family, kind and number of groups; more may be found one day.
PRUNABLE = {
    "c2f_chunk": "stem.conv:channel:8 body.cv1.conv:channel:6 body.m.0.cv1.conv:channel:6 "
    "body.m.1.cv1.conv:channel:6 body.cv2.conv:channel:12",
    "c2f_split": "stem.conv:channel:8 body.cv1.conv:channel:6 body.m.0.cv1.conv:channel:6 "
    "body.m.1.cv1.conv:channel:6 body.cv2.conv:channel:12",
    "csp": "stem.conv:channel:8 body.cv1.conv:channel:6 body.cv2.conv:channel:6 "
    "body.cv3.conv:channel:12 body.m.0.cv1.conv:channel:6 body.m.1.cv1.conv:channel:6",
    # Equal halves and the shuffle's order tie all channels of a unit's ends to one another.
    "shuffle": "body.0.branch.0.conv:channel:6 body.1.branch.0.conv:channel:6 body.2.conv:channel:10",
    "squeeze_excite": "stem.conv:channel:8 body.0.fc1:channel:4 body.1.conv:channel:8",
    "squeeze_excite_linear": "stem.conv:channel:8 body.0.fc.0:neuron:4 body.1.conv:channel:8",
    "pixel_shuffle": "0.conv:channel:8 3.conv:channel:6",
    "pixel_unshuffle": "2.conv:channel:6",
    "depthwise_multiplier": "stem.conv:channel:8 body.1.conv:channel:10",
    "unequal_groups": "stem.conv:channel:4 body.1.conv:channel:10",
    "weight_sharing": "0.conv:channel:8 1.conv:channel:8",
    "tied_autoencoder": "encoder:neuron:12",
    "transposed": "stem.conv:channel:8 body.0:channel:10 body.3.conv:channel:6",
    "transposed_groups": "body.3.conv:channel:6",
    "transposed_depthwise": "stem.conv:channel:8 body.2.conv:channel:6",
    "unet": "inc.0:channel:4 inc.3:channel:4 down1.0:channel:8 down1.3:channel:8 down2.0:channel:16 "
    "down2.3:channel:16 up1:channel:8 conv1.0:channel:8 conv1.3:channel:8 up2:channel:4 "
    "conv2.0:channel:4 conv2.3:channel:4",
    "group_norm": "stem.conv:channel:4 body.1:channel:12",
    "flatten_linear": "0.0.conv:channel:8 1:neuron:12",
    "focus": "stem.conv:channel:6 body.conv.conv:channel:10",
    "prelu": "stem.conv:channel:8",
    "multihead_attention": "",
    "multihead_attention_kdim": "body.memory:neuron:10 body.values:neuron:6",
    "transformer_encoder_layer": "body.linear1:neuron:24",
    "fused_attention": "embed:width:16 body.qkv:head:4",
    "fused_attention_eager": "embed:width:16 body.qkv:head:4",
    "fused_attention_computed": "",
    "pooled_attention": "embed:width:16 body.qkv:head:4",
    "separate_attention": "embed:width:16 body.q:head:4",
    "rope_attention": "embed:width:16 body.q:head:4",
    "grouped_query_interleave": "embed:width:16",
    "grouped_query_expand": "embed:width:16 body.q:head:2",
    "grouped_query_enabled": "embed:width:16 body.q:head:2",
    "eager_attention": "embed:width:16 body.query:head:4",
    "alibi_attention": "embed:width:16 body.query:head:4",
    "masked_attention": "embed:width:16 attn.query:head:4",
    "einsum_attention": "embed:width:16",
    "conv_attention": "stem.conv:channel:8 body.q:channel:4",
    "lstm": "mlp.0:neuron:14",
    "gru": "mlp.0:neuron:14",
    "cells": "embed:neuron:10 gru:neuron:12 lstm:neuron:8 plain:neuron:6",
    "packed_lstm": "embed:neuron:10 rnn:neuron:12",
    "packed_gru": "embed:neuron:10 rnn:neuron:12",
    "spatial_gate": "stem.conv:width:8 body.1.conv:channel:6",
    "channel_attention": "stem.conv:channel:8 body.1.conv:channel:6",
    "clusters": "embed:width:16 body.assign:neuron:6",
    "distances": "embed:width:16 body:neuron:9 body.left:neuron:10",
    "unpooled": "stem.conv:channel:8 body.1.conv:channel:6",
    "bilinear": "left:neuron:8 pair:neuron:10",
    "glu": "embed:width:16",
    "swiglu_chunk": "embed:width:16 body.up:neuron:12",
    "swiglu_slice": "embed:width:16",
    "swiglu": "embed:width:16 body.gate_proj:neuron:12",
    "rms_norm": "embed:width:16 body.1.gate_proj:neuron:12",
    "layer_scale": "embed:width:16 body.body.0:neuron:24",
    "class_token": "patch:width:16 attn.qkv:head:4 mlp.0:neuron:32",
    "mixer": "embed:width:16 body.0.mix.0:neuron:10 body.0.glu.up:neuron:12 body.1.mix.0:neuron:10 "
    "body.1.glu.up:neuron:12",
    "experts": "embed:width:16 body:neuron:10",
    "weight_norm_old": "",
    "weight_norm_new": "",
    "spectral_norm_old": "",
    "spectral_norm_new": "",
    "checkpointed": "stem.conv:channel:8 body.body.cv1.conv:channel:6 body.body.cv3.conv:channel:12",
    "checkpointed_always": "stem.conv:channel:8 body.body.cv1.conv:channel:6 "
    "body.body.cv3.conv:channel:12",
    "containers": "stem.conv:channel:8 body.stages.a.1.0.conv:channel:8 body.stages.b.0.conv:channel:12",
    "used_twice": "stem.conv:channel:8 body.out.conv:channel:6",
    "nested_outputs": "stem.conv:channel:8 body.conv:channel:8",
    "dataclass_output": "stem.conv:channel:8",
    "several_inputs": "visual.0.conv:channel:8 words:neuron:8 mlp.0:neuron:12",
    "mixed_leading_sizes": "embed:width:16 body.query:head:4",
    "nested_inputs": "lateral.0.conv:channel:8",
}

# What stays unless a rule is found for it: the tensor, and the reason given for the layer or place.
DENSE = {
    "shuffle": ("stem.conv.weight", "ambiguous|two groups at once"),
    "pixel_shuffle": ("1.conv.weight", "pixel_shuffle"),
    "pixel_unshuffle": ("0.conv.weight", "pixel_unshuffle"),
    "transposed_groups": ("stem.conv.weight", "two groups at once"),
    "prelu": ("body.0.weight", "prelu"),
    "multihead_attention": ("embed.weight", "embed_dim|embedding dimension"),
    "multihead_attention_kdim": ("embed.weight", "embed_dim|embedding dimension"),
    "transformer_encoder_layer": ("embed.weight", "embed_dim|embedding dimension"),
    "fused_attention_computed": ("body.qkv.weight", "cutting it fails: .*shape"),
    "grouped_query_interleave": ("body.q.weight", "repeat_interleave"),
    "bilinear": ("right.weight", "two others shrink already"),
    "glu": ("body.up.weight", r"aten\.glu"),
    "swiglu_slice": ("body.up.weight", "cutting it fails"),
    "mixer": ("body.0.mix.2.weight", "aten.add"),
    "weight_norm_old": ("body.0.weight_v", "_weight_norm"),
    "weight_norm_new": ("body.0.parametrizations.weight.original1", "_weight_norm"),
    "spectral_norm_old": ("body.0.weight_orig", r"aten\.dot"),
    "spectral_norm_new": ("body.0.parametrizations.weight.original", "vdot"),
}


def counted_macs(case: Case) -> int:
    return count_macs(lambda: case.model.eval()(*case.args, **case.kwargs))


def train_a_step(case: Case) -> None:
    case.model.train()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-3)
    loss = sum(x.square().mean() for x in tensors(case.model(*case.args, **case.kwargs)))
    loss.backward()
    for name, parameter in case.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.isfinite().all(), name
    optimizer.step()
    assert all(x.isfinite().all() for x in tensors(case.model(*case.args, **case.kwargs)))


def test_every_block_has_an_expectation():
    assert set(BLOCKS) == set(PRUNABLE)
    assert set(DENSE) <= set(BLOCKS)


@pytest.mark.filterwarnings("ignore:.*were assigned during export")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_cut_exactly_and_trains_on(name):
    case = make(name)
    families = group(case.model, case.args, case.kwargs)
    found = {f"{f.name}:{f.kind}:{f.size}" for f in families.families}
    assert set(PRUNABLE[name].split()) <= found
    if name in DENSE:
        tensor, reason = DENSE[name]
        assert tensor in dict(case.model.named_parameters())
        if not any(a.tensor == tensor and a.axis == 0 and (a.groups >= 0).any() for a in families.axes):
            assert any(re.search(reason, f.reason) for f in families.frozen), families.frozen
    else:
        assert not [f for f in families.frozen if "cutting it fails" in f.reason]
    samples = len(tensors((case.args, case.kwargs))[0])
    before = tensors(case.model.eval()(*case.args, **case.kwargs))
    assert predicted_macs(families) * samples == counted_macs(case)
    left = cut_model(case.model, families, third(families))
    after = tensors(case.model.eval()(*case.args, **case.kwargs))
    assert [x.shape for x in after] == [x.shape for x in before]
    assert predicted_macs(left) * samples == counted_macs(case)
    train_a_step(case)


@pytest.mark.parametrize("name", ["c2f_chunk", "eager_attention", "weight_norm_old", "several_inputs"])
def test_a_model_in_use_is_left_as_it_was(name):
    """After a training step, when modules hold tensors with a history."""
    case = make(name)
    train_a_step(case)
    case.model.eval()
    before = tensors(case.model(*case.args, **case.kwargs))
    state = {k: v.clone() for k, v in case.model.state_dict().items()}
    attributes = {k: dict(vars(m)) for k, m in case.model.named_modules()}
    group(case.model, case.args, case.kwargs)
    for key, module in case.model.named_modules():
        for name, value in attributes[key].items():
            assert type(vars(module)[name]) is type(value), f"{key}.{name}"
    assert all(torch.equal(state[k], v) for k, v in case.model.state_dict().items())
    for a, b in zip(before, tensors(case.model(*case.args, **case.kwargs)), strict=True):
        assert torch.equal(a, b)


# -- what cannot be pruned says so --------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def with_weight(change: Any) -> nn.Sequential:
    model = mlp()
    model[0].weight = nn.Parameter(change(model[0].weight.detach()), requires_grad=False)
    return model


def meta_buffer() -> nn.Sequential:
    model = mlp()
    model.register_buffer("table", torch.zeros(3, device="meta"))
    return model


REFUSED = {
    "meta": (lambda: mlp().to("meta"), r"0\.weight is on the meta device: materialize"),
    "meta buffer": (meta_buffer, "table is on the meta device: materialize"),
    "sparse": (lambda: with_weight(Tensor.to_sparse), r"0\.weight is not a dense tensor"),
    "sparse rows": (lambda: with_weight(Tensor.to_sparse_csr), r"0\.weight is not a dense tensor"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2)), "run a forward pass"),
    "complex": (lambda: with_weight(lambda w: w.cfloat()), r"0\.weight is complex64"),
    "eight bits": (lambda: with_weight(lambda w: w.to(torch.int8)), r"0\.weight is int8"),
    "narrow floats": (lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), r"is float8_e4m3fn"),
    "exported": (lambda: torch.export.export(mlp(), (torch.ones(2, 7),)).module(), "one mode only"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*Sparse CSR")
def test_what_cannot_be_grouped_says_so(kind):
    build, message = REFUSED[kind]
    with pytest.raises(GroupingError, match=message):
        group(build(), (torch.ones(2, 7),))


def test_a_buffer_that_holds_nan_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    model[1].running_mean.fill_(float("nan"))
    with pytest.raises(StateError, match=r"1\.running_mean holds NaN: the training has diverged"):
        group(model, (torch.ones(2, 3, 8, 8),))


def test_inputs_without_a_sample_are_refused():
    with pytest.raises(GroupingError, match="hold no sample"):
        group(mlp(), (torch.ones(0, 7),))


@pytest.mark.parametrize("wrap", ["whole", "in place", "part", "replicas"])
def test_wrapped_models_are_grouped_as_what_is_inside(wrap):
    model: nn.Module = mlp()
    if wrap == "whole":
        model = torch.compile(model, backend="eager")
    elif wrap == "in place":
        model.compile(backend="eager")
    elif wrap == "part":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model = nn.DataParallel(model)
    families = group(model, (torch.ones(2, 7),))
    assert [f.size for f in families.families] == [8, 6]
    cut_model(model, families, third(families))
    assert model(torch.ones(2, 7)).shape == (2, 3)


def test_a_module_that_holds_a_shard_says_so():
    """Only the module's own pass could gather it, and it does not run."""

    class Shard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("unsharding needs a process group")

    with pytest.raises(GroupingError, match="unsharding needs a process group"):
        group(Shard(), (torch.ones(2, 7),))


def test_unused_layers_stay():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.spare = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    families = group(Spare(), (torch.ones(2, 7),))
    assert [f.name for f in families.families] == ["body.0", "body.2"]
    assert not [axis for axis in families.axes if axis.tensor.startswith("spare")]
    reasons = {f.where: f.reason for f in families.frozen}
    assert reasons["spare.0.weight"] == "not used in the traced forward pass"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_costs_are_of_one_sample(batch):
    costs = predicted_macs(group(mlp(), (torch.ones(batch, 7),)))
    assert costs == 7 * 8 + 8 * 6 + 6 * 3


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.filterwarnings("ignore:.*were assigned during export")
def test_costs_of_operators_without_a_rule(name):
    """Both directions, six steps: a product with the input and one with the state for each gate."""
    case = make(name)
    gates = 4 if name == "lstm" else 3
    recurrent = 2 * 6 * gates * 12 * (10 + 12)
    rest = 6 * 7 * 10 + 24 * 14 + 14 * 3
    assert predicted_macs(group(case.model, case.args, verify=False)) == recurrent + rest


def test_inputs_without_values_of_their_own():
    """None, numbers and strings pass; the batch may be one of images or of tokens."""
    (x,) = image()
    assert group(nn.Conv2d(3, 4, 1), (x,)).families == ()
    (x,) = tokens(7)
    assert [f.size for f in group(mlp(), (x,), {}).families] == [8, 6]
