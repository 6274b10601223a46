"""`inspect` and `attach` leave a model as it was, whatever its pass writes, and where they refuse."""

from __future__ import annotations

import collections
import copy
import functools
import random
import sys
import threading
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.core.errors import OcsfastError


def deep(thing, seen=None):
    """Equal for equal things only: the same objects, of the same contents."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor):
        held = thing.detach()
        value = (type(thing).__name__, tuple(thing.shape), str(thing.dtype), thing.requires_grad)
        grad = None if not thing.is_leaf or thing.grad is None else (id(thing.grad), deep(thing.grad))
        return (*value, id(thing), held.cpu().numpy().tobytes() if held.numel() else b"", grad)
    if isinstance(thing, np.ndarray):
        return ("array", thing.tobytes())
    if id(thing) in seen and not isinstance(thing, (int, float, str, bytes, type(None))):
        return ("seen", id(thing))
    seen.add(id(thing))
    if isinstance(thing, dict):
        return (id(thing), type(thing), [(deep(k, seen), deep(v, seen)) for k, v in thing.items()])
    if isinstance(thing, (list, tuple, collections.deque)):
        return (id(thing), type(thing), [deep(v, seen) for v in thing])
    if isinstance(thing, set):
        return (id(thing), sorted(map(repr, thing)))
    if isinstance(thing, types.FunctionType):
        cells = thing.__closure__ or ()
        return (id(thing), [deep(cell.cell_contents, seen) for cell in cells])
    if isinstance(thing, types.MethodType):
        return (id(thing.__func__), deep(thing.__self__, seen))
    if isinstance(thing, nn.Module) or type(thing).__module__ == __name__:
        return (id(thing), type(thing), deep(vars(thing), seen))
    return thing if isinstance(thing, (int, float, str, bytes, bool, type(None))) else id(thing)


def of_classes(model):
    kinds = {kind for m in model.modules() for kind in type(m).__mro__}
    mine = (kind for kind in kinds if not kind.__module__.startswith(("torch.", "builtins")))
    return {
        f"{kind.__module__}.{kind.__qualname__}": {
            name: deep(value) for name, value in vars(kind).items() if not name.startswith("__")
        }
        for kind in mine
    }


def everything(model):
    state = {name: deep(value) for name, value in model.state_dict(keep_vars=True).items()}
    chance = (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [np.random.get_state()[k] for k in (0, 2, 3, 4)],
        np.random.get_state()[1].tolist(),
    )
    modes = [module.training for module in model.modules()]
    return state, modes, chance, deep(vars(model)), of_classes(model), deep(GLOBAL)


def unchanged(model, *calls):
    """Make the calls; what they refuse is returned."""
    refused = []
    for call in calls:
        before = everything(model)
        try:
            call()
        except OcsfastError as error:
            refused.append(str(error))
        ocsfast.detach(model)  # the hooks of a pruner are all that attach adds
        for a, b in zip(before, everything(model), strict=True):
            assert a == b
    return refused


# -- a model that writes wherever it can ------------------------------------------------------------

GLOBAL = {}


class Store:
    """An object of the user's own."""

    def __init__(self):
        self.last = None
        self.all = collections.deque(maxlen=3)


class Writer(nn.Module):
    grid = None
    shared: ClassVar[dict] = {}
    count = 0

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.last, self.listed, self.named, self.steps = None, [None, "x"], {"k": 1}, 0
        self.nested = [{"deep": ([],)}]
        self.store = Store()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.plain = torch.arange(3.0)
        closed, own = [], None

        def hook(module, args, output):
            nonlocal own
            own = output
            closed.append(output)
            GLOBAL["b"] = output

        self.b.register_forward_hook(hook)
        self.b.register_forward_pre_hook(self.counted)

    def counted(self, module, args):
        self.steps += 1
        self.nested[0]["deep"][0].append(args[0])

    def forward(self, x):
        if self.last is not None and self.last.shape[1] != 8:
            raise RuntimeError("a feature of another width")
        x = F.relu(self.a(x))
        self.last, self.listed[0], self.named["feature"] = x, x, x * 2
        Writer.grid, Writer.count = x.mean(), Writer.count + 1
        Writer.shared["x"], type(self).fresh = x, x
        self.store.last = x
        self.store.all.append(x)
        self.new_one = x
        random.random()
        np.random.rand()
        self.b.flag = self.training
        f = F.relu(self.b(x))
        return self.o(f.mean((2, 3)) + torch.rand(1))


def attached(model, x, ratio=0.3, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=x, **options)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_nothing_that_a_pass_writes_stays(trained):
    torch.manual_seed(0)
    model, x = Writer(), torch.randn(2, 3, 8, 8)
    model.b.eval()  # a mode of its own
    if trained:  # what it keeps then belongs to a graph: no leaves, which deepcopy refuses
        model(x).sum().backward()
    assert not unchanged(
        model,
        lambda: ocsfast.inspect(model, x, 0.3),
        lambda: attached(model, x, outputs=("0",)),
        lambda: ocsfast.as_graph(model, x),
        lambda: ocsfast.group(model, x),
    )
    assert trained or not hasattr(Writer, "fresh")
    assert trained or Writer.grid is None


def test_nothing_stays_after_a_refusal(caplog):
    class Branching(Writer):
        def forward(self, x):
            y = super().forward(x)
            return y * 2 if bool(y.sum() > 0) else y

    model, x, wide = Branching(), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    other = Writer()
    refused = unchanged(
        model,
        lambda: ocsfast.inspect(model, x),
        lambda: attached(model, x, outputs=("0",)),
        lambda: ocsfast.as_graph(model, x),
        lambda: ocsfast.inspect(other, wide),
        lambda: attached(model, x, ratio=0.999, forward=Writer.forward),
        lambda: attached(model, x, time_limit=1e-9),
        lambda: attached(model, x, keep=["nothing of the kind"]),
    )
    assert len(refused) == 6  # the second engine inspects the first


def test_a_buffer_that_a_pass_changes_in_place_is_put_back():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.passes += 1
            return self.o(F.relu(self.a(x)))

    model, x = Counting(), torch.randn(2, 8)
    assert not unchanged(model, lambda: ocsfast.as_graph(model, x), lambda: ocsfast.inspect(model, x))
    assert int(model.passes) == 0


@functools.lru_cache
def grid(size, device):
    return torch.arange(size, dtype=torch.float32, device=device)


MADE = {}


def remembered(size):
    """A helper with a cache by hand, that the forward pass calls."""
    if size not in MADE:
        MADE[size] = torch.arange(size)
    return MADE[size]


def test_caches_of_the_functions_that_a_pass_calls():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        @functools.lru_cache  # noqa: B019
        def scale(self, size):
            return torch.ones(size)

        def forward(self, x):
            x = x + grid(x.shape[1], x.device) + remembered(x.shape[1]) * self.scale(8)
            return self.o(F.relu(self.a(x)))

    model, x = Positions(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x).families[0].groups == 16
    assert MADE == {}
    assert grid.cache_info().currsize == Positions.scale.cache_info().currsize == 0
    model(x).sum().backward()  # with tensors that hold data
    before = MADE[8]
    assert not unchanged(model, lambda: ocsfast.inspect(model, x), lambda: attached(model, x))
    assert MADE[8] is before


class Positions:
    """A cache that is an object of the module, or a class."""

    table: ClassVar[dict] = {}

    def __init__(self):
        self.own = {}

    def get(self, size):
        if size not in self.own:
            self.own[size] = torch.arange(size) / 100
        return self.own[size]

    @classmethod
    def shared(cls, size):
        if size not in cls.table:
            cls.table[size] = torch.arange(size) / 100
        return cls.table[size]


class Slotted:
    __slots__ = ("kept",)

    def get(self, size):
        if not hasattr(self, "kept"):
            self.kept = torch.arange(size) / 100
        return self.kept


CACHE, SLOTS = Positions(), Slotted()


def of_a_global(size):
    global MADE_ONCE
    if "MADE_ONCE" not in globals():
        MADE_ONCE = torch.arange(size) / 100
    return MADE_ONCE


@pytest.mark.parametrize("get", [CACHE.get, Positions.shared, SLOTS.get, of_a_global])
def test_caches_anywhere_in_the_module(get):
    class Using(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            if get is of_a_global:
                x = x + of_a_global(8)
            elif get == Positions.shared:
                x = x + Positions.shared(8)
            else:
                x = x + (SLOTS if get == SLOTS.get else CACHE).get(8)
            return self.o(F.relu(self.a(x)))

    model, x = Using(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x).families[0].groups == 16
    assert Positions.table == CACHE.own == {}
    assert not hasattr(SLOTS, "kept")
    assert "MADE_ONCE" not in globals()
    assert type(model(x)) is torch.Tensor
    Positions.table.clear()
    CACHE.own.clear()
    if hasattr(SLOTS, "kept"):
        del SLOTS.kept
    globals().pop("MADE_ONCE", None)


def test_stores_that_are_long_or_far():
    class Manager:
        def __init__(self):
            self.stores = {"b": Store()}

    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            self.log = [torch.zeros(())] * 20_000
            self.trainer = types.SimpleNamespace(manager=Manager())
            self.b.register_forward_hook(lambda m, args, out: self.keep(out))

        def keep(self, out):
            self.trainer.manager.stores["b"].all.append(out)

        def forward(self, x):
            x = F.relu(self.a(x))
            self.log.append(x.mean())
            return self.o(F.relu(self.b(x)))

    model, x = Far(), torch.randn(2, 8)
    model(x).sum().backward()
    count = len(model.log), len(model.trainer.manager.stores["b"].all)
    found = ocsfast.inspect(model, x)
    assert {f.where: f.reason for f in found.frozen}["b"].startswith("left behind in ")
    assert (len(model.log), len(model.trainer.manager.stores["b"].all)) == count


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


def test_a_mode_that_changes_weights():
    torch.manual_seed(0)
    model = nn.Sequential(Lora(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(2, 8)
    assert not unchanged(model, lambda: ocsfast.inspect(model, x, 0.3), lambda: attached(model, x))
    assert ocsfast.inspect(model, x).families[0].groups == 16
    model.eval()
    assert not unchanged(model, lambda: ocsfast.inspect(model, x, 0.3))


def test_a_mode_that_freezes():
    class Freezing(nn.Sequential):
        def train(self, mode=True):
            return super().train(mode).requires_grad_(mode)

    model = Freezing(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(2, 8)
    assert not unchanged(model, lambda: attached(model, x))


def test_generators_of_a_module_are_put_back():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.random, self.numpy = random.Random(0), np.random.default_rng(0)
            self.torch = torch.Generator().manual_seed(0)

        def forward(self, x):
            x = x * (1 + self.random.random() + float(self.numpy.random()))
            return self.o(F.relu(self.a(x)))

    def states(model):
        return (
            model.random.getstate(),
            model.numpy.bit_generator.state,
            model.torch.get_state().tolist(),
        )

    model, x = Drawing(), torch.randn(2, 8)
    before = states(model)
    ocsfast.inspect(model, x)
    assert states(model) == before


def test_a_trainer_behind_a_hook_is_not_copied():
    class Trainer:
        def __init__(self, model):
            self.model, self.rows = model, torch.zeros(2**23)
            self.index = {k: (k,) for k in range(20_000)}
            self.images = [torch.zeros(2**20) for _ in range(40)]
            self.last = None

        def see(self, module, args, output):
            self.last = output

        def __deepcopy__(self, memo):
            copied_to = Trainer.__new__(Trainer)
            for name, value in vars(self).items():
                setattr(copied_to, name, copy.deepcopy(value, memo))
            assert copied_to.rows is self.rows
            assert copied_to.index is self.index
            shared = [a is b for a, b in zip(copied_to.images, self.images, strict=True)]
            assert sum(shared) > 20
            return copied_to

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    trainer = Trainer(model)
    model[0].register_forward_hook(trainer.see)
    found = ocsfast.inspect(model, torch.randn(2, 8), outputs=("0",))
    assert found.families[0].groups == 16
    assert trainer.last is None


def test_a_call_of_its_own():
    class Calling(nn.Sequential):
        def __call__(self, x):
            return super().__call__(x).log_softmax(-1)

    model = Calling(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    assert ocsfast.inspect(model, torch.randn(2, 8)).families[0].groups == 16


def test_a_tensor_that_is_no_leaf_does_not_stop_the_proof():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o, self.kept = nn.Linear(8, 16), nn.Linear(16, 3), {"deep": [None]}

        def forward(self, x):
            x = F.relu(self.a(x))
            self.kept["deep"][0] = x
            return self.o(x)

    model, x = Keeping(), torch.randn(2, 8)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    assert ocsfast.inspect(model, x, outputs=("0",)).families[0].groups == 16


def test_what_refuses_to_be_copied_is_shared_in_the_proof():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
            self.lock, self.math, self.rows = threading.Lock(), torch, (k for k in range(3))
            self.held = {"file": sys.__stderr__}

        def forward(self, x):
            with self.lock:
                return self.o(self.math.relu(self.a(x)))

    model, x = Locked(), torch.randn(2, 8)
    assert ocsfast.inspect(model, x).families[0].groups == 16
    assert not unchanged(model, lambda: ocsfast.inspect(model, x))


# -- models of the table ------------------------------------------------------------------------------

BENCH = Path(__file__).parents[2] / "bench"
FEW = ("torchvision/googlenet", "timm/test_resnet", "transformers/llama eager")
SMALL = {  # fifty models of docs/models.md
    "torchvision": (
        *("alexnet", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "resnet18"),
        *("shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0", "googlenet", "inception_v3"),
    ),
    "timm": None,
    "transformers": None,
}


def zoo():
    sys.path.insert(0, str(BENCH))
    try:
        import zoo
    finally:
        sys.path.remove(str(BENCH))
    return zoo


def leaves_as_it_was(library, name):
    model, args, kwargs = zoo().build(library, name)
    inputs = kwargs or tuple(args)
    unchanged(model, lambda: ocsfast.inspect(model, inputs, 0.2), lambda: attached(model, inputs, 0.2))


@pytest.mark.parametrize("full", FEW)
def test_models_are_left_as_they_were(full):
    library, _, name = full.partition("/")
    pytest.importorskip(library)
    leaves_as_it_was(library, name)


@pytest.mark.slow
def test_many_models_are_left_as_they_were():
    """Forty at least, of all three libraries."""
    tried = 0
    for library, names in SMALL.items():
        pytest.importorskip(library)
        for name in names or zoo().names()[library][:: 8 if library == "timm" else 4]:
            leaves_as_it_was(library, name)
            tried += 1
    assert tried >= 40
