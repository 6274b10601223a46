"""Tables of benchmarks' JSON, as Markdown: python bench/table.py bench/results/cpu.json

A file that ends in .jsonl holds a row a line, as `--rows` of the benchmarks leaves them behind; --merged
FILE keeps it in the form of the others.

A row: its median time, the bytes it must move, GB/s, how near the roof measured in turn with it comes
(roof's time / its time), and how many times as long as ocsfast's row it takes.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HEAD = ("op", "by", "threads", "ms", "MB", "GB/s", "of roof", "x ocsfast")


def row(entry: dict[str, Any], ours: dict[tuple[str, int], float]) -> tuple[str, ...]:
    info, seconds = entry["extra_info"], entry["stats"]["median"]
    base = ours.get((info["op"], info["threads"]))
    return (
        info["op"],
        info["by"],
        str(info["threads"]) if info["threads"] else "-",
        f"{1e3 * seconds:.4g}",
        f"{info['bytes'] / 1e6:.0f}" if info["bytes"] else "",
        f"{info['bytes'] / seconds / 1e9:.1f}" if info["bytes"] else "",
        f"{info['roof'] / seconds:.2f}" if info["roof"] else "",
        f"{seconds / base:.3g}" if base else "",
    )


def tables(document: dict[str, Any]) -> str:
    entries = document["benchmarks"]
    machine = ", ".join(f"{key} {value}" for key, value in document["machine_info"].items())
    lines = [f"Measured {document['datetime'][:10]}: {machine}."]
    for model in dict.fromkeys(e["extra_info"]["model"] for e in entries):
        mine = [e for e in entries if e["extra_info"]["model"] == model]
        ours = {
            (e["extra_info"]["op"], e["extra_info"]["threads"]): e["stats"]["median"]
            for e in mine
            if e["extra_info"]["by"] == "ocsfast"
        }
        lines += ["", f"### {model}", "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        order = sorted(mine, key=lambda e: (e["extra_info"]["op"], e["extra_info"]["threads"]))
        lines += ["| " + " | ".join(row(e, ours)) + " |" for e in order]
    return "\n".join(lines)


def rows_of(lines: str) -> dict[str, Any]:
    """The rows of one run, the last of which may have been cut off in the middle."""
    entries = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]
    if not entries:
        raise SystemExit("there is no row yet")
    facts = [entry.pop("machine_info") for entry in entries]
    now = datetime.now(timezone.utc).isoformat()
    return {"machine_info": facts[0], "datetime": now, "benchmarks": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--merged", type=Path)
    args = parser.parse_args()
    text = args.file.read_text()
    document = rows_of(text) if args.file.suffix == ".jsonl" else json.loads(text)
    if args.merged:
        args.merged.write_text(json.dumps(document, indent=1) + "\n")
    print(tables(document))


if __name__ == "__main__":
    main()
