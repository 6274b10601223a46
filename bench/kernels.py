"""Eight ops for ncu to look at, and its report as rows.

    ncu ... --profile-from-start off --csv --log-file ncu.csv python bench/kernels.py --device cuda
    python bench/kernels.py --read ncu.csv --rows results.jsonl

Only what stands between the start and the stop of the profiler is looked at: a launch an op, on 0.3 B
parameters in float32 and bfloat16. AdamW counts its steps in a launch of its own, which ncu leaves out.
"""

from __future__ import annotations

import csv
from pathlib import Path

import records
import torch
from cases import case
from launches import ops_of

# Each with what its kernel's name has in ncu's report.
OPS = {
    "group_saliency": "saliency_kernel",
    "shrink_": "shrink_kernel",
    "sgd_step_": "Sgd",
    "adamw_step_": "Adamw",
}
DTYPES = ("float32", "bfloat16")
# What ncu calls it, and what a row does.
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes.sum": "dram_bytes",
    "sm__inst_executed.avg.per_cycle_active": "ipc",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "l1tex__t_requests_pipe_lsu_mem_local_op_ld.sum": "local_loads",
    "l1tex__t_requests_pipe_lsu_mem_local_op_st.sum": "local_stores",
    "smsp__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}


def run(device: str, quick: bool) -> None:
    for dtype in DTYPES:
        calls = ops_of(case(f"{'Llama tiny' if quick else 'Llama 0.3B'}:{dtype}", device))
        for op in OPS:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            calls[op]()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print(op, dtype, flush=True)


def label(kernel: str) -> tuple[str, str]:
    """The op and the dtype of a kernel, by its name."""
    dtype = "bfloat16" if "__nv_bfloat16" in kernel else "float32"
    return next((op for op, name in OPS.items() if name in kernel), ""), dtype


def read(report: Path, rows: Path | None) -> None:
    """A row a launch."""
    lines = [line for line in report.read_text().splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, object]] = {}
    for line in csv.DictReader(lines):
        row = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        if line["Metric Name"] in METRICS:
            value = line["Metric Value"].replace(",", "")
            try:
                row[METRICS[line["Metric Name"]]] = float(value)
            except ValueError:
                row[METRICS[line["Metric Name"]]] = None
    for row in launches.values():
        op, dtype = label(str(row["kernel"]))
        records.append(rows, "ncu", model="Llama 0.3B", op=op, dtype=dtype, **row)
    if not launches:
        raise SystemExit(f"no launch in {report}: " + report.read_text()[-2000:])


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--read", type=Path, help="report of ncu to turn into rows")
    parser.add_argument("--metrics", action="store_true", help="print what ncu is to be asked for")
    args = parser.parse_args()
    if args.metrics:
        print(",".join(METRICS))
    elif args.read is not None:
        read(args.read, args.rows)
    else:
        run(args.device, args.quick)


if __name__ == "__main__":
    main()
