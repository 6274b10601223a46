"""Models of transformers: the config tells the truth after a cut, and the saved model loads."""

import pytest
import torch

import ocsfast
from ocsfast.api.arguments import families_of
from ocsfast.core.config import Config

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64}
IDS = torch.arange(18).view(2, 9)


def llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), {
        "input_ids": IDS
    }


def gpt2():
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS}


def t5():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    return transformers.T5ForConditionalGeneration(config), inputs


def vit():
    config = transformers.ViTConfig(**SIZES, intermediate_size=64, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


MODELS = {"llama": llama, "bert": bert, "gpt2": gpt2, "t5": t5, "vit": vit}


def cut(model, inputs, config):
    """Cut a third of each family; where they need not be uniform, of the later ones a single group."""
    families = families_of(model, ((), inputs), config)
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for f, family in enumerate(families.families):
        count = max(1, family.size // 3) if config.uniform or f < 4 else 1
        pruned[family.first : family.first + count] = True
    ocsfast.cut_model(model, families, pruned)
    return families


@pytest.mark.parametrize("name", list(MODELS))
def test_uniform_models_save_and_load_as_transformers_does(name, tmp_path):
    model, inputs = MODELS[name]()
    families = cut(model, inputs, Config(uniform=True))
    kinds = {family.kind for family in families.families}
    assert "neuron" in kinds
    if name == "t5":  # its number of heads derives nothing else
        assert "head" in kinds
        assert model.config.num_heads == 3
    if name == "llama":  # no dimension is as large as its numbers of heads, of which a group has two
        assert "head" in kinds
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("name", list(MODELS))
def test_what_no_config_can_say_is_cut_too_and_said(name, caplog, tmp_path):
    model, inputs = MODELS[name]()
    dense = model.config.to_dict()
    families = cut(model, inputs, Config())
    assert model.config.to_dict() == dense
    assert {"head", "width", "neuron"} <= {family.kind for family in families.families}
    assert "from_pretrained cannot read it" in caplog.text
    ocsfast.save(model, tmp_path / "pruned.safetensors")
    fresh = type(model)(model.config)
    ocsfast.load(fresh, tmp_path / "pruned.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.eval()(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0
        )


def test_tied_embeddings_stay_tied():
    model, inputs = gpt2()
    cut(model, inputs, Config())
    assert model.lm_head.weight is model.transformer.wte.weight
