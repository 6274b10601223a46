"""The dry run says what a cut would do, and changes nothing."""

import dataclasses
import re
from types import MethodType

import pytest
import torch
from helpers.networks import Net, batch, net, sgd, train
from torch import nn

import ocsfast
from ocsfast.core.errors import ConfigError, GroupingError
from ocsfast.grouping.macs import count_macs

X = torch.randn(2, 3, 8, 8)


def test_what_it_says_is_what_a_cut_gives():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ocsfast.inspect(model, X, 0.4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [f.name for f in found.families] == ["conv1", "conv2", "fc1"]
    assert [f.kind for f in found.families] == ["channel", "channel", "neuron"]
    assert [f.groups for f in found.families] == [8, 12, 10]
    assert found.prunable > 0.95
    assert found.macs * len(X) == count_macs(lambda: model.eval()(X))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    # The ratio's prediction is what the first check of a run chooses, by the same weights.
    optimizer = sgd(model, lr=0.0)
    pruner = ocsfast.attach(model, 0.4, optimizer=optimizer, example_inputs=X)
    train(model, optimizer, 1)
    report = pruner.cut()
    assert found.macs_left == report.cost_at_cut
    assert tuple(f.kept for f in found.families) == tuple(kept for _, kept, _ in report.kept)
    assert found.parameters_left == sum(p.numel() for p in model.parameters())


def test_the_largest_ratio_is_where_attach_begins_to_refuse():
    found = ocsfast.inspect(net(), X, 0.99, max_family_ratio=0.5)
    assert found.macs_left is None
    assert "cannot be reached" in str(found)
    model = net()
    for ratio, fails in ((found.largest_ratio - 1e-3, False), (found.largest_ratio + 1e-3, True)):
        options = {"optimizer": sgd(model), "example_inputs": X, "max_family_ratio": 0.5}
        if fails:
            with pytest.raises(ConfigError, match="cannot be reached"):
                ocsfast.attach(model, ratio, **options)
        else:
            ocsfast.attach(model, ratio, **options)
            ocsfast.detach(model)


def test_what_stays_dense_is_named_with_the_line_that_freezes_it():
    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(self.first(x).sort(dim=1).values)

    found = ocsfast.inspect(Sorting(), torch.randn(3, 4))
    assert found.families == ()
    assert found.largest_ratio == 0
    reasons = {frozen.where: frozen.reason for frozen in found.frozen}
    assert "aten.sort" in reasons["first"]
    assert "test_inspection.py" in reasons["first"]
    assert "first: aten.sort" in str(found)
    assert reasons["second"] == "model output"


class Refusing(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.a, self.what = nn.Linear(3, 3), what

    def forward(self, x):
        if self.what == "branch":
            return self.a(x) if x.sum() > 0 else self.missing
        if self.what == "numpy":
            return self.a(x).numpy()
        return self.a(x).view(5, 3)


def refusal(model, inputs):
    with pytest.raises(GroupingError) as refused:
        ocsfast.inspect(model, inputs)
    return str(refused.value)


def test_a_model_that_no_engine_can_trace(caplog):
    """Where it failed in the user's code, what was done to the inputs, and the way out."""
    said = refusal(Refusing("branch"), -torch.ones(2, 3))
    assert re.search(
        r"fails on example_inputs= \(\(2, 3\)\): .* at .*test_inspection\.py:\d+: .*missing", said
    )
    ocsfast.inspect(Refusing("branch"), torch.ones(2, 3))  # with the second engine
    said = next(r.getMessage() for r in caplog.records if r.name == "ocsfast")
    assert re.search(r"cannot be exported: .* at .*test_inspection\.py:\d+: .*Trying the second", said)
    way = "example_inputs= of the form that inference takes, or"
    assert f"branches on its data: pass {way} forward= (" in said
    assert "samples" not in said
    said = refusal(Refusing("numpy"), torch.ones(5, 3))
    line = Refusing.forward.__code__.co_firstlineno + 4
    assert f"test_inspection.py:{line}: .numpy() is not supported for tensor subclasses. Pass " in said
    assert f"Pass {way} in forward= what" in said
    assert len(said) < 600
    logged = [r.getMessage() for r in caplog.records if r.name == "ocsfast"]
    assert all(message.partition(". Trying")[0] in said for message in logged[-1:])
    with pytest.raises(GroupingError) as refused:
        ocsfast.as_graph(Refusing("view"), torch.ones(5, 3))
    line += 1
    assert f"test_inspection.py:{line}: shape '[5, 3]' is invalid for input of size 6 (with 2 " in str(
        refused.value
    )
    assert str(refused.value).endswith("samples, made of the example inputs' 5)")
    (note,) = ocsfast.inspect(Refusing("view"), torch.ones(5, 3)).notes
    assert f"test_inspection.py:{line}: shape '[5, 3]' is invalid for input of size 6: costs" in note
    said = refusal(nn.Linear(3, 3), torch.ones(2, 4))  # no line of the user's: none is named
    assert said.startswith("the model fails on example_inputs= ((2, 4)): RuntimeError: ")


def test_forward_may_call_the_model():
    def shapes(model, **options):
        found = ocsfast.inspect(model, torch.zeros(2, 3, 8, 8), 0.3, **options)
        return [(f.name, f.groups, f.kept) for f in found.families], found.macs

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    plain = shapes(model)
    assert plain[0]
    assert shapes(model, forward=lambda model, x: model(x).flatten(1)) == plain
    assert shapes(model, forward=lambda model, x: {"y": model.forward(x)}) == plain
    assert "forward" not in vars(model)
    patched = MethodType(lambda self, x: self[2](self[1](self[0](x))) * 2, model)
    model.forward = patched
    assert shapes(model, forward=lambda model, x: model(x).flatten(1)) == plain
    assert model.forward is patched


def test_options_are_checked():
    with pytest.raises(ConfigError, match="kinds= holds 'heads'"):
        ocsfast.inspect(net(), X, kinds=("heads",))
    with pytest.raises(ConfigError, match="only='nope' matches no parameter"):
        ocsfast.inspect(net(), X, only="nope")
    with pytest.raises(ConfigError, match="outputs='logits' matches no output"):
        ocsfast.inspect(net(), X, outputs="logits")
    with pytest.raises(ConfigError, match="ratio"):
        ocsfast.inspect(net(), X, 1.5)


def test_only_some_layers():
    found = ocsfast.inspect(net(), X, only=("conv2", "fc*"))
    assert [f.name for f in found.families] == ["conv2", "fc1"]
    assert ("conv1", "only= leaves it out") in [(f.where, f.reason) for f in found.frozen]


def test_time_limit():
    with pytest.raises(GroupingError, match="more than time_limit=1e-09 s, and was at"):
        ocsfast.inspect(net(), X, time_limit=1e-9)


def test_what_the_graph_may_free_is_said():
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.second(self.first(x).view(-1, 2, 4).flatten(1))

    found = ocsfast.inspect(Literal(), torch.randn(3, 4))
    assert found.graph_may
    assert "try ocsfast.as_graph(model, x)" in str(found)
    graph = ocsfast.as_graph(Literal(), torch.randn(3, 4))
    assert not ocsfast.inspect(graph, torch.randn(3, 4)).graph_may
    assert not ocsfast.inspect(net(), X).graph_may


def test_outputs_in_dataclasses():
    @dataclasses.dataclass
    class Features:
        last: torch.Tensor
        names: None = None

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        features: Features

    class Wrapped(Net):
        def forward(self, x):
            y = super().forward(x)
            return Output(y, Features(y * 2))

    plain = ocsfast.inspect(net(), batch(0)[0])
    wrapped = ocsfast.inspect(Wrapped(), batch(0)[0])
    assert [f.groups for f in wrapped.families] == [f.groups for f in plain.families]


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_code_or_no_weights_to_cut():
    x = batch(0)[0]
    quantized = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    for model, said in (
        (torch.jit.script(net()), "the model is scripted"),
        (nn.Sequential(torch.jit.trace(net().eval(), x)), "its part 0 is scripted"),
        (quantized, "its part fc1 is quantized"),
    ):
        with pytest.raises(GroupingError, match=said):
            ocsfast.inspect(model, x)
