"""A model that is another one in training: outputs, layers and widths that evaluation never shows."""

import copy
import dataclasses
import logging
from collections import OrderedDict

import pytest
import torch
from helpers.untouched import attach, unchanged
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import ocsfast
from ocsfast.grouping.engines import by_labels
from ocsfast.grouping.proof.trials import Trial, proved
from ocsfast.grouping.scope import Scope
from ocsfast.grouping.trace.export import trace

CLASSES, WIDTH = 4, 12


def image(samples=2):
    return torch.randn(samples, 3, 8, 8)


class Deep(nn.Module):
    """Deep supervision: the auxiliary head runs in both modes and is returned in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.aux, self.head = nn.Conv2d(WIDTH, CLASSES, 1), nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x):
        x = F.relu(self.a(x))
        deep = self.aux(x)
        out = self.head(F.relu(self.b(x)))
        return [out, deep] if self.training else out


class Features(Deep):
    """A feature map for distillation, returned in training."""

    def forward(self, x):
        feature = F.relu(self.b(F.relu(self.a(x))))
        out = self.head(feature)
        return (out, feature) if self.training else out


class Hooked(Features):
    """The same, out of a hook: the pass returns the logits alone in both modes."""

    def __init__(self):
        super().__init__()
        self.store = {}
        self.b.register_forward_hook(lambda module, args, output: self.store.update(b=output))

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


class Masked(Deep):
    """Channel dropout by hand: only training code reads the width."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.training:
            x = x * (torch.rand(self.width, device=x.device) > 0.1)[:, None, None]
        return self.head(F.relu(self.b(x)))


class Stateful(nn.Module):
    """Keeps its hidden state from one pass to the next."""

    def __init__(self):
        super().__init__()
        self.enter, self.again, self.out = nn.Linear(8, 16), nn.Linear(WIDTH, 16), nn.Linear(16, 3)
        self.back = nn.Linear(16, WIDTH)
        self.register_buffer("empty", torch.zeros(1, WIDTH))
        self.state = None

    def forward(self, x):
        state = self.empty.expand(len(x), -1) if self.state is None else self.state
        x = F.relu(self.enter(x) + self.again(state))
        self.state = self.back(x).detach()
        return self.out(x)


def cut_to(model, ratio, x=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = image() if x is None else x
    pruner = ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=x, **options)
    return pruner, pruner.cut(), optimizer


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


@pytest.mark.parametrize("graph", [False, True], ids=["module", "graph"])
def test_an_output_of_training_keeps_its_shape(graph):
    torch.manual_seed(0)
    model = Deep()
    if graph:
        model = ocsfast.as_graph(model, image())
    _, report, optimizer = cut_to(model, 0.8)
    assert report.cost <= 0.2 * report.cost_dense
    assert model.aux.weight.shape[0] == model.head.weight.shape[0] == CLASSES
    out = model.train()(image())
    assert [tuple(x.shape) for x in out] == [(2, CLASSES, 8, 8)] * 2
    target = torch.randint(0, CLASSES, (2, 8, 8))
    sum(F.cross_entropy(x, target) for x in out).backward()
    optimizer.step()
    reasons = {frozen.where: frozen.reason for frozen in ocsfast.inspect(Deep(), image()).frozen}
    assert reasons == {"head": "model output", "aux": "model output in training"}


@dataclasses.dataclass
class Seen:
    feature: object


class InObject(Hooked):
    """The same, in a new object each time."""

    def __init__(self):
        super().__init__()
        self.b._forward_hooks.clear()

    def forward(self, x):
        feature = self.b(F.relu(self.a(x)))
        self.store["b"] = Seen({"deep": (feature,)})
        return self.head(F.relu(feature))


@pytest.mark.parametrize("make", [Features, Hooked, InObject])
def test_features_for_distillation_keep_their_channels(make):
    torch.manual_seed(0)
    model, teacher = make(), make()
    _, report, optimizer = cut_to(model, 0.4)
    assert report.cost <= 0.6 * report.cost_dense
    assert model.b.weight.shape[0] == WIDTH
    assert model.a.weight.shape[0] < WIDTH
    x = image()
    seen = [m.train()(x) for m in (model, teacher)]
    if make is InObject:
        pairs = [tuple(m.store["b"].feature["deep"][0] for m in (model, teacher))]
    elif make is Hooked:
        assert ocsfast.inspect(model, image(), again=True).frozen[0].reason == "left behind in store.b"
        pairs = [(model.store["b"], teacher.store["b"])]
    else:
        pairs = zip(*seen, strict=True)
    sum(F.mse_loss(a, b.detach()) for a, b in pairs).backward()
    optimizer.step()


def test_what_is_left_behind_is_named_by_its_place():
    torch.manual_seed(0)
    names = {f.reason for f in ocsfast.inspect(nn.Sequential(Hooked(), nn.Flatten()), image()).frozen}
    assert "left behind in 0.store.b" in names


def test_outputs_frees_what_is_left_behind():
    torch.manual_seed(0)
    model = Hooked()
    cut_to(model, 0.8, outputs=("0",))
    assert model.b.weight.shape[0] < WIDTH


def test_a_width_that_only_training_reads_follows_the_cut():
    torch.manual_seed(0)
    model = Masked()
    _, report, optimizer = cut_to(model, 0.6)
    assert report.cost <= 0.4 * report.cost_dense
    assert model.width == model.a.weight.shape[0] < WIDTH
    model.train()(image()).sum().backward()
    optimizer.step()


def test_a_state_that_the_next_pass_reads_keeps_its_width():
    torch.manual_seed(0)
    model, x = Stateful(), torch.randn(2, 8)
    model(x)
    cut_to(model, 0.5, x)
    assert model.state.shape == (2, WIDTH)
    assert model.back.weight.shape[0] == WIDTH
    model(x)
    assert model(x).shape == (2, 3)


def test_the_proof_compares_in_training_too():
    """A label that is wrong in training alone does not pass."""

    class Reversed(Deep):
        def forward(self, x):
            x = F.relu(self.a(x))
            y = self.b(x.flip(1)) if self.training else self.b(x)
            return self.head(F.relu(y))

    model = Reversed()
    families, setting = by_labels(model, (image(),), {}, Scope())
    assert [run.training for run in setting.runs] == [False, True]
    # In training channel k meets the weights of channel 11 - k: the two go together or not at all.
    assert families.families[0].size == WIDTH // 2
    assert families == proved(model, families, setting)
    only, alone = by_labels(Deep(), (image(),), {}, Scope())
    with torch.no_grad():
        trial = Trial(model, only, setting)
        assert trial.difference([0]).startswith("outputs up to")
        assert alone.runs[0].training is False
        assert trial.difference([0]).endswith("in training")


class InEvaluationOnly(Deep):
    def forward(self, x, target=None):
        if self.training and target is None:
            raise ValueError("targets should be given")
        x = F.relu(self.a(x))
        deep = self.aux(x)  # training returns it
        out = self.head(F.relu(self.b(x)))
        return F.cross_entropy(out, target) + F.cross_entropy(deep, target) if self.training else out


class InTrainingOnly(Deep):
    def forward(self, x):
        x = F.relu(self.a(x))
        out = self.head(F.relu(self.b(x)))
        return out if self.training else out.argmax(1).numpy()


@pytest.mark.parametrize(
    ("make", "mode"), [(InEvaluationOnly, "evaluation"), (InTrainingOnly, "training")]
)
def test_a_mode_that_cannot_be_traced_is_named(make, mode, caplog):
    torch.manual_seed(0)
    model = make()
    found = ocsfast.inspect(model, image())
    (note,) = found.notes
    assert note.startswith(f"only the {mode} mode could be traced")
    assert f"note: {note}" in str(found)
    cut_to(model, 0.5)
    said = [r.levelno for r in caplog.records if r.name == "ocsfast" and note in r.message]
    assert said == [logging.WARNING]
    assert model.aux.weight.shape[0] == CLASSES  # the other mode may return it
    assert model.head.weight.shape[0] == CLASSES
    assert model.a.weight.shape[0] < WIDTH
    if make is InEvaluationOnly:
        model.train()(image(), torch.zeros(2, 8, 8, dtype=torch.long)).backward()


def test_a_graph_that_differs_by_dropout_alone_is_walked_once():
    class Dropping(nn.Sequential):
        def __init__(self):
            norm = nn.BatchNorm2d(WIDTH)
            super().__init__(nn.Conv2d(3, WIDTH, 3), norm, nn.Dropout(0.3), nn.Conv2d(WIDTH, 4, 3))

    _, setting = by_labels(Dropping(), (image(),), {}, Scope())
    assert len(setting.runs) == 1
    _, setting = by_labels(Masked(), (image(),), {}, Scope())
    assert len(setting.runs) == 2


def test_training_is_compared_without_chance():
    """Dropout, noise and drawn masks give a cut model and a zeroed one the same."""

    class Drawing(Deep):
        def forward(self, x):
            x = F.dropout(F.relu(self.a(x)), 0.5, self.training)
            if self.training:
                x = x + torch.randn_like(x) * torch.rand(x.shape[0], 1, 1, 1)
                x = x * x.new_empty(len(x), x.shape[1], 1, 1).bernoulli_(0.8)
            return self.head(F.relu(self.b(x)))

    model = Drawing()
    families, setting = by_labels(model, (image(),), {}, Scope())
    assert len(setting.runs) == 2
    assert len(families.families) == 2
    with torch.no_grad():
        assert Trial(model, families, setting).difference([0, 1]) is None
    assert copy.deepcopy(model).training


class Lora(nn.Linear):
    """An adapter that is merged into the weight where the mode is set, as loralib does."""

    def __init__(self, i, o):
        super().__init__(i, o)
        self.down, self.up = nn.Parameter(torch.randn(2, i)), nn.Parameter(torch.randn(o, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.merged = not mode
        return self

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


def test_a_mode_that_changes_weights_is_put_back():
    torch.manual_seed(0)
    model = nn.Sequential(Lora(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(2, 8)
    assert not unchanged(model, lambda: ocsfast.inspect(model, x, 0.3), lambda: attach(model, x))
    assert ocsfast.inspect(model, x).families[0].groups == 16
    model.eval()
    assert not unchanged(model, lambda: ocsfast.inspect(model, x, 0.3))


def test_a_mode_that_freezes_is_put_back():
    class Freezing(nn.Sequential):
        def train(self, mode=True):
            return super().train(mode).requires_grad_(mode)

    model = Freezing(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(2, 8)
    assert not unchanged(model, lambda: attach(model, x))


class Named(OrderedDict):
    """An output that torch takes apart without a name for what is inside, as those of diffusers."""


pytree.register_pytree_node(
    Named,
    lambda named: (list(named.values()), list(named)),
    lambda values, names: Named(zip(names, values, strict=True)),
)


class Both(Deep):
    def forward(self, x):
        x = F.relu(self.a(x))
        self.kept = Named(feature=x, more=[x.sum()])
        return Named(logits=self.head(F.relu(self.b(x))), others=(self.aux(x),))


def test_outputs_that_are_registered_without_names():
    model, x = Both(), image()
    traced = trace(model, (x,), {}, training=False)
    assert traced.outputs == ("logits", "others.0")
    assert traced.left == ("kept['feature']", "kept['more'][0]")
    families = ocsfast.group(model, x, outputs=("logits",))
    assert {f.name: f.size for f in families.families} == {"a": WIDTH, "b": WIDTH, "aux": CLASSES}
