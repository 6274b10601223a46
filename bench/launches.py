"""Launches and waits of each op, of a step and of a check: python bench/launches.py --device cuda

A wait is what `torch.cuda.set_sync_debug_mode` warns of. On the CPU, ops of torch are counted instead.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import records
import torch
from cases import Case, aim_of, case, compared
from end_to_end import optimizers, penalized, step_of
from torch.profiler import ProfilerActivity, profile

import ocsfast
from ocsfast import Config
from ocsfast.choice.selection import choose
from ocsfast.ops import functions as ops
from ocsfast.train.models import build_model


def count(call: Callable[[], object], device: str) -> dict[str, Any]:
    """What one call asks of the device, once it has been called before."""
    call()
    call()
    found = _launches(call, device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        torch.cuda.set_sync_debug_mode("default")
        found["waits"] = sum("synchronizing" in str(w.message) for w in caught)
        torch.cuda.synchronize()
    host = []
    for _ in range(20):
        begun = time.perf_counter()
        call()
        host.append(time.perf_counter() - begun)
        if device == "cuda":
            torch.cuda.synchronize()
    return found | {"host": statistics.median(host)}


def is_note(name: str) -> bool:
    """Whether the profiler's event is no work: a span that torch marks, or a number put on the CPU."""
    return name.startswith(("Optimizer.", "ProfilerStep", "aten::scalar_tensor"))


def _launches(call: Callable[[], object], device: str) -> dict[str, int]:
    if device != "cuda":
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            call()
        events = [e for e in watched.events() if not is_note(e.name)]
        outer = [e.name for e in events if e.cpu_parent is None or is_note(e.cpu_parent.name)]
        mine = sum(name.startswith("ocsfast::") for name in outer)
        return {"launches": len(outer), "ours": mine, "copies": 0, "waits": 0}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [e for e in watched.events() if e.device_type == on_device]
    names = [e.name for e in events if not is_note(e.name)]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {
        "launches": len(names) - copies,
        "ours": sum("ocsfast::cuda" in name for name in names),
        "copies": copies,
    }


def ops_of(made: Case) -> dict[str, Callable[[], object]]:
    device = str(made.flat.device)
    lr, one, tiny = (torch.tensor(v, device=device) for v in (1e-9, 1 - 1e-7, 1e-12))
    lr, config, aim = lr.double(), Config(), aim_of(made)
    steps = [torch.full((), 999.0, device=device) for _ in made.grads]
    penalty = ops.Penalty(made.half, tiny, one)
    scores, _ = ops.group_saliency(made.bound)
    bound, grads, momenta, squares = made.bound, made.grads, made.momenta, made.squares

    def saliency() -> None:
        bound.forget()
        ops.group_saliency(bound)

    def adamw() -> None:
        ops.adamw_step_(bound, grads, momenta, squares, steps, lr, penalty=penalty)

    return {
        "group_saliency": saliency,
        "group_saliency, squares at hand": lambda: ops.group_saliency(bound),
        "shrink_": lambda: ops.shrink_(bound, made.half, one),
        "lasso_grad_": lambda: ops.lasso_grad_(bound, grads, made.half, tiny),
        "sgd_step_": lambda: ops.sgd_step_(bound, grads, momenta, lr, momentum=0.9, penalty=penalty),
        "adamw_step_": adamw,
        "partition": lambda: ops.partition(made.plan, made.cost_model, scores, made.limits, made.budget),
        "compare": compared(made),
        "choose": lambda: choose(aim, bound, before=[made.half] * config.lag, lag=config.lag),
    }


def main() -> None:
    args = records.program(__doc__).parse_args()

    def record(what: str, call: Callable[[], object], model: str) -> None:
        device = records.device_name(args.device)
        try:
            found = count(call, args.device)
        except Exception as error:  # the rows after it may still be measured
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        records.append(args.rows, "launches", model=model, what=what, device=device, **found)

    made = case("ResNet56", args.device)
    for name, call in ops_of(made).items():
        record(name, call, "ResNet56")
    arch = "resnet20" if args.quick else "resnet56"
    x = torch.randn(4, 3, 32, 32, device=args.device)
    y = torch.zeros(4, dtype=torch.int64, device=args.device)
    dense = build_model(arch, 10, 3).to(args.device)
    families = ocsfast.group(dense, x[:2], verify=False)
    for name, make in optimizers().items():
        for with_penalty in (False, True):
            model = copy.deepcopy(dense)
            optimizer = make(model.parameters())
            pruner = penalized(model, optimizer, x, families) if with_penalty else None
            step_of(model, optimizer, x, y)()
            record(f"{name} step{', penalized' if with_penalty else ''}", optimizer.step, arch)
            if pruner is not None and "ocsfast" in name:
                record(f"check, {name}", lambda p=pruner: p._evaluate(forced=False), arch)


if __name__ == "__main__":
    main()
