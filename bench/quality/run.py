"""Makes the runs of a plan that have not been made yet, and writes a line of JSON after each.

    python bench/quality/run.py bench/quality/plans/small.yaml
    python bench/quality/run.py PLAN.yaml --images FOLDER --workers 2 --minutes 60

Results go to bench/quality/results, a file a plan. What is interrupted goes on where it is started
again; any number of these processes may work on one plan. CIFAR is read from torchvision's files in
data/, or by --images from a folder of train/CLASS/* and test/CLASS/*, or from a file that
bench/images.py has made of an archive of such a folder.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checked import read
from loop import Bench, Row
from plan import Plan

from ocsfast.core.errors import ConfigError, OcsfastError

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def rows_of(path: Path) -> dict[tuple[Any, ...], Row]:
    """The lines of a file of results, by task, variant, ratio and seed.

    A last line that a killed process left half is none.

    Raises:
        ConfigError: another line is no JSON.
    """
    if not path.exists():
        return {}
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number}: {error}") from error
    return {(row["task"], row["variant"], row["ratio"], row["seed"]): row for row in rows}


def append(path: Path, row: Row) -> None:
    """Add a line; where a killed process left half of one, that goes."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone holds a file; the system takes it back from one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def machine(device: torch.device) -> str:
    """The processor, or the card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str:
    """The commit that is checked out, with a + where the tree differs from it; "" outside of git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def work(plan: Plan, bench: Bench, out: Path, claims: Path, until: float) -> bool:
    """Make runs until all are made, or until a time.

    Args:
        claims: folder in which processes say what they are at.

    Returns:
        Whether no run broke down.
    """
    facts = {"machine": machine(bench.device), "torch": torch.__version__, "commit": commit()}
    facts["device"] = bench.device.type
    runs, broken = list(plan.runs()), set()
    while True:
        rows = rows_of(out)
        left = [run for run in runs if run.key not in rows and run not in broken]
        started = waiting = False
        for run in left:
            if time.time() > until:
                return not broken
            with claimed(claims / run.file_name) as mine:
                rows = rows_of(out)
                needed = {need.variant: rows.get(need.key) for need in plan.needs(run)}
                waiting = waiting or not mine
                if not mine or run.key in rows or None in needed.values():
                    continue
                started = True
                row = dict(zip(("task", "variant", "ratio", "seed"), run.key, strict=True))
                row["definition"] = plan.definition(run)
                begun = time.time()
                try:
                    row |= bench.run(run, needed)
                except OcsfastError as error:  # as a ratio that a variant cannot reach, or a loss of NaN
                    row["error"] = f"{type(error).__name__}: {error}"
                except Exception:  # no result: tried again by the next call
                    traceback.print_exc()
                    broken.add(run)
                    continue
                append(out, row | facts)
                told = row.get("error") or f"{row['accuracy']:.2f} % at {row['cost']:.3f} of the cost"
                print(f"{run}: {told}, {time.time() - begun:.0f} s", flush=True)
        if not left or not (started or waiting):
            return not broken
        if not started:
            time.sleep(2)


def require_same(plan: Plan, out: Path) -> None:
    """Refuse results that are of other tasks or variants under the same names.

    Raises:
        ConfigError: a row has another definition than its run in the plan.
    """
    rows = rows_of(out)
    for run in plan.runs():
        found = rows.get(run.key, {}).get("definition", plan.definition(run))
        if found != plan.definition(run):
            raise ConfigError(
                f"{out} has {run} of another definition than the plan's: rename the variant "
                "or the task, or take those rows out"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, help="file of results instead of the plan's own")
    parser.add_argument("--work", type=Path, help="folder for claims and dense runs' weights")
    parser.add_argument("--images", default="", help="CIFAR's: a folder, or a file of bench/images.py")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so long")
    given = parser.parse_args()
    out = given.out or HERE / "results" / f"{given.plan.stem}.jsonl"
    folder = given.work or ROOT / "build/quality" / given.plan.stem
    torch.set_num_threads(1)
    try:
        plan = read(given.plan)
        require_same(plan, out)
        bench = Bench(plan, given.images, folder / "weights", torch.device(given.device))
        bench.require_data()
    except OcsfastError as error:
        parser.error(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * given.minutes
    command = [*sys.argv, "--workers", "1"]
    others = [subprocess.Popen([sys.executable, *command]) for _ in range(given.workers - 1)]
    torch.backends.cudnn.benchmark = True  # all batches have one size
    try:
        right = work(plan, bench, out, folder / "claims", until)
    except KeyboardInterrupt:
        for other in others:
            other.terminate()
        raise
    sys.exit(any([not right, *(other.wait() != 0 for other in others)]))


if __name__ == "__main__":
    main()
