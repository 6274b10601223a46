"""When groups should begin to shrink and when the cut should come: accuracy against cost, run by run.

    python bench/stages.py OUT.jsonl --task digits --seeds 0 1 2 --only dense "the defaults"
    python bench/stages.py OUT.jsonl --table --against "1 cut, from 0.1"

A run is one network trained dense, or once with half of its MACs removed on the way. Variants differ in
how often checks are made, in when the stages fall and in how many cuts there are. A line of JSON is
written after each run; a run that has its line already is not made again.

`seconds` are of processor time in the training loop, of one thread, which another program on the machine
disturbs little; validation is not among them, checks and cuts are. The runs of one seed take turns, an
epoch each, so that what disturbs one disturbs all: compare times of the same call. `work` is what the
steps took of a dense run's MACs, which nothing disturbs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ocsfast
from ocsfast import Pruner, StepReport
from ocsfast.choice.budget import budget_of
from ocsfast.choice.selection import choose
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


def in_thirds(*spans: float) -> list[dict[str, float]]:
    """Three cuts, after each of which a third of the ratio more is gone.

    Those after the first have no checks behind them to compare with, and should not wait for many.
    """
    return [
        {"share": (k + 1) / 3, "span": span, **({"lag": 1, "window": 1} if k else {})}
        for k, span in enumerate(spans)
    ]


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
    # One cut and three: at the same time as the one, earlier, with the last later, and of groups that
    # all shrink from the beginning.
    "1 cut, from 0.1": {"checks": 200, "sparsify_from": 0.1},
    "1 cut, from 0.05": {"checks": 200, "sparsify_from": 0.05},
    "3 cuts, from 0.1": {"checks": 200, "sparsify_from": 0.1, "cuts": in_thirds(1 / 15, 1 / 15, 1 / 15)},
    "3 cuts, from 0.05": {"checks": 200, "sparsify_from": 0.05, "cuts": in_thirds(0.1, 0.1, 0.1)},
    "3 cuts, to 0.3": {"checks": 200, "sparsify_from": 0.05, "cuts": in_thirds(0.1, 0.2, 0.2)},
    "3 cuts, shrinking together": {
        "checks": 200,
        "sparsify_from": 0.1,
        "together": True,
        "cuts": [{"share": share} for share in (1 / 3, 2 / 3, 1.0)],
    },
}


@functools.cache
def latency_table(arch: str, classes: int, shape: tuple[int, ...], batch: int) -> ocsfast.LatencyTable:
    """Measured once for all runs of a call, which then aim at the same time."""
    model = build_model(arch, classes, shape[0], shape[1])
    return ocsfast.LatencyTable.measure(model, torch.zeros(batch, *shape))


class Cuts:
    """The cuts of one run: one, or several in turn, each attached to what the one before it left.

    Args:
        options: of `ocsfast.attach`; `checks` in the run; and `cuts`: for each cut the `share` of the
            ratio that is gone after it, and options of its own. With `together`, all that will ever go
            shrinks from the first stage on, and a share of it is cut as soon as that is small.
        total, epoch_steps: optimizer steps of the run and of an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: dict[str, Any],
        ratio: float,
        shape: tuple[int, ...],
        total: int,
        epoch_steps: int,
    ) -> None:
        self.options = dict(options)
        checks = self.options.pop("checks")
        self.every = max(1, total // checks) if checks else epoch_steps
        self.stages = self.options.pop("cuts", [{}])
        self.together = self.options.pop("together", False)
        self.model, self.optimizer, self.ratio, self.total = model, optimizer, ratio, total
        self.shape, self.made, self.t_sl = shape, 0, 0
        self.pruner = self._attached({"example_inputs": torch.zeros(2, *shape)}, 0)

    def step(self, step: int) -> StepReport:
        """Make a check if one is due; after a cut, attach for the next one."""
        if self.made == len(self.stages):
            return self.pruner.step()
        before, mask = len(self.pruner.history), self.pruner.mask
        report = self.pruner.step()
        everything = report.cut and self.together
        if self.together and not report.cut and len(self.pruner.history) > before:
            mask = self.pruner.mask
            report = self._cut_if_small() or report
        if report.cut:
            self.made = len(self.stages) if everything else self.made + 1
            self.t_sl = self.t_sl or self.pruner.history[(self.pruner.t_sl or 0) - 1].steps
            if self.made < len(self.stages):
                self._follow(mask, step)
        return report

    def _attached(self, given: dict[str, Any], step: int) -> Pruner:
        stage = {"share": 1.0, **self.stages[self.made]}
        share = stage.pop("share")
        fields = {**self.options, **given, **stage}
        if "sparsify_from" in fields:  # a share of the run
            start = round((fields["sparsify_from"] * self.total - step) / self.every)
            fields["sparsify_from"] = max(1, start)
        return ocsfast.attach(
            self.model,
            self.ratio if self.together else share * self.ratio,
            optimizer=self.optimizer,
            total_steps=self.total,
            check_every=self.every,
            **fields,
        )

    def _follow(self, mask: Tensor | None, step: int) -> None:
        """Attach to what is left; groups that shrink already go on as they do."""
        old, gone = self.pruner, self.pruner.mask
        assert gone is not None  # a cut has been made
        assert mask is not None
        given = {"families": old.families.cropped(gone), "again": True}
        self.pruner = self._attached({"sparsify_from": 0.0, **given}, step)
        if self.together:
            now, state, was = self.pruner._state.progress, self.pruner._state, old._state
            vars(now).update({**vars(was.progress), "stage": "sparsify", "t_cut": None})
            state.masks.extend(one[~gone] for one in was.masks)
            state.masks[-1] = state.mask = mask[~gone]

    def _cut_if_small(self) -> StepReport | None:
        """Cut the share of this stage if its groups are small, with the measure of `max_residual`."""
        parts, mask, share = self.pruner._parts, self.pruner.mask, self.stages[self.made]["share"]
        if self.pruner.stage != "sparsify" or share == 1.0 or mask is None:
            return None
        aim = dataclasses.replace(parts.aim, budget=budget_of(parts.aim.dense, share * self.ratio))
        choice = choose(aim, parts.hooks.current().bound)
        residual = choice.scores[choice.mask].mean() / choice.scores[~mask].mean()
        if residual >= (self.pruner.config.max_residual or 1.0):
            return None
        parts.aim = aim
        return self.pruner.cut()


def run(
    task: dict[str, Any], data: Data, options: dict[str, Any] | None, seed: int
) -> Iterator[dict[str, Any]]:
    """Train one network: nothing after each epoch, and after the last what came of it."""
    plan = recipe("default", task["data"], task["arch"])
    plan = dataclasses.replace(plan, epochs=task.get("epochs", plan.epochs))
    torch.manual_seed(seed)
    model = build_model(task["arch"], len(data.classes), data.shape[0], data.shape[1])
    epoch_steps = iterations(data.train, plan.batch_size)
    total = plan.epochs * epoch_steps
    optimizer = make_optimizer(plan, model)
    scheduler = make_scheduler(plan, optimizer, total)
    cuts, found = None, {"macs_before": macs_per_sample(model, data.shape), "cuts": []}
    if options is not None:
        options = dict(options)
        if options.get("target") == "latency":
            shape = (len(data.classes), tuple(data.shape), plan.batch_size)
            options["target"] = latency_table(task["arch"], *shape)
        ratio = task.get("ratio", 0.5)
        cuts = Cuts(model, optimizer, options, ratio, data.shape, total, epoch_steps)
    generator = torch.Generator().manual_seed(seed)
    seconds, step, macs, work = 0.0, 0, found["macs_before"], 0
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
            step, work = step + 1, work + macs
            if cuts is None:
                continue
            report = cuts.step(step)
            if report.cut:
                seconds += time.process_time() - begun
                macs = macs_per_sample(model, data.shape)
                found |= {"cut": step / total, "t_sl": cuts.t_sl / total, "forced": report.forced}
                found |= {"residual": report.residual}
                found["accuracy_at_cut"] = evaluate(model, data.test, plan.batch_size)
                names = ("cut", "residual", "accuracy_at_cut")
                found["cuts"].append({**{name: found[name] for name in names}, "macs": macs})
                model.train()
                begun = time.process_time()
        seconds += time.process_time() - begun
        yield {}
    yield found | {
        "accuracy": evaluate(model, data.test, plan.batch_size),
        "seconds": seconds,
        "macs": macs_per_sample(model, data.shape),
        "work": work / (total * found["macs_before"]),
    }


def in_turn(runs: dict[str, Iterator[dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """An epoch of each run after another, so that what disturbs their times is the same for all."""
    while runs:
        for name in list(runs):
            found = next(runs[name])
            if found:
                del runs[name]
                yield name, found


def table(rows: list[dict[str, Any]], against: str) -> str:
    """A line a task and variant: means over seeds, and each seed's difference to another variant."""
    lines = []
    other = {(r["task"], r["seed"]): r for r in rows if r["variant"] == against}
    for task, variant in dict.fromkeys((r["task"], r["variant"]) for r in rows):
        mine = [r for r in rows if (r["task"], r["variant"]) == (task, variant)]
        pairs = [(r, other[task, r["seed"]]) for r in mine if (task, r["seed"]) in other]

        def mean(values: list[float]) -> str:
            if not values:
                return "-"
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.fmean(values):.3f} ± {spread:.3f}"

        cuts = [[cut["cut"] for cut in r.get("cuts", [])] or [r["cut"]] for r in mine if "cut" in r]
        count = max(map(len, cuts), default=0)
        cells = [task, variant, str(len(mine))]
        cells += [mean([r[name] for r in mine if name in r]) for name in ("accuracy", "t_sl")]
        cells.append(", ".join(mean([at[k] for at in cuts if k < len(at)]) for k in range(count)) or "-")
        cells.append(mean([a["accuracy"] - b["accuracy"] for a, b in pairs]))
        cells.append(mean([a["seconds"] / b["seconds"] for a, b in pairs]))
        cells.append(mean([a["work"] / b["work"] for a, b in pairs if "work" in a and "work" in b]))
        cells.append(str(sum(r.get("forced", False) for r in mine)))
        lines.append("| " + " | ".join(cells) + " |")
    titles = ("task", "variant", "seeds", "accuracy", "shrink from", "cut at")
    titles += (f"accuracy - {against}", f"cost / {against}", f"MACs / {against}", "forced")
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
    parser.add_argument("--against", default="dense", help="the variant that the table compares with")
    given = parser.parse_args()
    rows = (
        [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    )
    if given.table:
        print(table(rows, given.against))
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
        names = [n for n in given.only or variants if (given.task, n, seed) not in done]
        runs = {name: run(task, data, variants[name], seed) for name in names}
        for name, found in in_turn(runs):
            row = {"task": given.task, "variant": name, "seed": seed, "options": variants[name], **found}
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
