"""Tiny configurations of transformers' models, each with both ways of computing attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, LENGTH = 99, 9
IMAGE, PATCH = 32, 8

# Sizes under the names that most configurations share.
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**COMMON, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION = {**COMMON, "image_size": IMAGE, "patch_size": PATCH}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
STAGES = {"depths": [1, 1], "num_labels": 5}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "vocab_size": VOCABULARY,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_mel_bins": 8,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
SEGFORMER = {
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 24,
    "num_labels": 5,
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}

# name: (model class, configuration class, its arguments, what it reads)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "text"),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | {"num_key_value_heads": 2}, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, "text"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED, "text"),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        TEXT | {"num_key_value_heads": 2, "pad_token_id": 0},
        "text",
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS, "text"),
    "qwen3-moe": (
        *("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "text",
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**TEXT, **MLA}, "text"),
    "gpt2": (
        *("GPT2LMHeadModel", "GPT2Config"),
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
        "text",
    ),
    "gptneox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, "text"),
    "opt": ("OPTForCausalLM", "OPTConfig", TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "text"),
    "bloom": (
        *("BloomForCausalLM", "BloomConfig"),
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        "text",
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", MAMBA, "text"),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT, "text"),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", TEXT, "text"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT, "text"),
    "distilbert": (
        *("DistilBertForSequenceClassification", "DistilBertConfig"),
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY},
        "text",
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**TEXT, "embedding_size": 16},
        "text",
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**TEXT, "embedding_size": 16},
        "text",
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**TEXT, "pad_token_id": 0},
        "text",
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "seq2seq"),
    "t5-gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        "seq2seq",
    ),
    "bart": (
        *("BartForConditionalGeneration", "BartConfig"),
        {**WHISPER, "max_position_embeddings": 64},
        "seq2seq",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 5}, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**VISION, "num_labels": 5}, "image"),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "num_labels": 5}, "image"),
    "swin": (
        *("SwinForImageClassification", "SwinConfig"),
        {
            **STAGES,
            "image_size": IMAGE,
            "patch_size": 2,
            "embed_dim": 16,
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "image",
    ),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, "image"),
    "convnextv2": (
        *("ConvNextV2ForImageClassification", "ConvNextV2Config"),
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_labels": 5},
        "image",
    ),
    "resnet": (
        *("ResNetForImageClassification", "ResNetConfig"),
        {**STAGES, "embedding_size": 8, "hidden_sizes": [16, 32]},
        "image",
    ),
    "clip-vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**VISION, "projection_dim": 24},
        "image",
    ),
    "clip": ("CLIPModel", "CLIPConfig", {}, "clip"),
    "whisper-encoder": ("WhisperModel", "WhisperConfig", WHISPER, "audio"),
    "wav2vec2": (
        *("Wav2Vec2ForCTC", "Wav2Vec2Config"),
        {
            **COMMON,
            "vocab_size": 20,
            "conv_dim": [16, 16],
            "conv_stride": [4, 4],
            "conv_kernel": [8, 4],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        "wave",
    ),
}
# Those that compute no attention, or in one way only.
ONE_WAY = {"mamba", "gemma2", "bloom", "swin", "segformer", "convnextv2", "resnet"}
MODELS = [
    name if name in ONE_WAY else f"{name} {how}"
    for name in ARCHITECTURES
    for how in (("",) if name in ONE_WAY else ("eager", "sdpa"))
]


def transformers_model(full_name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    name, _, how = full_name.partition(" ")
    model_class, config_class, sizes, reads = ARCHITECTURES[name]
    if name == "clip":
        vision, text = {**VISION, "projection_dim": 24}, {**TEXT, "projection_dim": 24}
        sizes = {"vision_config": vision, "text_config": text, "projection_dim": 24}
    config = getattr(transformers, config_class)(**sizes)
    if how:
        config._attn_implementation = how
    model = getattr(transformers, model_class)(config)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    image = torch.randn(2, 3, IMAGE, IMAGE)
    inputs: dict[str, dict[str, Any]] = {
        "text": {"input_ids": ids},
        "seq2seq": {"input_ids": ids, "decoder_input_ids": ids},
        "image": {"pixel_values": image},
        "clip": {"input_ids": ids, "pixel_values": image, "attention_mask": torch.ones_like(ids)},
        "wave": {"input_values": torch.randn(2, 400)},
    }
    if reads == "audio":
        return model.get_encoder(), (torch.randn(2, config.num_mel_bins, 32),), {}
    return model, (), inputs[reads]
