"""Options, and the way every row is measured: in turn with its roof."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import NAMES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--threads", default="1,2", help="numbers of threads, CPU only")
    parser.addoption("--models", default=",".join(NAMES), help="of " + ", ".join(NAMES))
    parser.addoption("--rounds", type=int, default=9, help="calls a row; slow peers get fewer")
    parser.addoption(
        "--rows", type=Path, help="a file to append each row to as it comes, a line of JSON"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", options.models.split(","), scope="session")
    if "threads" in metafunc.fixturenames:
        counts = [int(n) for n in options.threads.split(",")] if options.device == "cpu" else [0]
        metafunc.parametrize("threads", counts)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {}).get("brand_raw", "")
    machine_info.clear()
    machine_info.update(machine(config, cpu))


def machine(config: pytest.Config, cpu: str) -> dict[str, Any]:
    """What the times depend on, and no more."""
    facts = {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__}
    if config.option.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Without each single time: the file is kept."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.option.device)


@pytest.fixture
def set_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def synchronized(call: Callable[[], object], device: str) -> Callable[[], None]:
    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.fixture
def measure(
    request: pytest.FixtureRequest,
    benchmark: Any,
    device: str,
    name: str,
    threads: int,
    set_threads: None,
) -> Callable[..., None]:
    """measure(op, by, call, bytes=, roof=, slow=): times `call` and, before each time, its roof."""

    def run(
        op: str,
        by: str,
        call: Callable[[], object],
        *,
        moved: int = 0,
        roof: Callable[[], object] | None = None,
        slow: bool = False,
    ) -> None:
        timed, roofs = synchronized(call, device), []
        limit = synchronized(roof, device) if roof else None

        def setup() -> None:
            if limit is not None:
                begun = time.perf_counter()
                limit()
                roofs.append(time.perf_counter() - begun)

        rounds = 2 if slow else request.config.option.rounds
        benchmark.pedantic(timed, setup=setup, rounds=rounds, warmup_rounds=0 if slow else 1)
        benchmark.group = f"{name}, {op}, {threads} threads" if threads else f"{name}, {op}"
        benchmark.extra_info.update(
            model=name,
            op=op,
            by=by,
            threads=threads,
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            bytes=moved,
            roof=statistics.median(roofs) if roofs else None,
        )
        if request.config.option.rows:
            row = {
                "machine_info": machine(request.config, platform.processor() or platform.machine()),
                "extra_info": dict(benchmark.extra_info),
                "stats": {
                    name: getattr(benchmark.stats.stats, name)
                    for name in ("min", "median", "max", "rounds")
                },
            }
            with request.config.option.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return run
