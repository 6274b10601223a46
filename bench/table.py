"""Results as tables in Markdown: python bench/table.py bench/results/cpu.json

A file that ends in .jsonl holds a row a line, as bench/gpu.sh leaves them; another is pytest-
benchmark's.

A row of times: the median, the bytes it must move, GB/s, how near the roof measured in turn with it
comes (the roof's time / its time), and how many times as long as ocsfast's call, measured in turn too,
it takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def number(value: Any, scale: float = 1.0, digits: str = ".4g") -> str:
    return "" if value is None else f"{scale * value:{digits}}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows] if rows else []


def times(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    for model, dtype in dict.fromkeys((r["model"], r["dtype"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["dtype"]) == (model, dtype)]
        of_ocsfast = {(r["op"], r["threads"]): r["median"] for r in mine if r["by"] == "ocsfast"}
        on_gpu = any(r.get("host") is not None for r in mine)

        def line(r: Row, of_ocsfast: Row = of_ocsfast, on_gpu: bool = on_gpu) -> list[str]:
            ours = r.get("ours") or of_ocsfast.get((r["op"], r["threads"]))
            seconds, moved, roof = r["median"], r["bytes"], r["roof"]
            words = [r["op"] + (" (fits L2)" if r.get("fits_l2") else ""), r["by"]]
            words += [] if on_gpu else [str(r["threads"])]
            words += [number(1e3 * seconds), f"{1e3 * r['min']:.4g} to {1e3 * r['max']:.4g}"]
            words += [str(r["rounds"]), f"{moved / 1e6:.0f}" if moved else ""]
            words += [f"{moved / seconds / 1e9:.1f}" if moved else ""]
            words += [f"{moved / roof / 1e9:.1f}" if moved and roof else ""]
            words += [f"{roof / seconds:.2f}" if roof else ""]
            words += [number(seconds / ours, 1.0, ".3g") if ours else ""]
            # Where calls did not lie ready on the device, the time is the host's as well.
            late = "" if r.get("queued", True) else " (not queued)"
            return words + ([number(r["host"], 1e6, ".1f") + late] if on_gpu else [])

        head = ["op", "by", *([] if on_gpu else ["threads"]), "ms", "least to most", "rounds", "MB"]
        head += ["GB/s", "roof GB/s", "of roof", "x ocsfast", *(["host us"] if on_gpu else [])]
        order = sorted(mine, key=lambda r: (r["op"], r["threads"]))
        where = "" if dtype == "float32" else f", {dtype}"
        lines += ["", f"### {model}{where}, {mine[0]['device']}", *table(head, map(line, order))]
    return lines


def columns(title: str, **of: Callable[[Row], str]) -> Callable[[list[Row]], list[str]]:
    """A table with a column for each name, `_` for a blank."""

    def make(rows: list[Row]) -> list[str]:
        head = [name.replace("_", " ") for name in of]
        return ["", f"### {title}", *table(head, ([f(r) for f in of.values()] for r in rows))]

    return make


def plain(key: str) -> Callable[[Row], str]:
    return lambda r: str(r.get(key, "")) if r.get(key) is not None else ""


def scaled(key: str, scale: float = 1.0, digits: str = ".4g") -> Callable[[Row], str]:
    return lambda r: number(r.get(key), scale, digits)


def at_cut(r: Row) -> str:
    return "" if not r.get("accuracy_at_cut") else "{:.2f} / {:.2f}".format(*r["accuracy_at_cut"])


KINDS: dict[str, Callable[[list[Row]], list[str]]] = {
    "machine": lambda rows: [
        "Measured on: " + ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("kind", "build")) + "."
        for r in rows
    ],
    "roof": columns(
        "Roof",
        what=plain("what"),
        MB=scaled("bytes", 1e-6, ".0f"),
        GB_a_second=lambda r: f"{r['bytes'] / r['median'] / 1e9:.1f}",
        ms=scaled("median", 1e3),
        rounds=plain("rounds"),
    ),
    "stage": columns(
        "Stages", stage=plain("stage"), end=plain("end"), seconds=plain("seconds"), said=plain("said")
    ),
    "time": times,
    "step": columns(
        "Training steps",
        way=plain("way"),
        model=plain("model"),
        batch=plain("batch"),
        forward_and_backward_ms=scaled("compute", 1e3),
        step_ms=scaled("step", 1e3),
        all_of_torch_SGD=scaled("of_torch", 1, ".3f"),
    ),
    "launches": columns(
        "Launches and waits",
        model=plain("model"),
        what=plain("what"),
        launches=plain("launches"),
        ours=plain("ours"),
        copies=plain("copies"),
        waits=plain("waits"),
        host_us=scaled("host", 1e6, ".1f"),
        error=plain("error"),
    ),
    "training": columns(
        "Training through the cut",
        run=plain("run"),
        model=plain("model"),
        data=plain("data"),
        dtype=plain("dtype"),
        epochs=plain("epochs"),
        batch=plain("batch"),
        graph=plain("graph"),
        accuracy=scaled("accuracy", 1, ".2f"),
        before_and_after_the_cut=at_cut,
        images_a_second_before=scaled("before_cut", 1, ".0f"),
        images_a_second_after=scaled("after_cut", 1, ".0f"),
        MMACs=scaled("macs", 1e-6),
        MMACs_left=scaled("macs_left", 1e-6),
    ),
    "throughput": columns(
        "Images a second in training",
        model=plain("model"),
        what=plain("what"),
        by=plain("by"),
        batch=plain("batch"),
        images_a_second=scaled("images_a_second", 1, ".1f"),
        ms_a_step=scaled("median", 1e3),
        MMACs=scaled("macs", 1e-6),
        MB_at_peak=scaled("memory", 1e-6),
        first_call_s=scaled("compiled_in", 1, ".1f"),
    ),
    "latency": columns(
        "Latency as a target",
        model=plain("model"),
        device=plain("device"),
        threads=plain("threads"),
        batch=plain("batch"),
        side=plain("side"),
        dense_ms=scaled("dense_ms"),
        measuring_s=scaled("seconds", 1, ".1f"),
        ratio=plain("ratio"),
        predicted=scaled("predicted", 1, ".3f"),
        measured=scaled("measured", 1, ".3f"),
        error_percent=scaled("error", 100, ".1f"),
        MACs_kept=scaled("macs_kept_by_latency", 1, ".3f"),
        parameters_kept=scaled("parameters_kept_by_latency", 1, ".3f"),
        MACs_kept_by_FLOPs=scaled("macs_kept_by_flops", 1, ".3f"),
        parameters_kept_by_FLOPs=scaled("parameters_kept_by_flops", 1, ".3f"),
        cost_aware=plain("cost_aware"),
        MACs_kept_by_FLOPs_too=scaled("macs_kept_by_flops, cost-aware", 1, ".3f"),
        parameters_kept_by_FLOPs_too=scaled("parameters_kept_by_flops, cost-aware", 1, ".3f"),
    ),
    "rounding": columns(
        "Multiples of kept counts: time over that of round_to=1",
        model=plain("model"),
        device=plain("device"),
        dtype=plain("dtype"),
        batch=plain("batch"),
        side=plain("side"),
        ratio=plain("ratio"),
        what=plain("what"),
        round_to=plain("round_to"),
        time=scaled("time", 1, ".3f"),
        MACs_kept=scaled("macs_kept", 1, ".3f"),
    ),
    "latency summary": columns(
        "Predicted against measured latency",
        device=plain("device"),
        models=plain("models"),
        cuts=plain("cuts"),
        median_error_percent=scaled("median_error", 100, ".1f"),
        worst_error_percent=scaled("worst_error", 100, ".1f"),
    ),
    "ncu": columns(
        "Kernels under ncu",
        op=plain("op"),
        dtype=plain("dtype"),
        ms=scaled("nanoseconds", 1e-6),
        DRAM_percent=scaled("dram_percent", 1, ".1f"),
        DRAM_MB=scaled("dram_bytes", 1e-6, ".0f"),
        IPC=scaled("ipc", 1, ".2f"),
        occupancy_percent=scaled("occupancy_percent", 1, ".1f"),
        local_loads=scaled("local_loads", 1, ".3g"),
        local_stores=scaled("local_stores", 1, ".3g"),
        instructions=scaled("instructions", 1, ".3g"),
        registers=plain("registers"),
        blocks=plain("blocks"),
        kernel=lambda r: "`" + str(r["kernel"])[:60] + "`",
    ),
}


def rows_of(text: str) -> list[Row]:
    """The rows of a run, the last of which may have been cut off in the middle."""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def saved_rows(document: dict[str, Any]) -> list[Row]:
    """pytest-benchmark's file as rows."""
    machine = {"kind": "machine", "date": document["datetime"][:10], **document["machine_info"]}
    keys = ("min", "median", "max", "rounds")
    of_ops = [
        {"kind": "time", "dtype": "float32", **e["extra_info"], **{k: e["stats"][k] for k in keys}}
        for e in document["benchmarks"]
    ]
    return [machine, *of_ops]


def tables(rows: list[Row]) -> str:
    lines: list[str] = []
    for kind, make in KINDS.items():
        mine = [row for row in rows if row["kind"] == kind]
        lines += make(mine) if mine else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    text = file.read_text()
    print(tables(rows_of(text) if file.suffix == ".jsonl" else saved_rows(json.loads(text))))


if __name__ == "__main__":
    main()
