"""Training steps with sparsity learning and without: python bench/end_to_end.py [--device cuda]

ResNet56 on random CIFAR-10 images: forward, backward and the optimizer's step, in turn for each way of
doing it (on CUDA also captured in a graph). "penalized": the stage in which half of the FLOPs are
marked and shrink at every step.
"""

from __future__ import annotations

import copy
import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import records
import torch
from timing import warm_up
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.train.models import build_model

Way = Callable[[], tuple[float, float]]
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def optimizers(capturable: bool = False) -> dict[str, Make]:
    """SGD and AdamW, by torch and by ocsfast. SGD's rate is a number: a graph of its step repeats it."""
    sgd = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    makers: dict[str, Make] = {
        "torch SGD": lambda p: torch.optim.SGD(p, **sgd),
        "torch SGD, fused": lambda p: torch.optim.SGD(p, fused=True, **sgd),
        "ocsfast SGD": lambda p: ocsfast.optim.SGD(p, **sgd),
        "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=capturable),
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True, capturable=capturable),
        "ocsfast AdamW": lambda p: ocsfast.optim.AdamW(p, lr=1e-3, capturable=capturable),
    }
    return makers


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Way:
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
) -> Way:
    """The same step captured in a CUDA graph: one replay, all counted as forward and backward.

    A graph keeps nothing alive but what was allocated in its capture. Replays write to model and
    optimizer, which would be gone with this call, and their memory somebody else's.
    """
    warm_up(step_of(model, optimizer, x, y))
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    def run(kept: object = (model, optimizer, x, y)) -> tuple[float, float]:
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - begun, 0.0

    return run


def wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize()


def penalized(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    families: Any,
    capturable: bool = False,
    one_pass: bool = True,
) -> ocsfast.Pruner:
    """A pruner in the midst of sparsity learning, which goes on for as long as anyone measures.

    No cut is due, and none is missed: the pruner's word on that is not listened to.

    Args:
        families: of `ocsfast.group`: found once for all copies of a model.
    """
    logging.getLogger("ocsfast").setLevel(logging.ERROR)
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        families=families,
        total_steps=10**6,
        sparsify_from=1,
        deadline=None,
        max_residual=1e-9,
        capturable=capturable,
        one_pass=one_pass,
    )
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    step_of(model, optimizer, x, y)()
    assert pruner.step().stage in ("observe", "sparsify")
    step_of(model, optimizer, x, y)()
    pruner._evaluate(forced=False)
    assert pruner.stage == "sparsify"
    return pruner


def torch_prunings(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Way:
    import torch_pruning

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
    return step_of(model, optimizer, x, y)


def ways_of(dense: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Way]:
    """Each way of taking a step; one that cannot be prepared is named and left out."""
    device, ways = x.device.type, {}
    families = ocsfast.group(dense, x[:2], verify=False)

    def prepare(name: str, way: Callable[[], Way]) -> None:
        try:
            ways[name] = way()
        except Exception as error:  # on a GPU, whatever one way may not do, the others are measured
            if device == "cpu":
                raise
            print(f"{name}: {type(error).__name__}: {error}", flush=True)

    def way_of(name: str, with_penalty: bool, graphed: bool) -> Way:
        model = copy.deepcopy(dense)
        optimizer = optimizers(capturable=graphed)[name](model.parameters())
        if with_penalty:
            penalized(model, optimizer, x, families, capturable=graphed)
        return (graph_of if graphed else step_of)(model, optimizer, x, y)

    for name in optimizers():
        for with_penalty in (False, True):
            for graphed in (False, True) if device == "cuda" else (False,):
                words = [name, *["penalized"] * with_penalty, *["in a graph"] * graphed]
                prepare(", ".join(words), functools.partial(way_of, name, with_penalty, graphed))
    prepare("torch SGD, Torch-Pruning's regularize", lambda: torch_prunings(copy.deepcopy(dense), x, y))
    return ways


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    # Beside anything else that runs, two threads wait for each other: ten times as long as one, or more.
    torch.set_num_threads(1 if args.quick else args.threads)
    torch.manual_seed(0)
    arch, args.batch, args.rounds = (
        ("resnet20", 4, 1) if args.quick else ("resnet56", args.batch, args.rounds)
    )
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.randint(0, 10, (args.batch,), device=args.device)
    ways = ways_of(build_model(arch, 10, 3).to(args.device), x, y)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for k in range(args.rounds + 1):
        for name, way in ways.items():
            taken = way()
            if k > 0:
                seconds[name].append(taken)
    base = statistics.median(a + b for a, b in seconds["torch SGD"])
    lines = []
    for name, taken in seconds.items():
        compute, step = (statistics.median(t[k] for t in taken) for k in (0, 1))
        whole = statistics.median(a + b for a, b in taken)
        records.append(
            args.rows,
            "step",
            model=arch,
            way=name,
            device=records.device_name(args.device),
            batch=args.batch,
            compute=compute,
            step=step,
            of_torch=whole / base,
            rounds=args.rounds,
        )
        lines.append(f"| {name} | {1e3 * compute:.1f} | {1e3 * step:.2f} | {whole / base:.3f} |")
    print(f"{arch}, batch {args.batch}, {args.device}, torch {torch.__version__}\n")
    print("| way | forward + backward, ms | step, ms | all, of torch SGD's |\n|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
