"""When groups should begin to shrink and when the cut should come: accuracy against cost, run by run.

    python bench/stages.py OUT.jsonl --task digits --seeds 0 1 2 --only dense "the defaults"
    python bench/stages.py OUT.jsonl --table

A run is one network trained dense, or once with half of its MACs removed on the way. Variants differ in
how often checks are made and in when the stages fall. A line of JSON is written after each run; a run
that has its line already is not made again.

`seconds` are of processor time in the training loop, of one thread, which another program on the machine
disturbs little; validation is not among them, checks and the cut are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ocsfast
from ocsfast.train.data.catalogue import load
from ocsfast.train.data.source import Data, Request, iterations
from ocsfast.train.loop import evaluate, macs_per_sample
from ocsfast.train.models import build_model
from ocsfast.train.recipes import make_optimizer, make_scheduler, recipe

TASKS: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits", "arch": "digits_resnet"},
    "vit": {"data": "digits", "arch": "vit_tiny"},
    # 5 000 images at 16 pixels.
    "cifar": {"data": "", "arch": "resnet20", "epochs": 24, "subset": 5000, "size": 16},
}
# Options, and `checks` in the run; dense where there are none. Shares are of the run.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "a check an epoch, Eq. 5": {"checks": 0, "observe": 0.0},
    "50 checks, Eq. 5": {"checks": 50, "observe": 0.0},
    "200 checks, Eq. 5": {"checks": 200, "observe": 0.0},
    "200, lag 10, window 15": {"checks": 200, "lag": 10, "window": 15, "observe": 0.0},
    "from 0.05, span 0.1": {"checks": 200, "sparsify_from": 0.05, "span": 0.1},
    "from 0.05, span 0.2": {"checks": 200, "sparsify_from": 0.05, "span": 0.2},
    "from 0.1, span 0.1": {"checks": 200, "sparsify_from": 0.1, "span": 0.1},
    "from 0.1, span 0.2": {"checks": 200, "sparsify_from": 0.1, "span": 0.2},
    "from 0.2, span 0.1": {"checks": 200, "sparsify_from": 0.2, "span": 0.1},
    "from 0.2, span 0.2": {"checks": 200, "sparsify_from": 0.2, "span": 0.2},
    "from 0.3, span 0.1": {"checks": 200, "sparsify_from": 0.3, "span": 0.1},
    "the defaults": {"checks": 200},
    "the defaults, round_to auto": {"checks": 200, "round_to": "auto"},
    "the defaults, cost-aware": {"checks": 200, "cost_aware": True},
    "latency": {"checks": 200, "target": "latency"},
    "latency, cost-aware": {"checks": 200, "target": "latency", "cost_aware": True},
}


@functools.cache
def latency_table(arch: str, classes: int, shape: tuple[int, ...], batch: int) -> ocsfast.LatencyTable:
    """Measured once for all runs of a call, which then aim at the same time."""
    model = build_model(arch, classes, shape[0], shape[1])
    return ocsfast.LatencyTable.measure(model, torch.zeros(batch, *shape))


def run(task: dict[str, Any], data: Data, options: dict[str, Any] | None, seed: int) -> dict[str, Any]:
    """Train one network, and say what came of it."""
    plan = recipe("default", task["data"], task["arch"])
    plan = dataclasses.replace(plan, epochs=task.get("epochs", plan.epochs))
    torch.manual_seed(seed)
    model = build_model(task["arch"], len(data.classes), data.shape[0], data.shape[1])
    epoch_steps = iterations(data.train, plan.batch_size)
    total = plan.epochs * epoch_steps
    optimizer = make_optimizer(plan, model)
    scheduler = make_scheduler(plan, optimizer, total)
    pruner, found = None, {"macs_before": macs_per_sample(model, data.shape)}
    if options is not None:
        fields = dict(options)
        checks = fields.pop("checks")
        every = max(1, total // checks) if checks else epoch_steps
        if fields.get("target") == "latency":
            shape = (len(data.classes), tuple(data.shape), plan.batch_size)
            fields["target"] = latency_table(task["arch"], *shape)
        if "sparsify_from" in fields:  # a share of the run
            fields["sparsify_from"] = max(1, round(fields["sparsify_from"] * total / every))
        pruner = ocsfast.attach(
            model,
            task.get("ratio", 0.5),
            optimizer=optimizer,
            example_inputs=torch.zeros(2, *data.shape),
            total_steps=total,
            check_every=every,
            **fields,
        )
    generator = torch.Generator().manual_seed(seed)
    seconds, step = 0.0, 0
    for epoch in range(plan.epochs):
        torch.manual_seed(seed + epoch)
        model.train()
        begun = time.process_time()
        for images, labels in data.train.batches(plan.batch_size, generator):
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if pruner is not None and pruner.step().cut:
                report, now = pruner.history[-1], time.process_time()
                seconds += now - begun
                after = evaluate(model, data.test, plan.batch_size)
                model.train()
                begun = time.process_time()
                found |= {
                    "cut": step / total,
                    "t_sl": pruner.history[(pruner.t_sl or 0) - 1].steps / total,
                    "forced": report.forced,
                    "residual": report.residual,
                    "accuracy_at_cut": after,
                }
        seconds += time.process_time() - begun
    return found | {
        "accuracy": evaluate(model, data.test, plan.batch_size),
        "seconds": seconds,
        "macs": macs_per_sample(model, data.shape),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line a task and variant: means over seeds, and each seed's difference to its dense run."""
    lines = []
    dense = {(r["task"], r["seed"]): r for r in rows if r["variant"] == "dense"}
    for task, variant in dict.fromkeys((r["task"], r["variant"]) for r in rows):
        mine = [r for r in rows if (r["task"], r["variant"]) == (task, variant)]
        paired = [r for r in mine if (task, r["seed"]) in dense]

        def mean(values: list[float]) -> str:
            if not values:
                return "-"
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.fmean(values):.3f} ± {spread:.3f}"

        lost = [r["accuracy"] - dense[task, r["seed"]]["accuracy"] for r in paired]
        cost = [r["seconds"] / dense[task, r["seed"]]["seconds"] for r in paired]
        cells = [task, variant, str(len(mine))]
        cells += [mean([r[name] for r in mine if name in r]) for name in ("accuracy", "t_sl", "cut")]
        cells += [mean(lost), mean(cost), str(sum(r.get("forced", False) for r in mine))]
        lines.append("| " + " | ".join(cells) + " |")
    titles = ("task", "variant", "seeds", "accuracy", "shrink from", "cut at")
    titles += ("accuracy - dense", "cost / dense", "forced")
    return "\n".join(["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help=f"variants: {', '.join(VARIANTS)}")
    parser.add_argument(
        "--add", action="append", default=[], help='NAME={"option": value}, more variants'
    )
    parser.add_argument("--images", help="for cifar: a folder or archive as --data folder: takes it")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = (
        [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    )
    if given.table:
        print(table(rows))
        return
    torch.set_num_threads(1)
    variants = dict(VARIANTS)
    for text in given.add:
        name, _, options = text.partition("=")
        variants[name] = json.loads(options)
    task = dict(TASKS[given.task])
    if given.images:
        task["data"] = f"folder:{given.images}"
    data = load(task["data"], Request(subset=task.get("subset"), image_size=task.get("size", 32)))
    done = {(r["task"], r["variant"], r["seed"]) for r in rows}
    for seed in given.seeds:
        for name in given.only or variants:
            if (given.task, name, seed) in done:
                continue
            row = {"task": given.task, "variant": name, "seed": seed, "options": variants[name]}
            row |= run(task, data, variants[name], seed)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
