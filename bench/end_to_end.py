"""Training steps with sparsity learning and without: python bench/end_to_end.py [--device cuda]

ResNet56 on random CIFAR-10 images: forward, backward and the optimizer's step, in turn for each way of
doing it (on CUDA also captured in a graph). "penalized": the stage in which half of the FLOPs are
marked and shrink at every step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.train.models import build_model


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], tuple[float, float]]:
    """Seconds of forward and backward, and of the optimizer's step with its hooks."""

    def run() -> tuple[float, float]:
        begun = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        wait(x)
        between = time.perf_counter()
        optimizer.step()
        wait(x)
        return between - begun, time.perf_counter() - between

    return run


def graph_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], tuple[float, float]]:
    """The same step captured in a CUDA graph: one replay, all counted as forward and backward."""
    step = step_of(model, optimizer, x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def run() -> tuple[float, float]:
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - begun, 0.0

    return run


def wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def penalized(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        example_inputs=x[:2],
        total_steps=10**6,
        sparsify_from=1,
        deadline=None,
        max_residual=1e-9,
    )
    step_of(model, optimizer, x, torch.zeros(len(x), dtype=torch.int64, device=x.device))()
    assert pruner.step().stage in ("observe", "sparsify")
    step_of(model, optimizer, x, torch.zeros(len(x), dtype=torch.int64, device=x.device))()
    pruner._evaluate(forced=False)
    assert pruner.stage == "sparsify"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (args.batch,), device=args.device)
    dense = build_model("resnet56", 10, 3).to(args.device)
    ways: dict[str, Callable[[], tuple[float, float]]] = {}
    kinds = {"torch SGD": {}, "torch SGD, fused": {"fused": True}, "ocsfast SGD": None}
    for name, options in kinds.items():
        for with_penalty in (False, True):
            model = copy.deepcopy(dense)
            settings = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
            optimizer = (
                ocsfast.optim.SGD(model.parameters(), **settings)
                if options is None
                else torch.optim.SGD(model.parameters(), **settings, **options)
            )
            if with_penalty:
                penalized(model, optimizer, x)
            suffix = ", penalized" if with_penalty else ""
            ways[name + suffix] = step_of(model, optimizer, x, y)
            if args.device == "cuda":
                ways[name + suffix + ", in a graph"] = graph_of(model, optimizer, x, y)
    if args.device == "cpu":
        import torch_pruning

        model = copy.deepcopy(dense)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        pruner = torch_pruning.pruner.GroupNormPruner(
            model,
            x[:1],
            torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)],
        )
        pruner.update_regularizer()
        optimizer.register_step_pre_hook(lambda *_: pruner.regularize(model))
        ways["torch SGD, Torch-Pruning's regularize"] = step_of(model, optimizer, x, y)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for k in range(args.rounds + 1):
        for name, way in ways.items():
            taken = way()
            if k > 0:
                seconds[name].append(taken)
    print(
        f"ResNet56, batch {args.batch}, {args.device}, {args.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    print("| way | forward + backward, ms | step, ms | all, of torch SGD's |\n|---|---|---|---|")
    base = statistics.median(a + b for a, b in seconds["torch SGD"])
    for name, taken in seconds.items():
        compute, step = (1e3 * statistics.median(t[k] for t in taken) for k in (0, 1))
        whole = statistics.median(a + b for a, b in taken)
        print(f"| {name} | {compute:.1f} | {step:.2f} | {whole / base:.3f} |")


if __name__ == "__main__":
    main()
