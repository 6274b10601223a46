"""The cut: identities, optimizers that go on as if the network had always been small, old graphs."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.choices import families_of, some
from helpers.networks import OPTIMIZERS, Net, batch, net, sgd, train
from helpers.planted import Planted, PlantedError, require_same
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast import StateError, cut_model
from ocsfast.api import check
from ocsfast.core.families import kept_indices
from ocsfast.cut import layout as slicing
from ocsfast.cut import removal as cut
from ocsfast.grouping.engines import group


def crop(tensor, name, families, pruned):
    """Written straight from the labels, one index at a time."""
    for axis in families.axes:
        if axis.tensor == name:
            stays = [i for i, g in enumerate(axis.groups.tolist()) if g < 0 or not pruned[g]]
            tensor = torch.stack([tensor.select(axis.axis, i) for i in stays], axis.axis)
    return tensor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_equal_those_of_a_small_network(name):
    model = net().double()
    optimizer = OPTIMIZERS[name](model)
    families = families_of(model)
    train(model, optimizer, 5)
    pruned = some(families)

    left = [int((~pruned[f.first : f.first + f.size]).sum()) for f in families.families]
    small = Net(tuple(left)).double()
    small.load_state_dict({k: crop(v, k, families, pruned) for k, v in model.state_dict().items()})
    other = OPTIMIZERS[name](small)
    for (key, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        other.state[q] = {
            k: crop(v, key, families, pruned).clone()
            if isinstance(v, torch.Tensor) and v.shape == p.shape
            else copy.deepcopy(v)
            for k, v in optimizer.state[p].items()
        }
    before = [id(p) for p in model.parameters()]
    cut_model(model, families, pruned, [optimizer])
    assert [id(p) for p in model.parameters()] == before
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == before
    train(model, optimizer, 20, first=5)
    train(small, other, 20, first=5)
    for (key, p), q in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        assert p.shape == q.shape
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=key)


def test_sizes_in_modules_and_the_families_left_are_the_new_ones():
    model = net()
    families = families_of(model)
    pruned = some(families)
    left = cut_model(model, families, pruned)
    a, b, c = (family.size for family in left.families)
    assert (model.conv1.out_channels, model.bn1.num_features, model.conv2.in_channels) == (a, a, a)
    assert (model.conv2.out_channels, model.fc1.in_features, model.fc1.out_features) == (b, 4 * b, c)
    again = families_of(model)
    assert [f.size for f in again.families] == [a, b, c]
    cut_model(model, left, some(left, 1))
    model(batch(0)[0])


def test_an_old_loss_does_not_break_the_next_backward():
    model = net()
    optimizer = sgd(model)
    families = families_of(model)
    train(model, optimizer, 2)
    x, y = batch(0)
    old = F.cross_entropy(model(x), y)  # its graph stays alive
    calls = []
    model.conv1.weight.register_hook(lambda grad: calls.append(grad.shape))
    cut_model(model, families, some(families), [optimizer])
    train(model, optimizer, 2)
    assert calls == [model.conv1.weight.shape] * 2
    assert old.grad_fn is not None


def test_gradients_are_cut_too():
    model = net()
    families = families_of(model)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    pruned = some(families)
    expected = {n: crop(p.grad, n, families, pruned) for n, p in model.named_parameters()}
    cut_model(model, families, pruned)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, expected[name])


def test_channels_last_and_hooks_stay():
    model = net().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    families = families_of(model)
    train(model, optimizer, 2)
    cut_model(model, families, some(families), [optimizer])
    weight = model.conv2.weight
    for tensor in (weight, weight.grad, optimizer.state[weight]["momentum_buffer"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


def test_tied_parameters_are_cut_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(4, 6)
            self.a = nn.Linear(6, 6, bias=False)
            self.b = nn.Linear(6, 6, bias=False)
            self.b.weight = self.a.weight
            self.leave = nn.Linear(6, 3)

        def forward(self, x):
            return self.leave(self.b(F.relu(self.a(F.relu(self.enter(x))))))

    torch.manual_seed(0)
    model = Tied()
    families = group(model, (torch.randn(4, 4),), {})
    if not families.families:
        pytest.skip("nothing to prune here")
    cut_model(model, families, some(families))
    assert model.a.weight is model.b.weight
    model(torch.randn(4, 4))


def _snapshot(model, optimizer):
    return (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        [id(p) for p in model.parameters()],
        repr(model),
    )


def test_a_cut_is_made_whole_or_not_at_all():
    model = net()
    optimizer = sgd(model)
    families = families_of(model)
    train(model, optimizer, 2)
    before = _snapshot(model, optimizer)
    everything = torch.ones(families.num_groups, dtype=torch.bool)
    with pytest.raises(StateError, match="lose all its"):
        cut_model(model, families, everything, [optimizer])
    with pytest.raises(StateError, match="must be"):
        cut_model(model, families, everything[1:], [optimizer])
    wrong = replace(families, attributes=tuple(replace(a, name="training") for a in families.attributes))
    with pytest.raises(StateError, match="training is None"):
        cut_model(model, wrong, some(families), [optimizer])
    model.conv2.out_channels = 99
    with pytest.raises(StateError, match=r"conv2\.out_channels is 99"):
        cut_model(model, families, some(families), [optimizer])
    model.conv2.out_channels = 12
    model.fc1 = nn.Linear(7, 10)
    with pytest.raises(StateError, match=r"fc1\.weight has shape \(10, 7\)"):
        cut_model(model, families, some(families), [optimizer])
    after = _snapshot(model, optimizer)
    for key, value in before[0].items():
        if not key.startswith("fc1"):
            assert torch.equal(value, after[0][key])


def test_a_copy_can_be_cut_alike():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    families = families_of(model)
    pruned = some(families)
    cut_model(model, families, pruned)
    cut_model(average.module, families, pruned)
    average.update_parameters(model)
    assert kept_indices(families.axes[0].groups, pruned).numel() == model.conv1.out_channels


def everything(modules, optimizer):
    """Copies of values, and the objects that hold them."""
    values, objects = [], []
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            state = optimizer.state.get(tensor, {})
            held = [x for x in (tensor, tensor.grad, *state.values()) if torch.is_tensor(x)]
            values += [x.detach().clone() for x in held]
            objects += [tensor, tensor.grad, *state.values()]
        values += [cut.size_attributes(m) for m in module.modules()]
    return values, objects


def test_a_cut_that_fails_is_undone():
    """A failure planted at each step of a check that cuts: model, copy, optimizer and pruner go on."""
    model, x = net(), batch(0)[0]
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = OPTIMIZERS["AdamW"](model)
    given = {"optimizer": optimizer, "example_inputs": x, "also": [average]}
    pruner = ocsfast.attach(model, 0.5, **given)
    train(model, optimizer, 3)
    twin, others = copy.deepcopy((model, average)), copy.deepcopy(optimizer.state_dict())
    before = everything((model, average), optimizer)
    with pytest.MonkeyPatch.context() as patch:
        planted = Planted(
            patch,
            (slicing, "crop"),
            (slicing, "replace_data"),
            (cut, "set_size"),
            (cut, "announce"),
            (pruner._processes, "rebuild"),
            (check, "decide"),
        )
        for _ in planted.each(pruner.cut):
            require_same(before, everything((model, average), optimizer))
            assert (pruner.stage, pruner.history, pruner.mask) == ("observe", [], None)
    assert planted.at > 40
    called = {"crop", "replace_data", "set_size", "announce", "rebuild", "decide"}
    assert set(planted.names) == called
    train(model, optimizer, 3)
    # As one whose cut never failed.
    optimizer = OPTIMIZERS["AdamW"](twin[0])
    optimizer.load_state_dict(others)
    given |= {"optimizer": optimizer, "also": [twin[1]]}
    ocsfast.attach(twin[0], 0.5, **given).cut()
    train(twin[0], optimizer, 3)
    for a, b in ((model, twin[0]), (average, twin[1])):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key]), key


def test_the_length_of_a_run_is_still_known_after_a_check_that_failed(monkeypatch):
    """The scheduler's place in the run is found at the first check."""
    plans = []
    for fails in (False, True):
        model = net()
        optimizer = sgd(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=batch(0)[0])
        for epoch in range(6):
            train(model, optimizer, 4, first=4 * epoch)
            schedule.step()
            if fails and epoch == 0:
                with monkeypatch.context() as patch:
                    planted = Planted(patch, (cut, "announce"))
                    planted.plant(0)
                    with pytest.raises(PlantedError):
                        pruner.cut()
            pruner.step()
        plans.append((pruner._state.progress.position, pruner._timetable.plan(pruner._state.progress)))
    assert plans[0] == plans[1]


def test_a_cut_in_inference_mode_leaves_what_trains(tmp_path):
    """As a validation loop may leave it on: what is left can still be trained."""
    model, x = net(), batch(0)[0]
    families, fresh = families_of(model), net(1)
    with torch.inference_mode():
        cut_model(model, families, some(families))
        ocsfast.save(model, tmp_path / "model.safetensors")
        ocsfast.load(fresh, tmp_path / "model.safetensors")
    for subject in (model, fresh):
        assert not any(t.is_inference() for t in (*subject.parameters(), *subject.buffers()))
        subject(x).sum().backward()


class Watched(dict):
    """A module's dictionary that remembers what is set in it."""

    def __init__(self, held):
        super().__init__(held)
        self.set = []

    def __setitem__(self, name, value):
        self.set.append((name, value))
        super().__setitem__(name, value)


def test_dictionaries_show_that_tensors_have_changed():
    """torch.compile of torch 2.10 and 2.11 looks at sizes only where a dictionary has changed."""
    model = net()
    families = families_of(model)
    parameters, buffers = Watched(model.conv2._parameters), Watched(model.bn2._buffers)
    model.conv2._parameters, model.bn2._buffers = parameters, buffers
    before = list(parameters.items()), list(buffers.items())
    cut_model(model, families, some(families))
    for held, items in ((parameters, before[0]), (buffers, before[1])):
        assert [name for name, _ in held.set] == [name for name, _ in items for _ in range(2)]
        assert [(name, id(value)) for name, value in held.items()] == [(n, id(v)) for n, v in items]
