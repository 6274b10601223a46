"""Latency as a target: what a table predicts of cut models, and what they take.

    python bench/latency.py [--device cuda] [--models ResNet50 ViT-B/16] [--cost-aware] [--cpu-time]

Each model has random weights whose channels are scaled at random, so that families lose unequal shares.
It is cut for `target=` a table of its own, and timed in turns with the dense one, so that drift cancels.
Then FLOPs are cut until the model takes as long, to compare what is left of it. --cost-aware: the cut
for latency divides scores by costs, and so does one of two for FLOPs. --cpu-time reads the clock of the
thread and not the wall's, for a machine that others use: one thread, and no CUDA.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import records
import torch
import torchvision
from torch import nn

import ocsfast
from ocsfast.cut.record import record_of
from ocsfast.grouping.macs import count_macs
from ocsfast.latency.clock import clock_for

RATIOS = (0.3, 0.5, 0.7)
MOST_GONE = 0.9
SEARCH = 6  # cuts of FLOPs until the latency is the same


def vit(side: int) -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", img_size=side)


# The model, and the pixels of its images.
MODELS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "ResNet18": (lambda _: torchvision.models.resnet18(), 64),
    "ResNet50": (lambda _: torchvision.models.resnet50(), 64),
    "MobileNetV2": (lambda _: torchvision.models.mobilenet_v2(), 96),
    "EfficientNet-B0": (lambda _: torchvision.models.efficientnet_b0(), 96),
    "ConvNeXt-Tiny": (lambda _: torchvision.models.convnext_tiny(), 64),
    "ViT-B/16": (vit, 96),
}


class Timer:
    """Seconds of one call, and of several in turns."""

    def __init__(self, device: torch.device, cpu_time: bool, rounds: int) -> None:
        self._clock, self._cpu_time, self._rounds = clock_for(device), cpu_time, rounds

    def __call__(self, call: Callable[[], object]) -> float:
        if not self._cpu_time:
            return self._clock(call)
        begun = time.thread_time()
        call()
        return time.thread_time() - begun

    def share(self, dense: Callable[[], object], cut: Callable[[], object]) -> float:
        """What the cut model takes of the dense one's time: the median over turns."""
        with torch.no_grad():
            for call in (dense, cut):
                self(call)
            return statistics.median(self(cut) / self(dense) for _ in range(self._rounds))


def scaled(model: nn.Module, families: ocsfast.Families) -> None:
    """Give every group a size of its own, and every family another one."""
    draw = torch.Generator().manual_seed(1)
    each = torch.exp(0.5 * torch.randn(families.num_groups, generator=draw))
    of_family = torch.exp(0.3 * torch.randn(len(families.families), generator=draw))
    size = torch.cat([each * of_family[families.family_of_groups()], torch.ones(1)])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for axis in families.axes:
            if axis.tensor in parameters:
                weight = parameters[axis.tensor]
                shape = [-1 if d == axis.axis else 1 for d in range(weight.dim())]
                weight.mul_(size[axis.groups].to(weight).view(shape))


def cut(
    model: nn.Module, families: ocsfast.Families, ratio: float, target: object, **options: object
) -> nn.Module:
    small = copy.deepcopy(model)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    options |= {"target": target, "normalize": "kind", "max_family_ratio": MOST_GONE, "total_steps": 100}
    ocsfast.attach(small, ratio, optimizer=optimizer, families=families, **options).cut()
    return small.eval()


def costs(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with torch.no_grad():
        macs = count_macs(lambda: model(x[:1]))
    return {"macs": macs, "parameters": sum(p.numel() for p in model.parameters())}


def measure(name: str, args: argparse.Namespace) -> list[float]:
    """One model's rows; the errors of its predictions."""
    build, side = MODELS[name]
    side, batch = (32, 2) if args.quick else (side, args.batch)
    device = torch.device(args.device)
    torch.manual_seed(0)
    x = torch.randn(batch, 3, side, side, device=device)
    model = build(side).to(device).eval()
    families = ocsfast.group(model, x, verify=False)
    scaled(model, families)
    timer = Timer(device, args.cpu_time, 3 if args.quick else args.rounds)
    begun = time.perf_counter()
    table = ocsfast.LatencyTable.measure(
        model,
        x,
        clock=timer,
        grid=2 if args.quick else args.grid,
        time_limit=300,
        verify=False,
        max_family_ratio=MOST_GONE,
    )
    seconds = time.perf_counter() - begun
    fixed = {
        "model": name,
        "device": table.device,
        "threads": table.threads,
        "batch": batch,
        "side": side,
    }
    fixed |= {"dense_ms": table.dense / 1e6, "spread": table.spread, "seconds": seconds}
    dense, errors = costs(model, x), []
    for ratio in (0.5,) if args.quick else RATIOS:
        small = cut(model, families, ratio, table, cost_aware=args.cost_aware)
        cost = record_of(small)["left"]["latency"]
        taken = timer.share(lambda: model(x), lambda small=small: small(x))
        predicted = cost / table.dense
        errors.append(predicted / taken - 1)
        row = {"ratio": ratio, "predicted": predicted, "measured": taken, "error": errors[-1]}
        others = {"latency": small, "flops": same_time(model, families, x, taken, timer)}
        if args.cost_aware:
            others["flops, cost-aware"] = same_time(model, families, x, taken, timer, cost_aware=True)
        for how, other in others.items():
            kept = costs(other, x)
            row |= {f"{what}_kept_by_{how}": kept[what] / dense[what] for what in kept}
            row[f"measured_by_{how}"] = timer.share(lambda: model(x), lambda other=other: other(x))
        records.append(args.rows, "latency", **fixed, cost_aware=args.cost_aware, **row)
    return errors


def same_time(
    model: nn.Module,
    families: ocsfast.Families,
    x: torch.Tensor,
    taken: float,
    timer: Timer,
    **options: object,
) -> nn.Module:
    """The model cut for FLOPs that takes this share of the dense one's time, by halving."""
    low, high = 0.02, 0.97
    for _ in range(SEARCH):
        ratio = round((low + high) / 2, 4)
        try:
            small = cut(model, families, ratio, "flops", **options)
        except ocsfast.ConfigError:  # more than may go
            high = ratio
            continue
        slow = timer.share(lambda: model(x), lambda small=small: small(x)) > taken
        low, high = (ratio, high) if slow else (low, ratio)
    return small


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--grid", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cost-aware", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    args.cpu_time |= args.quick and args.device == "cpu"  # a dry run needs no quiet machine
    if args.threads or args.cpu_time:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
    torch.backends.cudnn.benchmark = False
    errors = []
    for name in args.models[:1] if args.quick else args.models:
        errors += measure(name, args)
    sizes = sorted(abs(error) for error in errors)
    records.append(
        args.rows,
        "latency summary",
        device=records.device_name(args.device),
        models=len(args.models[:1] if args.quick else args.models),
        cuts=len(sizes),
        median_error=statistics.median(sizes),
        worst_error=sizes[-1],
    )


if __name__ == "__main__":
    main()
