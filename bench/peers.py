"""The same work by other means: plain torch eager and compiled, `torch._foreach_*`, Torch-Pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import Tensor

from ocsfast.ops.tables import group_means


class Foreach:
    """The best `torch._foreach_*` formulation: elementwise over all tensors at once; what is a matter of
    rows and columns stays an op or two a tensor, as no multi-tensor op reduces along a dimension."""

    def __init__(self, case: Case) -> None:
        plan = case.plan
        self.case = case
        shapes = plan.shapes.tolist()
        self.weights, self.grads = (
            [t.view(n, m, -1) for t, (n, m, *_) in zip(tensors, shapes, strict=True)]
            for tensors in (case.bound.weights, case.grads)
        )
        self.group = plan.table("slice_group").long()
        self.size = plan.table("slice_size").clamp(min=1)
        self.slices = plan.count("slices")
        rows, cols = plan.table("row_slice").long(), plan.table("col_slice").long()
        self.rows: list[tuple[Tensor, list[int]]] = []
        self.cols: list[tuple[Tensor, list[int]]] = []
        for n, m, _, _, a, b in shapes:
            none = torch.full((max(n, m),), -1, device=rows.device)
            self.rows.append((rows[a : a + n] if a >= 0 else none[:n], [n, 1, 1]))
            self.cols.append((cols[b : b + m] if b >= 0 else none[:m], [1, m, 1]))

    def _of_rows_and_cols(self, values: Tensor, rest: float) -> tuple[list[Tensor], list[Tensor]]:
        table = torch.cat([values, values.new_full((1,), rest)])
        return (
            [table[index].view(shape) for index, shape in self.rows],
            [table[index].view(shape) for index, shape in self.cols],
        )

    def squares(self) -> Tensor:
        square = torch._foreach_mul(self.weights, self.weights)
        sums = [
            s.sum(other, dtype=torch.float32) for other in ((1, 2), (0, 2)) for s in square
        ]  # as our kernels take them, whatever the weights are
        index = torch.cat([i for i, _ in (*self.rows, *self.cols)])
        total = torch.zeros(self.slices + 1, device=index.device)
        return total.index_add_(0, index.where(index >= 0, self.slices), torch.cat(sums))[:-1]

    def group_saliency(self) -> Tensor:
        return group_means(self.case.plan, (self.squares() / self.size).sqrt())

    def shrink(self, mask: Tensor, factor: Tensor) -> None:
        once = torch.where(mask[self.group], factor, torch.ones_like(factor))
        for factors in self._of_rows_and_cols(once, 1.0):
            torch._foreach_mul_(self.weights, factors)

    def lasso_grad(self, mask: Tensor, strength: Tensor) -> None:
        norm = self.squares().sqrt()
        slope = torch.where(mask[self.group] & (norm > 0), strength / norm, torch.zeros_like(norm))
        for slopes in self._of_rows_and_cols(slope, 0.0):
            # addcmul does not broadcast in its multi-tensor form; a product and an addition do.
            torch._foreach_add_(self.grads, torch._foreach_mul(self.weights, slopes))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under `torch.compile`, with all shapes static."""
    return torch.compile(function, dynamic=False)


class TorchPruning:
    """Torch-Pruning's importance and regularization, and the bisection of the published method: prune a
    deep copy, count its operations, try another ratio."""

    def __init__(self, case: Case) -> None:
        import torch_pruning

        assert case.model is not None
        assert case.example is not None
        self.tp, self.model, self.example = torch_pruning, case.model, case.example[:1]
        self.importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        self.last = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)][-1]
        self.pruner = torch_pruning.pruner.GroupNormPruner(
            self.model, self.example, self.importance, global_pruning=True, ignored_layers=[self.last]
        )
        self.groups = list(self.pruner.DG.get_all_groups(ignored_layers=[self.last]))
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def group_saliency(self) -> None:
        for group in self.groups:
            self.importance(group)

    def regularize(self) -> None:
        self.pruner.update_regularizer()
        self.pruner.regularize(self.model)

    def bisection(self, ratio: float = 0.5, tolerance: float = 0.005) -> None:
        """Until a copy has come within `tolerance` of the ratio, or twenty have been pruned."""
        dense, _ = self.tp.utils.count_ops_and_params(self.model, self.example)
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            model = copy.deepcopy(self.model)
            last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
            self.tp.pruner.GroupNormPruner(
                model,
                self.example,
                self.importance,
                global_pruning=True,
                pruning_ratio=middle,
                ignored_layers=[last],
            ).step()
            macs, _ = self.tp.utils.count_ops_and_params(model, self.example)
            if abs(1 - macs / dense - ratio) < tolerance:
                return
            low, high = (middle, high) if 1 - macs / dense < ratio else (low, middle)
