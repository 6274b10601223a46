"""Small networks built from the blocks that people write, as they write them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from helpers.blocks import attention, calls, convolutional, gates, modules, recurrent, statistics
from helpers.blocks.parts import Case

_CASES: tuple[Callable[[], Case], ...] = (
    convolutional.c2f_chunk,
    convolutional.c2f_split,
    convolutional.csp,
    convolutional.shuffle,
    convolutional.squeeze_excite,
    convolutional.squeeze_excite_linear,
    convolutional.pixel_shuffle,
    convolutional.pixel_unshuffle,
    convolutional.depthwise_multiplier,
    convolutional.unequal_groups,
    convolutional.weight_sharing,
    convolutional.tied_autoencoder,
    convolutional.transposed,
    convolutional.transposed_groups,
    convolutional.transposed_depthwise,
    convolutional.unet,
    convolutional.group_norm,
    convolutional.flatten_linear,
    convolutional.focus,
    convolutional.prelu,
    attention.multihead_attention,
    attention.multihead_attention_kdim,
    attention.transformer_encoder_layer,
    attention.fused_attention,
    attention.fused_attention_eager,
    attention.fused_attention_computed,
    attention.separate_attention,
    attention.rope_attention,
    attention.grouped_query_interleave,
    attention.grouped_query_expand,
    attention.grouped_query_enabled,
    attention.pooled_attention,
    attention.eager_attention,
    attention.alibi_attention,
    attention.masked_attention,
    attention.einsum_attention,
    attention.conv_attention,
    recurrent.lstm,
    recurrent.gru,
    recurrent.cells,
    recurrent.packed_lstm,
    recurrent.packed_gru,
    statistics.spatial_gate,
    statistics.channel_attention,
    statistics.clusters,
    statistics.distances,
    statistics.unpooled,
    statistics.bilinear,
    gates.glu,
    gates.swiglu_chunk,
    gates.swiglu_slice,
    gates.swiglu,
    gates.rms_norm,
    gates.layer_scale,
    gates.class_token,
    gates.mixer,
    gates.experts,
    modules.weight_norm_old,
    modules.weight_norm_new,
    modules.spectral_norm_old,
    modules.spectral_norm_new,
    modules.checkpointed,
    modules.checkpointed_always,
    modules.containers,
    modules.used_twice,
    calls.nested_outputs,
    calls.dataclass_output,
    calls.several_inputs,
    calls.mixed_leading_sizes,
    calls.nested_inputs,
)

BLOCKS: dict[str, Callable[[], Case]] = {case.__name__: case for case in _CASES}


def make(name: str) -> Case:
    """The case of that name, with the same weights each time."""
    torch.manual_seed(0)
    return BLOCKS[name]()
