"""What each op returns of tensors without data: torch.compile and export ask for shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ocsfast.ops.extension import MISSING
from ocsfast.ops.plan import COUNTS, FACTS


def _bind(weights: list[Tensor], tables: Tensor, shapes: Tensor, layout: Sequence[int]) -> Tensor:
    return shapes.new_empty((), dtype=torch.int64)


def _nothing(*arguments: object) -> None:
    """Of an op that works in place."""


def _partition(
    scores: Tensor,
    tables: Tensor,
    layout: Sequence[int],
    cost_tables: Tensor,
    cost_layout: Sequence[int],
    limits: Tensor,
    budget: Tensor,
    units: Tensor | None,
    ties: Tensor | None,
    give_back: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tables.new_empty(layout[COUNTS.index("groups")], dtype=torch.bool),
        tables.new_empty((), dtype=torch.int64),
        tables.new_empty((), dtype=torch.int32),
    )


def _compare(
    mask: Tensor,
    sizes: Tensor,
    cost: Tensor,
    status: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    tables: Tensor,
    layout: Sequence[int],
) -> Tensor:
    return tables.new_empty(len(FACTS) + layout[COUNTS.index("families")], dtype=torch.float64)


if MISSING is None:
    for _name, _fake in (
        ("bind", _bind),
        ("group_saliency", _nothing),
        ("partition", _partition),
        ("shrink_", _nothing),
        ("lasso_grad_", _nothing),
        ("sgd_step_", _nothing),
        ("adamw_step_", _nothing),
        ("compare", _compare),
    ):
        torch.library.register_fake(f"ocsfast::{_name}", _fake)
