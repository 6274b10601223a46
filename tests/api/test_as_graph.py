"""A model run from its own graph: the same function, trained and cut like any model, and more of it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers.blocks import make
from helpers.choices import third
from helpers.networks import Net, net, sgd, train
from helpers.trees import tensors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import ocsfast
from ocsfast.core.errors import CheckpointError, ConfigError, GroupingError
from ocsfast.core.families import Families
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.grouping.graph.model import graph_of
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.rules.registry import RULES

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vision_transformer(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(seed)
    model = models.VisionTransformer(32, 8, 2, 4, 32, 64, dropout=dropout, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, which would hide all before it
    return model


def of_batch(inputs: Any, samples: int) -> Any:
    """The same inputs with another number of samples."""
    generator = torch.Generator().manual_seed(samples)

    def resized(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x[:1].expand(samples, *x.shape[1:])
        return torch.randn(samples, *x.shape[1:], generator=generator)

    return pytree.tree_map(resized, inputs)


def counted_macs(model: nn.Module, *args: Any) -> int:
    return count_macs(lambda: model.eval()(*args))


def names(families: Families) -> dict[str, int]:
    return {f"{f.name} {f.kind}": f.size for f in families.families}


# -- the same function --------------------------------------------------------------------------------

BLOCKS = (
    *("c2f_chunk", "shuffle", "depthwise_multiplier", "transposed", "multihead_attention", "group_norm"),
    *("fused_attention_computed", "grouped_query_expand", "rope_attention", "class_token", "experts"),
    *("weight_norm_new", "dataclass_output", "several_inputs", "nested_inputs", "lstm"),
)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.filterwarnings("ignore:.*were assigned during export")
def test_it_computes_what_the_model_does(name):
    case = make(name)
    reference = copy.deepcopy(case.model)
    graph = graph_of(case.model, case.args, case.kwargs)
    for training in (False, True):
        reference.train(training)
        graph.train(training)
        for samples in (2, 1 if name != "class_token" else 3, 7):
            args, kwargs = of_batch((case.args, case.kwargs), samples)
            results = []
            for model in (reference, graph):
                torch.manual_seed(1)
                model.zero_grad()
                out = model(*args, **kwargs)
                sum(x.square().sum() for x in tensors(out) if x.is_floating_point()).backward()
                results.append((out, dict(model.named_parameters()), dict(model.named_buffers())))
            (a, weights, buffers), (b, own_weights, own_buffers) = results
            assert pytree.tree_structure(a) == pytree.tree_structure(b)
            torch.testing.assert_close(tensors(a), tensors(b))
            torch.testing.assert_close(buffers, own_buffers)
            for key, weight in weights.items():
                torch.testing.assert_close(weight.grad, own_weights[key].grad, msg=key)


def test_noise_of_training_and_stochastic_depth():
    ops = pytest.importorskip("torchvision.ops")

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.second, self.drop = nn.Conv2d(8, 8, 1), ops.StochasticDepth(0.5, "row")

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.norm(self.first(x)), 0.3, self.training)
            return x + self.drop(self.second(x))

    model = Noisy()
    reference, graph = copy.deepcopy(model), ocsfast.as_graph(model, torch.randn(2, 3, 4, 4))
    for seed in range(3):
        x = torch.randn(5, 3, 4, 4)
        torch.manual_seed(seed)
        expected = reference(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(graph.state_dict(), reference.state_dict())
    assert int(graph.norm.num_batches_tracked) == 3
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(graph.eval()(x), reference.eval()(x))
    graph.train().norm.eval()  # as one freezes statistics
    before = graph.norm.running_mean.clone()
    graph(x)
    assert torch.equal(graph.norm.running_mean, before)


def test_what_runs_without_gradients_still_does():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.b(x).sigmoid()
            return self.c(self.a(x) * gate)

    graph = ocsfast.as_graph(Half(), torch.randn(2, 4))
    graph(torch.randn(3, 4)).sum().backward()
    assert graph.b.weight.grad is None
    assert graph.a.weight.grad is not None
    assert graph.c.weight.grad is not None


def test_arguments_by_name_behind_others_left_out():
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.ops.aten.max_pool2d(x, 2, ceil_mode=True)
            return torch.ops.aten.topk(x, 2, sorted=False)[0].sum(-1)

    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(ocsfast.as_graph(Pooled(), x)(x), Pooled()(x))


def test_parameters_and_names_are_the_models():
    model = net()
    optimizer = sgd(model)
    model.bn1.register_buffer("spare", torch.zeros(3), persistent=False)
    graph = ocsfast.as_graph(model, torch.randn(8, 3, 8, 8))
    assert list(graph.state_dict()) == list(model.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        mine, own = dict(getattr(graph, kind)()), dict(getattr(model, kind)())
        assert mine.keys() == own.keys()
        assert all(mine[key] is own[key] for key in own)
    before = model.conv1.weight.detach().clone()
    train(graph, optimizer, 1)
    assert not torch.equal(model.conv1.weight, before)
    assert ocsfast.as_graph(graph, torch.randn(8, 3, 8, 8)) is graph


def test_copies_and_pickles():
    x = IMAGES
    graph = ocsfast.as_graph(vision_transformer(), x)
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    for other in (copy.deepcopy(graph), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), graph(x))
        assert other.conv_proj.weight is not graph.conv_proj.weight
        assert other.double()(x.double()).dtype == torch.float64
        assert torch.equal(other.float().eval()(x), graph.eval()(x))


# -- more of it may go --------------------------------------------------------------------------------


def test_a_cut_at_half_of_the_cost_trains_on():
    model = vision_transformer(dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    graph = ocsfast.as_graph(model, IMAGES).train()
    labels = torch.randint(0, 10, (4,), generator=torch.Generator().manual_seed(0))

    def steps(count: int) -> float:
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(graph(IMAGES), labels)
            loss.backward()
            optimizer.step()
        return loss.item()

    pruner = ocsfast.attach(graph, 0.5, optimizer=optimizer, example_inputs=IMAGES)
    steps(2)
    report = pruner.cut()
    assert report.cost_at_cut <= 0.5 * report.cost_dense
    assert counted_macs(graph, IMAGES[:1]) == report.cost_at_cut
    graph.train()
    first = steps(1)
    assert steps(30) < first


def test_the_one_line_cuts_a_graph():
    model = net()
    optimizer = sgd(model)
    graph = ocsfast.as_graph(model, torch.randn(8, 3, 8, 8))
    options = {"total_steps": 60, "deadline": 8}
    reports = []
    for epoch in range(12):
        train(graph, optimizer, 5, 5 * epoch)
        reports.append(ocsfast.step(graph, 0.5, **options))
    ocsfast.detach(graph)
    assert sum(report.cut for report in reports) == 1
    assert reports[-1].cost <= 0.5 * reports[-1].cost_dense
    assert graph.conv2.weight.shape[0] < 12


def test_a_wrong_rule_is_still_found(monkeypatch):
    monkeypatch.setitem(RULES, "batch_norm", lambda walk, node, args: walk.dims(node.args[0]))
    x = torch.randn(2, 3, 8, 8)
    families = group(ocsfast.as_graph(Net(), x), (x,))
    assert names(families) == {"fc1 neuron": 10}
    assert any("cutting it fails" in frozen.reason for frozen in families.frozen)


def test_what_stays_dense_is_named_by_the_users_line():
    graph = ocsfast.as_graph(Body(lambda x: x.sort(dim=1).values), torch.randn(2, 4))
    (frozen,) = group(graph, (torch.randn(2, 4),)).frozen
    assert frozen.where == "linear"
    assert "aten.sort" in frozen.reason
    assert f"{__file__}:" in frozen.reason


# -- files, inputs, outputs ---------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    graph = ocsfast.as_graph(vision_transformer(), IMAGES)
    families = group(graph, (IMAGES,))
    cut_model(graph, families, third(families))
    ocsfast.save(graph, tmp_path / "pruned.safetensors")
    fresh = ocsfast.as_graph(vision_transformer(seed=1), IMAGES)
    ocsfast.load(fresh, tmp_path / "pruned.safetensors")
    assert torch.equal(fresh.eval()(IMAGES), graph.eval()(IMAGES))
    fresh.train()(IMAGES).sum().backward()
    with pytest.raises(CheckpointError, match=r"holds a ocsfast\.as_graph\.GraphModel"):
        ocsfast.load(vision_transformer(), tmp_path / "pruned.safetensors")


def test_inputs_may_come_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
            hidden = self.a(x) * scale
            return {"out": self.b(hidden if mask is None else hidden * mask), "scale": scale}

    model = Named()
    x, mask = torch.randn(3, 4), torch.ones(3, 1)
    graph = ocsfast.as_graph(model, {"x": x, "mask": mask, "scale": 2.0})
    out = graph(scale=2.0, x=x, mask=mask)
    assert torch.equal(out["out"], model(x, 2.0, mask)["out"])
    assert out["scale"] == 2.0
    with pytest.raises(ConfigError, match=r"traced with 2\.0 where it now gets 3\.0"):
        graph(x=x, mask=mask, scale=3.0)
    with pytest.raises(ConfigError, match="0 positional arguments and x= and mask= and scale=, not 1"):
        graph(x)


def test_the_graph_follows_its_inputs_to_another_device():
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(4, device=x.device) + torch.tensor([0.0, 1.0, 2.0, 3.0]).to(x)

    graph = ocsfast.as_graph(Positions(), torch.randn(2, 4)).to("meta")
    assert graph(torch.randn(2, 4, device="meta")).device.type == "meta"


# -- what cannot be one -------------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.linear, self.body = nn.Linear(4, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.linear(x))


def autocasting(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.t()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "cannot be exported"),
        (lambda x: x.relu() if len(x) > 2 else x, "branches on their number"),
        (lambda x: x if len(x) < 4 else x + 1, "does more with their number"),
        (lambda x: x * (1 / len(x)), r"the number of samples turns 0\.5 into 0\.3"),
        (lambda x: x[: len(x) // 2 + 1], "does more with their number"),
        (autocasting, "enters autocast"),
    ],
)
def test_models_without_one_graph(body, message):
    with pytest.raises(GroupingError, match=message):
        ocsfast.as_graph(Body(body), torch.randn(2, 4))


def test_inputs_without_tensors():
    with pytest.raises(ConfigError, match="example_inputs= holds no tensor"):
        ocsfast.as_graph(net(), {"x": 3})
    with pytest.raises(ConfigError, match=r"an nn\.Module is expected"):
        ocsfast.as_graph(lambda x: x, torch.randn(2, 4))
