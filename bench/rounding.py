"""What multiples of kept counts are worth in time: models cut for FLOPs with several `round_to`.

    python bench/rounding.py [--device cuda --dtype bfloat16] [--models ResNet50] [--cpu-time]

Weights are random and scaled as in latency.py. All cuts of a model have equally many MACs, but for what
rounding takes beyond; they run in turns with the one of `round_to=1`, a forward pass in evaluation and a
whole training step, and rows have their time over its. --cpu-time: see latency.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import records
import torch
from latency import MODELS, Timer, costs, cut, scaled
from torch import nn
from torch.nn import functional as F

import ocsfast

ROUND_TO = ("auto", 8, 16, 1)  # the last is what the others are compared with
RATIOS = (0.3, 0.5, 0.7)


def training_step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def forward_pass(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def forward() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            model(x)

    return forward


def in_turns(timer: Timer, calls: dict[object, Callable[[], None]], rounds: int) -> dict[object, float]:
    """Each call's time over the last one's: the median over turns."""
    shares: dict[object, list[float]] = {name: [] for name in calls}
    *_, last = calls
    for number in range(rounds + 1):
        seconds = {name: timer(call) for name, call in calls.items()}
        for name in calls if number else ():  # the first turn warms up
            shares[name].append(seconds[name] / seconds[last])
    return {name: statistics.median(found) for name, found in shares.items()}


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    args.cpu_time |= args.quick and args.device == "cpu"
    if args.cpu_time:
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = False
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    timer = Timer(device, args.cpu_time, 0)
    for name in args.models[:1] if args.quick else args.models:
        build, side = MODELS[name]
        side, batch, rounds = (32, 2, 2) if args.quick else (side, args.batch, args.rounds)
        torch.manual_seed(0)
        x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)
        model = build(side).to(device, memory_format=layout).eval()
        families = ocsfast.group(model, x, verify=False)
        scaled(model, families)
        dense = costs(model, x)["macs"]
        for ratio in RATIOS[1:2] if args.quick else RATIOS:
            cuts = {n: cut(model, families, ratio, "flops", round_to=n) for n in ROUND_TO}
            for what, make in (("forward", forward_pass), ("training step", training_step)):
                calls = {n: make(small, x, dtype) for n, small in cuts.items()}
                for round_to, share in in_turns(timer, calls, rounds).items():
                    records.append(
                        args.rows,
                        "rounding",
                        model=name,
                        device=records.device_name(args.device),
                        capability=torch.backends.cpu.get_cpu_capability(),
                        dtype=args.dtype,
                        channels_last=args.channels_last,
                        threads=torch.get_num_threads(),
                        batch=batch,
                        side=side,
                        ratio=ratio,
                        round_to=round_to,
                        what=what,
                        macs_kept=costs(cuts[round_to].eval(), x)["macs"] / dense,
                        time=share,
                    )


if __name__ == "__main__":
    main()
