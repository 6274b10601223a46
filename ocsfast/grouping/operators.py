"""What becomes of an operator that has no rule of its own.

Most of torch's operators need none. Those that work element by element share one rule; those that torch
composes of others are spelled out by `composed`; some compute no tensor. The rest freeze what flows into
them, and `FREEZES` says of those that users meet why that is right.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ocsfast.grouping.rules.registry import RULES
from ocsfast.grouping.trace.nodes import is_pointwise, operator_name

# These freeze nothing although they have no rule: they compute no tensor, or only compare.
HARMLESS = frozenset(
    {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "_print", "_version", "allclose"}
    | {"sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "sym_is_contiguous", "size", "numel"}
    | {"is_same_size", "is_pinned", "is_set_to", "dense_dim", "sparse_dim", "record_stream"}
    | {"dim", "stride", "storage_offset", "get_device", "result_type", "promote_types", "can_cast"}
    | {"is_complex", "is_conj", "is_contiguous", "is_distributed", "is_floating_point", "is_inference"}
    | {"is_leaf", "is_neg", "is_signed", "is_vulkan_available", "output_nr", "retains_grad"}
    | {"retain_grad", "sym_constrain_range", "sym_constrain_range_for_size"}
)

BY_VALUE = "how many entries it returns, or which, depends on their values"
CLASSES = "its targets number the classes"
MATRICES = "every entry of its result depends on all rows and columns"
MEMORY = "it reads or writes memory by place, whatever dimension that belongs to"
ORDER = "it orders or counts all the values it gets"

# Pattern of an operator's name -> why it freezes what flows in.
FREEZES = {
    r"masked_select|nonzero.*|argwhere|_?unique.*|take|put|masked_scatter|one_hot|isin": BY_VALUE,
    r"searchsorted|bucketize|multinomial|item|is_nonzero|equal|segment_reduce|hash_tensor": BY_VALUE,
    r"bincount|histc|histogram|histogramdd|quantile|nanquantile|msort|nanmedian": ORDER,
    r"_?(nll|multi_margin|multilabel_margin|cross_entropy|ctc)_loss.*": CLASSES,
    r"_?linalg_(cholesky|eig|svd|lu|ldl|inv|pinv|solve|lstsq|qr|det|slogdet).*": MATRICES,
    r"linalg_(householder_product|polar|matrix_(exp|sqrth|rank)|tensor(inv|solve))": MATRICES,
    r"(log|slog)?det|p?inverse|svd|qr|matrix_exp|cholesky.*|lu_.*|triangular_solve": MATRICES,
    r"geqrf|orgqr|ormqr": MATRICES,
    r"as_strided.*|set|set_data|data|resize.*|from_file": MEMORY,
    r"(slice|select|diagonal)_scatter|fill_diagonal": MEMORY,
    r"_pack_padded_sequence|_pad_packed_sequence": "the lengths of the sequences lay out its rows",
    r"conv_tbc": "an older form of conv1d",
}

# Operators that no model's code calls: kernels behind others, gradients, quantized and sparse layouts.
INTERNAL = re.compile(
    r"_[^_].*|.*backward.*|.*_jvp|.*_copy|(mkldnn|cudnn|miopen|mps|xnnpack|fbgemm|onednn)_.*|native_.*"
    r"|(slow|thnn)_conv.*|conv_depthwise3d|convolution_overrideable|.*_forward|.*_functional"
    r"|(q_|quantize|fake_quantize|fused_moving_avg|choose_qparams).*|dequantize|int_repr|qscheme"
    r"|.*sparse.*|.*(coo|csr|csc)_.*|(ccol|crow|col|row)_indices|indices|values|coalesce|is_coalesced"
    r"|smm|sspaddmm|hspmm|.*nested.*|to_padded_tensor|to_mkldnn|to_dense|batch_norm_.*|lift"
    r"|shallow_copy_data|slice_inverse|get_gradients|empty_quantized|linalg__.*"
)


def frozen_by(name: str) -> str | None:
    """Why an operator freezes what flows into it, on purpose; None of any other operator."""
    return next((why for names, why in FREEZES.items() if re.fullmatch(names, name)), None)


def is_composed(target: Any) -> bool:
    """Whether torch composes the operator of others, whatever the device."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    except RuntimeError:  # it exists for numbers alone
        return False


def is_known(target: Any) -> bool:
    """Whether an operator's labels follow from a rule, or it freezes on purpose or nothing."""
    name = operator_name(target)
    return name in RULES or is_pointwise(target) or name in HARMLESS or frozen_by(name) is not None
