"""Our count against torch's own, where torch's can see: on the products that fused operators are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ocsfast.grouping.engines import group
from ocsfast.grouping.macs import _formulas, count_macs
from ocsfast.ops.cost import build_cost_model


def torchs(call: Callable[[], object]) -> int:
    """torch's count of the same call, with nothing fused."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            FlopCounterMode(display=False) as counter,
        ):
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(5, 7)}])
def test_attention(options: dict[str, object], grad: bool, device: str) -> None:
    q = torch.randn(2, 3, 5, 8, device=device, requires_grad=grad)
    k, v = torch.randn(2, 2, 3, 7, 8, device=device)
    given = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, **given)

    assert count_macs(attend) == torchs(attend) == 2 * 3 * 5 * 7 * (8 + 8)


def test_attention_with_fewer_heads_of_keys(device: str) -> None:
    q, k, v = (torch.randn(2, heads, 5, 8, device=device) for heads in (4, 2, 2))

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert count_macs(attend) == torchs(attend) == 2 * 4 * 5 * 5 * (8 + 8)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [False, True])
def test_recurrence(kind: type[nn.RNNBase], training: bool, device: str) -> None:
    net = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True).to(device).train(training)
    x = torch.randn(3, 4, 6, device=device)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    expected = 3 * 4 * 2 * gates * 5 * (6 + 5 + 10 + 5)
    with torch.set_grad_enabled(training):
        assert count_macs(lambda: net(x)) == expected
        if device == "cpu":
            assert torchs(lambda: net(x)) == expected


def test_an_encoder_layer_in_inference(device: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to(device).eval()
    x = torch.randn(2, 5, 8, device=device)
    with torch.inference_mode():
        expected = 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * 8
        assert count_macs(lambda: layer(x)) == torchs(lambda: layer(x)) == expected


@pytest.mark.parametrize("enabled", [False, True])
def test_the_fast_path_is_put_back(enabled: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(ZeroDivisionError):
            count_macs(lambda: 1 / 0)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("rows", "matrices", "ends", "macs"),
    [
        ((10, 16), (3, 16, 24), [2, 5, 10], 10 * 16 * 24),  # each row by the matrix of its expert
        ((3, 10, 16), (3, 16, 24), None, 3 * 10 * 16 * 24),
        ((10, 48), (48, 24), [2, 5, 48], 10 * 48 * 24),  # a gradient: sums over each expert's rows
        ((3, 10, 16), (16, 24), [2, 5, 24], 10 * 16 * 24),
    ],
)
def test_experts(
    rows: tuple[int, ...], matrices: tuple[int, ...], ends: list[int] | None, macs: int
) -> None:
    x, weight = (torch.randn(s, dtype=torch.bfloat16, device="meta") for s in (rows, matrices))
    offs = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="meta")
    assert count_macs(lambda: torch._grouped_mm(x, weight, offs=offs)) == macs


def test_attention_with_values_of_another_width_than_keys():
    query, key = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 7, 4)
    value = torch.rand(2, 3, 7, 6)
    macs = 2 * 3 * 5 * 7 * (4 + 6)
    assert count_macs(lambda: F.scaled_dot_product_attention(query, key, value)) == macs
    # The CPU runs unequal widths unfused; a GPU may not.
    formula = _formulas()[torch.ops.aten._scaled_dot_product_flash_attention]
    assert formula(query.shape, key.shape, value.shape) == 2 * macs


class Summing(nn.Module):
    """A parameter of [3, 4] meets what a layer makes of the input, in an einsum."""

    def __init__(self, equation: str, rows: int) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(rows, 4))
        self.equation = equation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.equation, self.first(x), self.weight)


@pytest.mark.parametrize(
    ("equation", "rows", "expected"),
    [
        ("nc,kc->nk", 3, 12),
        ("nc,kd->nckd", 3, 0),  # an outer product sums nothing
        ("nc,kc->nkc", 3, 0),
        ("nc,kc->nc", 1, 0),  # a sum over one row
    ],
)
def test_an_einsum_costs_what_torch_sums(equation: str, rows: int, expected: int) -> None:
    model, x = Summing(equation, rows), torch.randn(2, 5)
    families = group(model, (x,))
    predicted = build_cost_model(families, families.macs, "MACs")([f.size for f in families.families])
    with torch.no_grad():
        assert 2 * predicted == count_macs(lambda: model(x)) == 2 * (5 * 4 + expected)
