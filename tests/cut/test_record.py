"""A model knows that it was cut: nothing cuts it again unless that is asked for by name."""

import copy
import io
import logging
import pickle

import pytest
import torch
from helpers.networks import Net, batch, net, sgd, train

import ocsfast
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.cut.record import record_of

RATIO = 0.5


def cut(model, ratio=RATIO, **options):
    optimizer = sgd(model)
    x, _ = batch(0)
    pruner = ocsfast.attach(model, ratio, optimizer=optimizer, example_inputs=x, **options)
    train(model, optimizer, 2)
    return pruner.cut()


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def pruned():
    model = Net((16, 24, 20))
    return model, cut(model)


def by_file(model, tmp_path):
    fresh = Net((16, 24, 20))
    ocsfast.save(model, tmp_path / "cut.safetensors")
    ocsfast.load(fresh, tmp_path / "cut.safetensors")
    return fresh


def by_state_dict(model, tmp_path):
    fresh = Net((16, 24, 20))
    ocsfast.fit_on_load(fresh, batch(0)[0])
    fresh.load_state_dict(model.state_dict())
    return fresh


def by_attached_state_dict(model, tmp_path):
    fresh = Net((16, 24, 20))
    ocsfast.attach(fresh, RATIO, optimizer=sgd(fresh), example_inputs=batch(0)[0])
    fresh.load_state_dict(model.state_dict())
    ocsfast.detach(fresh)
    return fresh


def by_copy(model, tmp_path):
    return copy.deepcopy(model)


def by_pickle(model, tmp_path):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model, tmp_path):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def by_graph(model, tmp_path):
    return ocsfast.as_graph(copy.deepcopy(model), batch(0)[0])


WAYS = (by_file, by_state_dict, by_attached_state_dict, by_copy, by_pickle, by_torch_save, by_graph)


@pytest.mark.parametrize("way", WAYS)
def test_a_cut_model_rests(pruned, way, tmp_path, caplog):
    model, report = pruned
    again = way(model, tmp_path)
    assert record_of(again)["left"]["flops"] == report.cost
    assert record_of(again)["dense"]["flops"] == report.cost_dense
    before, optimizer = shapes(again), sgd(again)
    for k in range(6):
        train(again, optimizer, 4, first=4 * k)
        now = ocsfast.step(again, RATIO, total_steps=24)
    assert shapes(again) == before
    assert (now.stage, now.cost, now.cost_dense) == ("pruned", report.cost, report.cost_dense)
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("was cut already" in message and "again=True" in message for message in said) == 1
    with pytest.raises(StateError, match="again=True"):
        ocsfast.attach(again, RATIO, optimizer=optimizer, example_inputs=batch(0)[0])


def test_cutting_further_means_of_the_dense_model(pruned):
    model, report = copy.deepcopy(pruned[0]), pruned[1]
    x, _ = batch(0)
    with pytest.raises(ConfigError, match=r"ratio=0\.5 is reached already"):
        ocsfast.attach(model, RATIO, optimizer=sgd(model), example_inputs=x, again=True)
    further = cut(model, 0.7, again=True)
    assert further.cost_dense == report.cost_dense
    assert 0.25 * report.cost_dense < further.cost <= 0.3 * report.cost_dense
    assert record_of(model)["dense"] == record_of(pruned[0])["dense"]
    assert record_of(model)["left"]["flops"] == further.cost


def test_the_one_line_cuts_further_when_it_is_asked_to():
    model = Net((16, 24, 20))
    optimizer = sgd(model)
    for epoch, ratio in enumerate([0.5] * 12 + [0.7] * 12):
        train(model, optimizer, 5, first=5 * epoch)
        if epoch == 12:
            with pytest.raises(ConfigError, match="again=True cuts it further"):
                ocsfast.step(model, ratio)
        options = {"again": True, "epochs": 24} if ratio == 0.7 else {"epochs": 12}
        report = ocsfast.step(model, ratio, **options)
        if epoch == 11:
            first = report
    assert first.stage == report.stage == "pruned"
    assert 0.45 * report.cost_dense < first.cost <= 0.5 * report.cost_dense
    assert report.cost <= 0.3 * report.cost_dense
    assert report.cost_dense == first.cost_dense


def test_inspect_speaks_of_the_dense_model(pruned):
    model, report = pruned
    x, _ = batch(0)
    found = ocsfast.inspect(model, x, 0.7)
    assert found.gone == 1 - report.cost / report.cost_dense
    assert found.macs_left <= 0.3 * report.cost_dense < found.macs == report.cost
    assert found.largest_ratio > ocsfast.inspect(Net((16, 24, 20)), x).largest_ratio
    assert "cut before: 0.5" in str(found)
    assert ocsfast.inspect(model, x, 0.2).macs_left == report.cost  # that much is gone


def test_other_targets_are_known_too():
    model = Net((16, 24, 20))
    dense = sum(p.numel() for p in model.parameters())
    cut(model, 0.4)
    left = sum(p.numel() for p in model.parameters())
    record = record_of(model)
    assert (record["dense"]["params"], record["left"]["params"]) == (dense, left)
    assert (record["dense"]["bytes"], record["left"]["bytes"]) == (4 * dense, 4 * left)
    wanted = 0.5 + 0.5 * (1 - left / dense)
    report = cut(model, wanted, target="params", again=True)
    assert report.cost_dense == dense
    assert report.cost == sum(p.numel() for p in model.parameters()) <= (1 - wanted) * dense


def test_a_cut_that_fails_leaves_no_mark(monkeypatch):
    model = net()
    pruner = ocsfast.attach(model, RATIO, optimizer=sgd(model), example_inputs=batch(0)[0])
    monkeypatch.setattr(pruner._processes, "rebuild", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pruner.cut()
    assert record_of(model) is None


def test_a_dense_model_has_no_record(tmp_path):
    model = net()
    ocsfast.save(model, tmp_path / "dense.safetensors")
    fresh = net(1)
    ocsfast.load(fresh, tmp_path / "dense.safetensors")
    assert record_of(fresh) is None
    assert record_of(ocsfast.as_graph(fresh, batch(0)[0])) is None


def test_averages_know_too(pruned):
    model = Net((16, 24, 20))
    average = torch.optim.swa_utils.AveragedModel(model)
    cut(model, also=[average])
    assert record_of(average.module) == record_of(model)


def test_a_model_inside_of_a_wrapper_rests(pruned):
    class Wrapped(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.scale = model, torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.model(x) * self.scale

    wrapped = Wrapped(copy.deepcopy(pruned[0]))
    before, optimizer = shapes(wrapped), sgd(wrapped)
    train(wrapped, optimizer, 2)
    assert ocsfast.step(wrapped, RATIO).stage == "pruned"
    assert shapes(wrapped) == before
    teacher = torch.nn.ModuleDict({"teacher": wrapped.requires_grad_(False), "student": net()})
    assert record_of(teacher) is None


def test_a_file_cuts_a_model_that_has_a_pruner(pruned, tmp_path):
    ocsfast.save(pruned[0], tmp_path / "cut.safetensors")
    model = Net((16, 24, 20))
    optimizer = sgd(model)
    pruner = ocsfast.attach(model, RATIO, optimizer=optimizer, example_inputs=batch(0)[0])
    train(model, optimizer, 2)
    ocsfast.load(model, tmp_path / "cut.safetensors")
    assert pruner.stage == "pruned"
    train(model, optimizer, 2)  # its momentum was cut with it
    assert pruner.step().cost == pruned[1].cost
    assert shapes(model) == shapes(pruned[0])


def test_compiled_models_are_saved_as_what_is_inside(pruned, tmp_path):
    compiled = torch.compile(copy.deepcopy(pruned[0]))
    ocsfast.save(compiled, tmp_path / "cut.safetensors")
    fresh = Net((16, 24, 20))
    ocsfast.load(torch.compile(fresh), tmp_path / "cut.safetensors")
    assert shapes(fresh) == shapes(pruned[0])


def test_a_config_says_so_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 19}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    dense = transformers.LlamaForCausalLM(copy.deepcopy(config))
    x = {"input_ids": torch.randint(0, 19, (2, 7))}
    options = {"optimizer": sgd(model), "example_inputs": x, "uniform": True}
    report = ocsfast.attach(model, 0.3, **options).cut()
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert record_of(loaded)["left"]["flops"] == report.cost
    assert record_of(dense) is None
    loaded.resize_token_embeddings(25)
    assert record_of(loaded)["left"]["flops"] == report.cost
    other = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert record_of(other)["left"]["flops"] == report.cost
    dense.config = loaded.config  # a config may be shared with a model that is not cut
    assert record_of(dense) is None
