"""The training program: recipes, arguments, and the whole of it from end to end."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ocsfast
from ocsfast.core.errors import CheckpointError, ConfigError, StateError
from ocsfast.train import cli
from ocsfast.train.cli import choose_recipe, main, make_parser
from ocsfast.train.data.catalogue import load
from ocsfast.train.data.source import Request
from ocsfast.train.experiment import load_pretrained
from ocsfast.train.loop import evaluate, in_turns, paired_latency, prepare_dense, preset, train
from ocsfast.train.models import build_model
from ocsfast.train.recipes import Recipe, learning_rate_factor, make_optimizer, make_scheduler, recipe
from ocsfast.train.report.records import EpochRow

# Recipes


def rates(chosen: Recipe, iterations: int) -> list[float]:
    """The learning rate at each of `iterations` steps."""
    optimizer = make_optimizer(chosen, torch.nn.Linear(1, 1))
    scheduler = make_scheduler(chosen, optimizer, iterations)
    seen = []
    for _ in range(iterations):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_paper_cifar() -> None:
    chosen = recipe("paper-cifar", "cifar10", "resnet56")
    assert (chosen.epochs, chosen.batch_size, chosen.weight_decay) == (300, 128, 5e-4)
    seen = rates(chosen, 300)  # one iteration an epoch
    steps = [epoch for epoch in range(1, 300) if seen[epoch] != seen[epoch - 1]]
    assert steps == [90, 180, 240, 270]
    assert [seen[epoch] for epoch in (0, 90, 180, 240, 270)] == pytest.approx(
        [0.1, 0.02, 0.004, 0.0008, 0.00016]
    )


@pytest.mark.parametrize(("arch", "epochs", "lr"), [("resnet50", 130, 0.1), ("mobilenet_v2", 150, 0.05)])
def test_paper_imagenet(arch: str, epochs: int, lr: float) -> None:
    chosen = recipe("paper-imagenet", "folder:x", arch)
    assert (chosen.epochs, chosen.batch_size, chosen.lr) == (epochs, 256, lr)
    assert (chosen.weight_decay, chosen.image_size, chosen.resized_crop) == (4e-5, 224, True)
    seen = rates(chosen, epochs)
    assert seen[0] == lr
    assert seen[epochs // 2] == pytest.approx(lr / 2)
    assert seen == sorted(seen, reverse=True)
    assert learning_rate_factor(chosen, 1.0) == pytest.approx(0)


def test_presets() -> None:
    assert preset(recipe("default", "digits", "digits_resnet")) is None
    assert preset(recipe("paper-cifar", "cifar10", "resnet56")) == ocsfast.Config.paper("cifar")
    assert preset(recipe("paper-imagenet", "folder:x", "resnet50")) == ocsfast.Config.paper("imagenet")
    mobile = preset(recipe("paper-imagenet", "folder:x", "mobilenet_v2"))
    assert mobile == ocsfast.Config.paper("imagenet")
    short = preset(choose(["--recipe", "paper-cifar", "--epochs", "30"]))
    assert short == ocsfast.Config.paper("cifar", sparsify_from=3, deadline=11)


def choose(arguments: list[str]) -> Recipe:
    return choose_recipe(make_parser().parse_args(arguments), "resnet20")


def test_arguments_win_over_the_recipe() -> None:
    given = ["--epochs", "7", "--batch-size", "9", "--lr", "0.3", "--image-size", "48"]
    chosen = choose(["--quick", "--recipe", "paper-cifar", *given])
    assert (chosen.epochs, chosen.batch_size, chosen.lr, chosen.image_size) == (7, 9, 0.3, 48)
    assert chosen.schedule == "multistep"


# Mistakes in the arguments: one line, status 2, nothing trained.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--colour", "red"], "--colour"),
        (["--data", "mnist"], "choose from digits, fashion-mnist, cifar10, cifar100, folder:PATH"),
        (["--arch", "resnet57"], "resnet56"),
        (["--recipe", "mine"], "paper-cifar"),
        (["--epochs", "many"], "--epochs"),
        (["--dense-only", "--prune-only"], "not allowed with"),
    ],
)
def test_argparse_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs is 0"),
        (["--batch-size", "-3"], "batch size is -3"),
        (["--lr", "nan"], "lr is nan"),
        (["--lr", "0"], "lr is 0"),
        (["--subset", "0"], "cannot draw 0"),
        (["--subset", "99999"], "give 1 to 1348"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--data", "cifar10", "--data-root", "/nowhere"], "/nowhere/cifar-10-batches-py"),
        (["--data", "folder:/nowhere"], "/nowhere/train"),
        (["--pretrained", "/nowhere/weights.pt"], "/nowhere/weights.pt"),
        (["--ratio", "0"], "ratio"),
        (["--ratio", "1"], "ratio"),
        (["--ratio", "1.5"], "did you mean 0.5?"),
        (["--ratio", "-0.5"], "ratio"),
        (["--ratio", "nan"], "ratio"),
        (["--ratio", "0.999"], "cannot be reached"),
    ],
)
def test_other_errors(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("ocsfast.train.experiment.in_turns", lambda *_: pytest.fail("it trained"))
    assert main(["--out", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_out_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert main(["--out", str(tmp_path / "file" / "below")]) == 2
    assert capsys.readouterr().err.count("cannot be written") == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_is_read_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert main(["--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--out", str(tmp_path)]) == 2
    assert "pip install ocsfast[train]" in capsys.readouterr().err


def test_the_library_does_not_need_the_training_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('torchvision', 'sklearn', 'matplotlib', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import ocsfast, ocsfast.train.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Pre-trained weights


@pytest.mark.parametrize("kind", ["weights.safetensors", "weights.pt", "wrapped.pt"])
def test_pretrained(tmp_path: Path, kind: str) -> None:
    source, target = build_model("resnet20", 10, 3), build_model("resnet20", 10, 3)
    path = tmp_path / kind
    if kind.endswith(".safetensors"):
        save_file(source.state_dict(), path)
    else:
        state = source.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if kind == "wrapped.pt" else state, path)
    load_pretrained(target, path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("what", ["other model", "garbage", "garbage.safetensors", "code", "a list"])
def test_bad_pretrained(tmp_path: Path, what: str) -> None:
    path = tmp_path / (what if "." in what else f"{what}.pt")
    if what == "other model":
        torch.save(build_model("resnet32", 10, 3).state_dict(), path)
    elif what == "code":
        torch.save({"x": Harmful()}, path)
    elif what == "a list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(b"garbage" * 10)
    model = build_model("resnet20", 10, 3)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError, match="--pretrained"):
        load_pretrained(model, path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Training


def test_dense_training_is_repeatable_and_learns() -> None:
    data = load("digits", Request())
    chosen = Recipe("test", epochs=3, batch_size=64, lr=0.05, weight_decay=0.0)
    runs = {}
    for name in ("first", "second"):
        torch.manual_seed(0)
        run = prepare_dense(build_model("resnet20", 10, 1), data, chosen)
        runs[name] = train(run, data, chosen, seed=0)
    shown: list[EpochRow] = []
    results = list(in_turns(runs, shown.append).values())
    assert [row.epoch for row in shown] == [1, 1, 2, 2, 3, 3]
    assert [row.loss for row in results[0].rows] == [row.loss for row in results[1].rows]
    assert results[0].rows[-1].accuracy > 60
    assert results[0].rows[-1].lr == pytest.approx(0)
    assert results[0].training_seconds > 0


def test_divergence_is_an_error() -> None:
    data = load("digits", Request(subset=64))
    chosen = Recipe("test", epochs=3, batch_size=32, lr=1e20, weight_decay=0.0)
    run = prepare_dense(build_model("resnet20", 10, 1), data, chosen)
    with pytest.raises(StateError, match="lower --lr"):
        next(train(run, data, chosen, seed=0))


def test_latency_is_measured_for_every_model() -> None:
    models = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    assert all(seconds > 0 for seconds in paired_latency(models, torch.zeros(4, 8), rounds=3))


# The whole program

FILES = ["filters.png", "metrics.csv", "model.safetensors", "norms.png", "stability.png", "summary.json"]


def test_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("epoch ") >= 2 * cli.QUICK_EPOCHS
    assert "one-cycle" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES

    summary = json.loads((tmp_path / "summary.json").read_text())
    dense, pruned = summary["dense"], summary["one_cycle"]
    assert summary["ratio"] == 0.5
    assert summary["macs_after"] <= 0.5 * summary["macs_before"]
    assert summary["macs_removed"] >= 0.5
    assert (dense["macs"], pruned["macs"]) == (summary["macs_before"], summary["macs_after"])
    assert pruned["params"] < dense["params"]
    assert 1 <= summary["t_sl"] < summary["t_cut"] < cli.QUICK_EPOCHS
    assert summary["seed"] == 0
    assert summary["versions"]["torch"]
    for run in (dense, pruned):
        for key in ("accuracy", "training_seconds", "latency_ms", "epoch_seconds_before_cut"):
            assert math.isfinite(run[key])
    assert pruned["epoch_seconds_after_cut"] > 0
    assert 0 <= pruned["accuracy_after_cut"] <= 100
    assert all(0 < kept <= size for size, kept in summary["widths"].values())

    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows].count("dense") == cli.QUICK_EPOCHS
    cycle = [row for row in rows if row["run"] == "one-cycle"]
    assert len(cycle) == cli.QUICK_EPOCHS
    assert [row["epoch"] for row in cycle if row["cut"] == "True"] == [str(summary["t_cut"])]
    assert {row["stage"] for row in cycle} == {"observe", "sparsify", "pruned"}
    assert int(cycle[-1]["macs"]) == summary["macs_after"]
    assert all(int(row["macs"]) == summary["macs_before"] for row in cycle[: summary["t_cut"] - 1])
    assert all((tmp_path / name).stat().st_size > 5000 for name in FILES if name.endswith(".png"))

    model = build_model("digits_resnet", 10, 1)
    ocsfast.load(model, tmp_path / "model.safetensors")
    data = load("digits", Request(subset=cli.QUICK_SUBSET))  # by whose mean and deviation it normalises
    assert evaluate(model, data.test, 128) == pytest.approx(pruned["accuracy"])


def test_dense_only_then_prune_only_from_its_weights(tmp_path: Path) -> None:
    small = ["--arch", "resnet20", "--subset", "128", "--batch-size", "64"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--dense-only", "--epochs", "1", "--out", str(first), *small]) == 0
    assert sorted(path.name for path in first.iterdir()) == [FILES[1], FILES[2], FILES[5]]
    weights = ["--pretrained", str(first / "model.safetensors")]
    assert main(["--prune-only", "--epochs", "10", "--out", str(second), *weights, *small]) == 0
    assert sorted(path.name for path in second.iterdir()) == FILES
    summary = json.loads((second / "summary.json").read_text())
    assert "dense" not in summary
    assert summary["macs_removed"] >= 0.5


def test_bad_name_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe.*paper-cifar"):
        recipe("mine", "digits", "resnet20")
