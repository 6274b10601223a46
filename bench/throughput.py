"""Images a second of ResNet50 in training: dense, and cut to half of its MACs.

    python bench/throughput.py --device cuda [--compile]

Synthetic images of 224 pixels in channels_last, bfloat16 autocast, torch's fused SGD. The cut's kept
counts are whatever the scores say (`round_to=1`) or multiples of what the device likes ("auto"). A step
is launched eagerly, and on CUDA as a graph of all of it: there the host takes no part. On CUDA also the
memory of a step at its peak, beyond weights and momentum.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import records
import torch
import torchvision
from timing import in_turn, warm_up
from torch import nn
from torch.nn import functional as F

import ocsfast
from ocsfast.grouping.macs import count_macs
from ocsfast.train.models import build_model

WARM = 5  # steps before any is timed: cuDNN tries its algorithms in the first


def cut(dense: nn.Module, families: Any, round_to: int | str) -> nn.Module:
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = ocsfast.attach(
        model,
        0.5,
        optimizer=optimizer,
        families=families,
        round_to=round_to,
        total_steps=1000,
    )
    pruner.cut()
    return model


def step_of(model: nn.Module, run: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A whole training step of `run`, which is `model` or what it was compiled to."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()

    return step


def warmed(steps: Mapping[str, Callable[[], None]]) -> Mapping[str, Callable[[], None]]:
    for step in steps.values():
        for _ in range(WARM):
            step()
    return steps


def memory_of(model: nn.Module, step: Callable[[], None]) -> int:
    """Bytes of a step at its peak beyond weights and momentum: activations, gradients, workspace."""
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def graph_of(step: Callable[[], None]) -> Callable[[], None]:
    """A step in a CUDA graph, after the warm-up on a side stream that torch asks for.

    The graph keeps neither the model nor the optimizer alive, which its replays write to: `step` does.
    """
    warm_up(step)
    torch.cuda.empty_cache()  # a graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(kept: object = step) -> None:
        graph.replay()

    return replay


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, minutes a model")
    args = parser.parse_args()
    batch, side, rounds = (4, 32, 2) if args.quick else (args.batch, 224, 11)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    dense = build_model("resnet20", 10, 3) if args.quick else torchvision.models.resnet50()
    dense = dense.to(args.device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=args.device)
    # Proved in the tests: here that would take as long as all the rest.
    families = ocsfast.group(dense, x[:2], verify=False)
    models = {"dense": dense} | {f"cut, round_to={n}": cut(dense, families, n) for n in ("auto", 1)}
    macs = {}
    with torch.no_grad():
        for name, model in models.items():
            macs[name] = count_macs(lambda model=model: model.eval()(x[:1]))
            model.train()

    def record(name: str, by: str, seconds: dict[str, float], first: float | None = None) -> None:
        records.append(
            args.rows,
            "throughput",
            model="resnet20" if args.quick else "ResNet50",
            device=records.device_name(args.device),
            dtype="bfloat16",
            what=name,
            by=by,
            batch=batch,
            side=side,
            macs=macs[name],
            images_a_second=batch / seconds["median"],
            memory=memory.get(name) if by == "eager" else None,
            compiled_in=first,
            **seconds,
        )

    steps = warmed({name: step_of(model, model, x, y) for name, model in models.items()})
    memory: dict[str, int] = {}
    if args.device == "cuda":
        memory = {name: memory_of(models[name], step) for name, step in steps.items()}
        graphs = {name: graph_of(step) for name, step in steps.items()}
        for name, times in in_turn(graphs, args.device, rounds).items():
            record(name, "in a graph", times.stats())
        del graphs
        torch.cuda.empty_cache()
    for name, times in in_turn(steps, args.device, rounds).items():
        record(name, "eager", times.stats())
    # Compiling takes longer than all the rest: each is recorded before the next begins. The quick form
    # leaves out the generation of code.
    backend = "aot_eager" if args.quick else "inductor"
    for name, model in models.items() if args.compile else ():
        step = step_of(model, torch.compile(model, backend=backend), x, y)
        begun = time.perf_counter()
        step()
        first = time.perf_counter() - begun
        record(name, "torch.compile", in_turn({name: step}, args.device, rounds)[name].stats(), first)


if __name__ == "__main__":
    main()
