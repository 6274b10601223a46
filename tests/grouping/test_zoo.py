"""Small models of timm and transformers: almost all of each may go, exactly, at the predicted cost."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ocsfast
from ocsfast.core.families import Families
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import count_macs
from ocsfast.ops.cost import build_cost_model

TIMM = {  # name: side
    "test_resnet": 64,
    "test_efficientnet": 64,
    "test_efficientnet_ln": 64,
    "test_convnext": 64,
    "test_nfnet": 64,
    "test_byobnet": 64,
    "test_vit": 160,
    "test_mambaout": 64,
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 19,
    "max_position_embeddings": 32,
}
IMAGES = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "num_hidden_layers": 2}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "gpt2": (
        *("GPT2LMHeadModel", "GPT2Config"),
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 19, "n_positions": 32},
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "vit": ("ViTForImageClassification", "ViTConfig", {**IMAGES, "image_size": 16, "patch_size": 4}),
    "t5": (
        *("T5ForConditionalGeneration", "T5Config"),
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 19},
    ),
    "bart": (
        *("BartForConditionalGeneration", "BartConfig"),
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "vocab_size": 19,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
}


def counted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with torch.no_grad():
        return count_macs(lambda: model.eval()(*args, **kwargs))


def prunable_share(model: nn.Module, families: Families) -> float:
    """Parameters with an axis of which some index may go, of all."""
    labelled = {axis.tensor for axis in families.axes}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(n for name, n in sizes.items() if name in labelled) / sum(sizes.values())


def check(model: nn.Module, *args: Any, **kwargs: Any) -> Families:
    model.eval().requires_grad_(True)
    families = group(model, args, kwargs)
    assert not [f for f in families.frozen if "cutting it fails" in f.reason]
    assert prunable_share(model, families) > 0.95
    macs = build_cost_model(families, families.macs, "MACs")
    model = copy.deepcopy(model).requires_grad_(False)
    assert macs([f.size for f in families.families]) * 2 == counted(model, args, kwargs)
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        pruned[family.first : family.first + max(1, family.size // 3)] = True
    left = cut_model(model, families, pruned)
    cost = build_cost_model(left, left.macs, "MACs")([f.size for f in left.families])
    assert cost * 2 == counted(model, args, kwargs)
    return families


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    check(timm.create_model(name), torch.randn(2, 3, TIMM[name], TIMM[name]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, attention):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model_class, config_class, sizes = TRANSFORMERS[name]
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = attention
    model = getattr(transformers, model_class)(config)
    ids = torch.randint(3, 19, (2, 7))
    inputs: dict[str, Any] = {"input_ids": ids}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif name in ("t5", "bart"):
        inputs["decoder_input_ids"] = ids
    families = check(model, **inputs)
    assert {"head", "width", "neuron"} <= {f.kind for f in families.families}


def test_every_model_of_the_benchmark_has_one_line():
    bench = Path(__file__).parents[2] / "bench"
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(bench))
    try:
        import zoo
    finally:
        sys.path.remove(str(bench))
    names = zoo.names()
    assert len(names["timm"]) >= 80
    assert all(len(set(known)) == len(known) for known in names.values())


def test_experts_keep_counts_that_their_operator_takes():
    """torch's grouped matrix product wants rows of whole 16 bytes: widths are multiples of 8."""
    transformers = pytest.importorskip("transformers")
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**sizes, "hidden_size": 32}))
    ids = torch.randint(3, 19, (2, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = ocsfast.attach(model, 0.4, optimizer=optimizer, example_inputs={"input_ids": ids})
    assert pruner.families.multiple == 8
    report = pruner.cut()
    assert all(kept == size or kept % 8 == 0 for _, kept, size in report.kept)
    assert any(kept < size for _, kept, size in report.kept)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
