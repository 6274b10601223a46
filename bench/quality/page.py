"""The tables and plots of docs/quality.md and README.md, from the results of bench/quality/run.py.

    python bench/quality/page.py                    writes them into the pages
    python bench/quality/page.py --check            fails where a page is not what the results say
    python bench/quality/page.py --results F.jsonl  prints one table of all that is in a file

A page holds what follows, and this program writes all that stands between the two comments; what is
printed as a table there is a line of JSON in bench/quality/results.

    <!-- quality: {results: cpu, tasks: [...], ratios: [...], variants: [...], against: [...]} -->
    <!-- end -->

`plot: FILE.svg` in the place of ratios makes a picture, and `points: [...]` a table of one run.
`facts: true` says how many runs there were, `short: true` makes a column of each variant, and
`beside: VARIANT` columns of each task: the difference to that variant, and the cost.

Differences are paired: of the runs of one seed. `±` is the standard deviation over seeds; of a
difference it is the standard error of its mean, in bold where 0 is outside of the 95 % interval of
Student's t, which is 4.3 of these for three seeds and 2.8 for five.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from run import HERE, ROOT, rows_of
from scipy import stats

from ocsfast.core.errors import ConfigError

PAGE = ROOT / "docs/quality.md"
PAGES = (PAGE, ROOT / "README.md")
MARK = re.compile(r"(<!-- quality: (?P<spec>\{.*?\}) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def load(names: str | Sequence[str]) -> list[Row]:
    """All rows of some files of results, those of runs that failed too."""
    names = [names] if isinstance(names, str) else names
    rows = [row for name in names for row in rows_of(HERE / "results" / f"{name}.jsonl").values()]
    if not rows:
        raise ConfigError(f"there are no results of {', '.join(names)}")
    return rows


def require_known(rows: list[Row], spec: dict[str, Any]) -> None:
    """Refuse names that no row has: a table of them would be empty.

    Raises:
        ConfigError: the first such name.
    """
    asked = {field: spec.get(field, ()) for field in ("tasks", "variants", "against")}
    asked["beside"] = [spec["beside"]] if "beside" in spec else []
    for field, names in asked.items():
        known = {row["task" if field == "tasks" else "variant"] for row in rows}
        for name in names:
            if name not in known:
                raise ConfigError(f"{field} has {name!r}, of which there are no results")
    if "facts" not in spec:
        needed = {"points"} if "points" in spec else {"tasks", "variants"}
        needed |= set() if {"points", "plot"} & spec.keys() else {"ratios"}
        if not needed <= spec.keys():
            raise ConfigError(f"{', '.join(sorted(needed - spec.keys()))} is missing")


def runs_of(rows: Iterable[Row], task: str, variant: str, ratio: float) -> dict[int, Row]:
    """Runs that ended, by seed; a dense one stands for every ratio."""
    return {
        row["seed"]: row
        for row in rows
        if row["task"] == task
        and row["variant"] == variant
        and row["ratio"] in (0.0, ratio)
        and "error" not in row
    }


def key(row: Row) -> tuple[str, str, float]:
    return row["task"], row["variant"], row["ratio"]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.1f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.1f}"


def paired(mine: dict[int, Row], other: dict[int, Row]) -> list[float]:
    """Differences in accuracy between the runs of each seed that both have."""
    return [
        row["accuracy"] - other[seed]["accuracy"] for seed, row in sorted(mine.items()) if seed in other
    ]


def difference(values: Sequence[float]) -> str:
    """Mean ± its standard error; in bold where 0 is outside of the 95 % interval.

    Never of two: their difference may be 0 by chance, as accuracies are of whole images.
    """
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    text = f"{mean:+.1f} ± {error:.1f}"
    beyond = len(values) > 2 and abs(mean) > error * stats.t.ppf(0.975, len(values) - 1)
    return f"**{text}**" if beyond else text


def table(rows: list[Row], spec: dict[str, Any]) -> str:
    """A line a task, ratio and variant."""
    against = spec.get("against", [])
    head = ["network", "MACs removed", "", "seeds", "accuracy, %", *(f"less {name}" for name in against)]
    lines = [[*head, "MACs left", "cost", "time"]]
    for task in spec["tasks"]:
        for ratio in spec["ratios"]:
            found = {variant: runs_of(rows, task, variant, ratio) for variant in spec["variants"]}
            if all(row["ratio"] != ratio for mine in found.values() for row in mine.values()):
                continue  # but for dense ones, which stand for every ratio
            for variant, mine in found.items():
                if not mine:
                    continue
                seeds = seeds_of(rows, mine, (task, variant, ratio))
                cells = [task, f"{ratio:g}", variant, seeds]
                cells.append(spread([row["accuracy"] for row in mine.values()]))
                for other in against:
                    theirs = runs_of(rows, task, other, ratio)
                    cells.append("" if other == variant else difference(paired(mine, theirs)))
                left = [row["macs"] / row["macs_dense"] for row in mine.values()]
                cells.append(f"{statistics.fmean(left):.3f}")
                cells.append(f"{statistics.fmean(row['cost'] for row in mine.values()):.2f}")
                lines.append([*cells, time_of(rows, mine)])
    lines.insert(1, ["---"] * len(lines[0]))
    return as_table(lines)


def seeds_of(rows: list[Row], mine: dict[int, Row], name: tuple[str, str, float]) -> str:
    """How many runs ended, and how many failed."""
    failed = sum(key(row) == name for row in rows if "error" in row)
    return f"{len(mine)}, {failed} failed" if failed else str(len(mine))


def time_of(rows: list[Row], mine: dict[int, Row]) -> str:
    """Processor time of runs, the dense run of the same seed being 1, with what they started from.

    Of a GPU none: runs share it.
    """
    task = {row["task"] for row in mine.values()}
    dense = {r["seed"]: r for r in rows if r["task"] in task and r["ratio"] == 0 and "error" not in r}
    shares = [
        row["cost"] + (row["cpu_seconds"] / other["cpu_seconds"] - row["work"] / other["work"])
        for seed, row in mine.items()
        if (other := dense.get(seed)) and row.get("device", "cpu") == "cpu"
    ]
    return f"{statistics.fmean(shares):.2f}" if shares else ""


def short(rows: list[Row], spec: dict[str, Any]) -> str:
    """A line a task and ratio, a column a variant."""
    lines = [["", "seeds", *spec["variants"]]]
    lines.append(["---"] * len(lines[0]))
    for task in spec["tasks"]:
        for ratio in spec["ratios"]:
            found = [runs_of(rows, task, variant, ratio) for variant in spec["variants"]]
            seeds = set.intersection(*(set(mine) for mine in found))
            cells = [spread([mine[seed]["accuracy"] for seed in sorted(seeds)]) for mine in found]
            lines.append([column(spec, task, ratio), str(len(seeds)), *cells])
    return as_table(lines)


def beside(rows: list[Row], spec: dict[str, Any]) -> str:
    """A line a variant, and of each task and ratio the difference to one variant, and the cost."""
    other, pairs = spec["beside"], [(task, ratio) for task in spec["tasks"] for ratio in spec["ratios"]]
    head = ["", "seeds"]
    for task, ratio in pairs:
        head += [f"{column(spec, task, ratio)}: less {other}", "cost"]
    lines = [head, ["---"] * len(head)]
    for variant in spec["variants"]:
        counts, cells = [], []
        for task, ratio in pairs:
            mine = runs_of(rows, task, variant, ratio)
            counts.append(seeds_of(rows, mine, (task, variant, ratio)))
            cells.append(difference(paired(mine, runs_of(rows, task, other, ratio))))
            cells.append(f"{statistics.fmean(r['cost'] for r in mine.values()):.2f}" if mine else "")
        same = len(set(counts)) == 1
        lines.append([variant, counts[0] if same else "; ".join(counts), *cells])
    return as_table(lines)


def column(spec: dict[str, Any], task: str, ratio: float) -> str:
    """What a short table calls a task and ratio."""
    return f"{spec.get('names', {}).get(task, task)}, {100 * ratio:g} %"


def on_the_way(rows: list[Row], spec: dict[str, Any]) -> str:
    """Accuracy of one run at some shares of it, as `Variant.curve` had it measured."""
    row = next(row for row in rows if row["variant"] == spec["variant"])
    lines = [["of the run", "the model", "fresh statistics", "its average"], ["---"] * 4]
    for share in spec["points"]:
        at, *accuracies = min(row["curve"], key=lambda point: abs(point[0] - share))
        cut = " (the cut)" if at == row["cut"] else ""
        lines.append([f"{at:.3f}{cut}", *(f"{accuracy:.1f}" for accuracy in accuracies)])
    return as_table(lines)


def as_table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in lines)


def facts(rows: list[Row], _: dict[str, Any]) -> str:
    """How many runs, for how long, and on what."""
    hours = sum(row.get("seconds", 0.0) for row in rows) / 3600
    machines = dict.fromkeys(f"{row['machine']}, torch {row['torch'].partition('+')[0]}" for row in rows)
    failed = sum("error" in row for row in rows)
    return (
        f"{len(rows)} runs, {failed} of which failed; {hours:.1f} hours of training, "
        f"of one thread each; {'; '.join(machines)}.\n"
    )


def plot(rows: list[Row], spec: dict[str, Any]) -> str:
    """Accuracy against MACs left and against training cost, as a picture; the line that shows it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file for the same rows, and text as text.
    matplotlib.rcParams.update({"svg.hashsalt": "ocsfast", "svg.fonttype": "none"})
    tasks, file = spec["tasks"], spec["plot"]
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.2 * len(tasks), 6.4), squeeze=False)
    for column, task in enumerate(tasks):
        for number, variant in enumerate(spec["variants"]):
            ratios = sorted({row["ratio"] for row in rows if row["variant"] == variant})
            found = [list(runs_of(rows, task, variant, ratio).values()) for ratio in ratios]
            found = [runs for runs in found if runs]
            if not found:
                continue
            y = [statistics.fmean(row["accuracy"] for row in runs) for runs in found]
            error = [
                statistics.stdev([row["accuracy"] for row in runs]) / math.sqrt(len(runs))
                if len(runs) > 1
                else 0.0
                for runs in found
            ]
            left = [statistics.fmean(r["macs"] / r["macs_dense"] for r in runs) for runs in found]
            cost = [statistics.fmean(row["cost"] for row in runs) for runs in found]
            style = {"marker": "osD^vPX*"[number % 8], "capsize": 2, "color": f"C{number}"}
            for axis, x in ((axes[0][column], left), (axes[1][column], cost)):
                axis.errorbar(x, y, error, label=variant, linewidth=1, markersize=4, **style)
        axes[0][column].set(title=task, xlabel="MACs left", ylabel="accuracy, %")
        axes[1][column].set(xlabel="training cost (dense = 1)", ylabel="accuracy, %")
        for axis in (axes[0][column], axes[1][column]):
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PAGE.parent / file, metadata={"Date": None})
    pyplot.close(figure)
    return f"![Accuracy against MACs left, and against training cost]({file})\n"


def filled(text: str, plots: bool) -> str:
    """A page, with each table as the results have it.

    Args:
        plots: whether pictures are drawn, too.

    Raises:
        ConfigError: a mark that is not as it should be, or asks for what there is not.
    """

    def body(match: re.Match[str]) -> str:
        try:
            spec = yaml.safe_load(match["spec"])
            rows = load(spec["results"])
            require_known(rows, spec)
        except (yaml.YAMLError, KeyError, ConfigError) as error:
            raise ConfigError(f"{match['spec']}: {error}") from error
        if "plot" in spec:
            made = plot(rows, spec) if plots else match["body"].strip("\n") + "\n"
        else:
            kinds = {"points": on_the_way, "facts": facts, "short": short, "beside": beside}
            made = next((kinds[kind] for kind in kinds if kind in spec), table)(rows, spec)
        return f"{match[1]}\n{made.strip(chr(10))}\n\n{match[4]}"

    found = list(MARK.finditer(text))
    marks, ends = text.count("<!-- quality"), text.count("<!-- end -->")
    if not len(found) == marks == ends or any("<!-- quality" in match["body"] for match in found):
        raise ConfigError(
            f"{marks} marks of tables and {ends} ends of them: each mark is <!-- quality: {{...}} --> "
            "on a line of its own, and has an <!-- end -->"
        )
    return MARK.sub(body, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    if given.results:
        rows = list(rows_of(given.results).values())
        names = {key: list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "variant")}
        ratios = sorted({row["ratio"] for row in rows})
        spec = {"tasks": names["task"], "ratios": ratios, "variants": names["variant"]}
        against = [name for name in ("thinner", "dense") if name in names["variant"]]
        print(table(rows, spec | {"against": against}), end="")
        for row in rows:
            if "error" in row:
                print(f"{row['task']}, {row['variant']}, {row['ratio']}, {row['seed']}: {row['error']}")
        return
    for page in PAGES:
        text = page.read_text()
        try:
            new = filled(text, plots=not given.check)
        except ConfigError as error:
            parser.error(f"{page}: {error}")
        if given.check and new != text:
            sys.exit(f"{page} is not what the results say: python bench/quality/page.py writes it")
        page.write_text(new)


if __name__ == "__main__":
    main()
