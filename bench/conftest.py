"""Options, and the way every row is measured: in turn with its roof and with ocsfast's own call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import records
import torch
from cases import NAMES
from timing import Times, in_turn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--threads", default="1,2", help="numbers of threads, CPU only")
    parser.addoption("--models", default=",".join(NAMES), help="of " + ", ".join(NAMES))
    parser.addoption("--rounds", type=int, default=9, help="calls a row; slow peers get fewer")
    parser.addoption("--rows", type=Path, help="file to append each row to, a line of JSON")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", options.models.split(","), scope="session")
    if "threads" in metafunc.fixturenames:
        counts = [int(n) for n in options.threads.split(",")] if options.device == "cpu" else [0]
        metafunc.parametrize("threads", counts)


# pytest-benchmark prints and saves what was measured here, where it is installed. Its clock is one that
# stands still but for the seconds of each round that is handed to it.
_now = 0.0


def measured_time() -> float:
    return _now


def hand_over(benchmark: Any, group: str, times: Times, info: dict[str, Any]) -> None:
    left = iter(times.seconds)

    def pass_time() -> None:
        global _now
        _now += next(left)

    benchmark.group = group
    benchmark.extra_info.update(info)
    benchmark.pedantic(pass_time, rounds=len(times.seconds))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measured_time))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the times depend on, and no more."""
    cpu = machine_info.get("cpu", {}).get("brand_raw", "")
    machine_info.clear()
    machine_info.update({"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__})
    if config.option.device == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.clear()


@pytest.hookimpl(optionalhook=True)
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


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, device: str, name: str, threads: int, set_threads: None
) -> Callable[..., None]:
    """measure(op, by, call, moved=bytes): times `call` in turn with its roof and with ocsfast's call."""
    options = request.config.option
    plugin = request.config.pluginmanager.hasplugin("benchmark")
    benchmark = request.getfixturevalue("benchmark") if plugin else None

    def run(
        op: str,
        by: str,
        call: Callable[[], object],
        *,
        moved: int = 0,
        roof: Callable[[], object] | None = None,
        ours: Callable[[], object] | None = None,
        slow: bool = False,
        waits: bool = False,
    ) -> None:
        calls = {"roof": roof, "ours": None if by == "ocsfast" else ours, "this": call}
        rounds = min(2, options.rounds) if slow and device == "cpu" else options.rounds
        given = {name: call for name, call in calls.items() if call is not None}
        times = in_turn(given, device, rounds, warm=not slow, waits=waits)
        this, (model, _, dtype) = times["this"], name.partition(":")
        info = {
            "model": model,
            "dtype": dtype or "float32",
            "op": op,
            "by": by,
            "threads": threads,
            "device": records.device_name(device),
            "bytes": moved,
            "roof": times["roof"].median if roof else None,
            "ours": times["ours"].median if "ours" in times else None,
        }
        if device == "cuda":
            cache = torch.cuda.get_device_properties().L2_cache_size
            info["host"] = sorted(this.host)[len(this.host) // 2]
            info |= {"batch": this.batch, "queued": this.queued, "fits_l2": 0 < moved <= cache}
        if benchmark is not None:
            group = f"{name}, {op}, {threads} threads" if threads else f"{name}, {op}"
            hand_over(benchmark, group, this, info)
        if options.rows is not None:
            records.append(options.rows, "time", **info, **this.stats())

    return run
