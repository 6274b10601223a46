"""Grouping on real architectures: exact groups, exact costs, exact cuts, and nothing disturbed."""

import copy

import pytest
import torch
from torch import nn

import ocsfast
from ocsfast.core.errors import ConfigError, GroupingError
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.scope import Scope
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import build_cost_model
from ocsfast.ops.planning import build_plan

torchvision = pytest.importorskip("torchvision")

SIDES = {"vgg16_bn": 32, "googlenet": 64, "convnext_tiny": 64}
RATIO_MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "regnet_y_400mf"),
    *("googlenet", "convnext_tiny", "vgg16_bn"),
)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    extra = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **extra)
    side = SIDES.get(name, 64)
    return model, torch.randn(2, 3, side, side)


def counted_macs(model: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad():
        return count_macs(lambda: model.eval()(x))


def group_sets(families):
    """Each group as the set of (tensor, axis, index) that it takes."""
    members = {}
    for axis in families.axes:
        for index, number in enumerate(axis.groups.tolist()):
            if number >= 0:
                members.setdefault(number, set()).add((axis.tensor, axis.axis, index))
    return {frozenset(member) for member in members.values()}


DENSE = pytest.param("densenet121", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "googlenet", "vgg16_bn", DENSE])
def test_both_engines_find_the_same_groups(name):
    model, x = build(name)
    if name == "googlenet":  # DepGraph traces one mode and does not see the auxiliary heads
        model.aux_logits, model.aux1, model.aux2 = False, None, None
    ours = group(model, (x,), verify=False)
    theirs = group(model, (x,), engine="torch-pruning", verify=False)
    assert group_sets(ours) == group_sets(theirs)
    assert len(ours.families) == len(theirs.families)
    costs = []  # with one group less of each family
    for families in (ours, theirs):
        macs = build_cost_model(families, families.macs, "MACs")
        assert macs([f.size for f in families.families]) * len(x) == counted_macs(model, x)
        costs.append(
            sorted(macs([f.size - (f is one) for f in families.families]) for one in families.families)
        )
    assert costs[0] == costs[1]


@pytest.fixture(scope="module", params=RATIO_MODELS)
def grouped(request):
    """A network, its input and its families, once for the tests that change none of them."""
    model, x = build(request.param)
    return model, x, group(model, (x,))  # raises, or freezes by name, what is not exact


def test_ratio_is_met_by_less_than_one_group_and_cost_is_exact(grouped):
    model, x, families = grouped
    macs = build_cost_model(families, families.macs, "MACs")
    sizes = torch.tensor([f.size for f in families.families])
    dense = macs(sizes)
    assert dense * len(x) == counted_macs(model, x)
    plan = build_plan(families, dict(model.named_parameters()))
    limits = (sizes * 3 // 4).clamp(max=sizes - 1)
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(families.num_groups, generator=generator)
    member = families.family_of_groups()
    for ratio in (0.3, 0.5, 0.7):
        budget = torch.tensor(int(dense * (1 - ratio)))
        mask, cost, status = ops.partition(plan, macs, scores, limits, budget)
        assert int(status) == 0
        assert int(cost) <= budget
        kept = torch.bincount(member[~mask], minlength=len(sizes))
        # Without the last group that went, the target is missed.
        last = member[mask][scores[mask].argmax()]
        kept[last] += 1
        assert macs(kept) > budget
        subject = copy.deepcopy(model)
        left = cut_model(subject, families, mask)
        assert counted_macs(subject, x) == int(cost) * len(x)
        assert build_cost_model(left, left.macs, "MACs")([f.size for f in left.families]) == int(cost)


def test_cutting_equals_zeroing_the_slices(grouped):
    model, _, families = grouped
    assert not [f for f in families.frozen if "cutting it fails" in f.reason]
    labelled = {axis.tensor for axis in families.axes}
    parameters = dict(model.named_parameters())
    share = sum(p.numel() for n, p in parameters.items() if n in labelled) / sum(
        p.numel() for p in parameters.values()
    )
    assert share > 0.95


def test_auxiliary_heads_are_cut_with_what_they_read():
    model, x = build("googlenet")
    families = group(model, (x,))
    assert any(axis.tensor.startswith("aux1.conv") for axis in families.axes)
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        pruned[family.first] = True
    cut_model(model, families, pruned)
    assert len(model.train()(x)) == 3


def test_model_is_left_as_it_was():
    model, x = build("resnet18")
    model.layer1.eval()
    model.layer1[0].conv1.weight.requires_grad_(True)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    calls = []
    handle = model.layer2.register_forward_hook(lambda *a: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = dict(model.layer2._forward_hooks)
    rng = torch.get_rng_state()
    group(model, (x,))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert dict(model.layer2._forward_hooks) == hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.fc.weight.grad is not None
    assert model.conv1.weight.grad is None
    handle.remove()


class SmallNet(nn.Module):
    """Convolution, norm, residual, and an operator of choice in between."""

    def __init__(self, between=None):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)
        self.between = between

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        if self.between is not None:
            x = self.between(x)
        x = self.second(x)
        x = x + self.third(x)
        return self.head(x.mean((2, 3)))


def test_an_operator_without_a_rule_freezes_and_is_named():
    model = SmallNet(between=lambda x: torch.native_layer_norm(x, x.shape[-1:], None, None, 0)[0])
    families = group(model, (torch.randn(2, 3, 8, 8),))
    assert [f.name for f in families.families] == ["second"]
    reasons = {f.where: f.reason for f in families.frozen}
    assert "no rule for aten.native_layer_norm" in reasons["first"]
    assert "test_grouping.py" in reasons["first"]


def test_residual_sums_share_one_family():
    families = group(SmallNet(), (torch.randn(2, 3, 8, 8),))
    assert {f.name: f.layers for f in families.families} == {
        "first": ("first",),
        "second": ("second", "third"),
    }


def test_a_cut_that_module_code_forbids_leaves_the_layer_dense_and_named():
    model = SmallNet(between=lambda x: x.reshape(len(x), 8, 8, 8).roll(0, 0))
    model.between = lambda x: x.view(len(x), 8, 64).view(len(x), 8, 8, 8)
    families = group(model, (torch.randn(2, 3, 8, 8),))
    assert "second" in {f.name for f in families.families}
    assert "first" not in {f.name for f in families.families}
    assert any(f.where == "first" and "cutting it fails" in f.reason for f in families.frozen)


@pytest.mark.parametrize("keep", [["first"], ["fi*"], ["first.weight"]])
def test_keep_by_pattern(keep):
    families = group(SmallNet(), (torch.randn(2, 3, 8, 8),), scope=Scope(keep=keep))
    assert [f.name for f in families.families] == ["second"]
    assert any(f.where == "first" and "keep=" in f.reason for f in families.frozen)


def test_keep_by_module_and_frozen_parameters():
    model = SmallNet()
    assert len(group(model, (torch.randn(2, 3, 8, 8),), scope=Scope(keep=[model.first])).families) == 1
    model.first.weight.requires_grad_(False)
    families = group(model, (torch.randn(2, 3, 8, 8),))
    assert [f.name for f in families.families] == ["second"]


def test_keep_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"keep='frist' matches no parameter"):
        group(SmallNet(), (torch.randn(2, 3, 8, 8),), scope=Scope(keep=["frist"]))


def test_tied_weights_are_one_tensor():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    families = group(model, (torch.randn(2, 8),))
    # The tied matrix reads the model's input, so its columns stay, and with them its rows' copies.
    assert all(axis.tensor != "2.weight" for axis in families.axes)


def test_parameters_that_cannot_be_pruned_are_refused_by_name():
    model = SmallNet()
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(GroupingError, match="phase is complex64"):
        group(model, (torch.randn(2, 3, 8, 8),))


def test_a_model_that_does_not_export_goes_to_the_second_engine():
    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    model = Branching()
    families = group(model, (torch.randn(2, 3, 8, 8),))
    assert {f.name for f in families.families} == {"first", "second"}


def test_where_the_model_itself_fails_the_error_names_place_and_cause():
    class Broken(SmallNet):
        def forward(self, x):
            raise RuntimeError("sensor offline")

    with pytest.raises(
        GroupingError, match=r"the model fails on .*test_grouping\.py:\d+: sensor offline"
    ):
        group(Broken(), (torch.randn(2, 3, 8, 8),))


def test_unknown_engine():
    with pytest.raises(ConfigError, match="use one of labels, torch-pruning"):
        ocsfast.group(SmallNet(), torch.randn(2, 3, 8, 8), grouping="magic")


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda layers: nn.Sequential(*layers)])
def test_slices_of_a_list_in_a_model_that_shares_a_module(kind):
    """torch.export then names the layers by the slices, as "body.slice(1, None, None).0"."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shared, self.stem, self.head = nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)
            self.body = kind(
                [nn.Sequential(nn.Conv2d(k, k + 1, 3, padding=1), shared) for k in (4, 5, 6, 7)]
            )

        def forward(self, x):
            x = self.stem(x)
            for layer in (*self.body[:2][:1], *self.body[1:-1]):
                x = layer(x)
            return self.head(x)

    model, x = Net(), torch.randn(2, 3, 5, 5)
    families = group(model, (x,))
    found = {family.name: family.size for family in families.families}
    assert found == {"stem": 4, "body.0.0": 5, "body.1.0": 6, "body.2.0": 7}
    counted = {(a.module, a.name) for a in families.attributes}
    assert {("body.1.0", "in_channels"), ("body.2.0", "out_channels")} <= counted
    assert {product.where for product in families.macs} == {*found, "head"}
