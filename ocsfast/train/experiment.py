"""One experiment: the dense and the one-cycle run from the same weights, and the files they leave."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ocsfast
from ocsfast.core.errors import CheckpointError, ConfigError
from ocsfast.train.data.source import Data
from ocsfast.train.loop import (
    Run,
    count_parameters,
    in_turns,
    macs_per_sample,
    paired_latency,
    prepare_dense,
    prepare_one_cycle,
    train,
)
from ocsfast.train.models import build_model
from ocsfast.train.recipes import Recipe
from ocsfast.train.report.figures import save_filters, save_norms, save_stability
from ocsfast.train.report.records import EpochRow, RunResult


@dataclass(frozen=True)
class Experiment:
    """What to train, and where the results go."""

    arch: str
    ratio: float
    recipe: Recipe
    seed: int
    device: torch.device
    out: Path
    runs: Literal["both", "dense", "one-cycle"] = "both"
    pretrained: Path | None = None


def run_experiment(
    experiment: Experiment, data: Data, show: Callable[[EpochRow], None]
) -> dict[str, Any]:
    """Train, measure, and write the results to `experiment.out`.

    Both runs are set up before the first is trained, so that a mistake in either is found at once.

    Args:
        experiment: what to train.
        data: what to train on.
        show: called with the row of each epoch as soon as it is known.

    Returns:
        What summary.json holds.
    """
    runs: list[Run] = []
    if experiment.runs != "one-cycle":
        runs.append(prepare_dense(_new_model(experiment, data), data, experiment.recipe))
    if experiment.runs != "dense":
        model = _new_model(experiment, data)
        runs.append(prepare_one_cycle(model, data, experiment.recipe, experiment.ratio))
    untouched = _new_model(experiment, data)
    macs_before, params_before = macs_per_sample(untouched, data.shape), count_parameters(untouched)

    trainings = {run.name: train(run, data, experiment.recipe, experiment.seed) for run in runs}
    results = in_turns(trainings, show)
    images, _ = next(data.test.batches(experiment.recipe.batch_size))
    latencies = paired_latency([run.model for run in runs], images)

    summary = {
        **_settings(experiment, data),
        "macs_before": macs_before,
        "params_before": params_before,
        **_pruning_summary(results.get("one-cycle"), macs_before),
        "latency_batch": len(images),
        **{
            run.name.replace("-", "_"): _run_summary(results[run.name], latency)
            for run, latency in zip(runs, latencies, strict=True)
        },
        "versions": _versions(),
    }
    _write(experiment.out, summary, results, runs[-1])
    return summary


def make_writable(folder: Path) -> None:
    """Create a folder, and make sure that files can be written into it.

    Raises:
        ConfigError: they cannot be.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror or error}") from error


def _new_model(experiment: Experiment, data: Data) -> nn.Module:
    """The network to train, with the same weights at every call."""
    torch.manual_seed(experiment.seed)
    model = build_model(experiment.arch, len(data.classes), data.shape[0], data.shape[1])
    if experiment.pretrained is not None:
        load_pretrained(model, experiment.pretrained)
    return model.to(experiment.device)


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Load weights from a safetensors file, or from a state dict that `torch.save` wrote.

    Other pickled objects are never loaded, because unpickling them can run code.

    Raises:
        CheckpointError: the file cannot be read, or its weights are of another architecture.
    """
    try:
        state: Any
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"--pretrained {path} cannot be read: {_one_line(error)}") from error
    except Exception as error:  # pickle's errors have no other common base
        raise CheckpointError(
            f"--pretrained {path} is neither safetensors nor a plain state dict: {_one_line(error)}"
        ) from error
    for key in ("state_dict", "model"):  # under which training scripts commonly save it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"--pretrained {path} holds no state dict")
    expected = model.state_dict()
    wrong = [
        name
        for name in {**expected, **state}
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"--pretrained {path} does not fit: {len(wrong)} of {len(expected)} tensors are missing, "
            f"unknown or of another shape, {wrong[0]} the first of them. A network that was pruned "
            "already is read by ocsfast.load"
        )
    model.load_state_dict(state)


def _one_line(error: Exception) -> str:
    """An error's message in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _settings(experiment: Experiment, data: Data) -> dict[str, Any]:
    """The part of the summary that was known before the training."""
    recipe = experiment.recipe
    return {
        "data": data.name,
        "images_train": len(data.train),
        "images_test": len(data.test),
        "shape": list(data.shape),
        "arch": experiment.arch,
        "recipe": asdict(recipe),
        "ratio": experiment.ratio,
        "seed": experiment.seed,
        "device": str(experiment.device),
        "pretrained": str(experiment.pretrained) if experiment.pretrained else None,
    }


def _pruning_summary(result: RunResult | None, macs_before: int) -> dict[str, Any]:
    """The part of the summary that says what the one-cycle run has pruned."""
    if result is None:
        return {}
    return {
        "macs_after": result.macs,
        "macs_removed": 1 - result.macs / macs_before,
        "params_after": result.params,
        "t_sl": result.t_sl,
        "t_cut": result.t_cut,
        "cut_by_deadline": result.cut.forced if result.cut else None,
        "widths": {width.name: [width.size, width.kept] for width in result.widths},
        "stays_dense": list(result.frozen),
    }


def _run_summary(result: RunResult, latency: float) -> dict[str, Any]:
    """What the summary says of one run; `latency` in seconds."""
    cut = result.cut
    return {
        "accuracy": result.rows[-1].accuracy,
        "best_accuracy": max(row.accuracy for row in result.rows),
        "macs": result.macs,
        "params": result.params,
        "training_seconds": result.training_seconds,
        "epoch_seconds_before_cut": result.epoch_seconds(pruned=False),
        "epoch_seconds_after_cut": result.epoch_seconds(pruned=True),
        "step_seconds": sum(row.step_seconds for row in result.rows),
        "set_up_seconds": result.set_up_seconds,
        "latency_ms": 1e3 * latency,
        "accuracy_before_cut": cut.accuracy_before if cut else None,
        "accuracy_after_cut": cut.accuracy_after if cut else None,
    }


def _versions() -> dict[str, Any]:
    """The software and the machine that the results come from."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("ocsfast", "torch", "torchvision", "scikit-learn", "numpy")
    return {
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _write(out: Path, summary: dict[str, Any], results: dict[str, RunResult], last: Run) -> None:
    """Write all files of the folder `out`; the model among them is that of the last run."""
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (out / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(EpochRow)])
        writer.writeheader()
        for result in results.values():
            writer.writerows(asdict(row) for row in result.rows)
    one_cycle = results.get("one-cycle")
    if one_cycle is None:
        save_file(_plain_state(last.model), out / "model.safetensors")
        return
    epochs = len(one_cycle.rows)
    save_stability(one_cycle.checks, one_cycle.t_sl, one_cycle.t_cut, epochs, out / "stability.png")
    save_norms(one_cycle.snapshots, out / "norms.png")
    save_filters(one_cycle.widths, out / "filters.png")
    ocsfast.save(last.model, out / "model.safetensors")


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict as safetensors takes it: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
