"""Files: what comes back is what was saved, or nothing happens at all."""

import copy
import json
import os
import pickle

import pytest
import torch
from helpers.choices import families_of, some
from helpers.networks import Net, batch, net
from helpers.planted import Planted
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ocsfast import CheckpointError, cut_model, load, save
from ocsfast.api.checkpoint_format import checksum
from ocsfast.cut import layout as slicing
from ocsfast.cut import removal as cut


@pytest.fixture
def pruned():
    model = net()
    families = families_of(model)
    cut_model(model, families, some(families))
    return model


@pytest.fixture
def path(tmp_path, pruned):
    save(pruned, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path, change_structure=None, change_tensors=None):
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()["ocsfast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_structure:
        change_structure(structure)
    if change_tensors:
        change_tensors(tensors)
    if isinstance(structure, dict):
        structure["checksum"] = checksum(structure, tensors)
    save_file(tensors, path, metadata={"ocsfast": json.dumps(structure)})


def refused(model, path, said):
    before = copy.deepcopy(model.state_dict()), repr(model), vars(model.conv1).copy()
    with pytest.raises(CheckpointError) as error:
        load(model, path)
    assert said in str(error.value)
    assert repr(model) == before[1]
    assert vars(model.conv1).keys() == before[2].keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_round_trip(path, pruned, form):
    fresh = net(seed=1).to(memory_format=form)
    before = [id(p) for p in fresh.parameters()]
    load(fresh, path)
    assert [id(p) for p in fresh.parameters()] == before
    assert repr(fresh) == repr(pruned)
    assert fresh.conv2.weight.is_contiguous(memory_format=form)
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    x, _ = batch(3)
    torch.testing.assert_close(fresh.eval()(x), pruned.eval()(x))
    fresh.train()(x).sum().backward()


def test_dense_and_tied_models(tmp_path):
    save(net(), tmp_path / "dense")
    load(net(seed=1), tmp_path / "dense")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    save(tied, tmp_path / "tied")
    loose = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="tied"):
        load(loose, tmp_path / "tied")
    loose[1].weight = loose[0].weight
    load(loose, tmp_path / "tied")
    assert torch.equal(loose[0].weight, tied[0].weight)


def test_truncated_foreign_and_missing(path, tmp_path):
    whole = path.read_bytes()
    for length in (0, 4, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(net(), path, "cannot read")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(net(), path, "cannot read")
    save_file({"x": torch.zeros(1)}, path)
    refused(net(), path, "was not written by ocsfast.save")
    refused(net(), tmp_path / "nowhere", "cannot read")
    refused(net(), tmp_path, "cannot read")


def test_another_models_file(path, tmp_path):
    class Other(Net):
        pass

    refused(Other(), path, "holds a helpers.networks.Net")
    refused(Net((8, 12, 3)), path, "no cut of the model's")
    refused(net().double(), path, "Convert the model first")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["attributes"]["conv1"].update(forward=1), "size attributes"),
        (lambda s: s["attributes"].update(evil={"out_channels": 1}), "size attributes"),
        (lambda s: s["attributes"]["conv1"].update(out_channels=99), "conv1.out_channels is 99"),
        (lambda s: s["attributes"]["conv1"].update(out_channels=0), "conv1.out_channels is 0"),
        (lambda s: s["attributes"]["conv1"].update(out_channels=1), "its weight has shape"),
        (lambda s: s["attributes"]["conv1"].update(out_channels=True), "cannot be read"),
        (lambda s: s["attributes"]["conv1"].update(out_channels="8"), "cannot be read"),
        (lambda s: s.update(attributes=[]), "cannot be read"),
        (lambda s: s.update(format=99), "format 99"),
        (lambda s: s.update(more=1), "cannot be read"),
        (lambda s: s.update(aliases={"conv1.weight": "fc1.weight"}), "tied"),
        (lambda s: s.pop("class"), "cannot be read"),
    ],
)
def test_malicious_structure(path, change, said):
    rewrite(path, change_structure=change)
    refused(net(), path, said)


def test_damage_in_the_weights_is_noticed(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    refused(net(), path, "is damaged")


def test_malicious_tensors(path):
    rewrite(path, change_tensors=lambda t: t.update({"conv1.bias": torch.zeros(1)}))
    refused(net(), path, "conv1.bias has 1 entries")
    rewrite(path, change_tensors=lambda t: t.update({"conv1.bias": torch.zeros(0)}))
    refused(net(), path, "no cut of the model's")
    rewrite(path, change_tensors=lambda t: t.pop("conv1.bias"))
    refused(net(), path, "lacks conv1.bias")
    rewrite(path, change_tensors=lambda t: t.update(evil=torch.zeros(1)))
    refused(net(), path, "lacks conv1.bias")


def test_deeply_nested_header(path):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"ocsfast": "[" * 200_000})
    refused(net(), path, "cannot be read")


def test_unwritable(pruned, path, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="cannot write"):
        save(pruned, tmp_path / "no" / "such" / "folder")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(pruned, tmp_path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save(net(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_state_that_is_not_a_tensor(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(CheckpointError, match="is a dict"):
        save(Extra(2, 2), tmp_path / "x")


def test_loading_that_fails_is_undone(path, monkeypatch):
    fresh = net(seed=1)
    planted = Planted(monkeypatch, (slicing, "replace_data"), (cut, "set_size"), (cut, "announce"))
    before = copy.deepcopy(fresh.state_dict()), repr(fresh)
    for _ in planted.each(lambda: load(fresh, path)):
        assert repr(fresh) == before[1]
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, before[0][name])
    assert planted.at > 16
    assert repr(fresh) != before[1]
