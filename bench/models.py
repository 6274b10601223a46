"""Which models ocsfast takes: writes docs/models.md.

    python bench/models.py                     every model, minutes
    python bench/models.py timm                one library
    python bench/models.py timm/volo_d1_224    one model; the others' results are kept
    python bench/models.py --graph timm        where a model stays partly dense, its graph too
    python bench/models.py --page              write the page again from bench/results/models.json

Every model is grouped in a process of its own, with random weights, and one random cut of every family
is held against the whole model with those slices zeroed, in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo
from models_page import page

from ocsfast.core.errors import GroupingError
from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import by_labels
from ocsfast.grouping.graph.model import graph_of
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.proof.trials import Trial, proved
from ocsfast.grouping.scope import Scope
from ocsfast.grouping.trace.batch import with_batch
from ocsfast.grouping.trace.side_effects import undisturbed
from ocsfast.ops.cost import build_cost_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"
LIMIT = 90  # seconds a model
SHARE = 0.3  # of every family's groups go in the trial
TOLERANCE, ATTEMPTS = 1e-8, 3  # of an error, on so many sets of weights
ENOUGH = 0.95  # prunable share below which the page says why

Entry = dict[str, Any]


# -- one model, in a process of its own ---------------------------------------------------------


def measure(library: str, name: str, graph: bool) -> Entry:
    model, args, kwargs = zoo.build(library, name)
    start = time.perf_counter()
    try:
        if graph:
            model = graph_of(model, args, kwargs)
        families, setting = by_labels(model, args, kwargs, Scope())
        grouped = time.perf_counter()
        found = len(families.families)
        families = proved(model, families, setting)
    except GroupingError as error:
        return {"refused": without_paths(str(error))}
    entry = {
        "seconds": round(grouped - start, 2),
        "proved_seconds": round(time.perf_counter() - start, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "found": found,
        "families": len(families.families),
        "groups": families.num_groups,
        "kinds": sorted({family.kind for family in families.families}),
        "share": round(prunable_share(model, families), 4),
        "reasons": reasons(families),
        "modes": len(setting.runs) if setting.training else 1,
        "notes": [without_paths(note) for note in families.notes],
    }
    generator = torch.Generator().manual_seed(1)
    pruned = torch.zeros(families.num_groups, dtype=torch.bool)
    for family in families.families:
        count = min(family.size - 1, max(1, round(SHARE * family.size)))
        kept = family.size - count
        count = max(0, count - -kept % families.multiple)  # so many stay as the operators want
        pruned[family.first + torch.randperm(family.size, generator=generator)[:count]] = True
    model.requires_grad_(False)  # the counter's hooks fail on modules that read parameters
    with torch.no_grad():
        entry["error"] = zeroing_error(model, families, setting, pruned)
        entry["macs"] = macs_agree(model, families, pruned, args, kwargs)
    return entry


def prunable_share(model: Any, families: Any) -> float:
    """The share of parameter elements that some group takes."""
    kept: dict[str, float] = {}  # of each tensor, what no group takes
    for axis in families.axes:
        free = float((axis.groups < 0).double().mean())
        kept[axis.tensor] = kept.get(axis.tensor, 1.0) * free
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    return sum(p.numel() * (1 - kept.get(name, 1.0)) for name, p in parameters.items()) / total


def zeroing_error(model: Any, families: Any, setting: Any, pruned: Any) -> float | str:
    """Relative to the largest output, in either mode; or what the cut model's own code said.

    A wrong label shows on any weights. Rounding, which batch norms over two samples may multiply a
    million times, does not: so other weights are tried before an error counts.
    """
    worst = math.inf
    for seed in range(ATTEMPTS):
        found = error_on(seed, model, families, setting, pruned)
        if isinstance(found, str):
            return found
        worst = min(worst, found)
        if worst <= TOLERANCE:
            break
    return worst


def error_on(seed: int, model: Any, families: Any, setting: Any, pruned: Any) -> float | str:
    with undisturbed(model, training=False):
        torch.manual_seed(seed)
        trial = Trial(model, families, setting)
        worst = 0.0
        for run in setting.runs:
            expected = trial._zeroed(pruned, run)
            try:
                actual = trial._cut(pruned, run)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            for a, b in zip(actual, expected, strict=True):
                scale = float(b.double().abs().max()) if b.numel() else 0.0
                if scale:
                    worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst


def macs_agree(model: Any, families: Any, pruned: Any, args: Any, kwargs: Any) -> list[int] | str:
    """Predicted and counted for one sample, before the cut and after it.

    Where the two differ, for two samples: a contrastive model multiplies the batch by itself.
    """

    def both(families: Any) -> list[int]:
        cost = build_cost_model(families, families.macs, "MACs")(families.sizes)
        for samples in (1, 2):
            some, named, samples = with_batch(
                args, kwargs, samples
            )  # as given, where they cannot be cut
            model.train().eval()  # in evaluation some models keep biases that they have computed
            counted = count_macs(lambda some=some, named=named: model(*some, **named))
            if counted in (cost, samples * cost):  # of the whole example, or of one sample
                break
        return [cost if counted == cost else samples * cost, counted]

    try:
        return [*both(families), *both(cut_model(model, families, pruned))]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def without_paths(text: str) -> str:
    """A text without the folders that packages lie in on this machine."""
    text = re.sub(r"/\S*?/site-packages/", "", text)
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f"{folder}/", "")
    return text


def reasons(families: Any) -> list[str]:
    """Why layers stay dense, the most frequent first, without the machine's paths."""
    counts: dict[str, int] = {}
    for frozen in families.frozen:
        reason = without_paths(frozen.reason)
        counts[reason] = counts.get(reason, 0) + 1
    return sorted(counts, key=lambda reason: -counts[reason])


# -- all of them ----------------------------------------------------------------------------------


def _worker(library: str, name: str, graph: bool, answer: Connection) -> None:
    try:
        answer.send(measure(library, name, graph))
    except Exception as error:
        answer.send({"crashed": f"{type(error).__name__}: {str(error).splitlines()[0]}"})


def run(library: str, name: str, graph: bool = False) -> Entry:
    """Forked, so that the libraries are imported once. `graph`: as `ocsfast.as_graph` makes it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(library, name, graph, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT):
            return {"crashed": f"not done in {LIMIT} s"}
        return dict(ours.recv())
    except EOFError:
        process.join()
        return {"crashed": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def verdict(entry: Entry) -> str:
    if "crashed" in entry or "refused" in entry:
        return "crashed" if "crashed" in entry else "refused"
    error, macs = entry["error"], entry["macs"]
    if isinstance(error, str) or isinstance(macs, str) or not error <= TOLERANCE:
        return "wrong"
    if macs[0] != macs[1] or macs[2] != macs[3]:
        return "wrong MACs"
    return "exact" if entry["share"] > ENOUGH else "partly dense"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("which", nargs="*", help="a library, or library/name")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--graph", action="store_true", help="what stays partly dense, as a graph too")
    parser.add_argument("--missing", action="store_true", help="only models without a good result yet")
    given = parser.parse_args()
    torch.set_num_threads(1)  # one thread, which forked processes need
    warnings.simplefilter("ignore")
    results: dict[str, Entry] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    every = [f"{library}/{name}" for library, known in zoo.names().items() for name in known]
    chosen = [m for m in every if not given.which or {m, m.split("/")[0]} & set(given.which)]
    for model in [] if given.page else chosen:
        if package := zoo.absent(*model.split("/", 1)):
            print(model, f"skipped: {package} is not installed", flush=True)
            continue
        if given.missing and verdict(results.get(model, {"crashed": ""})) == "exact":
            continue
        if not given.graph or model not in results:
            results[model] = run(*model.split("/", 1))
        if given.graph and verdict(results[model]) != "exact":
            results[model]["graph"] = run(*model.split("/", 1), graph=True)
        print(model, verdict(results[model]), json.dumps(results[model])[:400], flush=True)
        # Kept in the order of the lists, so that a single model's new result is a small difference.
        ordered = {m: results[m] for m in every if m in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(page({m: results[m] for m in every if m in results}, verdict))


if __name__ == "__main__":
    main()
