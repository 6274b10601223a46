"""What sparsity learning costs on ResNet50: python bench/resnet50.py [--threads 2] [--runs 15]

Grouping (export included), a check (saliency + partition + stability) and the penalty of one step
(Eq. 8 + Eq. 9, half the FLOPs marked), medians of one process, beside a flat read and a flat
read-modify-write of the same bytes and Torch-Pruning's importance and regularization.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch_pruning
import torchvision

from ocsfast import ops
from ocsfast.cost import build_cost_model
from ocsfast.grouping import group
from ocsfast.plan import build_plan


def medians_ms(rows: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Medians of rows that take turns, so that what else the machine does weighs on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for run in range(runs + 1):
        for name, call in rows.items():
            begun = time.perf_counter()
            call()
            if run > 0:
                seconds[name].append(time.perf_counter() - begun)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    x = torch.randn(2, 3, 224, 224)

    begun = time.perf_counter()
    families = group(model, (x,), verify=False)
    print(f"torch {torch.__version__}, {args.threads} threads")
    print(f"grouping, export included  {time.perf_counter() - begun:8.2f} s")
    begun = time.perf_counter()
    group(model, (x,), verify=True)
    print(f"the same with its proof    {time.perf_counter() - begun:8.2f} s")

    parameters = dict(model.named_parameters())
    plan = build_plan(families, parameters)
    macs = build_cost_model(families, families.macs, "MACs")
    weights = [parameters[name] for name in plan.names]
    sizes = torch.tensor([family.size for family in families.families])
    limits, budget = sizes * 3 // 4, torch.tensor(macs(sizes) // 2)
    scores, _ = ops.group_saliency(plan, weights)
    mask, _, _ = ops.partition(plan, macs, scores, limits, budget)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    grads = [weight.grad for weight in weights]
    tiny = torch.tensor(1e-12)

    def check() -> None:
        now, _ = ops.group_saliency(plan, weights)
        chosen, _, _ = ops.partition(plan, macs, now, limits, budget)
        ops.jaccard(plan, mask, chosen).item()

    flat = torch.cat([w.detach().flatten() for w in weights])
    other = flat.clone()
    every = torch.ones_like(mask)
    rows = {
        "group_saliency": lambda: ops.group_saliency(plan, weights),
        "  flat read of the same bytes": lambda: torch.sum(flat),
        "partition": lambda: ops.partition(plan, macs, scores, limits, budget),
        "a whole check": check,
        "shrink_, all marked": lambda: ops.shrink_(plan, weights, every, 1 - tiny),
        "shrink_, half the FLOPs marked": lambda: ops.shrink_(plan, weights, mask, 1 - tiny),
        "  flat read-modify-write of all": lambda: flat.mul_(1.0),
        "lasso_grad_, all marked": lambda: ops.lasso_grad_(plan, grads, weights, every, tiny),
        "lasso_grad_, half the FLOPs": lambda: ops.lasso_grad_(plan, grads, weights, mask, tiny),
        "  flat add of all": lambda: other.add_(flat, alpha=1e-12),
    }
    measured = medians_ms(rows, args.runs)

    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    pruner = torch_pruning.pruner.GroupNormPruner(
        model, x[:1, :, :64, :64], importance, global_pruning=True, ignored_layers=[model.fc]
    )
    groups = list(pruner.DG.get_all_groups(ignored_layers=[model.fc]))
    pruner.update_regularizer()
    few = max(3, args.runs // 5)
    peers = {
        "Torch-Pruning: importance": lambda: [importance(g) for g in groups],
        "Torch-Pruning: regularize": lambda: pruner.regularize(model),
    }
    measured |= medians_ms(peers, few)

    megabytes = flat.numel() * flat.element_size() / 1e6
    print(f"{len(weights)} tensors, {megabytes:.0f} MB, {plan.count('groups')} groups")
    for name, milliseconds in measured.items():
        print(f"{name:32s}{milliseconds:9.2f} ms")


if __name__ == "__main__":
    main()
