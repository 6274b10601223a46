"""Adapters of peft: on a frozen base, trained with it, merged, and on a pruned model."""

from __future__ import annotations

import copy

import pytest
import torch

import ocsfast
from ocsfast import ConfigError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONFIG = transformers.BertConfig(vocab_size=40, **SIZES)
LORA = peft.LoraConfig(
    r=8, target_modules=["value", "intermediate.dense"], modules_to_save=["classifier"]
)
BATCH = {"input_ids": torch.arange(1, 21).view(2, 10)}


def adapted():
    torch.manual_seed(0)
    model = peft.get_peft_model(transformers.BertForSequenceClassification(CONFIG), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # they begin with zeros
    return model


def attached(model, ratio, families):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return ocsfast.attach(model, ratio, optimizer=optimizer, families=families), optimizer


def ranks(model):
    layers = [module for module in model.modules() if hasattr(module, "base_layer")]
    return [(len(m.lora_A["default"].weight), m.lora_B["default"].weight.shape[1]) for m in layers]


def test_of_a_frozen_base_the_ranks_of_the_adapters_go(tmp_path):
    model = adapted()
    found = ocsfast.group(model, BATCH)
    assert [(f.name.rpartition(".lora_A")[1], f.size) for f in found.families] == [(".lora_A", 8)] * 2
    reasons = {frozen.where: frozen.reason for frozen in found.frozen}
    assert reasons["base_model.model.bert.encoder.layer.0.output.dense"] == "requires_grad=False"
    with pytest.raises(ConfigError, match=r"frozen \(requires_grad=False\).* unfreeze them") as refused:
        attached(model, 0.5, found)
    assert "cannot be reached" in str(refused.value)
    pruner, optimizer = attached(model, 0.1, found)
    report = pruner.cut()
    assert all(a == b for a, b in ranks(model))
    assert sum(a for a, _ in ranks(model)) < 16
    assert any(".r['default'] = 8" in stale for stale in report.stale)  # peft reads it when it is loaded
    model(**BATCH).logits.sum().backward()
    optimizer.step()
    before = model.eval()(**BATCH).logits
    ocsfast.save(model, tmp_path / "model.safetensors")
    fresh = adapted()
    ocsfast.load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh.eval()(**BATCH).logits, before)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**BATCH).logits, before)


def test_a_base_that_trains_goes_with_its_adapters():
    model = adapted().requires_grad_(True)
    pruner, optimizer = attached(model, 0.4, ocsfast.group(model, BATCH))
    report = pruner.cut()
    assert report.cost <= 0.6 * report.cost_dense
    model(**BATCH).logits.sum().backward()
    optimizer.step()
    before = model.eval()(**BATCH).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**BATCH).logits, before)
    exported = torch.export.export(merged, (), BATCH).module()
    torch.testing.assert_close(exported(**BATCH).logits, before)
    again = peft.get_peft_model(merged, LORA)  # adapters on what is left
    again(**BATCH).logits.sum().backward()
    for module in again.modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            assert module.lora_A["default"].in_features == module.base_layer.in_features
