"""Rows of results: a line of JSON each, written as it comes: a run that is cut off keeps its rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def append(path: Path | None, kind: str, **fields: Any) -> None:
    """Print a row, and add it to the file of rows, if there is one."""
    line = json.dumps({"kind": kind, **fields})
    print(line, flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(line + "\n")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def program(description: str | None) -> argparse.ArgumentParser:
    """The options that every program of bench/gpu.sh takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", type=Path, help="file to append each row to, a line of JSON")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: shows that it runs")
    return parser
