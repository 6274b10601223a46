"""docs/models.md from the results of bench/models.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

Entry = dict[str, Any]

HEAD = """# Models

One row a model: random weights, the smallest of its family, made shallower where that says so in
`bench/zoo.py`; `python bench/models.py` writes this page. The last table has models of people's own
packages, narrow and shallow ones; `bench/requirements-zoo.txt` has versions and how to install them.

* **share**: parameters that some group takes, of all.
* **error**: one random cut of 30 % of every family against the whole model with those slices zeroed,
  in float64, relative to the largest output; in training too, where its graph is another one. The best
  of up to three sets of weights: batch norms over two samples may multiply rounding a lot, not always.
* **MACs**: predicted equals counted, of one sample (of two for CLIP, which multiplies the batch by
  itself), before and after the cut.
* **s**: seconds for export and grouping, and with the proof (one thread, a shared machine).
* **exact**: share above 0.95. **partly dense**: exact too, but more stays dense, and why.
* **tier**: `module` is the model's own class. What is not exact there was tried as `ocsfast.as_graph`
  makes it (`python bench/models.py --graph`). `graph`: more of it may go then; the share is that of the
  module, then the graph's, as are the other columns.
* Head dimensions stay by default (`kinds=`), so a bias or norm of one head's width is not counted.
"""
COLUMNS = ("model", "", "tier", "families", "groups", "share", "error", "MACs", "s", "what stays dense")


def shorten(reason: str) -> str:
    """A reason without the machine's paths, one line, no table marks."""
    text = re.sub(r"\(?/\S*?/(?:site-packages|lib/python[0-9.]+)/(\S+?)\)?(?=[\s;,)]|$)", r"\1", reason)
    text = re.sub(r"\s+", " ", text).replace("|", "/")
    return text if len(text) <= 150 else text[:147] + "..."


def better(entry: Entry) -> tuple[Entry, str, str]:
    """The graph's results where more may go and rightly so; the tier; the module's share."""
    graph = entry.get("graph", {})
    share = entry.get("share", 0.0)
    right = isinstance(graph.get("error"), float) and graph["error"] <= 1e-8
    right = right and not isinstance(graph["macs"], str)
    if right and graph["share"] > share:
        return graph, "graph", f"{share:.3f}, "
    return entry, "module", ""


def row(model: str, entry: Entry, verdict: Callable[[Entry], str]) -> str:
    entry, tier, before = better(entry)
    said, name = verdict(entry), model.split("/", 1)[1]
    if said in ("crashed", "refused"):
        return f"| {name} | {said} | | | | | | | | {shorten(entry[said])} |"
    error, macs = entry["error"], entry["macs"]
    agree = "error" if isinstance(macs, str) else "=" if macs[::2] == macs[1::2] else "differ"
    apart = "fails" if isinstance(error, str) else f"{error:.0e}" if error else "0"
    why = "; ".join(map(shorten, entry["reasons"][:2])) if said != "exact" else ""
    cells = (
        *(name, said, tier, str(entry["families"]), str(entry["groups"])),
        f"{before}{entry['share']:.3f}",
        *(apart, agree, f"{entry['seconds']:.1f}, {entry['proved_seconds']:.1f}", why),
    )
    return "| " + " | ".join(cells) + " |"


def page(results: dict[str, Entry], verdict: Callable[[Entry], str]) -> str:
    totals = Counter(verdict(better(entry)[0]) for entry in results.values())
    parts = [
        HEAD,
        f"{len(results)} models: " + ", ".join(f"{n} {said}" for said, n in totals.most_common()),
    ]
    parts[-1] += "."
    for library in dict.fromkeys(model.split("/")[0] for model in results):
        own = {model: entry for model, entry in results.items() if model.split("/")[0] == library}
        parts += [f"\n## {library}\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        parts += [row(model, entry, verdict) for model, entry in own.items()]
    return "\n".join(parts) + "\n"
