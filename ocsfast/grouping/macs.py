"""MACs of a call, counted while it runs.

torch's own counter knows most operators. Which fused ones it knows depends on its version (the CPU's
attention from 2.15 on) and on the device, so their formulas are here. Running attention unfused instead
would give its result other strides, which a `view` in the model's code may not accept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Sequence[int]


def count_macs(call: Callable[[], object]) -> int:
    """Multiply-accumulates (MACs) of the matrix products and convolutions that `call` computes.

    That is what `torch.utils.flop_counter.FlopCounterMode` counts, halved. Attention, recurrence and
    grouped products count as what they compute, fused or not, on every version of torch, on the CPU and
    on CUDA. One exception: in half precision on CUDA, torch may pad heads whose width is no multiple of
    8 before it fuses them, and then the padding counts.

    Examples:
        >>> count_macs(lambda: torch.nn.Linear(3, 5)(torch.zeros(2, 3)))
        30
    """
    # The fast path runs a whole encoder layer as one operator, which the counter does not know.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2


def _formulas() -> dict[Any, Callable[..., int]]:
    """Operator -> a function from its arguments, tensors as shapes, to FLOPs; if this torch has it."""
    aten: Any = torch.ops.aten
    formulas: dict[str, Callable[..., int]] = {
        **dict.fromkeys(
            (
                "_scaled_dot_product_flash_attention_for_cpu",
                "_scaled_dot_product_flash_attention",
                "_scaled_dot_product_efficient_attention",
                "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_fused_attention_overrideable",
            ),
            _attention,
        ),
        "mkldnn_rnn_layer": _one_layer,
        "_cudnn_rnn": _all_layers,
        "_grouped_mm": _grouped,
    }
    known = {getattr(aten, name): f for name, f in formulas.items() if hasattr(aten, name)}
    # transformers registers the same product when a mixture of experts is first imported.
    experts: Any = torch.ops.transformers
    if hasattr(experts, "grouped_mm_fallback"):
        known[experts.grouped_mm_fallback] = _grouped
    return known


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """q [..., L, D] with k [..., S, D], and the result [..., L, S] with v [..., S, E]; masked or not."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _one_layer(x: Shape, w_ih: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
    """x [steps, batch, inputs] through both matrices of a layer, in one direction."""
    return 2 * math.prod(x[:-1]) * (math.prod(w_ih) + math.prod(w_hh))


def _all_layers(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """x [..., inputs] through all matrices; the biases among the weights are vectors."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _grouped(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """x [..., m, k] times weight [..., k, n], in several products.

    Where the weight is a stack of matrices, each row of x meets one of them. Where it is one matrix, its
    columns, or the k that is summed over, are shared out among the products.
    """
    rows = math.prod(x[:-1]) if len(weight) == 3 else x[-2]
    return 2 * rows * weight[-2] * weight[-1]
